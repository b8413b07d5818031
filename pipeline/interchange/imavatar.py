"""IMavatar's and PointAvatar's layout: `flame_params.json` beside image/ and mask/, FLAME at four times its size.

The formulas are those of the loaders (zhengyuf/IMavatar `code/datasets/real_dataset.py`, `code/utils/rend_util.py`;
zhengyuf/PointAvatar `code/datasets/real_dataset.py`): `p = R (4 X) + t` with `world_mat = [R | t]`, the camera looks
along -z, and `u / S = k0 x / z + k2`, `v / S = k1 y / z + k3` with `intrinsics = k`, `k0 < 0`, and S the side of the
square pictures. Videos of a subject lie beside each other; a pair NAME_train and NAME_test is one recording.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from pipeline.interchange.recording import FlameTrack, Pictures, Recording
from pipeline.interchange.sidecar import Sidecar, flame_version, read_sidecar, write_sidecar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads.flame import Flame

    Floats = NDArray[np.float64]

RECTIFY: Literal["", "centred", "square"] = "square"
FILE = "flame_params.json"
VERSION = "flame2020"
"""The FLAME that the loaders read."""
SHAPES, EXPRESSIONS = 100, 50
SCALE = 4.0
"""Their lengths are metres times this."""
OLD_SIZE = 512
"""Of the pictures that `intrinsics` in pixels belong to: what the loader calls an old form."""
GL = np.diag([1.0, -1.0, -1.0])
"""Between OpenCV's axes and a camera that looks along -z, either way."""
AROUND = ("keypoint.json", "iris.json", "code.json")
"""What the preprocessing leaves beside; no loader reads it."""
BATCH = 256
"""Frames whose vertices are held at once."""


def detect(folder: Path) -> bool:
    """Whether there is a `flame_params.json` in the folder or up to three below it (root, subject, subject, video)."""
    return bool(_videos(folder))


def read(folder: Path, options: ReadOptions) -> Recording:
    """Read and check the dataset.

    Args:
        folder: the folder of a video, or one above that holds one video, or a pair NAME_train and NAME_test.
        options: what the layout does not tell.

    Raises:
        UserError: the first thing that is wrong, with its file, frame and key; or there are several videos.
    """
    files = Folder(folder)
    videos = [_read_video(files, name) for name in _chosen(folder)]
    first = videos[0]
    for other in videos[1:]:
        for key in ("intrinsics", "shape_params"):
            if not np.array_equal(first.shared[key], other.shared[key]):
                raise UserError(f"'{other.file}': '{key}' differs from that of '{first.file}'.", FIX)
        if {frame.number for frame in first.frames} & {frame.number for frame in other.frames}:
            raise _several(folder, [str(PurePosixPath(video.file).parent) for video in videos])
    sidecar = read_sidecar(files) or read_sidecar(Folder((folder / first.file).parent))
    version = flame_version(options.flame, sidecar) or VERSION
    frames = [frame for video in videos for frame in video.frames]
    order = list(rising([frame.number for frame in frames], " and ".join(f"'{video.file}'" for video in videos)))
    splits = {}
    if len(videos) == 2:
        of_train = len(first.frames)
        splits = {
            "train": tuple(row for row, at in enumerate(order) if at < of_train),
            "test": tuple(row for row, at in enumerate(order) if at >= of_train),
        }
    frames = [frames[at] for at in order]

    where, images, masks = ([getattr(frame, name) for frame in frames] for name in ("where", "image", "mask"))
    size = files.picture_size(images[0], where[0])
    if size[0] != size[1]:
        raise UserError(
            f"{where[0]}: the image '{images[0]}' is {size[0]}x{size[1]}, expected a square.",
            "the loaders know square pictures only; crop them and their camera with IMavatar's preprocess.sh",
        )
    check_pictures(files, images, size, where, "image")
    check_pictures(files, masks, size, where, "mask")
    for image in images:
        semantic = image.replace("image", "semantic")
        if files.has(semantic):
            files.file(semantic)
    for video in videos:
        for name in AROUND:
            beside = str(PurePosixPath(video.file).with_name(name))
            if files.has(beside):
                files.file(beside)

    poses = np.stack([frame.pose for frame in frames])
    world_mats = np.stack([frame.world_mat for frame in frames])
    Ts_cam_world = np.repeat(np.eye(4)[None], len(frames), 0)
    Ts_cam_world[:, :3, :3] = GL @ world_mats[:, :3, :3]
    Ts_cam_world[:, :3, 3] = world_mats[:, :3, 3] / SCALE @ GL
    expression = np.stack([frame.expression for frame in frames])
    basis = f"{version}-expression-{EXPRESSIONS}"
    zero_based = min(frame.number for frame in frames) == 0
    return Recording(
        format="imavatar",
        size=size,
        fps=options.fps or (Fraction(sidecar.fps) if sidecar else DEFAULT_FPS),
        numbers=np.array([frame.number - (not zero_based) for frame in frames], np.int64),
        Ks=np.repeat(_pixel_matrix(first.shared["intrinsics"], size[0])[None], len(frames), 0),
        Ts_cam_world=Ts_cam_world,
        images=tuple(images),
        alpha="masks",
        masks=tuple(masks),
        basis=basis,
        coefficient_names=_coefficient_names(basis),
        coefficients=expression,
        flame=FlameTrack(
            version=version,
            shape=first.shared["shape_params"],
            expression=expression,
            rotation=poses[:, :3],
            neck=poses[:, 3:6],
            jaw=poses[:, 6:9],
            eyes=poses[:, 9:].reshape(-1, 2, 3),
            translation=np.zeros((len(frames), 3)),
        ),
        splits=splits,
        files=tuple(files.used),
        extra={video.file: video.extra for video in videos if video.extra},
        frame_extra=tuple(frame.extra for frame in frames),
        notes=tuple(_notes(options, sidecar, world_mats)),
    )


@dataclass(frozen=True)
class _Frame:
    """A frame as the file has it. `pose` [15], `world_mat` [4,4]; `extra`: keys that are kept as they stand."""

    where: str
    number: int
    image: str
    mask: str
    world_mat: Floats
    expression: Floats
    pose: Floats
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class _Video:
    """A `flame_params.json`; `shared`: `intrinsics` [4] relative to the side, `shape_params` [100]."""

    file: str
    frames: list[_Frame]
    shared: Mapping[str, Floats]
    extra: Mapping[str, Any]


def _videos(folder: Path) -> list[str]:
    """The folders, relative, that hold a `flame_params.json`: the uppermost ones."""
    for pattern in (FILE, f"*/{FILE}", f"*/*/{FILE}", f"*/*/*/{FILE}"):
        found = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def _chosen(folder: Path) -> list[str]:
    """The video that is there, or a pair NAME_train and NAME_test.

    Raises:
        UserError: there is none, or another choice.
    """
    videos = _videos(folder)
    if len(videos) == 2 and sorted(videos) == sorted(f"{videos[0].rpartition('_')[0]}_{part}" for part in _PARTS):
        return sorted(videos, reverse=True)
    if len(videos) != 1:
        if not videos:
            raise UserError(f"There is no '{FILE}' in '{folder}' or up to three folders below it.", "name its folder")
        raise _several(folder, videos)
    return videos


def _several(folder: Path, videos: Sequence[str]) -> UserError:
    names = ", ".join(videos[:8]) + (f" and {len(videos) - 8} more" if len(videos) > 8 else "")
    return UserError(
        f"'{folder}' holds {len(videos)} videos: {names}.", f"name the folder of one, such as '{folder / videos[0]}'"
    )


_PARTS = ("train", "test")


def _read_video(files: Folder, folder: str) -> _Video:
    name = str(PurePosixPath(folder) / FILE)
    document = files.json(name)
    intrinsics = document.take("intrinsics", (4,))
    if intrinsics[3] > 1:
        intrinsics = intrinsics / OLD_SIZE
    fx, fy = intrinsics[:2]
    if fx > 0:
        raise document.wrong(f"'intrinsics' begins with {fx:g}: a camera that looks along -z has a negative fx there")
    if not (0.1 <= -fx <= 100 and 0.1 <= fy <= 100):
        raise document.wrong(f"'intrinsics' has the focal lengths {-fx:g} and {fy:g}, expected sides of the picture")
    shared = {"intrinsics": intrinsics, "shape_params": document.take("shape_params", (SHAPES,))}
    frames = [_read_frame(frame, folder) for frame in document.items("frames")]
    return _Video(name, frames, shared, document.rest())


def _read_frame(frame: Document, folder: str) -> _Frame:
    path = frame.text("file_path")
    number = PurePosixPath(path).name
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise frame.wrong(f"'file_path' is '{path[:80]}': its last part is no number")
    if path.count("image") != 1:
        raise frame.wrong(
            f"'file_path' is '{path[:80]}', expected 'image' in it once: the mask's path has 'mask' there"
        )
    image = f"{PurePosixPath(folder) / path}.png"
    world_mat = frame.pose("world_mat", rows=3)
    if world_mat[2, 3] >= 0:
        raise frame.wrong(f"'world_mat' puts the head behind the camera, at z = {world_mat[2, 3]:g}; it looks along -z")
    pose, expression = frame.take("pose", (15,)), frame.take("expression", (EXPRESSIONS,))
    extra = frame.rest()
    if "bbox" in extra:
        numbers(extra["bbox"], (4,), f"{frame.where}: 'bbox'")
    if "flame_keypoints" in extra:
        numbers(extra["flame_keypoints"], (None, 2), f"{frame.where}: 'flame_keypoints'")
    mask = str(PurePosixPath(folder) / f"{path}.png".replace("image", "mask"))
    return _Frame(frame.where, int(number), image, mask, world_mat, expression, pose, extra)


def _notes(options: ReadOptions, sidecar: Sidecar | None, world_mats: Floats) -> list[str]:
    notes = []
    if options.fps is None and sidecar is None:
        notes.append(f"The layout tells no frame rate: {DEFAULT_FPS} a second are taken, as its preprocess.sh has.")
    if options.flame is None and sidecar is None:
        notes.append("The layout does not say which FLAME it belongs to: 2020 is taken, which its loaders read.")
    if np.abs(world_mats[:, :3, :3] - np.eye(3)).max() > 1e-6:
        notes.append("The camera turns in world_mat: read as IMavatar does; PointAvatar puts such heads elsewhere.")
    return notes


def _coefficient_names(basis: str) -> tuple[str, ...]:
    return tuple(f"{basis}/{index:03d}" for index in range(EXPRESSIONS))


def _pixel_matrix(intrinsics: Floats, side: int) -> Floats:
    fx, fy, cx, cy = intrinsics * side
    return np.array([[-fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def write(
    recording: Recording,
    pictures: Pictures,
    folder: Path,
    *,
    flame: Flame | None,
    sidecar: Sidecar,
    on_frame: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write the dataset: SUBJECT/SUBJECT/SUBJECT_train (and _test), as IMavatar and PointAvatar look for it.

    Beside image/ and mask/ a video has matted/ (FateAvatar) and images/ (SplattingAvatar), the same RGBA pictures.

    Args:
        recording: its pictures are square, its FLAME has at most 100 shape and 50 expression coefficients.
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
    track, flame, warnings = _checked(recording, flame, folder)
    name = sidecar.subject.replace("image", "picture")
    if name != sidecar.subject:
        warnings.append(f"Folders are named '{name}': the loaders take each 'image' of a path for 'mask'.")
    world_mats, rotations, boxes = _placed(recording, track, flame)
    keep = recording.format == "imavatar" and not sidecar.rectified
    side = recording.size[0]
    K = recording.Ks[0]
    intrinsics = [-K[0, 0] / side, K[1, 1] / side, K[0, 2] / side, K[1, 2] / side]

    basis = f"{flame.name}-expression-{EXPRESSIONS}"
    sidecar = replace(sidecar, basis=basis, names=_coefficient_names(basis), flame=flame.name)
    test = sorted(set(recording.splits.get("test", ())))
    parts = {"train": [row for row in range(len(recording)) if row not in set(test)], "test": test}
    parts = {part: rows for part, rows in parts.items() if rows}
    if "train" not in parts:
        parts = {"train": test}
    for part, rows in parts.items():
        video = folder / name / name / f"{name}_{part}"
        for each in ("image", "mask", "matted", "images"):
            (video / each).mkdir(parents=True, exist_ok=True)
        frames = []
        for row in rows:
            number = int(recording.numbers[row]) + 1
            _write_pictures(video, number, *pictures(row))
            frames.append(
                {
                    "file_path": f"./image/{number}",
                    "world_mat": world_mats[row].tolist(),
                    "expression": track.expression[row].tolist(),
                    "pose": np.concatenate(
                        [rotations[row], track.neck[row], track.jaw[row], track.eyes[row].ravel()]
                    ).tolist(),
                    "bbox": boxes[row].tolist(),
                    **(recording.frame_extra[row] if keep and recording.frame_extra else {}),
                }
            )
            on_frame()
        write_json(
            video / FILE,
            {
                "frames": frames,
                "intrinsics": intrinsics,
                "shape_params": track.shape.tolist(),
                **(_kept(recording, part) if keep else {}),
            },
        )
        write_sidecar(video, replace(sidecar, numbers=tuple(int(recording.numbers[row]) for row in rows)))
    write_sidecar(folder, sidecar)
    (folder / "dataset.conf").write_text(_settings(name, recording, parts))
    return warnings


def _checked(recording: Recording, flame: Flame | None, folder: Path) -> tuple[FlameTrack, Flame, list[str]]:
    """FLAME's parameters and model where the layout can hold them, and what is lost.

    Raises:
        UserError: it cannot.
    """
    track, flame = flame_of(recording, flame, "IMavatar", VERSION, SHAPES, EXPRESSIONS)
    if track.static_offset is not None and track.static_offset.any():
        raise UserError(
            "IMavatar's layout has no place for FLAME's static offset.", "refit without it, or export another layout"
        )
    if recording.size[0] != recording.size[1]:
        raise UserError(
            f"IMavatar's loaders know square pictures only, not {recording.size[0]}x{recording.size[1]}.",
            "rectify the pictures first",
        )
    if np.abs(recording.Ks - recording.Ks[0]).max() > 1e-9:
        raise UserError(
            "IMavatar's layout has one camera for all frames; this one's intrinsics change.", "rectify it first"
        )
    if "image" in str(folder.resolve()):
        raise UserError(
            f"IMavatar's and PointAvatar's loaders take each 'image' of a path for 'mask', as in '{folder.resolve()}'.",
            "name a folder without 'image' in its path with --out",
        )
    warnings = []
    if flame.name != VERSION:
        warnings.append(
            f"The numbers belong to {flame.name}, the loaders read FLAME 2020: put that file in the place of their "
            "FLAME2020/generic_model.pkl, or the head is another one."
        )
    if track.eyelids is not None and track.eyelids.any():
        warnings.append("The eyelids' two shapes of metrical-tracker are left out: FLAME has none.")
    shape = np.pad(track.shape, (0, SHAPES - len(track.shape)))
    expression = np.pad(track.expression, ((0, 0), (0, EXPRESSIONS - track.expression.shape[1])))
    return replace(track, shape=shape, expression=expression), flame, warnings


def _placed(recording: Recording, track: FlameTrack, flame: Flame) -> tuple[Floats, Floats, Floats]:
    """`world_mat` [T,3,4] whose rotation is the identity, head rotations [T,3], and `bbox` [T,4]."""
    import torch

    from pipeline.geometry import matrix_to_rotvec, project_points, transform_points

    shape, expression = torch.from_numpy(track.shape), torch.from_numpy(track.expression)
    roots = np.concatenate([flame.joints(shape, part)[:, 0].numpy() for part in expression.split(BATCH)])
    Ts_cam_head = recording.Ts_cam_head(roots)
    rotations = GL @ Ts_cam_head[:, :3, :3]
    translations = Ts_cam_head[:, :3, 3] @ GL + np.einsum("tij,tj->ti", rotations, roots) - roots
    world_mats = np.zeros((len(recording), 3, 4))
    world_mats[:, :, :3] = np.eye(3)
    world_mats[:, :, 3] = SCALE * translations

    # What hangs on the jaw and the eyes spans the face about as the landmarks do whose box the preprocessing writes.
    face = flame.weights[:, 2:].sum(1).numpy() > 0.5
    still = torch.zeros(len(recording), 3, dtype=torch.float64)
    turns = [torch.from_numpy(np.ascontiguousarray(part)) for part in (track.neck, track.jaw, track.eyes)]
    boxes = np.empty((len(recording), 4))
    for start in range(0, len(recording), BATCH):
        rows = slice(start, start + BATCH)
        neck, jaw, eyes = (turn[rows] for turn in turns)
        vertices = flame.vertices(shape, expression[rows], still[rows], neck, jaw, eyes, still[rows])
        points = transform_points(Ts_cam_head[rows], vertices[:, face].numpy())
        seen = project_points(points, recording.Ks[rows]) / recording.size[0] * 2 - 1
        boxes[rows] = np.concatenate([seen.min(1), seen.max(1)], 1).clip(-1, 1)
    outside = (boxes[:, :2] >= boxes[:, 2:]).any(1)
    boxes[outside] = (-1, -1, 1, 1)
    return world_mats, matrix_to_rotvec(rotations), boxes


def _write_pictures(video: Path, number: int, rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> None:
    save_image(video / "image" / f"{number}.png", rgb)
    save_image(video / "mask" / f"{number}.png", alpha)
    matted = np.dstack([np.where(alpha[..., None] > 0, rgb, 0), alpha]).astype(np.uint8)
    save_image(video / "matted" / f"{number}.png", matted)
    link_or_copy(video / "matted" / f"{number}.png", video / "images" / f"{number}.png")


def _kept(recording: Recording, part: str) -> dict[str, Any]:
    """Unknown keys of the file that this part was read from."""
    of_test = {name: PurePosixPath(name).parent.name.endswith("_test") for name in recording.extra}
    return {
        key: value
        for name, values in recording.extra.items()
        if of_test[name] == (part == "test") or not any(of_test.values())
        for key, value in values.items()
    }


def _settings(name: str, recording: Recording, parts: Mapping[str, Sequence[int]]) -> str:
    """What the loaders' own settings must say, as text of their `.conf` files."""
    side = recording.size[0]
    centred = np.abs(recording.Ks[0, :2, 2] - side / 2).max() < 0.5
    fateavatar = f"root_path = {name}/{name}" if centred else "takes the camera for centred, which it is not: use insta"
    test = f"{name}_{'test' if 'test' in parts else 'train'}"
    return f"""\
# Settings for IMavatar's and PointAvatar's .conf files; data_folder is the folder that holds this file.
dataset{{
    data_folder = ../data/datasets
    subject_name = {name}
    json_name = flame_params.json
    train{{
        sub_dir = [{name}_train]
        img_res = [{side}, {side}]
    }}
    test{{
        sub_dir = [{test}]
        img_res = [{side}, {side}]
    }}
}}
model{{
    deformer_network{{
        ghostbone = True  # FLAME's root turns with the head
    }}
}}
loss{{
    gt_w_seg = False  # IMavatar: there is no semantic/ here
}}
# SplattingAvatar: dat_dir = {name}/{name}/{name}_train with num_for_train = {len(parts["train"])}
# FateAvatar: {fateavatar}
"""
