"""metrical-tracker's own output, which INSTA's data is made of: `checkpoint/00000.frame` and `input/00000.png`.

A `.frame` is `torch.save` of arrays, that is a zip with a pickle: the pickle is read by `pipeline.restricted_pickle`,
which runs nothing, and never by torch. The facts are those of Zielon/metrical-tracker (`tracker.py`, `flame/FLAME.py`):
`opencv` has the camera with OpenCV's axes and K in pixels, the head is at rest (FLAME's root and neck are), rotations
are six numbers, the first two rows of the matrix, `img_size` is height before width. `pipeline.interchange.insta` says
which of the eyes comes first.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.interchange import DEFAULT_FPS, ReadOptions
from pipeline.interchange.checking import FIX, MAX_FRAMES, Document, Folder, check_pictures, check_rotation, rising
from pipeline.interchange.recording import FlameTrack, Recording
from pipeline.restricted_pickle import plain_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CHECKPOINTS, IMAGES = "checkpoint", "input"
VERSION = "flame2020"
SHAPES, EXPRESSIONS = 300, 100
MAX_PICKLE_BYTES, MAX_ENTRIES = 4 << 20, 256
SAME_SHAPE = 1e-5


def detect(folder: Path) -> bool:
    """Whether there is a `.frame` in `checkpoint/`, and no file of the datasets that are made from those."""
    made = any((folder / name).exists() for name in ("transforms.json", "flame_params.json"))
    return not made and any((folder / CHECKPOINTS).glob("*.frame"))


def read(folder: Path, options: ReadOptions) -> Recording:
    """Read and check a tracked actor.

    Args:
        folder: the actor's in the tracker's output, which holds checkpoint/ and input/.
        options: what the layout does not tell.

    Raises:
        UserError: the first thing that is wrong, with its file and key.
    """
    files = Folder(folder)
    names = sorted(path.name for path in (folder / CHECKPOINTS).glob("*.frame"))
    if not names:
        raise UserError(f"There is no '{CHECKPOINTS}/*.frame' in '{folder}'.", "name an actor's folder in the output")
    if len(names) > MAX_FRAMES:
        raise UserError(f"'{folder / CHECKPOINTS}' has {len(names):,} frames; {MAX_FRAMES:,} are read.", "split it")
    for name in names:
        if not re.fullmatch(r"[0-9]{1,9}\.frame", name):
            raise UserError(f"'{CHECKPOINTS}/{name[:80]}': its name is no number.", FIX)
    numbers = [int(name.partition(".")[0]) for name in names]
    names = [names[at] for at in rising(numbers, f"'{CHECKPOINTS}'")]
    tracked = [read_frame(files, f"{CHECKPOINTS}/{name}") for name in names]
    size = tracked[0].size
    for frame in tracked:
        if frame.size != size:
            raise UserError(
                f"{frame.where}: 'img_size' says {frame.size[0]}x{frame.size[1]}, expected {size[0]}x{size[1]} as in "
                f"{tracked[0].where}.",
                "all pictures of a dataset have the same size",
            )
    images = [f"{IMAGES}/{PurePosixPath(name).stem}.png" for name in names]
    check_pictures(files, images, size, [frame.where for frame in tracked], "image")

    version = options.flame or VERSION
    track, notes = flame_track(tracked, version)
    if options.fps is None:
        notes.append(f"The tracker's output tells no frame rate: {DEFAULT_FPS} a second are taken, its default.")
    if options.flame is None:
        notes.append("The tracker's output does not say which FLAME it used: 2020 is taken, its default.")
    basis = f"{version}-expression-{EXPRESSIONS}"
    return Recording(
        format="metrical",
        size=size,
        fps=options.fps or Fraction(DEFAULT_FPS),
        numbers=np.array(sorted(numbers), np.int64),
        Ks=np.stack([frame.K for frame in tracked]),
        Ts_cam_world=np.stack([frame.T_cam_head for frame in tracked]),
        images=tuple(images),
        alpha="none",
        masks=(),
        basis=basis,
        coefficient_names=tuple(f"{basis}/{index:03d}" for index in range(EXPRESSIONS)),
        coefficients=track.expression,
        flame=track,
        files=tuple(files.used),
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class TrackedFrame:
    """What a `.frame` tells.

    Attributes:
        where: the file, for messages.
        size: (width, height).
        K: [3,3]. T_cam_head: [4,4].
        shape: [300]. expression: [100]. jaw: [3]. eyes: [2,3]. eyelids: [2].
    """

    where: str
    size: tuple[int, int]
    K: Floats
    T_cam_head: Floats
    shape: Floats
    expression: Floats
    jaw: Floats
    eyes: Floats
    eyelids: Floats


def read_frame(files: Folder, name: str, where: str = "") -> TrackedFrame:
    """Read and check a `.frame`; nothing in it is run.

    Raises:
        UserError: it is missing, no zip of torch's, holds anything but plain data, or a key is wrong.
    """
    values = _payload(files.file(name, where), name)
    frame = _object(values, f"'{name}'")
    camera, flame = (_object(frame.raw(key), f"'{name}', '{key}'") for key in ("opencv", "flame"))
    number = frame.text("frame_id")
    if not re.fullmatch(r"[0-9]{1,9}", number) or int(number) != int(PurePosixPath(name).stem):
        raise frame.wrong(f"'frame_id' is '{number[:40]}', which is not its name")
    height, width = frame.take("img_size", (2,)).tolist()
    if not all(side == int(side) and 1 <= side <= 1 << 16 for side in (height, width)):
        raise frame.wrong(f"'img_size' is {height:g}, {width:g}: no height and width")
    T_cam_head = np.eye(4)
    T_cam_head[:3, :3], T_cam_head[:3, 3] = camera.take("R", (1, 3, 3))[0], camera.take("t", (1, 3))[0]
    check_rotation(T_cam_head[:3, :3], f"{camera.where}: 'R'")
    if T_cam_head[2, 3] <= 0:
        raise camera.wrong(f"'t' puts the head behind the camera, at z = {T_cam_head[2, 3]:g}")
    K = camera.take("K", (1, 3, 3))[0]
    if K[0, 0] <= 0 or K[1, 1] <= 0 or K[0, 1] or K[1, 0] or (K[2] != (0, 0, 1)).any():
        raise camera.wrong("'K' is no camera matrix without skew")
    turns = {key: flame.take(key, (1, 6 * count))[0].reshape(count, 6) for key, count in (("jaw", 1), ("eyes", 2))}
    jaw, eyes = (rotvec_from_6d(rows, f"{flame.where}: '{key}'") for key, rows in turns.items())
    return TrackedFrame(
        where=f"'{name}'",
        size=(int(width), int(height)),
        K=K,
        T_cam_head=T_cam_head,
        shape=flame.take("shape", (1, SHAPES))[0],
        expression=flame.take("exp", (1, EXPRESSIONS))[0],
        jaw=jaw[0],
        eyes=eyes,
        eyelids=flame.take("eyelids", (1, 2))[0],
    )


def flame_track(tracked: Sequence[TrackedFrame], version: str) -> tuple[FlameTrack, list[str]]:
    """FLAME's parameters of all frames, and what was taken for granted."""
    notes = []
    if max(np.abs(frame.shape - tracked[0].shape).max() for frame in tracked) > SAME_SHAPE:
        notes.append("FLAME's shape differs between frames: that of the first is taken.")
    still = np.zeros((len(tracked), 3))
    return FlameTrack(
        version=version,
        shape=tracked[0].shape,
        expression=np.stack([frame.expression for frame in tracked]),
        rotation=still,
        translation=still.copy(),
        neck=still.copy(),
        jaw=np.stack([frame.jaw for frame in tracked]),
        eyes=np.stack([frame.eyes for frame in tracked]),
        eyelids=np.stack([frame.eyelids for frame in tracked]),
    ), notes


def frame_bytes(frame: TrackedFrame, number: str) -> bytes:
    """A `.frame` as the tracker's `torch.save` writes it, which torch and NumPy of any version load.

    `camera` is the same camera in PyTorch3D's terms; it has one focal length, the horizontal one. Texture and lights,
    which are nobody's here, are zero.
    """
    (width, height), K, T = frame.size, frame.K, frame.T_cam_head
    half = min(width, height) / 2
    flip = np.array([-1.0, -1.0, 1.0])
    flame = {
        "exp": frame.expression,
        "shape": frame.shape,
        "tex": np.zeros(140),
        "sh": np.zeros((9, 3)),
        "eyes": rotvec_to_6d(frame.eyes).ravel(),
        "eyelids": frame.eyelids,
        "jaw": rotvec_to_6d(frame.jaw),
    }
    camera = {
        "R": (T[:3, :3].T * flip)[:2].ravel(),
        "t": T[:3, 3] * flip,
        "fl": K[:1, 0] / half,
        "pp": (np.array([width, height]) / 2 - K[:2, 2]) / half,
    }
    opencv = {"R": T[:3, :3], "t": T[:3, 3], "K": K}
    groups = {"flame": flame, "camera": camera, "opencv": opencv}
    values: dict[str, Any] = {
        group: {key: value.astype(np.float32)[None] for key, value in arrays.items()}
        for group, arrays in groups.items()
    }
    values |= {"img_size": np.array([height, width]), "frame_id": number, "global_step": 0}
    # NumPy 2 names its own new module, which NumPy 1 has not; both have the old one. It stands before any array's data.
    data = pickle.dumps(values, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return buffer.getvalue()


def _payload(path: Path, name: str) -> Any:
    """The plain data in a zip that torch wrote.

    Raises:
        UserError: it is none, or holds more than that.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if PurePosixPath(entry.filename).name == "data.pkl"]
            if len(pickles) != 1 or len(entries) > MAX_ENTRIES:
                raise ValueError(f"{len(entries)} entries, {len(pickles)} of them a data.pkl")
            with archive.open(pickles[0]) as file:
                data = file.read(MAX_PICKLE_BYTES + 1)
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"'{name}' is no zip as torch.save writes it since torch 1.6: {error}.", "track the actor again"
        ) from None
    if len(data) > MAX_PICKLE_BYTES:
        raise UserError(f"'{name}' holds more than {MAX_PICKLE_BYTES >> 20} MB.", "track the actor again")
    return plain_data(data, path)


def _object(value: Any, where: str) -> Document:
    """A dict with texts as keys.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} is no object of named values.", FIX)
    return Document(value, where)


def rotvec_from_6d(rows: Floats, where: str) -> Floats:
    """Rotation vectors [...,3] of six numbers [...,6], the first two rows of the matrix (Zhou et al. 2019).

    Raises:
        UserError: the rows are zero or parallel.
    """
    from pipeline.geometry import matrix_to_rotvec

    first, second = rows[..., :3], rows[..., 3:]
    x = first / np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), 1e-300)
    y = second - (x * second).sum(-1, keepdims=True) * x
    length = np.linalg.norm(y, axis=-1, keepdims=True)
    if (length < 1e-6).any() or (np.linalg.norm(first, axis=-1) < 1e-6).any():
        raise UserError(f"{where} is no rotation: its six numbers are two rows that are zero or parallel.", FIX)
    y = y / length
    found: Floats = matrix_to_rotvec(np.stack([x, y, np.cross(x, y)], -2))
    return found


def rotvec_to_6d(rotvecs: Floats) -> Floats:
    """The first two rows [...,6] of the matrices of rotation vectors [...,3]."""
    from pipeline.geometry import rotvec_to_matrix

    rows: Floats = rotvec_to_matrix(rotvecs)[..., :2, :].reshape(*rotvecs.shape[:-1], 6)
    return rows
