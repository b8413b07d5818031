"""INSTA's layout: `transforms.json` with OpenCV cameras about a still head, a mesh a frame, FLAME's numbers as text.

The facts are those of the programs that write and read it (Zielon/INSTA `scripts/*.py` and `nerf_loader.cu`,
Zielon/INSTA-pytorch `insta/provider.py` and `insta/utils.py`, zjwfufu/FateAvatar `train/dataset.py`): a pixel's ray is
`transform_matrix @ ((x - cx) / fl_x, (y - cy) / fl_y, 1)`, centres at +0.5, no axis is turned round. All motion of the
head is the camera's: FLAME's root and neck are at rest, jaw and eyes are in the mesh. INSTA's own last step exchanges
FLAME's mesh for a simpler one of another topology, so that any is read.

FLAME beyond the expression is FateAvatar's addition, as metrical-tracker has it: `flame/{shape,jaw,eyes,eyelids}`.
Rotations are six numbers, the first two rows of the matrix. Of the twelve numbers of the eyes the first six turn
FLAME's joint 3, which lies at x > 0: the subject's left eye. (metrical-tracker's `forward` hands them to FLAME in this
order. It calls them `right_eye` elsewhere, for it names by side of the picture: the vertices of its `right_iris_flame`
lie in the left eyeball of INSTA's `flame_masks`. FateAvatar takes that name for FLAME's and gives joint 3 the last six,
so that it shows the two eyes' gazes exchanged; with the tracker's files just as with ours.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.dataset import link_or_copy, write_json
from pipeline.errors import UserError
from pipeline.frames import save_image
from pipeline.interchange import DEFAULT_FPS, ReadOptions
from pipeline.interchange.checking import FIX, Document, Folder, check_pictures, flame_of, numbers, rising
from pipeline.interchange.metrical import (
    EXPRESSIONS,
    SHAPES,
    VERSION,
    TrackedFrame,
    flame_track,
    frame_bytes,
    read_frame,
    rotvec_from_6d,
    rotvec_to_6d,
)
from pipeline.interchange.recording import FlameTrack, Pictures, Recording
from pipeline.interchange.sidecar import Sidecar, flame_version, read_sidecar, write_sidecar
from pipeline.obj import ObjReader, write_obj

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads.flame import Flame

    Floats = NDArray[np.float64]

RECTIFY: Literal["", "centred", "square"] = ""
"""INSTA and INSTA-pytorch heed fl_x, fl_y, cx, cy, w and h. FateAvatar does not heed cx and cy: `write` says so."""
FILE = "transforms.json"
SPLITS = {name: f"transforms_{name}.json" for name in ("train", "test", "val")}
MAX_TEXT_BYTES = 1 << 20
SAME = 1e-5
"""How far numbers that stand in two files may differ: one is rounded."""
TEST_FRAMES, VAL_FRAMES = 350, 20
CANONICAL_JAW_RAD = math.radians(12)
MESH_DIGITS = 8
MM = 1000.0
BATCH = 128
"""Frames whose vertices are held at once."""
HAIRLINE, EARS = 1.0, 1.2
"""How far above the eyes hair begins and how far behind them the face ends, in distances of the eyes."""
BACKGROUND, FACE, LEFT_EYE, RIGHT_EYE, NECK, CLOTH, HAIR = 0, 250, 210, 200, 110, 90, 80
"""Red in seg_mask/, by INSTA's table for its face parsing. INSTA-pytorch compares depth where it is above 90."""


def detect(folder: Path) -> bool:
    """Whether there is a `transforms.json` whose first frame has `mesh_path` and `exp_path`, and no time step: VHAP's
    meshes have one, and other axes.
    """
    files = Folder(folder)
    try:
        frames = files.json(FILE).values.get("frames") if files.has(FILE) else None
    except (UserError, OSError):
        return False
    first = frames[0] if isinstance(frames, list) and frames else None
    return isinstance(first, dict) and {"mesh_path", "exp_path"} <= set(first) and "timestep_index" not in first


def read(folder: Path, options: ReadOptions) -> Recording:
    """Read and check the dataset. Without FateAvatar's files its head is known by its meshes only.

    Args:
        folder: what holds `transforms.json`.
        options: what the layout does not tell.

    Raises:
        UserError: the first thing that is wrong, with its file, frame and key.
    """
    files = Folder(folder)
    sidecar = read_sidecar(files)
    version = flame_version(options.flame, sidecar) or VERSION
    top = files.json(FILE)
    size, K = _camera(top)
    frames = [_read_frame(document) for document in top.items("frames")]
    frames = [frames[at] for at in rising([frame.number for frame in frames], f"'{FILE}'")]
    notes = _notes(options, sidecar)

    where = [frame.where for frame in frames]
    images = [frame.image for frame in frames]
    check_pictures(files, images, size, where, "image")
    for name, what in (("depth", "depth picture"), ("seg_mask", "parsing")):
        given = {frame.where: frame.beside[name] for frame in frames if name in frame.beside}
        there = {place: path for place, path in given.items() if files.has(path)}
        check_pictures(files, list(there.values()), size, list(there), what)
    meshes = [frame.mesh for frame in frames]
    Ts_cam_head = np.linalg.inv(np.stack([frame.T_head_cam for frame in frames]))
    for T, place, (vertices, _) in zip(Ts_cam_head, where, _read_meshes(files, meshes, where), strict=True):
        if (depth := float(T[2, :3] @ vertices.mean(0) + T[2, 3])) <= 0:
            raise UserError(
                f"{place}: 'transform_matrix' puts the mesh behind the camera, at z = {depth:g}.",
                "INSTA's cameras look along +z, with y down; see which tool wrote the file",
            )
    splits, extra = _read_splits(files, top, frames, notes)
    _take_others(files, images)

    expression = np.stack([_read_text(files, frame.exp, (EXPRESSIONS,), frame.where) for frame in frames])
    basis = f"{version}-expression-{EXPRESSIONS}"
    return Recording(
        format="insta",
        size=size,
        fps=options.fps or (Fraction(sidecar.fps) if sidecar else DEFAULT_FPS),
        numbers=np.array([frame.number for frame in frames], np.int64),
        Ks=np.repeat(K[None], len(frames), 0),
        Ts_cam_world=Ts_cam_head,
        images=tuple(images),
        alpha="channel",
        masks=(),
        basis=basis,
        coefficient_names=tuple(f"{basis}/{index:03d}" for index in range(EXPRESSIONS)),
        coefficients=expression,
        flame=_read_flame(files, frames, version, expression, notes),
        meshes=tuple(meshes),
        splits=splits,
        files=tuple(files.used),
        extra=extra,
        frame_extra=tuple(frame.extra for frame in frames),
        notes=tuple(notes),
    )


def read_meshes(root: Path, names: Sequence[str]) -> tuple[Floats, NDArray[np.int32]]:
    """Meshes of one topology: vertices [T,V,3] in the head frame, metres, and triangles [F,3].

    Args:
        root: the dataset's folder.
        names: of the meshes in it, T of them, at least one.

    Raises:
        UserError: a mesh is missing, damaged, or of another topology than the first.
    """
    found = list(_read_meshes(Folder(root), names, [""] * len(names)))
    return np.stack([vertices for vertices, _ in found]), found[0][1]


@dataclass(frozen=True)
class _Frame:
    """A frame as the file has it; `beside`: paths of other pictures; `extra`: keys that are kept as they stand."""

    where: str
    number: int
    image: str
    mesh: str
    exp: str
    T_head_cam: Floats
    beside: Mapping[str, str]
    extra: Mapping[str, Any]


def _camera(top: Document) -> tuple[tuple[int, int], Floats]:
    """Size (width, height) and the matrix [3,3] of a file's camera.

    Raises:
        UserError: it has none, or says two things about it.
    """
    width, height = top.integer("w", 1, 1 << 16), top.integer("h", 1, 1 << 16)
    fx, fy = top.number("fl_x", 1e-3, 1e7), top.number("fl_y", 1e-3, 1e7)
    cx, cy = top.number("cx", -1e6, 1e6), top.number("cy", -1e6, 1e6)
    for axis, side, focal in (("x", width, fx), ("y", height, fy)):
        angle = 2 * math.atan2(side, 2 * focal)
        for key, expected in ((f"camera_angle_{axis}", angle), (f"{axis}_fov", math.degrees(angle))):
            if key in top and abs(top.number(key) - expected) > 1e-3 * expected:
                unit = "radians" if "angle" in key else "degrees"
                raise top.wrong(
                    f"'{key}' is {top.number(key):g}, but 'fl_{axis}' says {expected:.4f} {unit}; loaders differ in "
                    "which of them they take"
                )
    if "integer_depth_scale" in top:
        top.number("integer_depth_scale", 0, 1e3)
    for key in ("k1", "k2", "p1", "p2"):
        if key in top.values and top.number(key):
            raise top.wrong(f"'{key}' is {top.number(key):g}: pictures with lens distortion are not read")
    return (width, height), np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _read_frame(frame: Document) -> _Frame:
    image = frame.text("file_path")
    number = PurePosixPath(image).stem
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise frame.wrong(f"'file_path' is '{image[:80]}': its name is no number")
    own = sorted({"fl_x", "fl_y", "cx", "cy", "x_fov", "y_fov", "transform_matrix_start"} & set(frame.values))
    if own:
        raise frame.wrong(f"'{own[0]}' is the frame's own, which only one of the loaders heeds")
    beside = {name: frame.text(f"{name}_path") for name in ("depth", "seg_mask") if f"{name}_path" in frame}
    T_head_cam = frame.pose("transform_matrix")
    mesh, exp = frame.text("mesh_path"), frame.text("exp_path")
    return _Frame(frame.where, int(number), image, mesh, exp, T_head_cam, beside, frame.rest())


def _read_splits(
    files: Folder, top: Document, frames: Sequence[_Frame], notes: list[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Rows of each split, and unknown keys of each file.

    Raises:
        UserError: one that every loader reads is missing, or says something else than `transforms.json`.
    """
    rows = {frame.number: row for row, frame in enumerate(frames)}
    camera = _camera(top)
    extra = {FILE: top.rest()}
    splits = {}
    for name, file in SPLITS.items():
        if name == "val" and not files.has(file):
            notes.append(f"There is no '{file}': the dataset names no frames for validation.")
            continue
        document = files.json(file)
        if document.values.get("frames") == []:
            found = []
            document.raw("frames")
        else:
            found = [_read_frame(item) for item in document.items("frames")]
        size, K = _camera(document)
        if size != camera[0] or np.abs(K - camera[1]).max() > SAME * K.max():
            raise document.wrong(f"its camera differs from that in '{FILE}'")
        for frame in found:
            same = frames[rows[frame.number]] if frame.number in rows else None
            if same is None:
                raise UserError(f"{frame.where}: frame {frame.number} is not in '{FILE}'.", FIX)
            if np.abs(frame.T_head_cam - same.T_head_cam).max() > SAME or frame.mesh != same.mesh:
                raise UserError(f"{frame.where}: frame {frame.number} differs from that in '{FILE}'.", FIX)
        splits[name] = tuple(rows[found[at].number] for at in rising([frame.number for frame in found], f"'{file}'"))
        extra[file] = document.rest()
    return splits, {file: values for file, values in extra.items() if values}


def _read_meshes(
    files: Folder, names: Sequence[str], where: Sequence[str]
) -> Iterator[tuple[Floats, NDArray[np.int32]]]:
    """Each mesh's vertices [V,3] and the triangles [F,3] that all have."""
    reader = ObjReader()
    first: tuple[Floats, NDArray[np.int32]] | None = None
    for name, place in zip(names, where, strict=True):
        vertices, faces = reader.read(files.file(name, place))
        if first is None:
            first = vertices, faces
        elif len(vertices) != len(first[0]) or not (faces is first[1] or np.array_equal(faces, first[1])):
            raise UserError(
                f"{place + ': ' if place else ''}'{name}' has {len(vertices)} vertices and {len(faces)} faces, another "
                f"mesh than '{names[0]}' with {len(first[0])} and {len(first[1])}.",
                "all meshes of a dataset are the same mesh, moved",
            )
        yield vertices, faces


def _read_text(files: Folder, name: str, shape: tuple[int, ...], where: str) -> Floats:
    """The numbers of a text file.

    Raises:
        UserError: it is missing or too large, or holds something else.
    """
    path = files.file(name, where)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES >> 20} MB")
        values = [float(word) for word in path.read_bytes().split()]
    except ValueError as error:
        raise UserError(f"{where}: '{name}' holds something else than numbers: {error}.", FIX) from None
    return numbers(values, shape, f"{where}: '{name}'")


def _sibling(exp: str, name: str) -> str:
    """The path of another of a frame's texts, flame/NAME/00000.txt, from flame/exp/00000.txt."""
    path = PurePosixPath(exp)
    return str(path.parent.parent / name / path.name)


def _read_flame(
    files: Folder, frames: Sequence[_Frame], version: str, expression: Floats, notes: list[str]
) -> FlameTrack | None:
    """FLAME's parameters where FateAvatar's files, or the tracker's, complete them.

    Raises:
        UserError: one of them is missing or wrong, or the tracker's has another camera than the frame.
    """
    tracked = _read_tracked(files, frames)
    if not any(files.has(_sibling(frames[0].exp, name)) for name in ("shape", "jaw", "eyes")):
        if tracked:
            track, found = flame_track(tracked, version)
            notes.extend(found)
            return track
        notes.append(
            "FLAME's shape, jaw and eyes are not in the dataset (stock INSTA leaves them out): its meshes are the head."
        )
        return None

    def texts(name: str, count: int) -> Floats:
        return np.stack([_read_text(files, _sibling(frame.exp, name), (count,), frame.where) for frame in frames])

    def turns(name: str, count: int) -> Floats:
        rows = texts(name, 6 * count).reshape(-1, count, 6)
        where = [f"{frame.where}: '{_sibling(frame.exp, name)}'" for frame in frames]
        return np.stack([rotvec_from_6d(row, place) for row, place in zip(rows, where, strict=True)])

    shapes = texts("shape", SHAPES)
    if np.abs(shapes - shapes[0]).max() > SAME:
        notes.append("FLAME's shape differs between frames: that of the first is taken, as FateAvatar does.")
    eyelids = texts("eyelids", 2) if files.has(_sibling(frames[0].exp, "eyelids")) else None
    still = np.zeros((len(frames), 3))
    return FlameTrack(
        version=version,
        shape=shapes[0],
        expression=expression,
        rotation=still,
        translation=still.copy(),
        neck=still.copy(),
        jaw=turns("jaw", 1)[:, 0],
        eyes=turns("eyes", 2),
        eyelids=eyelids,
    )


def _read_tracked(files: Folder, frames: Sequence[_Frame]) -> list[TrackedFrame]:
    """The tracker's own file of each frame, where the dataset has them."""
    names = [f"checkpoint/{PurePosixPath(frame.image).stem}.frame" for frame in frames]
    if not files.has(names[0]):
        return []
    tracked = [read_frame(files, name, frame.where) for name, frame in zip(names, frames, strict=True)]
    for frame, found in zip(frames, tracked, strict=True):
        if np.abs(found.T_cam_head @ frame.T_head_cam - np.eye(4)).max() > 10 * SAME:
            raise UserError(f"{frame.where}: 'transform_matrix' is another camera than that of {found.where}.", FIX)
    return tracked


def _take_others(files: Folder, images: Sequence[str]) -> None:
    """Count what belongs to the dataset and is not read as its files."""
    for name in ("canonical.obj", *(str(PurePosixPath("alpha") / PurePosixPath(image).name) for image in images)):
        if files.has(name):
            files.file(name)


def _notes(options: ReadOptions, sidecar: Sidecar | None) -> list[str]:
    notes = []
    if options.fps is None and sidecar is None:
        notes.append(f"The layout tells no frame rate: {DEFAULT_FPS} a second are taken, metrical-tracker's default.")
    if options.flame is None and sidecar is None:
        notes.append("The layout does not say which FLAME it belongs to: 2020 is taken, which metrical-tracker has.")
    return notes


def write(
    recording: Recording,
    pictures: Pictures,
    folder: Path,
    *,
    flame: Flame | None,
    sidecar: Sidecar,
    on_frame: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write the dataset, with what INSTA-pytorch (depth, parsing) and FateAvatar (FLAME as text, alpha) ask for.

    The neck's turn goes into the camera, as no file has a place for it: meshes are FLAME's with root and neck at rest.
    Pictures end below the neck, where INSTA removes clothes; those of an INSTA dataset stay as they are. `seg_mask` is
    a rough parsing by the mesh: what it covers is face, eyes or neck, what else is seen is hair above the neck's end
    and cloth below; lips are not told from skin.

    Args:
        recording: one camera; its FLAME has up to 300 shape and 100 expression coefficients.
        pictures: of the recording.
        folder: an empty one, or one that is not there yet.
        flame: the one that the recording's numbers belong to.
        sidecar: what lies beside; basis and names are set here.
        on_frame: called once for each frame.

    Returns:
        Warnings, one sentence each.

    Raises:
        UserError: what the layout cannot hold, or loaders would misread.
    """
    from pipeline.geometry import transform_points

    track, flame, warnings = _checked(recording, flame, folder)
    splits = _splits(recording, warnings)
    own = recording.format == "insta" and bool(recording.images)
    keep = own and not sidecar.rectified
    digits = max(5, len(str(recording.numbers[-1])))
    names = [f"{number:0{digits}d}" for number in recording.numbers.tolist()]
    for name in (*_FOLDERS, *(f"flame/{text}" for text in _TEXTS)):
        (folder / name).mkdir(parents=True, exist_ok=True)

    parts = _Parts.of(flame)
    write_obj(folder / "canonical.obj", _canonical(track, flame), flame.faces, MESH_DIGITS, sync=False)
    frames = []
    for row, (vertices, T_cam_mesh) in enumerate(_posed(recording, track, flame)):
        name = names[row]
        write_obj(folder / f"meshes/{name}.obj", vertices, flame.faces, MESH_DIGITS, sync=False)
        tracked = _tracked(recording, track, row, T_cam_mesh)
        (folder / f"checkpoint/{name}.frame").write_bytes(frame_bytes(tracked, name))
        _write_text(folder, name, tracked)
        in_camera = transform_points(T_cam_mesh, vertices)
        _write_pictures(folder, name, *pictures(row), parts, in_camera, recording.Ks[row], cut=not own)
        frames.append(
            {
                "transform_matrix": np.linalg.inv(T_cam_mesh).tolist(),
                "file_path": f"images/{name}.png",
                "mesh_path": f"meshes/{name}.obj",
                "exp_path": f"flame/exp/{name}.txt",
                "depth_path": f"depth/{name}.png",
                "seg_mask_path": f"seg_mask/{name}.png",
                **(recording.frame_extra[row] if keep and recording.frame_extra else {}),
            }
        )
        on_frame()
    top = _top(recording)
    for file, rows in {FILE: range(len(frames)), **{SPLITS[name]: rows for name, rows in splits.items()}}.items():
        extra = recording.extra.get(file, {}) if keep else {}
        write_json(folder / file, {**top, "frames": [frames[row] for row in rows], **extra})
    basis = f"{flame.name}-expression-{EXPRESSIONS}"
    coefficients = tuple(f"{basis}/{index:03d}" for index in range(EXPRESSIONS))
    write_sidecar(folder, replace(sidecar, basis=basis, names=coefficients, flame=flame.name))
    return warnings


_FOLDERS = ("images", "matted", "seg_mask", "depth", "meshes", "alpha", "checkpoint")
_TEXTS = ("exp", "shape", "jaw", "eyes", "eyelids")


def _checked(recording: Recording, flame: Flame | None, folder: Path) -> tuple[FlameTrack, Flame, list[str]]:
    """FLAME's parameters and model where the layout can hold them, and what is lost.

    Raises:
        UserError: it cannot.
    """
    track, flame = flame_of(recording, flame, "INSTA", VERSION, SHAPES, EXPRESSIONS)
    K = recording.Ks[0]
    if np.abs(recording.Ks - K).max() > 1e-9 or K[0, 1]:
        raise UserError(
            "INSTA's layout has one camera without skew, this one's focal length or centre moves.", "rectify it first"
        )
    for word in ("images", "png"):
        if word in str(folder.resolve()):
            raise UserError(
                f"INSTA-pytorch finds a frame's files by the words 'images' and 'png' in its path, and "
                f"'{folder.resolve()}' has '{word}' as well.",
                "name another folder with --out",
            )
    warnings = []
    if flame.name != VERSION:
        warnings.append(
            f"The numbers belong to {flame.name}: INSTA needs the meshes only, FateAvatar reads them as FLAME 2020's, "
            "so put that file in the place of its own."
        )
    if np.abs(K[:2, 2] * 2 - recording.size).max() > 0.5:
        warnings.append(
            "The principal point lies off the centre: INSTA and INSTA-pytorch heed that, FateAvatar does not."
        )
    if track.eyelids is not None and track.eyelids.any():
        warnings.append("The eyelids' two shapes of metrical-tracker are written as numbers; the meshes are without.")
    if track.neck.any():
        warnings.append(
            "The neck's turns went into the camera, for the layout has no place for them: meshes show them, FateAvatar "
            "has the lower neck unturned."
        )
    if track.static_offset is not None and track.static_offset.any():
        warnings.append("FLAME's static offset is in the meshes only: FateAvatar's numbers have no place for it.")
    if flame.template.shape[0] != 5023:
        raise UserError(f"INSTA's tools know FLAME's 5,023 vertices, not {flame.template.shape[0]}.", "use FLAME's own")
    return track, flame, warnings


def _splits(recording: Recording, warnings: list[str]) -> dict[str, list[int]]:
    """Rows to train, test and validate on: the recording's own, else the last frames as INSTA's script has them."""
    count = len(recording)
    found = {name: sorted(set(recording.splits.get(name, ()))) for name in SPLITS}
    if not (found["train"] and found["test"]):
        held = min(TEST_FRAMES, max(1, count // 3))
        found = {"train": list(range(count - held)) or [0], "test": list(range(count - held, count)), "val": []}
        if held < TEST_FRAMES:
            warnings.append(
                f"Of {count} frames the last {held} are for testing, so that enough are left for training; INSTA's "
                f"script takes {TEST_FRAMES}, and its README asks for 1,000 frames or more."
            )
    found["val"] = found["val"] or found["test"][-VAL_FRAMES:]
    return found


def _posed(recording: Recording, track: FlameTrack, flame: Flame) -> Iterator[tuple[Floats, Floats]]:
    """Of each frame: FLAME's vertices [5023,3] with root and neck at rest, and where that frame is in the camera."""
    import torch

    from pipeline.geometry import invert_rigid, make_rigid, rotvec_to_matrix, transform_points

    shape = torch.from_numpy(track.shape)
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[: len(flame.template)])
    for start in range(0, len(recording), BATCH):
        rows = slice(start, start + BATCH)
        expression, neck, jaw, eyes = (
            torch.from_numpy(np.ascontiguousarray(part[rows]))
            for part in (track.expression, track.neck, track.jaw, track.eyes)
        )
        joints = flame.joints(shape, expression, offset).numpy()
        head = replace(recording, numbers=recording.numbers[rows], Ts_cam_world=recording.Ts_cam_world[rows])
        moved = replace(track, rotation=track.rotation[rows], translation=track.translation[rows])
        Ts_cam_head = replace(head, flame=moved).Ts_cam_head(joints[:, 0])
        turns, at = rotvec_to_matrix(track.neck[rows]), joints[:, 1]
        Ts_head_mesh = make_rigid(turns, at - np.einsum("tij,tj->ti", turns, at))
        still = torch.zeros(len(expression), 3, dtype=torch.float64)
        vertices = flame.vertices(shape, expression, still, neck, jaw, eyes, still, offset).numpy()
        yield from zip(transform_points(invert_rigid(Ts_head_mesh), vertices), Ts_cam_head @ Ts_head_mesh, strict=True)


def _canonical(track: FlameTrack, flame: Flame) -> Floats:
    """Vertices [5023,3] of the neutral face with the jaw open, where INSTA's volume lies."""
    import torch

    still = torch.zeros(1, 3, dtype=torch.float64)
    jaw = torch.tensor([[CANONICAL_JAW_RAD, 0, 0]], dtype=torch.float64)
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[: len(flame.template)])
    found: Floats = flame.vertices(
        torch.from_numpy(track.shape),
        torch.zeros(1, 0, dtype=torch.float64),
        still,
        still,
        jaw,
        torch.zeros(1, 2, 3, dtype=torch.float64),
        still,
        offset,
    )[0].numpy()
    return found


def _top(recording: Recording) -> dict[str, float]:
    """What stands above the frames, all of it as INSTA's script writes it: floats."""
    (width, height), K = recording.size, recording.Ks[0]
    angles = [2 * math.atan2(side, 2 * focal) for side, focal in ((width, K[0, 0]), (height, K[1, 1]))]
    return {
        "w": float(width),
        "h": float(height),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "fl_x": float(K[0, 0]),
        "fl_y": float(K[1, 1]),
        "camera_angle_x": angles[0],
        "camera_angle_y": angles[1],
        "x_fov": math.degrees(angles[0]),
        "y_fov": math.degrees(angles[1]),
        "integer_depth_scale": 1 / MM,
    }


def _tracked(recording: Recording, track: FlameTrack, row: int, T_cam_mesh: Floats) -> TrackedFrame:
    """A frame as metrical-tracker has it. Coefficients that are not there are zero, which changes no vertex."""
    return TrackedFrame(
        where="",
        size=recording.size,
        K=recording.Ks[row],
        T_cam_head=T_cam_mesh,
        shape=np.pad(track.shape, (0, SHAPES - len(track.shape))),
        expression=np.pad(track.expression[row], (0, EXPRESSIONS - track.expression.shape[1])),
        jaw=track.jaw[row],
        eyes=track.eyes[row],
        eyelids=np.zeros(2) if track.eyelids is None else track.eyelids[row],
    )


def _write_text(folder: Path, name: str, frame: TrackedFrame) -> None:
    values = {
        "exp": frame.expression,
        "shape": frame.shape,
        "jaw": rotvec_to_6d(frame.jaw),
        "eyes": rotvec_to_6d(frame.eyes).ravel(),
        "eyelids": frame.eyelids,
    }
    for text in _TEXTS:
        lines = [f"{value:.8f}\n" for value in values[text].tolist()]
        (folder / f"flame/{text}/{name}.txt").write_text("".join(lines))


@dataclass(frozen=True, eq=False)
class _Parts:
    """What `seg_mask` says of FLAME's mesh.

    Attributes:
        faces: [F,3].
        codes: [F] red of each triangle.
        head, rim: vertices of the head, and around the open end of the neck.
    """

    faces: NDArray[np.int32]
    codes: NDArray[np.uint8]
    head: NDArray[np.int64]
    rim: NDArray[np.int64]

    @classmethod
    def of(cls, flame: Flame) -> _Parts:
        """By skinning weights and by where the template lies about its eyes, in units of their distance."""
        from pipeline.heads.flame import EYES, ROOT
        from pipeline.heads.flame import NECK as HEAD

        vertices, weights, faces = flame.template.numpy(), flame.weights.numpy(), flame.faces
        joints = flame.regressor.numpy() @ vertices
        left, right = sorted(EYES, key=lambda eye: -joints[eye, 0])
        unit = float(np.linalg.norm(joints[left] - joints[right]))
        up, ahead = ((vertices - joints[EYES].mean(0))[:, 1:] / unit).T
        codes = np.where((up < HAIRLINE) & (ahead > -EARS), FACE, HAIR).astype(np.uint8)
        codes[weights[:, ROOT] > 0.5] = NECK
        codes[weights[:, left] > 0.5] = LEFT_EYE
        codes[weights[:, right] > 0.5] = RIGHT_EYE
        edges = np.sort(np.concatenate([faces[:, pair] for pair in ((0, 1), (1, 2), (2, 0))]), 1)
        edges, uses = np.unique(edges, axis=0, return_counts=True)
        open_edge = np.zeros(len(vertices), bool)
        open_edge[edges[uses == 1]] = True
        head = np.flatnonzero(weights[:, HEAD] > 0.5)
        rim = np.flatnonzero(open_edge & (weights[:, ROOT] > 0.5))
        return cls(faces.astype(np.int32), codes[faces[:, 0]], head, rim)


def _write_pictures(
    folder: Path,
    name: str,
    rgb: NDArray[np.uint8],
    alpha: NDArray[np.uint8],
    parts: _Parts,
    in_camera: Floats,
    K: Floats,
    *,
    cut: bool,
) -> None:
    """A frame's pictures; `cut` takes away what lies below the neck's end, beside the mesh. `in_camera`: vertices."""
    from pipeline.geometry import project_points
    from pipeline.mesh_render import rasterize_mesh

    height, width = alpha.shape
    raster = rasterize_mesh(in_camera, parts.faces, K, width, height)
    covered = raster.face_index >= 0
    parsing = np.where(alpha > 127, HAIR, BACKGROUND).astype(np.uint8)
    if len(parts.rim):
        head, rim = (project_points(in_camera[part], K).mean(0) for part in (parts.head, parts.rim))
        y, x = np.mgrid[:height, :width] + 0.5
        below = (x - rim[0]) * (rim - head)[0] + (y - rim[1]) * (rim - head)[1] > 0
        parsing[below & (parsing == HAIR)] = CLOTH
        if cut:
            alpha = np.where(below & ~covered, 0, alpha).astype(np.uint8)
    on_head = covered & (alpha > 127)
    parsing[on_head] = parts.codes[raster.face_index[on_head]]
    matted = np.dstack([np.where(alpha[..., None] > 0, rgb, 0), alpha]).astype(np.uint8)
    depth = np.where(covered, raster.depth * MM, 0).clip(0, 65535).round().astype(np.uint16)
    save_image(folder / f"images/{name}.png", matted)
    link_or_copy(folder / f"images/{name}.png", folder / f"matted/{name}.png")
    save_image(folder / f"alpha/{name}.png", alpha)
    save_image(folder / f"seg_mask/{name}.png", np.dstack([parsing, *[np.zeros_like(parsing)] * 2]))
    save_image(folder / f"depth/{name}.png", depth)
