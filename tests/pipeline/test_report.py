"""report.html: its structure for whole, partial and failed runs, and that nothing from a file becomes markup."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config, override, preset_config
from pipeline.dataset import Subject
from pipeline.errors import StageError
from pipeline.frames import save_image, shown_file
from pipeline.report import build_report, bytes_text, figure_text, lead_text, seconds_text
from pipeline.stage import Result, Stage, StageRun, Verdict, run_stage

HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"
ORDER = {
    "decode": (),
    "track": ("decode",),
    "matte": ("decode", "track"),
    "fit": ("decode", "track"),
    "train": ("decode", "matte", "fit"),
    "evaluate": ("decode", "matte", "fit", "train"),
    "export": ("train",),
}
METRICS = {
    "schema": 1,
    "subject": "ada",
    "resolution": [256, 256],
    "split": {"train": [0, 194], "test": [195, 215]},
    "counts": {"train": 195, "train_usable": 190, "test": 21, "test_usable": 20},
    "test": {
        **{"psnr": 33.41, "psnr_subject": 29.02, "psnr_head": 30.5, "psnr_torso": 27.5, "ssim": 0.951, "ms_ssim": None},
        **{"l1": 0.0091, "flip": 0.061, "lpips": None},
    },
    "ms_ssim_reason": "it needs sides of at least 161 px",
    "lpips_reason": f"no weights {HOSTILE}",
    "train": {"psnr": 36.2},
    "baselines": {
        "nearest_train_frame": {"psnr": 34.4, "psnr_subject": 30.0, "psnr_head": None},
        "nearest_by_parameters": {"psnr": 32.0, "psnr_subject": 28.0, "psnr_head": 29.1, "psnr_torso": 25.0},
        "mean_frame": {"psnr": 31.9, "psnr_subject": 27.0, "psnr_head": 27.7, "psnr_torso": 26.0},
    },
    "avatar": {"model": "rigged", "gaussians": 10000, "bytes": 2_400_000},
    "speed": {"render_fps": 212.4, "train_seconds": 41.5, "train_steps": 1500},
    "error_share_partial_alpha": 0.42,
    "error_parts": {
        "outline": {"error": 0.42, "area": 0.05},
        "face": {"error": 0.5, "area": 0.3},
        "background": {"error": 0.08, "area": 0.65},
        HOSTILE: {"error": 0.1, "area": 0.1},
    },
    "shown": [
        {"frame": 197, "kind": "worst"},
        {"frame": 196, "kind": "typical"},
        {"frame": 999, "kind": "worst"},
        {"frame": 198, "kind": HOSTILE},
    ],
    "per_frame": {
        "frame": [195, 196, 197, 198],
        "psnr": [34.0, 33.5, 31.0, 35.0],
        "psnr_head": [31.0, None, 28.0, 32.0],
        "baselines": {"nearest_train_frame": {"frame": [194, 194, 190, 3], "psnr": [35.0, 34.0, 33.0, 33.0]}},
    },
}
LOG = [
    {"step": 100, "loss": 0.02, "psnr_train": 28.0, "psnr_val": 27.0},
    {"step": 200, "loss": 0.01, "psnr_train": 33.0, "psnr_val": None},
]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def headings(self) -> list[str]:
        """The ids of the sections, in order."""
        return [str(attributes["id"]) for attributes in self.all("section")]


def picture(path: Path) -> None:
    save_image(path, np.tile(np.arange(0, 256, 2, dtype=np.uint8)[:, None, None], (1, 1600, 3)))


def write_fit(path: Path) -> None:
    """A head that turns left more and more, and a jaw that opens only where training does not see it."""
    count = 216
    rng = np.random.default_rng(0)
    expression = rng.uniform(0, 0.3, (count, 3))
    expression[195:, 0] = 0.9
    yaw = np.radians(np.linspace(0, 43, count))
    poses = np.tile(np.diag([1.0, -1, -1, 1]), (count, 1, 1))
    poses[:, 0, 2], poses[:, 2, 2] = np.sin(yaw), -np.cos(yaw)
    np.savez(
        path,
        expression=expression,
        expression_names=np.array(["jawOpen", "eyeBlinkLeft", "mouthSmileLeft"]),
        Ts_cam_head=poses,
        eyes=rng.normal(0, 0.05, (count, 2, 3)),
        usable=np.ones(count, bool),
    )


def work_of(name: str) -> Callable[[StageRun], Result]:
    """A stage's function that writes what the page reads."""

    def run(run: StageRun) -> Result:
        picture(run.work / "picture.jpg")
        if name == "evaluate":
            (run.work / "metrics.json").write_text(json.dumps(METRICS))
            picture(run.work / "mean_error.jpg")
            (run.work / "shown").mkdir()
            for frame in (196, 197, 198):
                picture(run.work / shown_file(frame))
            (run.work / "comparison.mp4").write_bytes(b"video")
        if name == "train":
            (run.work / "log.json").write_text(json.dumps(LOG))
        if name == "fit":
            picture(run.work / "neutral.jpg")
            picture(run.work / "curves.png")
            (run.work / "overlay.mp4").write_bytes(b"video")
            write_fit(run.work / "fit.npz")
        metrics = {}
        if name == "export":
            picture(run.work / "novel_views.jpg")
            metrics = {"seen_from": {"yaw": [-3.0, 4.0], "pitch": [0.0, 2.0], "text": f"Seen from {HOSTILE}"}}
        (run.work / "frames").mkdir(exist_ok=True)
        (run.work / "frames/000000.bin").write_bytes(b"x" * 1000)
        return Result(Verdict("good", f"{name.capitalize()}: good. Said {HOSTILE} in {name}.", "picture.jpg"), metrics)

    return run


def fail(run: StageRun) -> Result:
    raise StageError(f"The fit did not hold: {HOSTILE}.", f"film again {HOSTILE}")


def stages(**instead: Callable[[StageRun], Result]) -> list[Stage]:
    return [
        Stage(name, 1, inputs, instead.get(name) or work_of(name), description=f"what {name} does")
        for name, inputs in ORDER.items()
    ]


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    subject = Subject(tmp_path / "ada")
    subject.source.mkdir(parents=True)
    clip = {"name": HOSTILE, "file": "ada.mp4", "sha256": "0" * 64, "size": 1_500_000}
    record = {"schema": 2, "clips": [clip, {**clip, "name": "second.mov"}]}
    (subject.source / "source.json").write_text(json.dumps(record))
    return subject


def bring_up_to(subject: Subject, table: list[Stage], last: str, config: Config) -> None:
    with subject.lock():
        for stage in table:
            run_stage(subject, stage, table, config)
            if stage.name == last:
                return


def page_of(subject: Subject, table: list[Stage], config: Config) -> tuple[Page, str]:
    path = build_report(subject, table, config)
    assert path == subject.root / "report.html"
    source = path.read_text()
    return Page(source), source


@pytest.fixture
def config() -> Config:
    return override(preset_config("quick"), ["train.steps=700"])


@pytest.fixture
def whole(subject: Subject, config: Config) -> tuple[Page, str]:
    table = stages()
    bring_up_to(subject, table, "export", config)
    return page_of(subject, table, config)


def test_a_whole_run_has_every_section(whole: tuple[Page, str]) -> None:
    page, _ = whole
    expected = ["limits", "comparison", "held-out", "training", "coverage", "novel-views", "fit", "advice"]
    assert page.headings() == [*expected, "stages", "timings", "settings", "next"]
    assert any(text.startswith("headcast view ada --data ") for text in page.texts)
    assert [a["id"] for a in page.all("article")] == [f"stage-{name}" for name in ORDER]
    assert len(page.all("video")) == 2, "the comparison, and the fitted head over the clip"
    others = "two held-out frames, the mean error, the fit's curves, the neutral head and novel views"
    assert len(page.all("img")) == len(ORDER) + 6, f"a picture for every stage, {others}"
    assert all(attributes.get("alt") for attributes in page.all("img"))
    charts = [str(attributes["aria-label"]) for attributes in page.all("svg")]
    assert [label.partition(".")[0].partition(":")[0] for label in charts] == [
        *("PSNR of every held-out frame", "PSNR by training step", "Loss by training step"),
        *("Where the head turned", "Where the eyes turned in the head"),
        *("Mouth", "Eyes", "Jaw, brows, cheeks and nose"),
    ]


def test_it_says_what_limited_quality_and_what_was_never_shown(whole: tuple[Page, str]) -> None:
    page, _ = whole
    text = " ".join(page.texts)
    assert (
        "42% of the squared error on held-out frames lies in the half-transparent outline, 5% of the picture." in text
    )
    assert "never opened the mouth beyond 0.30 of 1" in text and "never turned right" in text
    assert re.search(r"One of the worst: frame 197, 31\.0 dB\. Nearest training frame: \d+, \d\.\d times as far", text)
    assert "Not seen in training: jawOpen 0.90 (training: up to 0.30)." in text
    assert "Frame 198" not in text and "999" not in text
    assert "Half-transparent outline 42 % 5 %" in text


def test_a_report_of_an_older_evaluation_has_what_its_files_tell(subject: Subject, config: Config) -> None:
    table = stages()
    bring_up_to(subject, table, "export", config)
    older = {name: value for name, value in METRICS.items() if name not in ("error_parts", "shown", "per_frame")}
    folder = subject.stage("evaluate")
    (folder / "metrics.json").write_text(json.dumps(older))
    (folder / "mean_error.jpg").unlink()
    page, _ = page_of(subject, table, config)
    assert "held-out" not in page.headings() and "training" in page.headings()
    assert "42% of the squared error on held-out frames" in " ".join(page.texts)
    (subject.stage("train") / "log.json").write_text('[{"step": "x", "loss": null}, 3]')
    (subject.stage("fit") / "fit.npz").write_bytes(b"PK")
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "per_frame": {"frame": 3}, "shown": {}}))
    page, _ = page_of(subject, table, config)
    assert not {"training", "coverage"} & set(page.headings())


def test_exports_are_listed_with_their_size(subject: Subject, config: Config) -> None:
    folder = subject.root / "exported" / "ply"
    folder.mkdir(parents=True)
    (folder / "avatar.ply").write_bytes(b"x" * 2500)
    (folder / "account.json").write_text("{}")
    (subject.root / "exported" / "stray").mkdir()
    table = stages()
    bring_up_to(subject, table, "export", config)
    page, _ = page_of(subject, table, config)
    assert "Export ply exported/ply/ 2 kB" in " ".join(page.texts) and "stray" not in " ".join(page.texts)


def test_the_comparison_names_split_baselines_and_reasons(whole: tuple[Page, str]) -> None:
    page, _ = whole
    text = " ".join(page.texts)
    assert "Test: frames 195 to 215, 20 of 21 usable." in text
    assert "Training: frames 0 to 194, 190 of 195 usable" in text
    cells = re.search(r"This avatar (.*?) Test:", text)
    assert cells is not None
    assert cells[1] == (
        "33.4 29.0 30.5 27.5 "
        "Best training frame picked by looking at the answer 34.4 avatar −1.0 30.0 avatar −1.0 – – "
        "Nearest training frame by expression and pose 32.0 avatar +1.4 28.0 avatar +1.0 29.1 avatar +1.4 "
        "25.0 avatar +2.5 "
        "Mean training frame 31.9 avatar +1.5 27.0 avatar +2.0 27.7 avatar +2.8 26.0 avatar +1.5"
    )
    assert "No MS-SSIM: it needs sides of at least 161 px" in text
    assert "700 instead of 2000" in text
    assert "people who agreed" in text


def test_it_opens_offline_and_runs_nothing(whole: tuple[Page, str]) -> None:
    page, source = whole
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'")
    sources = [a["src"] for tag in ("img", "video") for a in page.all(tag)]
    assert all(str(uri).startswith("data:") for uri in sources)
    assert not page.all("link") and not page.all("script") and not page.all("iframe")
    assert not re.search(r"\bhttps?://|url\(|@import", source)
    assert all(not str(a["href"]).startswith(("/", "http", "javascript")) for a in page.all("a"))


def test_nothing_from_files_becomes_markup(whole: tuple[Page, str]) -> None:
    page, source = whole
    assert "<script" not in source
    assert "49" not in re.findall(r"&amp;(\d+)", source)
    text = " ".join(page.texts)
    assert text.count(" ".join(HOSTILE.split())) >= len(ORDER) + 2, "it is shown as it was written"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_pictures_are_made_fit_for_a_page(whole: tuple[Page, str]) -> None:
    import base64

    import cv2

    page, _ = whole
    uri = str(page.all("img")[-1]["src"])
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    assert np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)).shape[1] == 1280


def test_a_picture_outside_the_stage_is_not_shown(subject: Subject, config: Config) -> None:
    picture(subject.root / "secret.jpg")

    def sly(run: StageRun) -> Result:
        (run.work / "note.txt").write_text("not a picture")
        return Result(Verdict("good", "Decoding: good.", "../secret.jpg"))

    table = stages(decode=sly)
    bring_up_to(subject, table, "decode", config)
    page, _ = page_of(subject, table, config)
    assert not page.all("img")


def test_a_failed_run_says_what_and_what_to_do(subject: Subject, config: Config) -> None:
    table = stages(fit=fail)
    with pytest.raises(StageError):
        bring_up_to(subject, table, "export", config)
    page, _ = page_of(subject, table, config)
    text = " ".join(page.texts)
    assert page.headings() == ["advice", "stages", "timings", "settings"]
    assert "Stopped at fit. The fit did not hold" in text
    assert "What to do: film again" in text
    assert text.count("Not run yet.") == 3
    assert not page.all("script")


def test_a_run_cut_short_names_the_command_that_goes_on(subject: Subject, config: Config) -> None:
    table = stages()
    bring_up_to(subject, table, "matte", config)
    text = " ".join(page_of(subject, table, config)[0].texts)
    assert "Finished as far as matte; go on with: headcast rerun ada --from fit" in text


def test_a_subject_without_any_stage_has_a_report(subject: Subject, config: Config) -> None:
    page, _ = page_of(subject, stages(), config)
    assert page.headings() == ["stages", "settings"]
    assert "Nothing is finished yet" in " ".join(page.texts)


def test_files_of_other_settings_are_marked(subject: Subject, config: Config) -> None:
    table = stages()
    bring_up_to(subject, table, "export", config)
    text = " ".join(page_of(subject, table, override(config, ["train.steps=900"]))[0].texts)
    assert "Of an earlier run: train.steps changed from 700 to 900." in text


def test_damaged_figures_leave_the_rest_of_the_page(subject: Subject, config: Config) -> None:
    table = stages()
    bring_up_to(subject, table, "export", config)
    for damage in (b"{", b"[]", b'{"schema": 1, "test": 3}', b'{"schema": 99}'):
        (subject.stage("evaluate") / "metrics.json").write_bytes(damage)
        page, _ = page_of(subject, table, config)
        assert "comparison" not in page.headings() and "stages" in page.headings()


def test_a_large_video_gives_way_to_a_picture(
    subject: Subject, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.VIDEO_LIMIT_BYTES", 4)
    table = stages()
    bring_up_to(subject, table, "evaluate", config)
    picture(subject.stage("evaluate") / "comparison.jpg")
    page, _ = page_of(subject, table, config)
    assert not page.all("video")
    assert page.all("img")[0]["alt"] == "Truth, render and error side by side"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(812), "812 B"),
        (bytes_text(35_400), "35 kB"),
        (bytes_text(2_400_000), "2.4 MB"),
        (bytes_text(3.2e9), "3.2 GB"),
        (seconds_text(None), "–"),
        (seconds_text(0.42), "0.4 s"),
        (seconds_text(48.2), "48 s"),
        (seconds_text(200), "3 min 20 s"),
        (seconds_text(7500), "2 h 05 min"),
        (figure_text(None), "–"),
        (figure_text(33.456), "33.5"),
        (figure_text(0.9512, 3), "0.951"),
        (lead_text(-0.62), "−0.6"),
        (lead_text(0.04), "0.0"),
    ],
)
def test_figures_read_well(text: str, expected: str) -> None:
    assert text == expected


def test_the_old_report_stays_when_a_new_one_cannot_be_made(
    subject: Subject, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_report(subject, stages(), config)
    before = subject.report.read_bytes()

    def broken(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        build_report(subject, stages(), config)
    assert subject.report.read_bytes() == before
