"""A subject's own head model comes back as it was saved, and damaged ones are refused in words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import check_messages

from pipeline.errors import StageError
from pipeline.heads import load_head
from pipeline.heads.stored import StoredHead, load_stored, save_head

Arrays = dict[str, np.ndarray]


def stored() -> StoredHead:
    """anny with three coefficients of another name."""
    anny = load_head("anny")
    names = tuple(f"nerfblendshape-3/{index:02d}" for index in range(3))
    head = replace(
        anny,
        expression_basis=anny.expression_basis[:3],
        expression_names=names,
        identity_basis=anny.identity_basis[:0],
        identity_names=(),
        identity_low=anny.identity_low[:0],
        identity_high=anny.identity_high[:0],
        joints_identity_basis=anny.joints_identity_basis[:0],
        uv=None,
        uv_faces=None,
    )
    return StoredHead(head, "Nobody's.", False)


def test_a_head_comes_back(tmp_path: Path) -> None:
    wanted = stored()
    save_head(tmp_path / "head.npz", wanted)
    found = load_stored(tmp_path / "head.npz")
    assert found[1:] == wanted[1:]
    for each in fields(found.model):
        one, other = getattr(found.model, each.name), getattr(wanted.model, each.name)
        if each.name == "regions":
            assert list(one) == list(other)
            assert all((one[name] == other[name]).all() for name in one)
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other, each.name


def _text(**changes: Any) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        text = json.loads(bytes(arrays["text"])) | changes
        return {**arrays, "text": np.frombuffer(json.dumps(text).encode(), np.uint8)}

    return change


def _array(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: np.asarray(change(arrays[name].copy()))}


def _nan(values: np.ndarray) -> np.ndarray:
    values[1] = np.nan
    return values


DAMAGE: dict[str, Callable[[Arrays], Arrays]] = {
    "no template": lambda arrays: {name: value for name, value in arrays.items() if name != "template"},
    "no text": lambda arrays: {name: value for name, value in arrays.items() if name != "text"},
    "no numbers": _array("template", _nan),
    "another shape": _array("expression_basis", lambda values: values[:2]),
    "faces beyond": _array("faces", lambda values: values + 10_000),
    "faces below": _array("landmark_faces", lambda values: values - 100_000),
    "faces as fractions": _array("faces", lambda values: values.astype(float)),
    "weights": _array("skin_weights", lambda values: 2 * values),
    "two of one name": _text(expression_names=["a/0", "a/0", "a/1"]),
    "names that are numbers": _text(expression_names=[1, 2, 3]),
    "another schema": _text(schema=9),
    "no lips": _text(region_names=[f"r{i}" for i in range(len(load_head("anny").regions))]),
    "code": lambda arrays: {**arrays, "template": np.array([print], dtype=object)},
}


def test_a_damaged_head_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "head.npz"
    save_head(path, stored())
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    messages = {}
    for case, change in DAMAGE.items():
        buffer = io.BytesIO()
        np.savez(buffer, **change(arrays))  # type: ignore[arg-type]
        path.write_bytes(buffer.getvalue())
        with pytest.raises(StageError) as caught:
            load_stored(path)
        messages[case] = str(caught.value).replace(str(tmp_path), "FOLDER")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StageError) as caught:
        load_stored(path)
    messages["cut off"] = str(caught.value).replace(str(tmp_path), "FOLDER")
    check_messages("stored_head", messages)
