"""The table of what a subject does: it reads back as the fit's own performance, in both layouts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from reenact_data import change_fit, read_fit, write_dataset

from pipeline.clip import load_clip
from pipeline.coefficients import read_coefficients
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.exports import check_export, export
from pipeline.heads import EXPRESSIONS
from pipeline.retarget import MOVE, Performance

UNUSABLE = [4, 5, 17]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Bert, who is only fitted, looks about, turns and moves, and cannot be used in three frames."""
    bert = write_dataset(tmp_path / "data").existing("bert")
    fit, rng = read_fit(bert), np.random.default_rng(0)
    expression = rng.uniform(0, 1, fit["expression"].shape).astype(np.float32)
    eyes = np.zeros_like(fit["eyes"])
    yaw = rng.uniform(-0.3, 0.3, len(eyes))
    eyes[:, :, 1], eyes[:, :, 0] = yaw[:, None], rng.uniform(-0.2, 0.2, (len(eyes), 2))
    for side, outwards in (("Left", 1), ("Right", -1)):
        expression[:, EXPRESSIONS.index(f"eyeLookOut{side}")] = np.maximum(outwards * yaw, 0) / 0.6
        expression[:, EXPRESSIONS.index(f"eyeLookIn{side}")] = np.maximum(-outwards * yaw, 0) / 0.6
    usable = np.ones(len(eyes), bool)
    usable[UNUSABLE] = False
    change_fit(bert, expression=expression, eyes=eyes, usable=usable)
    return tmp_path / "data"


def written(data: Path, layout: str) -> Path:
    plan = check_export(data, "bert", "csv", out=data.parent / layout, options={"layout": layout})
    assert export(plan)["usable"] == 24 - len(UNUSABLE)
    return plan.product.path / "coefficients.csv"


@pytest.mark.parametrize("layout", ["plain", "livelink"])
def test_the_table_reads_back_as_the_performance(data: Path, layout: str) -> None:
    clip = load_clip(Dataset(data).existing("bert"), 64)
    wanted = Performance.of(clip)
    table = read_coefficients(written(data, layout))
    assert set(wanted.names) - set(table.names) == (set() if layout == "plain" else set(MOVE))
    np.testing.assert_array_equal(table.usable, clip.usable)
    assert str(table.fps) == "30000/1001"
    np.testing.assert_allclose(table.times, clip.times - clip.times[0], atol=1e-6 if layout == "plain" else 5e-5)
    for name in table.names:
        ours = table.values[:, table.names.index(name)]
        theirs = wanted.values[:, wanted.names.index(name)]
        np.testing.assert_allclose(ours[clip.usable], theirs[clip.usable], atol=1e-6, err_msg=name)
        assert not ours[UNUSABLE].any()


def test_driving_by_the_plain_table_is_driving_by_the_subject(data: Path) -> None:
    clip = load_clip(Dataset(data).existing("bert"), 64)
    own, by_table = (
        Performance.of(clip),
        Performance.of_table(read_coefficients(written(data, "plain")), clip.expression_names),
    )
    for name in ("neutral", "low", "high"):
        np.testing.assert_allclose(getattr(by_table, name), getattr(own, name), atol=2e-6)
    np.testing.assert_allclose(by_table.values[own.usable], own.values[own.usable], atol=2e-6)


def test_foreign_coefficients_keep_their_names(data: Path) -> None:
    bert = Dataset(data).existing("bert")
    names = [f"flame2020-{number:03d}" for number in range(52)]
    change_fit(bert, expression_names=np.array(names))
    path = written(data, "plain")
    with path.open() as file:
        header = next(csv.reader(file))
    assert header[2:54] == names and not set(header) & set(EXPRESSIONS)
    with pytest.raises(UserError, match=r"'flame2020-000', and the app's layout is for ARKit's only"):
        written(data, "livelink")


def test_gaze_that_contradicts_its_coefficients_is_not_passed_on_as_the_apps(data: Path) -> None:
    bert = Dataset(data).existing("bert")
    change_fit(bert, eyes=-read_fit(bert)["eyes"])
    with pytest.raises(UserError, match="contradict one another"):
        written(data, "livelink")
    assert not (data.parent / "livelink").exists()
