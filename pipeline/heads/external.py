"""Head models that are no part of the program: the user's file, found, checked, cleaned once and cached.

A file is read once, by a reader that runs nothing in it, and turned into a `.npz` of plain arrays in our head frame;
from then on only that is read. The same run finds MediaPipe's landmarks on the model by looking at renders of it, first
roughly on the neutral face, which registers the model to anny's head and carries anny's 52 expressions over
(`pipeline/heads/transfer.py`), then with those expressions (`pipeline/landmark_embedding.py`).
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.dataset import sha256_file, write_atomic
from pipeline.errors import UserError
from pipeline.heads import EXPRESSIONS, JOINTS, HeadModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.faces import Detector

log = logging.getLogger(__name__)

EXTRACTION_VERSION = 1
ROUGH_RENDERS = 48
IDENTITY_LIMIT = 3.0  # standard deviations
CARRIED_REGIONS = ("face", "ears", "lips", "eyelids", "mouth_interior", "eye_sockets")
UNRECOGNISED = "unrecognised file of the right shape"


@dataclass(frozen=True, eq=False)
class NativeHead:
    """A head model's own arrays, in headcast's head frame: metres, origin at the joint about which the head turns."""

    template: NDArray[np.float64]
    """[V, 3]"""
    faces: NDArray[np.int32]
    """[F, 3]"""
    identity_basis: NDArray[np.float32]
    """[S, V, 3] for one standard deviation."""
    identity_names: tuple[str, ...]
    controls: NDArray[np.float32]
    """[N, V, 3] displacement for one unit of each of the model's own expression controls."""
    control_names: tuple[str, ...]
    skin_weights: NDArray[np.float64]
    """[V, 4] over `JOINTS`."""
    joints: NDArray[np.float64]
    """[4, 3] `JOINTS` at rest."""
    joints_identity_basis: NDArray[np.float64]
    """[S, 4, 3]"""
    regions: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """The model's own masks [V], by the names of `HeadModel.regions`; the rest is carried over from anny."""


@dataclass(frozen=True)
class HeadFile:
    """A head model that the user brings: which file it is, where it goes, where it comes from, and its reader."""

    name: str
    title: str
    file: str
    """Its name, as the publisher calls it."""
    page: str
    licence: str
    read: Callable[[Path], NativeHead]
    """Raises UserError for a file that is not this model."""
    how: str
    """How to get it, up to "and put it at"; {folder} stands for where it goes."""
    known: Mapping[str, str] = field(default_factory=dict)
    """sha256 -> which published file that is."""
    may_be_passed_on: bool = True
    """Whether the licence lets a user give others a head made with it."""

    @property
    def path(self) -> Path:
        """Where it is looked for."""
        return heads_folder() / self.file

    def missing(self) -> str:
        """How to get it, as one sentence."""
        return f"{self.how.format(folder=self.path.parent)} and put {self.file} at '{self.path}' ({self.licence})"


def heads_folder() -> Path:
    """Where the user's head model files lie: `HEADCAST_HEADS`, else `heads` in the cache folder."""
    from pipeline.assets import cache_folder

    chosen = os.environ.get("HEADCAST_HEADS")
    return Path(chosen).expanduser() if chosen else cache_folder() / "heads"


def prepared_folder() -> Path:
    """Where cleaned head models and their landmark embeddings are cached."""
    from pipeline.assets import cache_folder

    return cache_folder() / "heads" / "prepared"


def check_shapes(
    path: Path, title: str, found: Mapping[str, tuple[int, ...] | None], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """See that every array is there and has its shape.

    Raises:
        UserError: which array has which shape, and what was expected.
    """
    wrong = [
        f"{name} is missing" if found.get(name) is None else f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    if wrong:
        raise UserError(f"'{path}' is not {title}: {'; '.join(wrong)}.", "get the file again from its publisher")


def check_values(path: Path, title: str, native: NativeHead) -> None:
    """See that numbers are finite, faces name vertices and weights are shares.

    Raises:
        UserError: which array is wrong.
    """
    arrays: dict[str, NDArray[Any]] = {
        "the template": native.template,
        "the identity basis": native.identity_basis,
        "the expression basis": native.controls,
        "the joints": native.joints,
    }
    wrong = [f"{name} has values that are no numbers" for name, array in arrays.items() if not np.isfinite(array).all()]
    if native.faces.min() < 0 or native.faces.max() >= len(native.template):
        wrong.append(f"its faces name vertices up to {native.faces.max()} of {len(native.template)}")
    if not (np.abs(native.skin_weights.sum(axis=1) - 1) < 1e-3).all() or native.skin_weights.min() < -1e-3:
        wrong.append("its skinning weights do not add up to 1")
    gap = native.joints[JOINTS.index("eye_left"), 0] - native.joints[JOINTS.index("eye_right"), 0]
    if not 0.04 < gap < 0.09:
        wrong.append(f"its eyes lie {1e3 * gap:.0f} mm apart, expected about 63 mm with the left one at larger x")
    if wrong:
        raise UserError(f"'{path}' is not {title}: {'; '.join(wrong)}.", "get the file again from its publisher")


def load_external(file: HeadFile, report: Callable[[str], None] | None = None) -> HeadModel:
    """The head model in the user's file; the first time takes a minute or two, which `report` announces.

    Raises:
        UserError: the file is not there, or not that model, or refused.
        StageError: MediaPipe's model or a system library that it needs is missing.
    """
    if not file.path.is_file():
        raise UserError(f"The head model {file.name} ({file.title}) is not on this machine.", file.missing())
    digest = sha256_file(file.path)
    if not prepared_path(file.name, digest).is_file() or not embedding_path(file.name, digest).is_file():
        from pipeline.assets import FACE_LANDMARKER, asset_path
        from pipeline.faces import Detector

        say = report or log.warning
        say(f"Preparing the head model {file.name} from '{file.path}' ({published(file, digest)}), once")
        # A file that is not what it should be fails before anything else is asked for.
        native = None if prepared_path(file.name, digest).is_file() else read_checked(file)
        with Detector(asset_path(FACE_LANDMARKER)) as detector:
            if native is not None:
                say(f"Registering {file.name} to anny's head and carrying the 52 expressions over")
                _write(prepared_path(file.name, digest), prepare(file, native, detector))
            say(f"Finding MediaPipe's landmarks on {file.name}")
            write_embedding(file, digest, detector)
    return _load(file.name, published(file, digest), digest, prepared_folder())


def read_checked(file: HeadFile) -> NativeHead:
    """The model's arrays out of the user's file, checked.

    Raises:
        UserError: the file is not that model, or refused, or cannot be read.
    """
    try:
        native = file.read(file.path)
    except OSError as error:
        raise UserError(f"Cannot read '{file.path}': {error.strerror}.", "make it readable") from error
    check_values(file.path, file.title, native)
    return native


def published(file: HeadFile, digest: str) -> str:
    """Which published file this is."""
    return file.known.get(digest, UNRECOGNISED)


def prepared_path(name: str, digest: str) -> Path:
    """Where the arrays of a file lie, cleaned; changes with the file, the extraction, and anny, whose shapes it has."""
    from pipeline.heads.anny import load_anny

    return prepared_folder() / f"{name}-{digest[:16]}-{EXTRACTION_VERSION}-{load_anny().version}.npz"


def embedding_path(name: str, digest: str) -> Path:
    """Where the landmark embedding lies that belongs to `prepared_path`."""
    from pipeline.landmark_embedding import EMBEDDING_VERSION

    prepared = prepared_path(name, digest)
    return prepared.with_name(f"{prepared.stem}-landmarks-{EMBEDDING_VERSION}.npz")


def prepare(file: HeadFile, native: NativeHead, detector: Detector) -> dict[str, NDArray[Any]]:
    """All arrays of the head model but the landmark embedding."""
    from pipeline.heads.anny import load_anny
    from pipeline.heads.transfer import register, transfer
    from pipeline.landmark_embedding import find_landmarks

    anny = load_anny()
    rough = rough_head(file.name, native)
    embedding = find_landmarks(rough, detector, ROUGH_RENDERS)
    rough = replace(
        rough,
        landmark_faces=embedding["faces"],
        landmark_bary=embedding["bary"],
        landmark_spread=embedding["spread"],
    )
    registration = register(rough, anny)
    carried = transfer(rough, native.controls, anny, registration)
    carried_masks = registration.carry_masks(anny)
    own = {name: rough.regions[name] for name in ("eye_left", "eye_right", "eyes", "teeth", "tongue", "head", "torso")}
    skin = ~np.any([own[name] for name in ("eyes", "teeth", "tongue")], axis=0)
    regions = {name: carried_masks[name] & skin for name in CARRIED_REGIONS} | own | dict(native.regions)
    return {
        "template": rough.template,
        "faces": rough.faces,
        "identity_basis": native.identity_basis,
        "expression_basis": carried.basis,
        "expression_to_native": carried.to_native,
        "transfer_error": carried.error,
        "transfer_scale": carried.scale,
        "skin_weights": rough.skin_weights,
        "joints": rough.joints,
        "joints_identity_basis": rough.joints_identity_basis,
        "regions": np.stack(list(regions.values())),
        "text": np.frombuffer(
            json.dumps(
                {
                    "identity_names": native.identity_names,
                    "native_names": native.control_names,
                    "region_names": list(regions),
                }
            ).encode(),
            dtype=np.uint8,
        ),
    }


def write_embedding(file: HeadFile, digest: str, detector: Detector) -> dict[str, NDArray[Any]]:
    """Find the landmarks on a prepared head model and cache them."""
    from pipeline.landmark_embedding import find_landmarks

    embedding = find_landmarks(_from_arrays(file.name, prepared_path(file.name, digest)), detector)
    _write(embedding_path(file.name, digest), embedding)
    return embedding


def rough_head(name: str, native: NativeHead) -> HeadModel:
    """The head before anything is known of it but what the file says: no expressions, no landmarks, all skin."""
    weights = native.skin_weights.astype(np.float32)
    count = len(weights)
    left, right = (weights[:, JOINTS.index(eye)] > 0.5 for eye in ("eye_left", "eye_right"))
    torso = weights[:, JOINTS.index("torso")] > 0.5
    limits = np.full(len(native.identity_names), IDENTITY_LIMIT, dtype=np.float32)
    nowhere = np.zeros(count, dtype=bool)
    return HeadModel(
        name=name,
        version="rough",
        template=native.template.astype(np.float32),
        faces=native.faces.astype(np.int32),
        uv=None,
        uv_faces=None,
        identity_basis=native.identity_basis.astype(np.float32),
        identity_names=native.identity_names,
        identity_low=-limits,
        identity_high=limits,
        expression_basis=np.zeros((len(EXPRESSIONS), count, 3), dtype=np.float32),
        expression_names=EXPRESSIONS,
        skin_weights=weights,
        joints=native.joints.astype(np.float32),
        joints_identity_basis=native.joints_identity_basis.astype(np.float32),
        regions={
            **dict.fromkeys(("teeth", "tongue", "mouth_interior", "lips"), nowhere),
            **native.regions,
            "face": ~torso,
            "eye_left": left,
            "eye_right": right,
            "eyes": left | right,
            "head": ~torso,
            "torso": torso,
        },
        landmark_faces=np.zeros(478, dtype=np.int32),
        landmark_bary=np.tile(np.array([1, 0, 0], dtype=np.float32), (478, 1)),
        landmark_spread=np.ones(478, dtype=np.float32),
    )


def _from_arrays(name: str, path: Path) -> HeadModel:
    """The head model in a prepared file, without its landmarks."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    text = json.loads(bytes(arrays["text"]))
    limits = np.full(len(text["identity_names"]), IDENTITY_LIMIT, dtype=np.float32)
    return HeadModel(
        name=name,
        version="",
        template=arrays["template"],
        faces=arrays["faces"],
        uv=None,
        uv_faces=None,
        identity_basis=arrays["identity_basis"],
        identity_names=tuple(text["identity_names"]),
        identity_low=-limits,
        identity_high=limits,
        expression_basis=arrays["expression_basis"],
        expression_names=EXPRESSIONS,
        skin_weights=arrays["skin_weights"],
        joints=arrays["joints"],
        joints_identity_basis=arrays["joints_identity_basis"],
        regions=dict(zip(text["region_names"], arrays["regions"], strict=True)),
        landmark_faces=np.zeros(478, dtype=np.int32),
        landmark_bary=np.tile(np.array([1, 0, 0], dtype=np.float32), (478, 1)),
        landmark_spread=np.ones(478, dtype=np.float32),
        expression_to_native=arrays["expression_to_native"],
        native_names=tuple(text["native_names"]),
        transfer_error=arrays["transfer_error"],
        transfer_scale=float(arrays["transfer_scale"]),
    )


@functools.cache
def _load(name: str, label: str, digest: str, folder: Path) -> HeadModel:
    """The prepared head model with its landmarks; `folder` keeps caches of one process apart."""
    prepared, embedding = prepared_path(name, digest), embedding_path(name, digest)
    with np.load(embedding, allow_pickle=False) as data:
        return replace(
            _from_arrays(name, prepared),
            version=f"{label}, {embedding.stem}-{sha256_file(embedding)[:8]}",
            landmark_faces=data["faces"],
            landmark_bary=data["bary"],
            landmark_spread=data["spread"],
        )


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that a reader sees the whole file or none."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(
            f"Cannot write to the cache folder '{path.parent}': {error.strerror}.",
            "make it writable and see that the disk is not full, or set HEADCAST_CACHE to another folder",
        ) from error
