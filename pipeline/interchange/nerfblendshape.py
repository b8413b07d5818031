"""NeRFBlendShape's and gaussian-head's layout: `transforms.json` with 46 coefficients, head motion in the camera.

Facts from USTC3DV/NeRFBlendShape-code `nerf/provider.py`, `nerf/utils.py`, `get_max.py` and chiehwangs/gaussian-head
`scene/dataset_readers.py`: cameras are camera-to-world with OpenGL's axes, the world is the head, lengths are the
tracker's over ten. NeRFBlendShape's rays go through whole numbers, `(i - cx) / fx`, so that its `cx` is ours less a
half; gaussian-head takes fx and fy and the middle of the picture for `cx` and `cy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.dataset import write_json
from pipeline.errors import UserError
from pipeline.frames import save_image
from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.interchange import DEFAULT_FPS, ReadOptions
from pipeline.interchange.checking import FIX, Folder, check_pictures, numbers, rising
from pipeline.interchange.recording import FlameTrack, Pictures, Recording
from pipeline.interchange.sidecar import Sidecar, read_sidecar, write_sidecar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads.flame import Flame

    Floats = NDArray[np.float64]

RECTIFY: Literal["", "centred", "square"] = "centred"
FILE = "transforms.json"
BASIS = "nerfblendshape"
"""Begins the name of the tracker's own coefficients, which come with lengths of its own."""
COEFFICIENTS = 46
"""What NeRFBlendShape's scripts take (`run_train.sh --num 46`)."""
DISTANCE = 0.3493212163448334
"""Of the camera from the head, to which NeRFBlendShape's box and both programs' new views are made."""
TEST, GAUSSIAN_HEAD_OFF, GAUSSIAN_HEAD_TEST = 500, 1000, 50
"""NeRFBlendShape tests on the last 500 frames; gaussian-head leaves the last 1000 out and tests on the last 50."""
PIXEL_CENTRE = 0.5
"""From a `cx` for pixels whose centres are whole numbers to ours."""
GL = np.diag([1.0, -1.0, -1.0, 1.0])
HEAD, ELSEWHERE = (0, 0, 255), (255, 255, 255)
"""Colours of a parsing."""
WITHOUT_LANDMARKS = "NeRFBlendShape cannot train without .lms files in ori_imgs/, for which no landmarks are known."
QUALITY = 98
MAX_COEFFICIENTS = 1000


def detect(folder: Path) -> bool:
    """Whether frames have an `img_id`; those of AD-NeRF too, so that `read` says what they lack."""
    files = Folder(folder)
    for name in (FILE, "transforms_train.json"):
        try:
            frames = files.json(name).values.get("frames") if files.has(name) else None
        except UserError:
            continue
        if isinstance(frames, list) and frames and isinstance(frames[0], dict) and "img_id" in frames[0]:
            return True
    return False


def read(folder: Path, options: ReadOptions) -> Recording:
    """Read and check the dataset.

    Without a sidecar the coefficients and the lengths are the tracker's own and stay so.

    Args:
        folder: the folder with `transforms.json`.
        options: what the layout does not tell.

    Raises:
        UserError: the first thing that is wrong, with its file, frame and key.
    """
    files = Folder(folder)
    if not files.has(FILE) and files.has("transforms_train.json"):
        raise _ad_nerf(folder)
    document = files.json(FILE)
    if "focal_len" in document and "fx" not in document:
        raise _ad_nerf(folder)
    size = document.integer("w", 1, 2**14), document.integer("h", 1, 2**14)
    K = np.eye(3)
    for axis, side in enumerate(size):
        letter = "xy"[axis]
        K[axis, axis] = document.number(f"f{letter}", 0.05 * side, 100 * side)
        K[axis, 2] = document.number(f"c{letter}", -side, 2 * side) + PIXEL_CENTRE

    found = document.items("frames")
    ids = [frame.integer("img_id", 0, 2**31 - 2) for frame in found]
    order = list(rising(ids, document.where))
    frames, ids = [found[at] for at in order], [ids[at] for at in order]
    width = len(found[0].take("exp_ori", (None,)))
    if not 1 <= width <= MAX_COEFFICIENTS:
        raise found[0].wrong(f"'exp_ori' has {width:,} coefficients, expected 1 to {MAX_COEFFICIENTS:,}")
    coefficients = np.stack([frame.take("exp_ori", (width,)) for frame in frames])
    cameras: Floats = np.stack([frame.pose("transform_matrix") for frame in frames]) @ GL
    sidecar = read_sidecar(files)
    if sidecar:
        if len(sidecar.names) != width or len(set(sidecar.names)) != width:
            raise UserError(
                f"'headcast.json' names {len(set(sidecar.names))} coefficients, 'exp_ori' of '{FILE}' has {width}.",
                "take 'headcast.json' away if the dataset was changed since",
            )
        cameras[:, :3, 3] = cameras[:, :3, 3] / sidecar.scale + np.array(sidecar.origin)
    Ts_cam_world = np.linalg.inv(cameras).astype(np.float64)
    for frame, depth in zip(frames, Ts_cam_world[:, 2, 3], strict=True):
        if depth <= 0:
            raise UserError(
                f"{frame.where}: 'transform_matrix' puts the head behind the camera, at z = {depth:.3g}.",
                "cameras look along -z in this layout: turn columns 1 and 2 around if its tool has them look along z",
            )

    where = [f"{frame.where} (img_id {number})" for frame, number in zip(frames, ids, strict=True)]
    images = [_image(files, number) for number in ids]
    _see_video(files, folder, images[0])
    check_pictures(files, images, size, where, "image")
    alpha, masks = _masks(files, ids)
    of_masks = [f"{place}, whose mask counts from 1" if alpha == "masks" else place for place in where[: len(masks)]]
    check_pictures(files, masks, size, of_masks, "mask")
    if files.has("bc.jpg"):
        check_pictures(files, ["bc.jpg"], size, [document.where], "background")
    _read_ranges(files, width)

    basis = sidecar.basis if sidecar else f"{BASIS}-{width}"
    names = sidecar.names if sidecar else tuple(f"{basis}/{index:02d}" for index in range(width))
    count = len(ids)
    tested = count > TEST
    return Recording(
        format="nerfblendshape",
        size=size,
        fps=options.fps or (Fraction(sidecar.fps) if sidecar else DEFAULT_FPS),
        numbers=np.array(ids, np.int64),
        Ks=np.repeat(K[None], count, 0),
        Ts_cam_world=Ts_cam_world,
        images=tuple(images),
        alpha=alpha,
        masks=tuple(masks),
        basis=basis,
        coefficient_names=names,
        coefficients=coefficients,
        splits={"train": tuple(range(count - TEST)), "test": tuple(range(count - TEST, count))} if tested else {},
        files=tuple(files.used),
        extra={FILE: rest} if (rest := document.rest()) else {},
        frame_extra=tuple(frame.rest() for frame in frames),
        notes=tuple(_notes(options, sidecar, basis, alpha)),
    )


def _ad_nerf(folder: Path) -> UserError:
    return UserError(
        f"'{folder}' is AD-NeRF's layout: speech drives it, there are no expression coefficients to import.",
        "track its video instead: headcast run VIDEO",
    )


def _image(files: Folder, number: int) -> str:
    """`.jpg` as the loaders have it, `.png` where that alone is there."""
    names = [f"ori_imgs/{number}.{ending}" for ending in ("jpg", "png")]
    return next((name for name in names if files.has(name)), names[0])


def _see_video(files: Folder, folder: Path, image: str) -> None:
    """Say what is to do with the published datasets, which come with a video instead of pictures.

    Raises:
        UserError: there is a video and no picture.
    """
    video = next((path.name for path in sorted(folder.glob("*.mp4"))), "")
    if video and not files.has(image) and not (folder / "ori_imgs").exists():
        raise UserError(
            f"'{folder}' has '{video}' and no folder 'ori_imgs' with its pictures.",
            f"extract them first: ffmpeg -i {video} -start_number 0 -q:v 1 ori_imgs/%d.jpg",
        )


def _masks(files: Folder, ids: Sequence[int]) -> tuple[Literal["masks", "parsing", "none"], list[str]]:
    """Where alphas are: gaussian-head's soft masks, whose names count from 1, before a parsing's blue."""
    masks, parsings = [f"mask/{number + 1}.png" for number in ids], [f"parsing/{number}.png" for number in ids]
    if any(files.has(name) for name in masks):
        return "masks", masks
    if any(files.has(name) for name in parsings):
        return "parsing", parsings
    return "none", []


def _read_ranges(files: Folder, width: int) -> None:
    """See that `max_46.txt` and `min_46.txt`, or those of another count, are what get_max.py writes.

    Raises:
        UserError: one alone, no numbers, or another count.
    """
    ends = {}
    for end in ("max", "min"):
        name = f"{end}_{width}.txt"
        if not files.has(name):
            continue
        path = files.file(name)
        if path.stat().st_size > 64 * MAX_COEFFICIENTS:
            raise UserError(f"'{name}' is too large for {width} numbers.", FIX)
        try:
            values = [float(word) for word in path.read_text().split()]
        except ValueError as error:
            raise UserError(f"'{name}' holds something that is no number: {error}.", FIX) from None
        ends[end] = numbers(values, (width,), f"'{name}'")
    if len(ends) == 1:
        lacking = "min" if "max" in ends else "max"
        raise UserError(f"'{lacking}_{width}.txt' is missing beside its counterpart.", "run get_max.py again")
    if ends and (ends["min"] > ends["max"]).any():
        index = int((ends["min"] > ends["max"]).argmax())
        raise UserError(f"'min_{width}.txt' exceeds 'max_{width}.txt' at coefficient {index}.", "run get_max.py again")


def _notes(options: ReadOptions, sidecar: Sidecar | None, basis: str, alpha: str) -> list[str]:
    notes = []
    if _own(basis):
        notes.append("Lengths are the tracker's own, not metres, and stay as they are.")
    if options.fps is None and sidecar is None:
        notes.append(f"The layout tells no frame rate: {DEFAULT_FPS} a second are taken.")
    if alpha == "none":
        notes.append("There is neither mask/ nor parsing/: the matte is made from the pictures.")
    return notes


def _own(basis: str) -> bool:
    """Whether coefficients, and with them lengths, are those of the layout's own tracker."""
    return basis.startswith(f"{BASIS}-")


def write(
    recording: Recording,
    pictures: Pictures,
    folder: Path,
    *,
    flame: Flame | None,
    sidecar: Sidecar,
    on_frame: Callable[[], None] = lambda: None,
    coefficients: int = COEFFICIENTS,
    landmarks: Floats | None = None,
) -> list[str]:
    """Write the dataset as both programs load it.

    Lengths in metres are scaled so that the camera is at its usual distance from the middle of the face, which becomes
    the origin; the sidecar tells both. Jaw and eyes of FLAME, which are no expression, are appended to the
    coefficients, and its neck turns the head.

    Args:
        recording: its pictures are centred.
        pictures: of the recording.
        folder: an empty one, or one that is not there yet.
        flame: the one that the recording's numbers belong to; needed where its root or its neck turns.
        sidecar: what lies beside; basis, names, scale, origin and what was left out are set here.
        on_frame: called once for each frame.
        coefficients: how many are written, those that vary most in the clip, or move FLAME's face most; 0 writes all.
        landmarks: [T,478,3] MediaPipe's points in the camera's coordinates, for the middle of the face and for the
            `.lms` files without which NeRFBlendShape does not train.

    Returns:
        Warnings, one sentence each.

    Raises:
        UserError: what the layout cannot hold.
    """
    count = len(recording)
    if np.abs(recording.Ks - recording.Ks[0]).max() > 1e-9:
        raise UserError(
            "NeRFBlendShape's layout has one camera, this one's focal length or centre moves.", "rectify it first"
        )
    recording = _head_in_camera(recording, flame)
    basis, names, values, posed = _all_coefficients(recording)
    spread = values.std(0)
    kept = _most_varying(spread * _reach(recording, flame, len(names)), posed, coefficients)
    written = values[:, kept]
    scale, origin = (1.0, np.zeros(3)) if _own(recording.basis) else _placement(recording, landmarks)
    cameras = np.linalg.inv(recording.Ts_cam_world)
    cameras[:, :3, 3] = scale * (cameras[:, :3, 3] - origin)
    cameras = cameras @ GL
    K = recording.Ks[0]
    keep = recording.format == "nerfblendshape" and not sidecar.rectified
    left = [index for index in range(len(names)) if index not in set(kept)]

    for name in ("ori_imgs", "head_imgs", "mask", "parsing"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    frames = []
    for row in range(count):
        number = int(recording.numbers[row])
        _write_pictures(folder, number, *pictures(row))
        frames.append(
            {
                "img_id": number,
                "exp_ori": written[row].tolist(),
                "transform_matrix": cameras[row].tolist(),
                **(recording.frame_extra[row] if keep and recording.frame_extra else {}),
            }
        )
        on_frame()
    if landmarks is not None:
        seen = project_points(landmarks, recording.Ks)
        for number, points in zip(recording.numbers, seen, strict=True):
            np.savetxt(folder / "ori_imgs" / f"{number}.lms", points - PIXEL_CENTRE, fmt="%.3f")
    width, height = recording.size
    save_image(folder / "bc.jpg", np.full((height, width, 3), ELSEWHERE, np.uint8), QUALITY)
    trained = written[: count - TEST] if count > TEST else written
    np.savetxt(folder / f"max_{len(kept)}.txt", trained.max(0))
    np.savetxt(folder / f"min_{len(kept)}.txt", trained.min(0))
    head: dict[str, Any] = {"h": height, "w": width, "fx": K[0, 0], "fy": K[1, 1]}
    head |= {"cx": K[0, 2] - PIXEL_CENTRE, "cy": K[1, 2] - PIXEL_CENTRE, "frames": frames}
    write_json(folder / FILE, head | (dict(recording.extra.get(FILE, {})) if keep else {}))
    write_sidecar(
        folder,
        replace(
            sidecar,
            basis=basis,
            names=tuple(names[index] for index in kept),
            scale=scale,
            origin=(float(origin[0]), float(origin[1]), float(origin[2])),
            left_out={names[index]: float(spread[index]) for index in left},
        ),
    )
    return [
        *_told_of_camera(recording),
        *_told_of_frames(recording),
        *_told_of_coefficients([names[index] for index in left], spread[left], len(kept)),
        *(
            []
            if landmarks is not None
            else ["Without .lms files in ori_imgs/ NeRFBlendShape renders but cannot train."]
        ),
    ]


def _head_in_camera(recording: Recording, flame: Flame | None) -> Recording:
    """The same where the world is the head, FLAME's neck included: these programs know one rigid head.

    Raises:
        UserError: FLAME's joints are needed, and there is no FLAME.
    """
    import torch

    track = recording.flame
    if track is None or not track.moves_head:
        return recording
    if flame is None or flame.name != track.version:
        raise UserError(
            f"The head turns about FLAME's joints, which need the model {track.version}.",
            "see docs/heads.md on how to get it",
        )
    shape = torch.from_numpy(track.shape)
    # Joints follow the offset of FLAME's own vertices; VHAP's teeth come after those.
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[: len(flame.template)])
    batches = torch.from_numpy(track.expression).split(256)
    joints = np.concatenate([flame.joints(shape, part, offset).numpy()[:, :2] for part in batches])
    turns = rotvec_to_matrix(track.neck)
    neck = make_rigid(turns, joints[:, 1] - np.einsum("tij,tj->ti", turns, joints[:, 1]))
    return recording.with_head_in_camera(recording.Ts_cam_head(joints[:, 0]) @ neck)


def _all_coefficients(recording: Recording) -> tuple[str, tuple[str, ...], Floats, NDArray[np.bool_]]:
    """Basis, names [E], values [T,E], and which of them are FLAME's jaw, eyes and eyelids."""
    values, names = recording.coefficients, recording.coefficient_names
    track = recording.flame
    if track is None:
        return recording.basis, names, values, np.zeros(len(names), bool)
    poses = _poses(track)
    basis = f"{recording.basis}-and-pose"
    names = (*(name.partition("/")[2] for name in names), *poses)
    values = np.column_stack([values, *poses.values()])
    posed = np.arange(len(names)) >= len(names) - len(poses)
    return basis, tuple(f"{basis}/{name}" for name in names), values, posed


def _poses(track: FlameTrack) -> dict[str, Floats]:
    """What moves the face beside expression, by name: rotation vectors in radians, and eyelids."""
    columns = {f"jaw-{axis}": track.jaw[:, index] for index, axis in enumerate("xyz")}
    for eye in range(2):
        columns |= {f"eye-{eye}-{axis}": track.eyes[:, eye, index] for index, axis in enumerate("xyz")}
    if track.eyelids is not None:
        columns |= {f"eyelid-{side}": track.eyelids[:, index] for index, side in enumerate(("left", "right"))}
    return columns


def _reach(recording: Recording, flame: Flame | None, count: int) -> Floats:
    """[E] how far a coefficient moves the face: FLAME's, in deviations, do so by less and less; 1 where not known."""
    reach = np.ones(count)
    if recording.flame is not None and flame is not None:
        shapes = flame.expressions.flatten(1).norm(dim=1).numpy()[: recording.flame.expression.shape[1]]
        reach[: len(shapes)] = shapes
    return reach


def _most_varying(spread: Floats, posed: NDArray[np.bool_], count: int) -> list[int]:
    """The coefficients that vary most, in their order; those of a pose, in another unit, first if they vary at all."""
    if count == 0 or count >= len(spread):
        return list(range(len(spread)))
    ranks = np.where(posed & (spread > 0), np.inf, spread)
    return sorted(np.argsort(-ranks, kind="stable")[:count].tolist())


def _placement(recording: Recording, landmarks: Floats | None) -> tuple[float, Floats]:
    """Scale from metres, and where in the head frame the origin of the dataset lies."""
    origin = np.zeros(3)
    if landmarks is not None:
        in_head = transform_points(np.linalg.inv(recording.Ts_cam_world), landmarks)
        origin = np.median((in_head.min(1) + in_head.max(1)) / 2, 0)
    centres = np.linalg.inv(recording.Ts_cam_world)[:, :3, 3]
    return DISTANCE / float(np.median(np.linalg.norm(centres - origin, axis=1))), origin


def _write_pictures(folder: Path, number: int, rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> None:
    opacity = alpha[..., None].astype(np.float32) / 255
    on_white = np.round(rgb * opacity + 255 * (1 - opacity)).astype(np.uint8)
    parsing = np.where(alpha[..., None] > 127, HEAD, ELSEWHERE).astype(np.uint8)
    save_image(folder / "ori_imgs" / f"{number}.jpg", rgb, QUALITY)
    save_image(folder / "head_imgs" / f"{number}.jpg", on_white, QUALITY)
    save_image(folder / "mask" / f"{number + 1}.png", alpha)
    save_image(folder / "parsing" / f"{number}.png", parsing)


def _told_of_camera(recording: Recording) -> list[str]:
    off = recording.Ks[0, :2, 2] - np.array(recording.size) / 2
    # The tracker's own sets say w / 2, a half pixel off the middle by NeRFBlendShape's count of pixels.
    if np.abs(off).max() <= (PIXEL_CENTRE + 1e-6 if _own(recording.basis) else 0.01):
        return []
    return [
        f"gaussian-head takes the middle of the picture for cx and cy: it sees the head {off[0]:+.1f}, "
        f"{off[1]:+.1f} px beside its place."
    ]


def _told_of_frames(recording: Recording) -> list[str]:
    count, warnings = len(recording), []
    if count < GAUSSIAN_HEAD_OFF + GAUSSIAN_HEAD_TEST:
        # A slice that ends below zero counts from the end.
        trains = len(range(count)[0 : count - GAUSSIAN_HEAD_OFF])
        warnings.append(
            f"gaussian-head trains on frames[0:N-{GAUSSIAN_HEAD_OFF}] and tests on the last {GAUSSIAN_HEAD_TEST}: of "
            f"these {count} frames it would train on {trains}; give it well over "
            f"{GAUSSIAN_HEAD_OFF + GAUSSIAN_HEAD_TEST:,}, or change test_frames in its scene/dataset_readers.py."
        )
    if count <= TEST:
        warnings.append(
            f"NeRFBlendShape tests on the last {TEST} frames, and there are {count}: say where its test starts, "
            f"sh run_train.sh NAME {max(1, count * 4 // 5)} 0."
        )
    test = recording.splits.get("test", ())
    if test and set(test) != set(range(count - len(test), count)):
        warnings.append("The dataset's own test frames are not its last ones, which both programs test on.")
    return warnings


def _told_of_coefficients(left: Sequence[str], spread: Floats, count: int) -> list[str]:
    warnings = []
    if left:
        warnings.append(
            f"{len(left)} coefficients are left out, those that vary least (deviation up to {spread.max():.3g}): "
            f"NeRFBlendShape's scripts take {COEFFICIENTS}; headcast.json names them."
        )
    if count != COEFFICIENTS:
        warnings.append(
            f"NeRFBlendShape's scripts take {COEFFICIENTS} coefficients, these are {count}: change --num and "
            f"--basis_num in run_train.sh and run_infer.sh to {count}."
        )
    return warnings
