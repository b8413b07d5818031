"""VHAP's export, which GaussianAvatars and LAM read: `transforms.json` with a FLAME file a frame.

Facts from ShenhanQian/VHAP `vhap/export_as_nerf_dataset.py`, `vhap/util/camera.py`, ShenhanQian/GaussianAvatars
`scene/dataset_readers.py`, `scene/flame_gaussian_model.py` and aigc3d/LAM `lam/runners/infer/head_utils.py`: cameras
are camera-to-world with OpenGL's axes; the head moves in FLAME's rotation and translation before a camera that stands
still; GaussianAvatars knows `camera_angle_x` only, so the principal point is the middle and fy is fx. VHAP counts `cy`
from the bottom for calibrated cameras and LAM from the top: only a centred one means the same to all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.dataset import write_json
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

RECTIFY: Literal["", "centred", "square"] = "centred"
VERSION = "flame2023"
"""The FLAME that VHAP and GaussianAvatars read."""
SHAPES, EXPRESSIONS = 300, 100
VERTICES, WITH_TEETH = 5023, 5143
TRAIN_SHARE = 0.7
CENTRED_PX = 0.01
"""A principal point that is so near the middle means the same counted from above and from below."""
GL = np.diag([1.0, -1.0, -1.0, 1.0])
POSES = {"translation": 3, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6}
SPLITS = ("train", "val", "test")
MAX_KEPT = 1000
"""Of an unknown array's values; a mesh a frame would make a recording of hundreds of megabytes."""
STILL = 1e-6
"""A camera that moves less (metres, radians) stands still: what single precision loses of the head moves it so."""


def detect(folder: Path) -> bool:
    """Whether the frames of `transforms.json` name FLAME files, or time steps with meshes: VHAP's other mode."""
    files = Folder(folder)
    if not files.has("transforms.json"):
        return False
    try:
        frames = files.json("transforms.json").values.get("frames")
    except (UserError, OSError):
        return False
    first = frames[0] if isinstance(frames, list) and frames else None
    return isinstance(first, dict) and ("flame_param_path" in first or {"timestep_index", "mesh_path"} <= set(first))


def read(folder: Path, options: ReadOptions) -> Recording:
    """Read and check the dataset.

    Args:
        folder: the folder with `transforms.json`.
        options: what the layout does not tell.

    Raises:
        UserError: the first thing that is wrong, with its file, frame and key.
    """
    files = Folder(folder)
    if not files.has("transforms.json") and any(folder.glob("tracked_flame_params*.npz")):
        raise UserError(
            f"'{folder}' holds what VHAP's tracker leaves; its export is read, which has the pictures with it.",
            f"run VHAP's: python vhap/export_as_nerf_dataset.py --src_folder {folder} --tgt_folder FOLDER",
        )
    document = files.json("transforms.json")
    sidecar = read_sidecar(files)
    version = flame_version(options.flame, sidecar) or VERSION
    for name in ("timestep_indices", "camera_indices"):
        document.take(name, (None,))
    items = document.items("frames")
    if "mesh_path" in items[0] and "flame_param_path" not in items[0]:
        raise UserError(
            f"{document.where} names meshes of each frame, and no FLAME parameters.",
            "export it from VHAP again with --flame_mode param",
        )
    found = [_read_frame(frame, document) for frame in items]
    cameras = sorted({each.camera for each in found})
    if len(cameras) > 1:
        raise UserError(
            f"{document.where} has {len(cameras)} cameras, such as camera_index {cameras[0]} and {cameras[1]}; a "
            "sequence of one is read.",
            "keep the frames of one camera in it, and in its split files",
        )
    frames = [found[at] for at in rising([each.number for each in found], document.where)]
    rising([each.timestep for each in frames], f"{document.where}, timestep_index")
    first = frames[0]
    for each in frames:
        if each.size != first.size:
            raise UserError(
                f"{each.where}: 'w' and 'h' are {each.size[0]} and {each.size[1]}, {first.size[0]} and {first.size[1]} "
                f"in {first.where}.",
                FIX,
            )
    where = [each.where for each in frames]
    check_pictures(files, [each.image for each in frames], first.size, where, "image")
    masks = [each.mask for each in frames if each.mask]
    if len(masks) not in (0, len(frames)):
        lacking = next(each.where for each in frames if not each.mask)
        raise UserError(f"{lacking}: 'fg_mask_path' is missing, other frames have one.", FIX)
    check_pictures(files, masks, first.size, where[: len(masks)], "mask")
    track, notes = _read_flame(files, frames, version)
    if files.has("canonical_flame_param.npz"):
        files.npz("canonical_flame_param.npz")
    else:
        notes.append("canonical_flame_param.npz is not there: GaussianAvatars would not know the set as VHAP's.")
    splits = _read_splits(files, {each.timestep: row for row, each in enumerate(frames)})
    for name in ("transforms_backup.json", "transforms_backup_flame.json"):
        if files.has(name):
            files.file(name)
    if options.fps is None and sidecar is None:
        notes.append(f"The layout tells no frame rate: {DEFAULT_FPS} a second are taken.")
    if options.flame is None and not (sidecar and sidecar.flame):
        notes.append("The layout does not say which FLAME it belongs to: 2023 is taken, which its programs read.")
    basis = f"{version}-expression-{track.expression.shape[1]}"
    own = {"cx", "cy", "fl_x", "fl_y", "h", "w", "camera_angle_x", "camera_angle_y"}
    extra = {key: value for key, value in document.rest().items() if key not in own}
    return Recording(
        format="vhap",
        size=first.size,
        fps=options.fps or (Fraction(sidecar.fps) if sidecar else DEFAULT_FPS),
        numbers=np.array([each.number for each in frames], np.int64),
        Ks=np.stack([each.K for each in frames]),
        Ts_cam_world=np.stack([GL @ np.linalg.inv(each.pose) for each in frames]),
        images=tuple(each.image for each in frames),
        alpha="masks" if masks else "none",
        masks=tuple(masks),
        basis=basis,
        coefficient_names=tuple(f"{basis}/{index:03d}" for index in range(track.expression.shape[1])),
        coefficients=track.expression,
        flame=track,
        splits=splits,
        files=tuple(files.used),
        extra={"transforms.json": extra} if extra else {},
        frame_extra=tuple(each.extra for each in frames) if any(each.extra for each in frames) else (),
        notes=tuple(notes),
    )


class _Frame:
    """A frame as the file has it."""

    def __init__(self, frame: Document, shared: Mapping[str, Any]) -> None:
        self.where = frame.where
        self.timestep = frame.integer("timestep_index")
        self.number = frame.integer("timestep_index_original") if "timestep_index_original" in frame else self.timestep
        self.camera = frame.integer("camera_index")
        # What only names a frame or a camera is not needed, but must be a name where it is there.
        self.names = {key: _name(frame, key) for key in ("timestep_id", "camera_id") if key in frame}
        self.pose = frame.pose("transform_matrix")
        self.image, self.flame = _png(frame.text("file_path")), frame.text("flame_param_path")
        self.mask = frame.text("fg_mask_path") if "fg_mask_path" in frame else ""
        self.size, self.K = _camera(Document({**shared, **frame.values}, frame.where))
        known = {"w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y"}
        self.extra = {key: value for key, value in frame.rest().items() if key not in known} | self.names


def _read_frame(frame: Document, document: Document) -> _Frame:
    shared = {key: value for key, value in document.values.items() if key != "frames"}
    return _Frame(frame, shared)


def _name(frame: Document, key: str) -> str | int:
    value = frame.raw(key)
    if not isinstance(value, str | int):
        raise frame.wrong(f"'{key}' is neither a text nor a whole number")
    return value


def _png(path: str) -> str:
    return path if ".png" in path else path + ".png"


def _camera(camera: Document) -> tuple[tuple[int, int], Floats]:
    """Size and K of a frame; what it lacks is the file's own.

    Raises:
        UserError: a key is wrong, angles do not fit the focal length, or the principal point is off the middle.
    """
    size = camera.integer("w", 1, 16384), camera.integer("h", 1, 16384)
    angle = camera.number("camera_angle_x", 1e-3, math.pi - 1e-3)
    from_angle = size[0] / (2 * math.tan(angle / 2))
    if "camera_angle_y" in camera:
        camera.number("camera_angle_y", 1e-3, math.pi - 1e-3)
    fx, fy = (camera.number(key, 1e-3, 1e7) if key in camera else from_angle for key in ("fl_x", "fl_y"))
    if abs(fx / from_angle - 1) > 1e-4:
        raise camera.wrong(f"'fl_x' is {fx:g}, 'camera_angle_x' says {from_angle:g}: readers take either")
    middle = size[0] / 2, size[1] / 2
    cx, cy = (camera.number(key) if key in camera else middle[axis] for axis, key in enumerate(("cx", "cy")))
    if abs(cy - middle[1]) > CENTRED_PX:
        raise UserError(
            f"{camera.where}: 'cy' is {cy:g}, the middle is {middle[1]:g}: VHAP counts it from the bottom for "
            "calibrated cameras and LAM from the top, so it is not known what is meant.",
            "rectify the pictures, so that the principal point is in their middle",
        )
    return size, np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _read_flame(files: Folder, frames: list[_Frame], version: str) -> tuple[FlameTrack, list[str]]:
    """FLAME's parameters of all frames, and notes; unknown arrays are kept with their frame."""
    poses: dict[str, list[Floats]] = {name: [] for name in POSES}
    expressions = []
    head: dict[str, Floats | None] = {}
    left_out: set[str] = set()
    for each in frames:
        arrays = files.npz(each.flame, each.where)
        for name, size in POSES.items():
            poses[name].append(arrays.take(name, (1, size))[0])
        expressions.append(arrays.take("expr", (1, EXPRESSIONS))[0])
        shape = arrays.raw("shape")
        flat = np.ndim(shape) == 2 and np.shape(shape)[0] == 1
        own = {
            "shape": numbers(shape[0] if flat else shape, (SHAPES,), f"{arrays.where}: 'shape'"),
            "static_offset": _offset(arrays, "static_offset") if "static_offset" in arrays else None,
        }
        head = head or own
        for name, value in own.items():
            if not _same(value, head[name]):
                raise arrays.wrong(f"'{name}' differs from that of '{frames[0].flame}'; a head has one")
        if "dynamic_offset" in arrays and _offset(arrays, "dynamic_offset").any():
            left_out.add("dynamic_offset")
        unknown = arrays.rest()
        kept = {key: value.tolist() for key, value in unknown.items() if _can_be_kept(value)}
        left_out |= unknown.keys() - kept.keys()
        if kept:
            each.extra["flame_param_path"] = kept
    notes = []
    if left_out:
        notes.append(f"Not taken from the FLAME files: {', '.join(sorted(left_out))}.")
    assert head["shape"] is not None
    track = FlameTrack(
        version=version,
        shape=head["shape"],
        expression=np.stack(expressions),
        rotation=np.stack(poses["rotation"]),
        translation=np.stack(poses["translation"]),
        neck=np.stack(poses["neck_pose"]),
        jaw=np.stack(poses["jaw_pose"]),
        eyes=np.stack(poses["eyes_pose"]).reshape(-1, 2, 3),
        static_offset=head["static_offset"],
    )
    return track, notes


def _can_be_kept(value: NDArray[Any]) -> bool:
    """Whether an unknown array is a little one, of texts or of finite numbers."""
    plain = value.dtype.kind in "iubU" or (value.dtype.kind == "f" and bool(np.isfinite(value).all()))
    return plain and value.size <= MAX_KEPT


def _same(one: Floats | None, other: Floats | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _offset(arrays: Document, key: str) -> Floats:
    """[V,3] of FLAME's vertices, with or without VHAP's teeth.

    Raises:
        UserError: another shape.
    """
    found = arrays.take(key, (1, None, 3))[0]
    if len(found) not in (VERTICES, WITH_TEETH):
        raise arrays.wrong(f"'{key}' is of {len(found)} vertices, expected {WITH_TEETH} (with teeth) or {VERTICES}")
    return found


def _read_splits(files: Folder, rows: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """Rows of each split, by time step; none where there are no split files, as LAM's sets have none."""
    splits: dict[str, tuple[int, ...]] = {}
    if not any(files.has(f"transforms_{name}.json") for name in SPLITS):
        return splits
    for name in SPLITS:
        document = files.json(f"transforms_{name}.json")
        listed = document.raw("frames")
        # Of one camera, the validation set is empty; its file must be there.
        steps = [frame.integer("timestep_index") for frame in document.items("frames")] if listed else []
        for step in steps:
            if step not in rows:
                raise document.wrong(f"timestep_index {step} is not in 'transforms.json'")
        splits[name] = tuple(sorted(rows[step] for step in steps))
    return splits


def write(
    recording: Recording,
    pictures: Pictures,
    folder: Path,
    *,
    flame: Flame | None,
    sidecar: Sidecar,
    on_frame: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write the dataset as VHAP exports it.

    Args:
        recording: its principal point is in the middle and its pixels are square.
        pictures: of the recording.
        folder: an empty one, or one that is not there yet.
        flame: the one that the recording's numbers belong to.
        sidecar: what lies beside; basis and names are set here.
        on_frame: called once for each frame.

    Returns:
        Warnings, one sentence each.

    Raises:
        UserError: what the layout cannot hold, or its readers would misread.
    """
    track, flame = _checked(recording, flame)
    warnings = []
    if flame.name != VERSION:
        warnings.append(
            f"The numbers belong to {flame.name}; GaussianAvatars reads FLAME 2023: set FLAME_MODEL_PATH in its "
            "flame_model/flame.py to that file, or the head is another one."
        )
    for part in ("images", "fg_masks", "flame_param"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    cameras, rotation, translation = _placed(recording, track, flame)
    keep = recording.format == "vhap" and not sidecar.rectified
    count, (width, height) = len(recording), recording.size
    focal = float(recording.Ks[0, 0, 0])
    camera = {
        "cx": width / 2,
        "cy": height / 2,
        "fl_x": focal,
        "fl_y": focal,
        "h": height,
        "w": width,
        "camera_angle_x": 2 * math.atan(width / (2 * focal)),
        "camera_angle_y": 2 * math.atan(height / (2 * focal)),
    }
    static = np.zeros((1, WITH_TEETH, 3), np.float32)
    if track.static_offset is not None:
        static[0, : len(track.static_offset)] = track.static_offset
    fixed = {"shape": _padded(track.shape, SHAPES), "static_offset": static}
    frames = []
    for row in range(count):
        rgb, alpha = pictures(row)
        image, mask = f"images/{row:05d}_00.png", f"fg_masks/{row:05d}_00.png"
        over_white = 255 - (alpha[..., None] / 255.0) * (255.0 - rgb)
        save_image(folder / image, np.round(over_white).astype(np.uint8))
        save_image(folder / mask, alpha)
        parameters = f"flame_param/{row:05d}.npz"
        extra = dict(recording.frame_extra[row]) if keep and recording.frame_extra else {}
        kept = {key: np.asarray(value) for key, value in extra.pop("flame_param_path", {}).items()}
        arrays: dict[str, Any] = {
            **fixed,
            "translation": translation[row : row + 1],
            "rotation": rotation[row : row + 1],
            "neck_pose": track.neck[row : row + 1],
            "jaw_pose": track.jaw[row : row + 1],
            "eyes_pose": track.eyes[row].reshape(1, 6),
            "expr": _padded(track.expression[row], EXPRESSIONS)[None],
            "dynamic_offset": np.zeros_like(static),
        }
        arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
        np.savez(folder / parameters, **(kept | arrays))
        number = int(recording.numbers[row])
        frames.append(
            {
                "timestep_index": row,
                "timestep_index_original": number,
                "timestep_id": f"{number:05d}",
                "camera_index": 0,
                "camera_id": "0",
                **camera,
                "transform_matrix": cameras[row].tolist(),
                "file_path": image,
                "fg_mask_path": mask,
                "flame_param_path": parameters,
                **extra,
            }
        )
        on_frame()
    _write_canonical(folder / "canonical_flame_param.npz", fixed)
    given = set(recording.splits.get("train", ()))
    if given and 0 not in given:
        warnings.append(
            f"Frame {recording.numbers[0]}, the first, is for training here: GaussianAvatars takes the head's shape "
            "from there."
        )
    train = given | {0} if given else set(range(math.ceil(TRAIN_SHARE * count)))
    _write_lists(folder, frames, camera, train, recording.extra.get("transforms.json", {}) if keep else {})
    basis = f"{flame.name}-expression-{EXPRESSIONS}"
    names = tuple(f"{basis}/{index:03d}" for index in range(EXPRESSIONS))
    told = tuple(int(number) for number in recording.numbers)
    write_sidecar(folder, replace(sidecar, basis=basis, names=names, flame=flame.name, numbers=told))
    return warnings


def _checked(recording: Recording, flame: Flame | None) -> tuple[FlameTrack, Flame]:
    """FLAME's parameters and model where the layout can hold them.

    Raises:
        UserError: it cannot.
    """
    track, flame = flame_of(recording, flame, "VHAP", VERSION, SHAPES, EXPRESSIONS)
    if track.eyelids is not None and track.eyelids.any():
        raise UserError("VHAP's layout has no place for metrical-tracker's eyelids.", "refit without them")
    K, (width, height) = recording.Ks, recording.size
    middle = np.abs(K[:, :2, 2] - (width / 2, height / 2)).max() > 1e-6
    if middle or np.abs(K[:, 0, 0] / K[:, 1, 1] - 1).max() > 1e-9 or np.abs(K - K[0]).max() > 1e-9:
        raise UserError(
            "GaussianAvatars takes the middle of the picture for the principal point, and fy for fx; "
            "this camera is another.",
            "rectify the pictures first",
        )
    return track, flame


def _placed(recording: Recording, track: FlameTrack, flame: Flame) -> tuple[Floats, Floats, Floats]:
    """Cameras to world [T,4,4] (OpenGL), rotation [T,3] and translation [T,3] as float32 holds them.

    The camera stands upright and the head takes all motion, with its mean translation for the world's origin, as VHAP
    exports one camera (LAM's meshes are right for upright ones only); a VHAP camera that stands still stays as it is.
    What single precision loses of the head's pose goes into the camera, which has double.
    """
    import torch

    from pipeline.geometry import invert_rigid, make_rigid, matrix_to_rotvec, rotvec_to_matrix

    rotation, translation = track.rotation, track.translation
    still = np.abs(recording.Ts_cam_world - recording.Ts_cam_world[0]).max() < STILL
    stays = recording.format == "vhap" and still
    if stays and all(np.array_equal(value.astype(np.float32), value) for value in (rotation, translation)):
        return invert_rigid(recording.Ts_cam_world) @ GL, rotation, translation
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[:VERTICES].copy())
    root = flame.joints(torch.from_numpy(track.shape), torch.from_numpy(track.expression), offset)[:, 0].numpy()
    Ts_cam_head = recording.Ts_cam_head(root)
    if not stays:
        Ts_world_head = GL @ Ts_cam_head
        rotations = np.ascontiguousarray(Ts_world_head[:, :3, :3])
        rotation = matrix_to_rotvec(rotations)
        translation = Ts_world_head[:, :3, 3] - root + np.einsum("tij,tj->ti", rotations, root)
        translation = translation - translation.mean(0)
    rotation, translation = (value.astype(np.float32).astype(np.float64) for value in (rotation, translation))
    held = rotvec_to_matrix(rotation)
    as_read = make_rigid(held, root - np.einsum("tij,tj->ti", held, root) + translation)
    return invert_rigid(Ts_cam_head @ invert_rigid(as_read)) @ GL, rotation, translation


def _padded(values: Floats, size: int) -> NDArray[np.float32]:
    return np.pad(values, (0, size - len(values))).astype(np.float32)


def _write_canonical(path: Path, fixed: Mapping[str, NDArray[np.float32]]) -> None:
    """The parameters at rest, mouth open; that they are there tells GaussianAvatars which loader to take."""
    still = {name: np.zeros((1, size), np.float32) for name, size in POSES.items()}
    still["jaw_pose"][0, 0] = 0.3
    np.savez(path, expr=np.zeros((1, EXPRESSIONS), np.float32), **still, **fixed)  # type: ignore[arg-type]


def _write_lists(
    folder: Path,
    frames: list[dict[str, Any]],
    camera: Mapping[str, Any],
    train: set[int],
    extra: Mapping[str, Any],
) -> None:
    """`transforms.json`, its splits and its backups. The validation set of one camera is empty, and its file must be
    there.
    """
    steps = list(range(len(frames)))
    whole = {"frames": frames, **camera, "timestep_indices": steps, "camera_indices": [0], **extra}
    write_json(folder / "transforms.json", whole)
    write_json(folder / "transforms_backup_flame.json", whole)
    plain = [{key: value for key, value in frame.items() if key != "flame_param_path"} for frame in frames]
    write_json(folder / "transforms_backup.json", {**whole, "frames": plain})
    chosen = {"train": [s for s in steps if s in train], "val": [], "test": [s for s in steps if s not in train]}
    for name, rows in chosen.items():
        times = chosen["train"] if name == "val" else rows
        cameras = [] if name == "val" else [0]
        part = {"frames": [frames[row] for row in rows], **camera, "timestep_indices": times, "camera_indices": cameras}
        write_json(folder / f"transforms_{name}.json", {**part, **extra})
