"""Comparisons: true figures in a common crop and resolution, a page that escapes, and runs that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import avatar_data
import cv2
import numpy as np
import pytest
from reenact_data import change_fit, finish, write_dataset

from pipeline.avatar_table import table_lines
from pipeline.avatars import load_avatar, save_avatar
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.cli.compare import Compare
from pipeline.clip import load_clip, load_crops
from pipeline.compare import check_compare, common_crop, compare, markdown
from pipeline.compare_page import write_page
from pipeline.config import TrainConfig
from pipeline.dataset import Subject, write_json
from pipeline.errors import HeadcastError, UserError
from pipeline.evaluation import ClipRenderer
from pipeline.evaluation_figures import titled
from pipeline.metrics import psnr

HOSTILE = "<script>alert('x')</script>|\"'&{{ 7 * 7 }}$_"
HELD_OUT = list(range(14, 24))


def add_run(root: Path, name: str, gaussians: int, resolution: int) -> Subject:
    """A copy of anna with another avatar."""
    shutil.copytree(root / "anna", root / name, ignore=shutil.ignore_patterns("compare"))
    subject = Subject(root / name)
    avatar = RiggedAvatar.start(avatar_data.training_data(), TrainConfig(gaussians=gaussians), np.random.default_rng(1))
    save_avatar(avatar, subject.stage("train"), {"resolution": resolution, "steps": 0, "frames": 14})
    finish(subject, "train", name)
    change_manifest(subject, "train", config={"gaussians": gaussians}, metrics={"train_seconds": 7.0, "steps": 3})
    return subject


def change_manifest(subject: Subject, stage: str, **fields: Any) -> None:
    path = subject.stage(stage) / "stage.json"
    write_json(path, json.loads(path.read_text()) | fields)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    finish(write_dataset(root).existing("anna"), "matte")
    add_run(root, "anna-few", 200, 32)
    return root


@pytest.fixture
def data(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "data"))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_runs_of_different_resolutions_are_measured_on_the_same_pixels(data: Path) -> None:
    plan = check_compare(data, ["anna", "anna-few"])
    document = compare(plan)
    folder = data / "anna" / "compare" / "anna-vs-anna-few"
    assert document == json.loads((folder / "compare.json").read_text())
    assert (document["resolution"], document["per_frame"]["frame"]) == ([32, 32], HELD_OUT)
    truth = load_crops(load_clip(Subject(data / "anna"), 32), HELD_OUT).images / 255
    clip = load_clip(Subject(data / "anna"), 64)
    renderer = ClipRenderer.of(load_avatar(data / "anna" / "train"), clip, 1)
    reduced = [cv2.resize(renderer.render(frame).image, (32, 32), interpolation=cv2.INTER_AREA) for frame in HELD_OUT]
    scores = [psnr(*pair) for pair in zip(truth, reduced, strict=True)]
    anna, few = document["runs"]
    assert document["per_frame"]["runs"]["anna"]["psnr"] == pytest.approx(scores, abs=1e-4)
    assert anna["test"]["psnr"] == pytest.approx(np.mean(scores), abs=1e-4)
    best = document["baselines"]["nearest_train_frame"]["psnr"]
    assert few["gain"]["psnr"] == pytest.approx(few["test"]["psnr"] - best, abs=1e-3)
    assert (few["avatar"]["gaussians"], few["speed"]["train_seconds"]) == (200, 7.0)
    assert document["settings"]["train.gaussians"] == [10000, 200]
    assert any("anna 64 px, anna-few 32 px" in note for note in document["notes"])
    assert f"{anna['test']['psnr']:.1f} dB" in document["verdict"] and document["verdict"].startswith("anna ")
    with av.open(str(folder / "compare.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert (len(frames), frames[0].shape[1]) == (len(HELD_OUT), 3 * 256)

    page = (folder / "compare.html").read_text()
    assert not re.search(r"<script|https?://|@import", page)
    assert all(str(attributes.get("src", "data:")).startswith("data:") for _, attributes in Page(page).tags)
    assert document["verdict"] in Page(page).text

    stamp = (folder / "compare.html").stat().st_mtime_ns
    _, text, code = Compare(data=data, runs=("anna", "anna-few"), markdown=True).answer()
    assert (folder / "compare.html").stat().st_mtime_ns == stamp, "it is fresh"
    assert (text, code) == (markdown(document), 0)
    assert len({line.count("|") for line in text.splitlines()}) == 1 and "| anna-few |" in text


def test_equal_avatars_in_other_crops_cannot_be_told_apart(data: Path) -> None:
    add_run(data, "twin", 1500, 64)
    shutil.copy(data / "anna/train/avatar.safetensors", data / "twin/train/avatar.safetensors")
    plan = check_compare(data, ["anna", str(data / "twin")])
    assert compare(plan)["beside_best"]["twin"]["psnr"]["mean"] == 0
    change_fit(Subject(data / "twin"), crops=np.tile([6.0, 4, 50], (24, 1)))
    finish(Subject(data / "twin"), "fit", "recropped")
    finish(Subject(data / "twin"), "train", "recropped")
    document = compare(check_compare(data, ["twin", "anna"]))
    assert document["crops"] == [[6, 4, 50]]
    beside = next(iter(document["beside_best"].values()))["psnr"]
    assert abs(beside["mean"]) < 1e-3, "one camera, though each had another crop"
    assert "cannot be told apart" in document["verdict"]
    assert any(note.startswith("anna: trained on another crop") for note in document["notes"])


def test_names_stay_text_wherever_they_are_shown(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = compare(check_compare(data, ["anna", "anna-few"]))
    folder = data / "anna" / "compare" / "anna-vs-anna-few"
    shown = json.loads(json.dumps(document).replace("anna-few", json.dumps(HOSTILE)[1:-1]))
    write_page(folder, shown, {next(folder.glob("frame-*.jpg")).name: HOSTILE})
    source = (folder / "compare.html").read_text()
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.tags} and HOSTILE in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "video" in {tag for tag, _ in page.tags}
    monkeypatch.setattr("pipeline.compare_page.VIDEO_LIMIT_BYTES", 4)
    write_page(folder, shown, {next(folder.glob("frame-*.jpg")).name: HOSTILE})
    large = Page((folder / "compare.html").read_text())
    assert "video" not in {tag for tag, _ in large.tags} and ("a", {"href": "compare.mp4"}) in large.tags
    lines = table_lines(HOSTILE, shown["runs"], shown["baselines"])
    assert "<script" not in "".join(lines) and len({line.count("|") for line in lines}) == 1
    image = np.zeros((64, 64, 3), np.uint8)
    assert titled({f"{HOSTILE}\n{HOSTILE * 9}, 31.2 dB": image, "b": image}).shape[1] == 512


def refused(data: Path, *given: str, **how: Any) -> str:
    with pytest.raises(HeadcastError) as caught:
        compare(check_compare(data, given, **how))
    assert caught.value.fix
    return str(caught.value)


def test_runs_that_do_not_fit_are_named_with_the_reason(data: Path, tmp_path: Path) -> None:
    few = Subject(data / "anna-few")
    assert "two runs at least" in refused(data, "anna")
    assert "two runs at least" in refused(data)
    assert "is named twice" in refused(data, "anna", str(data / "anna"))
    assert "No subject 'nobody'" in refused(data, "anna", "nobody")
    assert "no subject of a dataset" in refused(data, "anna", f"../{HOSTILE}")
    assert "'bert' has no trained avatar" in refused(data, "anna", "bert")
    assert "too many" in refused(data, *[str(add_run(data, f"r{i}", 20, 32).root) for i in range(7)])

    for stage, fields, reason in (
        ("decode", {"inputs": {"source": "another"}}, "'anna-few' was made from another clip"),
        ("train", {"config": {"evaluate.holdout": 0.6}}, "was not trained on frames 10-23"),
    ):
        kept = (few.stage(stage) / "stage.json").read_bytes()
        change_manifest(few, stage, **fields)
        assert reason in refused(data, "anna", "anna-few")
        (few.stage(stage) / "stage.json").write_bytes(kept)
    listing = few.stage("decode") / "frames.json"
    kept_text = listing.read_text()
    for change, reason in (({"width": 128}, "frames of 128 x 64 px"), ({"frames": []}, "keeps other frames")):
        write_json(listing, json.loads(kept_text) | change)
        assert reason in refused(data, "anna", "anna-few")
    listing.write_text("[]")
    assert "is damaged" in refused(data, "anna", "anna-few")
    listing.write_text(kept_text)

    description = few.stage("train") / "avatar.json"
    whole = json.loads(description.read_text())
    write_json(description, whole | {"schema": 99})
    assert "has schema 99" in refused(data, "anna", "anna-few")
    write_json(description, whole | {"training": {"resolution": "large"}})
    assert "does not tell what the avatar was trained at" in refused(data, "anna", "anna-few")
    write_json(description, whole)
    change_fit(few, usable=np.arange(24) < 14)
    assert "No held-out frame is usable in every run" in refused(data, "anna", "anna-few")
    assert not (data / "anna" / "compare" / "anna-vs-anna-few").exists()


def test_what_is_there_is_not_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "is there already" in refused(data, "anna", "anna-few", out=tmp_path / "mine")
    assert "did not write" in refused(data, "anna", "anna-few", out=tmp_path / "mine", force=True)
    assert "among the dataset's own files" in refused(data, "anna", "anna-few", out=data / "anna" / "fit")
    with pytest.raises(HeadcastError, match="Nothing was written"):
        compare(check_compare(data, ["anna", "anna-few"], stop_requested=lambda: True))
    assert not list((data / "anna" / "compare").iterdir())


def test_rows_of_a_bench_folder_are_found_and_kept_with_their_subject(data: Path) -> None:
    for name in ("rigged", "few"):
        place = data / "anna" / "bench" / name
        place.mkdir(parents=True)
        for stage in ("source", "decode", "matte", "fit"):
            (place / stage).symlink_to(Path("..", "..", stage))
        shutil.copytree(data / ("anna" if name == "rigged" else "anna-few") / "train", place / "train")
    plan = check_compare(data, ["anna/bench"])
    assert [run.name for run in plan.runs] == ["few", "rigged"]
    assert plan.product.path == data / "anna" / "compare" / "few-vs-rigged"
    assert [run.name for run in check_compare(data, ["anna", "anna-few", "anna/bench/few"]).runs][2] == "few"


def test_the_common_crop_lies_in_all_of_them() -> None:
    assert common_crop([(0, 0, 100)]) == (0, 0, 100)
    x0, y0, side = common_crop([(0, 0, 100), (10, -20, 100)])
    assert (x0 >= 10, x0 + side <= 100, y0 >= 0, y0 + side <= 80, side) == (True, True, True, True, 80)
    with pytest.raises(UserError, match="nothing in common"):
        common_crop([(0, 0, 40), (30, 0, 40)])
