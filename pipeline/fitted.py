"""A finished fit, however it came about: torso and skull followed in its frames, its files and its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.frames import FrameSet
    from pipeline.heads import HeadModel
    from pipeline.skull import Skull
    from pipeline.stage import StageRun
    from pipeline.torso import Torso

SCHEMA = 2
VIDEO_FRAMES, VIDEO_SIDE_PX, SHEET_SIDE_PX = 600, 320, 400
CURVES = ("jawOpen", "mouthSmileLeft", "eyeBlinkLeft", "eyeBlinkRight")
CHUNK = 64


@dataclass(frozen=True)
class Fitted:
    """Camera, head and motion of T frames."""

    head: HeadModel
    """The head model with what was found at the landmarks built in."""
    frames: FrameSet
    Ks: NDArray[np.float64]
    """[T, 3, 3]."""
    Ts_cam_head: NDArray[np.float64]
    """[T, 4, 4]."""
    identity: NDArray[np.float64]
    """[S]."""
    expression: NDArray[np.float64]
    """[T, E]."""
    eyes: NDArray[np.float64]
    """[T, 2, 3] rotation vectors of the left and right eye."""
    landmarks: NDArray[np.float64]
    """[T, L, 2] seen, in pixels, where `detected`."""
    detected: NDArray[np.bool_]
    usable: NDArray[np.bool_]
    errors: NDArray[np.float64]
    """[T, L] pixels; NaN where no face was detected."""
    torso: Torso
    skull: Skull
    """As the frames show it; before it was looked for, a guess from the head's motion."""
    offsets: NDArray[np.float64] | None = None
    """[1 + E, L, 3] what is built into the head model; None where a head model of the subject's own is stored."""

    @cached_property
    def cameras(self) -> NDArray[np.int64]:
        """[T] which of the clips that have frames."""
        import numpy as np

        return np.unique(self.frames.clips, return_inverse=True)[1]

    @cached_property
    def neck(self) -> NDArray[np.float64]:
        """[T, 3] rotation vectors of the head relative to the torso."""
        import numpy as np

        from pipeline.geometry import matrix_to_rotvec

        return matrix_to_rotvec(np.swapaxes(self.torso.poses[:, :3, :3], 1, 2) @ self.Ts_cam_head[:, :3, :3])

    @cached_property
    def head_faces(self) -> NDArray[np.int32]:
        """[F, 3] faces without the torso's."""
        on_head = self.head.regions["head"]
        return self.head.faces[on_head[self.head.faces].all(1)]

    @cached_property
    def neutral(self) -> NDArray[np.float32]:
        """[V, 3] the person's neutral head."""
        import numpy as np

        identity = self.identity.astype(np.float32)
        return self.head.template + np.tensordot(identity, self.head.identity_basis, 1)

    def vertices_cam(self, indices: Sequence[int]) -> Iterator[NDArray[np.float64]]:
        """Fitted vertices [V, 3] in camera space of each of these frames."""
        import numpy as np
        import torch

        from pipeline.geometry import transform_points

        neck = self.neck
        identity = torch.from_numpy(self.identity.astype(np.float32))
        for start in range(0, len(indices), CHUNK):
            rows = list(indices[start : start + CHUNK])
            parts = (self.expression[rows], neck[rows], self.eyes[rows])
            with torch.no_grad():
                posed = self.head.vertices(identity, *(torch.from_numpy(p.astype(np.float32)) for p in parts))
            yield from transform_points(self.Ts_cam_head[rows], posed.numpy().astype(np.float64))


def training_crops(fitted: Fitted, margin: float) -> list[tuple[int, int, int]]:
    """The square around the head over each clip."""
    import numpy as np

    from pipeline.fitting import training_crop
    from pipeline.geometry import project_points

    on_head = fitted.head.regions["head"]
    crops = []
    for clip, (width, height) in enumerate(fitted.frames.contents[first_frames(fitted.frames)].tolist()):
        here = fitted.cameras == clip
        # A clip without a frame to trust still needs a square.
        rows = np.flatnonzero(here & fitted.usable if (here & fitted.usable).any() else here)
        boxes = []
        for K, vertices in zip(fitted.Ks[rows], fitted.vertices_cam(rows.tolist()), strict=True):
            pixels = project_points(vertices[on_head], K)
            boxes.append([*pixels.min(0), *pixels.max(0)])
        crops.append(training_crop(np.array(boxes), width, height, margin))
    return crops


def with_torso_and_skull(run: StageRun, fitted: Fitted, crops: list[tuple[int, int, int]]) -> Fitted:
    """The fit with torso and skull where the frames show them; the guess stays where one is out of sight."""
    import numpy as np

    from pipeline.skull import follow_skull
    from pipeline.torso import Views, follow_torso, typical_frame

    frames, on_head = fitted.frames, fitted.head.regions["head"]

    def picture(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        width, height = frames.contents[index]
        matte = run.subject.stage("matte")
        return frames.foreground(index, matte)[:height, :width], frames.alpha(index, matte)[:height, :width]

    with run.reporter.task("torso and skull", 4 * len(frames), "looks") as task:

        def on_frame() -> None:
            task.advance()
            run.check_stop()

        def heads() -> Iterator[NDArray[np.float64]]:
            for vertices in fitted.vertices_cam(range(len(frames))):
                on_frame()
                yield vertices[on_head]

        views = Views.load(picture, heads(), fitted.Ks, np.array(crops)[fitted.cameras], run.threads)
        torso = follow_torso(views, fitted.Ts_cam_head, fitted.torso.poses, fitted.usable, frames.shots, on_frame)
        reference = typical_frame(fitted.Ts_cam_head, fitted.usable)
        x0, y0, side = crops[fitted.cameras[reference]]
        skull = follow_skull(
            views,
            fitted.Ts_cam_head,
            reference,
            next(fitted.vertices_cam([reference])),
            fitted.head_faces,
            (fitted.landmarks[reference, :, :2] - (x0, y0)) * (views.pictures.shape[1] / side),
            frames.shots,
            run.threads,
            on_frame,
        )
    return replace(fitted, torso=torso, skull=skull)


def write_fit(run: StageRun, fitted: Fitted, crops: list[tuple[int, int, int]]) -> None:
    """Write `fit.npz`, `cameras.json` and `neutral.obj`."""
    import numpy as np

    from pipeline.dataset import write_json
    from pipeline.obj import write_obj

    frames, usable, head = fitted.frames, fitted.usable, fitted.head
    offsets = {}
    if fitted.offsets is not None:
        own = fitted.offsets.astype(np.float32)
        offsets = {"landmark_offsets": own[0], "expression_offsets": own[1:]}
    np.savez(
        run.work / "fit.npz",
        Ks=fitted.Ks,
        image_size=np.array([frames.width, frames.height]),
        Ts_cam_head=fitted.Ts_cam_head,
        Ts_cam_skull=fitted.skull.poses,
        skull_confidence=fitted.skull.confidence.astype(np.float32),
        Ts_cam_torso=fitted.torso.poses,
        torso_shape=fitted.torso.shape.astype(np.float32),
        torso_confidence=fitted.torso.confidence.astype(np.float32),
        neck=fitted.neck.astype(np.float32),
        eyes=fitted.eyes.astype(np.float32),
        identity=fitted.identity.astype(np.float32),
        expression=fitted.expression.astype(np.float32),
        expression_names=np.array(head.expression_names),
        **offsets,
        usable=usable,
        residual_px=np.median(fitted.errors, 1).astype(np.float32),
        head=np.array(head.name),
        crops=np.array(crops, np.float64)[fitted.cameras],
        shots=frames.shots,
        clips=frames.clips,
    )
    cameras = {
        "schema": SCHEMA,
        "width": frames.width,
        "height": frames.height,
        "clips": [
            {"name": name, "K": fitted.Ks[first].tolist(), "crop": list(crop)}
            for name, first, crop in zip(_clip_names(frames), first_frames(frames), crops, strict=True)
        ],
        "frames": [
            {
                "index": i,
                "time": float(frames.times[i]),
                "clip": int(fitted.cameras[i]),
                "shot": int(frames.shots[i]),
                "usable": bool(usable[i]),
                "T_cam_head": T_cam_head.tolist(),
            }
            for i, T_cam_head in enumerate(fitted.Ts_cam_head)
        ],
    }
    write_json(run.work / "cameras.json", cameras)
    write_obj(run.work / "neutral.obj", fitted.neutral, head.faces)


def first_frames(frames: FrameSet) -> NDArray[np.int64]:
    """The first frame of each clip that has any."""
    import numpy as np

    return np.unique(frames.clips, return_index=True)[1]


def _clip_names(frames: FrameSet) -> list[str]:
    names = frames.clip_names
    return [names[clip] if clip < len(names) else "" for clip in frames.clips[first_frames(frames)]]


def draw(run: StageRun, fitted: Fitted, video_frames: int = VIDEO_FRAMES) -> None:
    """Write the pictures a person judges the fit by; the video has at most so many frames."""
    from concurrent.futures import ThreadPoolExecutor

    import cv2
    import numpy as np

    from pipeline.fitting import head_angles
    from pipeline.frames import contact_sheet, evenly, save_image
    from pipeline.overlay import draw_torso, front_and_side, overlay, plot_curves
    from pipeline.torso import head_cover, torso_mask
    from pipeline.video import write_video

    frames, errors, torso = fitted.frames, fitted.errors, fitted.torso
    on_head, matte = fitted.head.regions["head"], run.subject.stage("matte")
    save_image(run.work / "neutral.jpg", front_and_side(fitted.neutral, fitted.head_faces), 90)

    def overlays(indices: Sequence[int], side: int) -> Iterator[NDArray[np.uint8]]:
        shrink = min(1.0, side / max(frames.width, frames.height))
        size = (round(frames.width * shrink), round(frames.height * shrink))
        scale = np.array(size) / (frames.width, frames.height)

        def drawn(index: int, vertices: NDArray[np.float64]) -> NDArray[np.uint8]:
            K = np.diag([*scale, 1]) @ fitted.Ks[index]
            image = cv2.resize(frames.image(index), size, interpolation=cv2.INTER_AREA)
            alpha = cv2.resize(frames.alpha(index, matte), size, interpolation=cv2.INTER_AREA) / 255
            where = torso_mask(alpha, head_cover(vertices[on_head], K, *size), torso.poses[index], K)
            image = draw_torso(np.asarray(image, np.uint8), torso.poses[index], K, where, torso.confidence[index])
            seen = fitted.landmarks[index, :, :2] * scale
            return overlay(image, vertices, fitted.head_faces, K, seen)

        with ThreadPoolExecutor(max(1, run.threads)) as pool:
            for start in range(0, len(indices), CHUNK):
                run.check_stop()
                rows = indices[start : start + CHUNK]
                yield from pool.map(drawn, rows, fitted.vertices_cam(rows))

    several = frames.shots[-1] > frames.shots[0]

    def label(index: int) -> str:
        shot = f"shot {frames.shots[index]}  " if several else ""
        error = "no face" if not fitted.detected[index] else ""
        if np.isfinite(errors[index]).all():
            error = f"{np.median(errors[index]):.2f} px"
        return f"{shot}{index}  {error}{'' if fitted.usable[index] else '  not usable'}"

    T = len(frames)
    shown = evenly(T, 8)
    pictures = list(overlays(shown, SHEET_SIDE_PX))
    sheet = contact_sheet(pictures, [label(i) for i in shown], width=pictures[0].shape[1])
    save_image(run.work / "overlay.jpg", sheet, 90)

    in_video = evenly(T, video_frames)
    seconds = float(frames.times[-1] - frames.times[0]) + 1 / float(frames.fps)
    with run.reporter.task("draw", len(in_video), "frames") as task:

        def counted() -> Iterator[NDArray[np.uint8]]:
            for index, picture in zip(in_video, overlays(in_video, VIDEO_SIDE_PX), strict=True):
                yield contact_sheet([picture], [label(index)], columns=1, width=picture.shape[1])
                task.advance()

        write_video(run.work / "overlay.mp4", counted(), round(len(in_video) / seconds, 2), crf=26)

    names = fitted.head.expression_names
    liveliest = [names[i] for i in np.argsort(-fitted.expression.std(0))[: len(CURVES)]]
    shown_names = CURVES if set(CURVES) <= set(names) else liveliest
    curves = {name: fitted.expression[:, names.index(name)] for name in shown_names}
    shifts = torso.poses[:, :3, 3] - np.median(torso.poses[:, :3, 3], 0)
    angles, gaze = np.degrees(head_angles(fitted.Ts_cam_head[:, :3, :3])).T, np.degrees(fitted.eyes[..., :2])
    panels = [
        ("expression", curves),
        ("head, degrees", dict(zip(("yaw", "pitch", "roll"), angles, strict=True))),
        ("gaze, degrees", {"left pitch": gaze[:, 0, 0], "left yaw": gaze[:, 0, 1], "right yaw": gaze[:, 1, 1]}),
        ("torso, mm", dict(zip(("right", "down", "away"), 1e3 * shifts.T, strict=True))),
        ("error, px", {"median": np.median(errors, 1), "95 %": np.percentile(errors, 95, axis=1)}),
    ]
    if fitted.offsets is None:  # imported: detected in a few frames only, which make no curve
        panels.pop()
    plot_curves(run.work / "curves.png", frames.times, panels, ~fitted.usable, frames.shots)
