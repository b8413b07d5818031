"""The benchmark of avatar models: rows train apart on shared stages, failures stay where they are, figures add up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from avatar_data import write_subject

from pipeline import bench_avatars
from pipeline.avatar_table import BEST, REGIONS
from pipeline.bench_avatars import ABLATION, Row, bench, table
from pipeline.config import configure, override, preset_config
from pipeline.dataset import Subject, read_json, subject_name_for, write_json
from pipeline.errors import StageError, UserError
from pipeline.stage import StageRun, section_of
from pipeline.video import write_video
from stages import evaluate, train

SETTINGS = ("train.resolution=64", "train.gaussians=300", "evaluate.min_holdout_frames=4")
ROWS = {
    "short": Row("rigged", ("train.steps=5",)),
    "longer, 40 steps": Row("rigged", ("train.steps=40",)),
    "broken": Row("rigged", ("train.steps=7",)),
}


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def in_process(arguments: list[str]) -> None:
    """What the commands would do: the clip's first stages, or train and evaluate, which fails with seven steps."""
    data = Path(option(arguments, "--data"))
    if option(arguments, "--to") == "fit":
        subject = data / subject_name_for(Path(arguments[1]))
        if "lost" in arguments[1]:
            raise StageError("There is no face | in it.", "film one")
        if not subject.exists():
            write_subject(subject)
            (subject / "source").mkdir()
            (subject / "track").mkdir()
        return
    settings = [value for name, value in itertools.pairwise(arguments) if name == "--set"]
    assert option(arguments, "--avatar") == "rigged"
    subject = Subject(data / option(arguments, "--subject"))
    config = override(preset_config(option(arguments, "--preset")), settings)
    if config.train.steps == 7:
        raise StageError("Training diverged at step 7.", "try another seed")
    for module in (train, evaluate):
        work = subject.stage(module.STAGE.name)
        if not work.exists():
            work.mkdir()
            result = module.run(StageRun(subject, work, config, "cpu", 1))
            about = {"config": section_of(module.STAGE, config), "metrics": result.metrics}
            write_json(work / "stage.json", {"schema": 1, "outputs": [], **about})


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Files that pass for clips."""
    paths = [tmp_path / name for name in ("ada.mp4", "lost.mp4", "bob.mp4")]
    for frames, path in enumerate(paths, 2):
        write_video(path, [np.zeros((96, 96, 3), np.uint8)] * frames, 25)
    return paths


def test_rows_train_apart_and_failures_stay_in_their_place(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_avatars, "timed", in_process)
    data = tmp_path / "data"
    document = bench(videos, ROWS, "avatars", "quick", data, SETTINGS)
    assert json.loads(json.dumps(document, allow_nan=False))["schema"] == 1
    assert document["complete"] is False
    ada, lost, bob = document["clips"]
    assert (lost["rows"], lost["error"]) == ([], {"what": "There is no face | in it.", "fix": "film one"})
    for clip in (ada, bob):
        short, longer, broken = clip["rows"]
        assert short["error"] is longer["error"] is clip["error"] is None
        assert broken["error"]["what"] == "Training diverged at step 7."
        assert (short["speed"]["train_steps"], longer["speed"]["train_steps"]) == (5, 40)
        assert longer["test"]["psnr"] > short["test"]["psnr"]
        root = data / subject_name_for(Path(clip["clip"]))
        assert not (root / "train").exists(), "the clip's own avatar is not touched"
        folder = root / "bench" / "longer-40-steps"
        assert (folder / "fit" / "fit.npz").samefile(root / "fit" / "fit.npz")
        metrics = read_json(folder / "evaluate" / "metrics.json")
        assert longer["test"] == metrics["test"]
        assert longer["gain"]["psnr_head"] == pytest.approx(
            metrics["test"]["psnr_head"] - metrics["baselines"][BEST]["psnr_head"], abs=1e-3
        )
        assert 0 < clip["baselines"]["nearest_by_parameters"]["ssim"] <= clip["baselines"][BEST]["ssim"] < 1
        assert 0 < clip["baselines"][BEST]["flip"] < 1
        picture = cv2.imread(str(data / clip["picture"]))
        assert picture.shape[1] == 3 * 256, "the truth and the two that finished"
    gains = document["gains"]
    each = [clip["rows"][1]["gain"]["psnr"] for clip in (ada, bob)]
    assert gains["longer, 40 steps"]["psnr"] == {"mean": pytest.approx(sum(each) / 2, abs=1e-3), "min": min(each)}
    assert gains["longer, 40 steps"]["beside_first"]["min"] > 0
    assert gains["short"]["beside_first"] == {"mean": 0, "min": 0}
    assert gains["broken"] == {"clips": 0, **dict.fromkeys(REGIONS), "beside_first": None}

    lines = table(document).splitlines()
    assert "| broken | failed: Training diverged at step 7. " in table(document)
    assert "There is no face / in it." in table(document)
    blocks = [block.splitlines() for block in table(document).split("\n\n")]
    assert len(blocks) == 4
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1, block
    assert lines[-1].startswith("| broken | 0 | - | - |")


def test_a_second_time_finds_it_all(videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_avatars, "timed", in_process)
    one, two = (bench(videos[:1], {"short": ROWS["short"]}, "avatars", "quick", tmp_path, SETTINGS) for _ in range(2))
    assert one == two
    assert one["complete"] is True


def test_each_ablation_leaves_out_something_else() -> None:
    configs = [configure("quick", [f"train.avatar={row.avatar}", *row.settings]) for row in ABLATION.values()]
    whole, *others = (config.model_dump() for config in configs)
    assert len({json.dumps(config) for config in (whole, *others)}) == len(ABLATION)
    assert {config["train"]["avatar"] for config in (whole, *others)} == {"gaussianhead"}
    assert all(config["train"] | {"gaussianhead": None} == whole["train"] | {"gaussianhead": None} for config in others)


def test_clips_that_are_none_are_refused_first(tmp_path: Path, videos: list[Path]) -> None:
    with pytest.raises(UserError, match="There is no file"):
        bench([videos[0], tmp_path / "missing.mp4"], ROWS, "avatars", "quick", tmp_path / "data")
    assert not (tmp_path / "data").exists()
