"""The dataset's page and metrics: what they say of every standing, and that nothing from a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.bench_status import make_finished_subject
from pipeline.config import preset_config
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.dataset_page import write_dataset_page
from pipeline.prometheus import prometheus_text
from pipeline.stage import inspect_stages, work_folder
from pipeline.summary import StageSummary, Summary
from stages import STAGES

HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }}\n</td>\x1b[31m"


class Page(HTMLParser):
    """Tags with their attributes, and the text of each row of the table."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data: str) -> None:
        if self.rows and data.strip():
            self.rows[-1] += " ".join(data.split()) + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """`anna` is finished, `bert` has failed, `cleo`'s settings cannot be read, `dora` is stale and poor."""
    dataset = Dataset(tmp_path)
    for name in ("anna", "bert", "cleo", "dora"):
        make_finished_subject(dataset.subject(name), STAGES, frames=2)
    dataset.subject("anna").report.write_text("a report")
    failed = dataset.subject("bert")
    shutil.rmtree(failed.stage("fit"))
    state = inspect_stages(failed, STAGES, preset_config("quick"), verify=False)[3]
    work = work_folder(failed, STAGES[3], str(state.key))
    work.mkdir()
    record = {"what": f"No face: {HOSTILE}.", "fix": f"film again {HOSTILE}", "at": "2026-01-02T00:00:00+00:00"}
    write_json(work / "failure.json", record)
    (dataset.subject("cleo").root / "run.json").write_text("{")
    edit(dataset.subject("dora"), "fit", key="old", version=HOSTILE)
    edit(dataset.subject("dora"), "matte", verdict={"level": "poor", "text": HOSTILE, "picture": HOSTILE})
    return dataset


def edit(subject: Subject, stage: str, **changes: Any) -> None:
    path = subject.stage(stage) / "stage.json"
    write_json(path, json.loads(path.read_bytes()) | changes)


def evaluated_psnr(dataset: Dataset) -> float:
    manifest = json.loads((dataset.subject("anna").stage("evaluate") / "stage.json").read_bytes())
    return float(manifest["metrics"]["test"]["psnr"])


def page_of(dataset: Dataset) -> tuple[Page, str]:
    path = write_dataset_page(dataset, STAGES)
    assert path == dataset.root / "index.html"
    source = path.read_text()
    return Page(source), source


def test_a_row_for_each_subject_the_most_urgent_first(dataset: Dataset) -> None:
    page, _ = page_of(dataset)
    bert, cleo, dora, anna = page.rows[1:]
    assert bert.startswith("bert fit: No face: ")
    assert "What to do: film again" in bert
    assert f"headcast rerun bert --data {dataset.root}" in bert
    assert "failed 2026-01-02 00:00 UTC" in bert
    assert "run.json' cannot be read as this version's settings" in cleo and "headcast rerun" not in cleo
    assert "fit: the stage's code is version" in dora and " stale poor " in dora
    psnr = json.loads((dataset.subject("anna").stage("evaluate") / "stage.json").read_bytes())["metrics"]["test"][
        "psnr"
    ]
    assert f"{psnr:.1f} +3.0 rigged quick 2026-01-01 00:06 UTC" in anna
    assert [row.get("data-standing") for row in page.all("tr")[1:]] == ["failed", "unreadable", "stale", "fresh"]


def test_it_opens_offline_and_moves_with_the_dataset(dataset: Dataset) -> None:
    page, source = page_of(dataset)
    assert [image["src"] for image in page.all("img")] == [f"{n}/export/neutral.jpg" for n in ("bert", "dora", "anna")]
    assert all(image["loading"] == "lazy" for image in page.all("img"))
    assert [link["href"] for link in page.all("a")] == ["anna/report.html"]
    assert not page.all("link") and not page.all("iframe")
    assert not re.search(r"\bhttps?://|url\(|@import", source)


def test_nothing_from_files_becomes_markup_and_only_its_own_script_runs(dataset: Dataset) -> None:
    page, source = page_of(dataset)
    assert len(page.all("script")) == source.count("<script") == 1
    script = re.search(r"<script>(.*)</script>", source, re.DOTALL)
    assert script is not None and "alert" not in script[1]
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in str(
        policy
    )
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7 * 7 }}" in page.rows[1], "it is shown as it was written"


def test_a_thousand_subjects_make_a_page_of_a_few_megabytes(dataset: Dataset) -> None:
    one, two = Dataset(dataset.root / "one"), Dataset(dataset.root / "two")
    for at, names in ((one, ["anna"]), (two, ["anna", "bert"])):
        for name in names:
            make_finished_subject(at.subject(name), STAGES, frames=1)
    row = len(page_of(two)[1]) - len(page_of(one)[1])
    assert 200 < row < 2500


def test_a_dataset_without_subjects_says_how_to_begin(tmp_path: Path) -> None:
    assert "headcast run VIDEO" in page_of(Dataset(tmp_path))[1]
    assert "headcast_subjects{" in (tmp_path / "metrics.prom").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to run the page in")
def test_rows_are_sorted_and_filtered_in_a_browser(dataset: Dataset, tmp_path: Path) -> None:
    _, source = page_of(dataset)
    policy = re.compile(r"<meta http-equiv.*?>")
    trial = """<script>
    const seen = () => rows.filter((row) => !row.hidden).map((row) => row.cells[1].dataset.value).join(" ");
    const press = (number) => document.querySelectorAll("th button")[number].click();
    const told = [];
    press(0); told.push(seen()); press(0); told.push(seen()); press(3); told.push(seen());
    search.value = "NO FACE"; filter(); told.push(seen());
    search.value = ""; chips.find((chip) => chip.value === "stale").click(); told.push(seen());
    document.title = told.join(";");
    </script>"""
    (tmp_path / "trial.html").write_text(policy.sub("", source).replace("</body>", trial + "</body>"))
    whole = dom(tmp_path, tmp_path / "index.html")
    assert re.search(r"<time [^>]*>just now</time>", whole), "the policy lets the page's own script run"
    title = re.search(r"<title>(.*)</title>", dom(tmp_path, tmp_path / "trial.html"))
    assert title is not None
    by_name, by_name_down, by_psnr, found, stale = title[1].split(";")
    assert by_name == "anna bert cleo dora" and by_name_down == "dora cleo bert anna"
    assert by_psnr.endswith("cleo"), "what has no figure comes last"
    assert (found, stale) == ("bert", "dora")


def dom(home: Path, page: Path) -> str:
    """The page as a browser has it after its scripts."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={home / 'browser'}", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, page.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout


def samples(text: str) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            assert sample.timestamp is None, "the textfile collector refuses time stamps"
            found[(sample.name.removeprefix("headcast_"), *sample.labels.values())] = sample.value
    return found


def test_prometheus_reads_the_metrics(dataset: Dataset) -> None:
    write_dataset_page(dataset, STAGES)
    found = samples((dataset.root / "metrics.prom").read_text())
    states = {key[1]: value for key, value in found.items() if key[0] == "subjects"}
    assert states == {
        **{"fresh": 1, "failed": 1, "unreadable": 1, "stale": 1},
        **{"missing": 0, "partial": 0, "running": 0},
    }
    assert found["stage_seconds", "train"] == 90
    assert found["stages", "fit", "failed"] == 1
    assert found["verdicts", "poor"] == 1
    assert found["subject_psnr_db", "anna"] == evaluated_psnr(dataset)
    assert found["subject_finished_timestamp_seconds", "anna"] == 1_767_225_990
    assert found["subject_failed_timestamp_seconds", "bert"] == 1_767_312_000
    assert ("subject_failed_timestamp_seconds", "anna") not in found and ("subject_psnr_db", "cleo") not in found


def test_names_are_escaped_for_prometheus() -> None:
    name = 'a "b"\\n\n\\ {x="y"} 1\n# TYPE evil counter'
    told = [Summary(name, "fresh", stages=(StageSummary(name, "fresh", bytes=7),))]
    found = samples(prometheus_text(told))
    assert found["subject_bytes", name] == 7
    assert found["stage_bytes", name] == 7
