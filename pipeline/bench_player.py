"""How near the browser player's pictures are to our renderer's, and what its JavaScript costs: in Chromium."""

from __future__ import annotations

import base64
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.api import Avatar, LoadedSubject, Pose, load_subject
from pipeline.avatars import Condition
from pipeline.chromium import chromium, serve
from pipeline.exports import check_export, export
from pipeline.frames import evenly
from pipeline.metrics import psnr
from pipeline.viewpoint import Camera

SIZE_PX = 512
FRAMES = 8
"""So many frames each, of training and held out, are drawn."""
READY = "body:not(.loading)"
FACES: dict[str, tuple[dict[str, float], Pose]] = {
    "rest": ({}, Pose()),
    "eyes closed": ({"eyeBlinkLeft": 1.0, "eyeBlinkRight": 1.0}, Pose()),
    "mouth open": ({"jawOpen": 0.8}, Pose()),
    "turned": ({}, Pose(yaw=8.0, pitch=3.0)),
}
_PICTURE = """([drive, camera]) => {
  const { pixels } = player.picture(drive, camera);
  return btoa(Array.from(pixels, (byte) => String.fromCharCode(byte)).join(""));
}"""


def drive_of(condition: Condition) -> dict[str, Any]:
    """A condition as the page takes it (the top of pipeline/player/main.js)."""
    return {
        "expression": condition.expression.tolist(),
        "head": condition.T_cam_head.flatten().tolist(),
        "eyes": condition.eyes[:, :2].flatten().tolist(),
        "torso": condition.T_cam_torso.flatten().tolist(),
        "torsoShape": condition.torso_shape.tolist(),
        "skull": condition.T_cam_skull.flatten().tolist(),
    }


def drawn(page: Any, condition: Condition, camera: Camera) -> NDArray[np.float64]:
    """The page's picture over white, [H,W,3] in [0,1]."""
    (fx, _, cx), (_, fy, cy), _ = camera.K.tolist()
    size = {"width": camera.width, "height": camera.height}
    lens = {"fx": fx, "fy": fy, "cx": cx, "cy": cy, "view": camera.T_cam_world.flatten().tolist()}
    text = page.evaluate(_PICTURE, [drive_of(condition), size | lens])
    pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(camera.height, camera.width, 4)
    return np.asarray(pixels[..., :3] / 255)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """The exported page in `folder`, loaded and at rest.

    Raises:
        UserError: Chromium or Playwright is not here.
        RuntimeError: the page complained, or reached outside.
    """
    with (
        tempfile.TemporaryDirectory() as profile,
        serve(folder) as url,
        chromium(Path(profile)) as browser,
        browser.visit(url, reduced_motion="reduce") as visit,
    ):
        visit.page.locator(READY).wait_for()
        yield visit.page
        if visit.errors or visit.outside:
            raise RuntimeError(f"the page complained {visit.errors} or reached outside {visit.outside}")


def bench(data: Path, subjects: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure the player of each subject.

    Args:
        data: the dataset.
        subjects: names in it; exported.
        report: is told what is measured.

    Raises:
        HeadcastError: a subject has no baked avatar, or there is no Chromium.
    """
    rows = {}
    for name in subjects:
        report(f"{name}: exporting, then drawing")
        with tempfile.TemporaryDirectory() as folder:
            plan = check_export(data, name, "web", out=Path(folder) / "web", options={"webcam": "false"})
            account = export(plan)
            with opened(plan.product.path) as page:
                rows[name] = _measured(page, load_subject(name, data)) | {
                    part: account[part] for part in ("gaussians", "packed_bytes", "unpacked_bytes", "packing_db")
                }
    return {"schema": 1, "size": SIZE_PX, "rows": rows}


def _measured(page: Any, subject: LoadedSubject) -> dict[str, Any]:
    baked, full = subject.avatar(baked=True), subject.avatar()
    clip_camera = subject.camera(int(subject.test_frames[0])).resized(SIZE_PX, SIZE_PX)
    aside = baked.camera(SIZE_PX, yaw=40)

    def against(avatar: Avatar, condition: Condition, camera: Camera) -> float:
        ours = avatar.render(condition, camera=camera) / 255
        return psnr(drawn(page, condition, camera), ours)

    def between(condition: Condition) -> float:
        first, second = (avatar.render(condition, camera=clip_camera) / 255 for avatar in (full, baked))
        return psnr(first, second)

    faces = {name: baked.condition(*face) for name, face in FACES.items()}
    near = {name: against(baked, condition, clip_camera) for name, condition in faces.items()}
    near["40 degrees aside"] = against(baked, faces["rest"], aside)
    row: dict[str, Any] = {"javascript": page.evaluate("player.measure()")}
    for part, frames in (("held out", subject.test_frames), ("training", subject.train_frames)):
        chosen = [subject.condition(int(frames[i])) for i in evenly(len(frames), FRAMES)]
        near[part] = min(against(baked, condition, clip_camera) for condition in chosen)
        row[f"full_{part.replace(' ', '_')}_db"] = _rounded(min(against(full, c, clip_camera) for c in chosen))
        row[f"baking_{part.replace(' ', '_')}_db"] = _rounded(min(between(condition) for condition in chosen))
    return row | {"baked_db": {name: _rounded(value) for name, value in near.items()}}


def _rounded(value: float) -> float:
    return round(float(value), 2)


def table(result: dict[str, Any]) -> str:
    """The figures as text: least PSNR against our renderer, of the baked and the full avatar, and milliseconds."""
    side = result["size"]
    lines = [
        f"Least PSNR in dB at {side} x {side} against our renderer; baking: of the baked avatar against the full one.",
        "",
        "| clip | packed | unpacked | packing | baked | full, held out (baking) | full, training (baking) "
        "| JavaScript a frame, fastest / median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        near, script = row["baked_db"], row["javascript"]
        worst = min(near, key=near.__getitem__)
        lines.append(
            f"| {name} | {row['packed_bytes'] / 1e6:.1f} MB | {row['unpacked_bytes'] / 1e6:.1f} MB "
            f"| {row['packing_db']:.0f} | {near[worst]:.1f} ({worst}) "
            f"| {row['full_held_out_db']:.1f} ({row['baking_held_out_db']:.1f}) "
            f"| {row['full_training_db']:.1f} ({row['baking_training_db']:.1f}) "
            f"| {script['fastest_ms']:.1f} / {script['median_ms']:.1f} ms |"
        )
    return "\n".join(lines)
