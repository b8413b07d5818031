"""A head model of a subject's own, kept with it as `head.npz`: of an imported dataset, whose coefficients it has."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.dataset import write_atomic
from pipeline.errors import StageError
from pipeline.heads import JOINTS, HeadModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "head.npz"
SCHEMA = 1
LANDMARKS = 478
REGIONS = ("face", "head", "torso", "eyes", "eye_left", "eye_right", "teeth", "tongue", "lips", "eyelids", "ears")
"""Regions that every head model has."""
MOST_VERTICES, MOST_EXPRESSIONS = 200_000, 1_000
_FIX = "make it again: headcast rerun SUBJECT --from track"


class StoredHead(NamedTuple):
    """A head model and on what terms it is there."""

    model: HeadModel
    licence: str
    """A sentence."""
    may_be_passed_on: bool
    """Whether the licence lets the user give others the mesh."""


def save_head(path: Path, stored: StoredHead) -> None:
    """Write it as an `.npz` of plain arrays and a JSON text."""
    head = stored.model
    text = {
        "schema": SCHEMA,
        "name": head.name,
        "version": head.version,
        "identity_names": head.identity_names,
        "expression_names": head.expression_names,
        "region_names": list(head.regions),
        "licence": stored.licence,
        "may_be_passed_on": stored.may_be_passed_on,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        template=head.template,
        faces=head.faces,
        identity_basis=head.identity_basis,
        identity_low=head.identity_low,
        identity_high=head.identity_high,
        expression_basis=head.expression_basis,
        skin_weights=head.skin_weights,
        joints=head.joints,
        joints_identity_basis=head.joints_identity_basis,
        regions=np.stack(list(head.regions.values())),
        landmark_faces=head.landmark_faces,
        landmark_bary=head.landmark_bary,
        landmark_spread=head.landmark_spread,
        text=np.frombuffer(json.dumps(text).encode(), np.uint8),
    )
    write_atomic(path, buffer.getvalue())


def load_stored(path: Path) -> StoredHead:
    """Read what `save_head` wrote, checked like anybody's file.

    Raises:
        StageError: it is missing or damaged, with what is wrong.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text = json.loads(bytes(arrays.pop("text")))
        if text["schema"] != SCHEMA:
            raise ValueError(f"its schema is {text['schema']!r}, this version reads {SCHEMA}")
        return _checked(arrays, text)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise StageError(f"'{path}' cannot be used: {what}.", _FIX) from None


def _checked(arrays: dict[str, NDArray[Any]], text: dict[str, Any]) -> StoredHead:
    """The head of a file's arrays.

    Raises:
        ValueError, KeyError, TypeError: what is wrong.
    """
    names = {key: tuple(_texts(text[key])) for key in ("identity_names", "expression_names", "region_names")}
    vertices, faces = len(arrays["template"]), len(arrays["faces"])
    identities, expressions = len(names["identity_names"]), len(names["expression_names"])
    if vertices > MOST_VERTICES or expressions > MOST_EXPRESSIONS:
        raise ValueError(f"{vertices} vertices and {expressions} expressions are too many")
    shapes: dict[str, tuple[int, ...]] = {
        "template": (vertices, 3),
        "faces": (faces, 3),
        "identity_basis": (identities, vertices, 3),
        "identity_low": (identities,),
        "identity_high": (identities,),
        "expression_basis": (expressions, vertices, 3),
        "skin_weights": (vertices, len(JOINTS)),
        "joints": (len(JOINTS), 3),
        "joints_identity_basis": (identities, len(JOINTS), 3),
        "regions": (len(names["region_names"]), vertices),
        "landmark_faces": (LANDMARKS,),
        "landmark_bary": (LANDMARKS, 3),
        "landmark_spread": (LANDMARKS,),
    }
    kinds = {"faces": "i", "landmark_faces": "i", "regions": "b"}
    for name, shape in shapes.items():
        value = arrays[name]
        if value.shape != shape:
            raise ValueError(f"'{name}' has shape {value.shape}, expected {shape}")
        if value.dtype.kind != kinds.get(name, "f") or not np.isfinite(value).all():
            raise ValueError(f"'{name}' holds other values than a head model's")
    for name, count in (("faces", vertices), ("landmark_faces", faces)):
        if not len(arrays[name]) or arrays[name].min() < 0 or arrays[name].max() >= count:
            raise ValueError(f"'{name}' names more than there is")
    if np.abs(arrays["skin_weights"].sum(1) - 1).max() > 1e-3:
        raise ValueError("'skin_weights' do not add up to 1")
    if missing := [name for name in REGIONS if name not in names["region_names"]]:
        raise ValueError(f"it has no region '{missing[0]}'")
    if len(set(names["expression_names"])) < expressions:
        raise ValueError("two of its expressions have one name")
    name, version, licence = _texts([text["name"], text["version"], text["licence"]])

    def floats(key: str) -> NDArray[np.float32]:
        return arrays[key].astype(np.float32)

    head = HeadModel(
        name=name,
        version=version,
        template=floats("template"),
        faces=arrays["faces"].astype(np.int32),
        uv=None,
        uv_faces=None,
        identity_basis=floats("identity_basis"),
        identity_names=names["identity_names"],
        identity_low=floats("identity_low"),
        identity_high=floats("identity_high"),
        expression_basis=floats("expression_basis"),
        expression_names=names["expression_names"],
        skin_weights=floats("skin_weights"),
        joints=floats("joints"),
        joints_identity_basis=floats("joints_identity_basis"),
        regions=dict(zip(names["region_names"], arrays["regions"], strict=True)),
        landmark_faces=arrays["landmark_faces"].astype(np.int32),
        landmark_bary=floats("landmark_bary"),
        landmark_spread=floats("landmark_spread"),
    )
    return StoredHead(head, licence, text["may_be_passed_on"] is True)


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("its names are no texts")
    return values
