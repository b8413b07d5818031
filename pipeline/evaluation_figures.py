"""The pictures of an evaluation: truth, render and error side by side, and where the error is on the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.frames import save_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip

MIN_PANEL_PX = 256
"""Panels of smaller crops are enlarged to this, so that their captions can be read."""
BAR_PX, GAP_PX = 26, 8
FACE_PLANE_M = np.array([[0, 0, 0.1], [0.1, 0, 0.1], [0, 0.1, 0.1]])
"""Three points in the head's axes that a face is laid over another by."""
FLIP_FULL_SCALE = 0.5
"""The FLIP error that the colour map's bright end stands for."""
ERROR_TITLE = f"error (FLIP, bright = {FLIP_FULL_SCALE})"
INK, PAPER, BAR = (32, 36, 44), (255, 255, 255), (238, 240, 243)


def side_by_side(
    truth: NDArray[np.uint8], image: NDArray[np.uint8], flip: NDArray[np.floating[Any]], caption: str, figure: str
) -> NDArray[np.uint8]:
    """Truth, render and error in a row under a bar of captions.

    Args:
        truth, image: [R,R,3] RGB.
        flip: [R,R] FLIP's error in [0, 1].
        caption: what the truth is called, for example `frame 203`.
        figure: what stands over the render, for example `render, 31.2 dB`.
    """
    return titled({caption: truth, figure: image, ERROR_TITLE: heat_map(flip)})


def mean_error(pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]]) -> NDArray[np.uint8]:
    """The mean of n frames beside their mean error, and the error laid over the frames.

    Args:
        pairs: n images [R,R,3] RGB, heads on each other, and their errors [R,R] of FLIP.
    """
    images, errors, count = np.zeros((1, 1, 3)), np.zeros((1, 1)), 0
    for image, flip in pairs:
        images, errors, count = images + image, errors + flip, count + 1
    truth, error = images / count, errors / count
    full = max(0.02, round(float(np.percentile(error, 99)), 2))
    heat, grey = heat_map(error, full), truth.mean(-1, keepdims=True) * 0.6 + 90
    over = grey + np.clip(error / full, 0, 1)[..., None] ** 0.5 * (heat - grey)
    first, last = (np.clip(image + 0.5, 0, 255).astype(np.uint8) for image in (truth, over))
    return titled({f"mean of {count} frames": first, f"mean error (FLIP, bright = {full})": heat, "both": last})


def laid_over(
    clip: Clip, frame: int, other: int, image: NDArray[np.uint8], flip: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A frame's image [R,R,3] and error [R,R], moved so that the head lies where it does in another frame."""
    import cv2

    def corners(frame: int) -> NDArray[np.float32]:
        points_cam = FACE_PLANE_M @ clip.Ts_cam_head[frame, :3, :3].T + clip.Ts_cam_head[frame, :3, 3]
        projected = points_cam @ clip.Ks[clip.cameras[frame]].T
        return np.asarray(projected[:, :2] / projected[:, 2:], np.float32)

    move, size = cv2.getAffineTransform(corners(frame), corners(other)), (clip.resolution, clip.resolution)
    moved = cv2.warpAffine(image, move, size, borderValue=(255, 255, 255))
    return np.asarray(moved), np.asarray(cv2.warpAffine(flip.astype(np.float32), move, size))


def heat_map(flip: NDArray[np.floating[Any]], full_scale: float = FLIP_FULL_SCALE) -> NDArray[np.uint8]:
    """FLIP's error [H,W] in colours [H,W,3]: black is none, bright is `full_scale` or more."""
    import cv2

    shown = (np.clip(flip / full_scale, 0, 1) * 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(shown, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB))


def titled(panels: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Square RGB images in a row under a bar of their titles, all as large as the first, or larger to be readable."""
    import cv2
    from PIL import Image, ImageDraw, ImageFont

    side = max(MIN_PANEL_PX, len(next(iter(panels.values()))))
    row = [cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR) for image in panels.values()]
    canvas = np.full((side + BAR_PX, len(row) * side, 3), BAR, np.uint8)
    canvas[BAR_PX:] = np.concatenate(row, 1)
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for place, title in enumerate(panels):
        draw.text((place * side + 8, BAR_PX / 2), _shortened(title, font, side - 12), INK, font, anchor="lm")
    return np.asarray(picture)


def _shortened(title: str, font: Any, width_px: int) -> str:
    """A title on one line that fits a width: what is too long loses its middle, for figures stand at its end."""
    whole = text = " ".join(title.split())
    kept = len(whole)
    while font.getlength(text) > width_px and kept > 2:
        kept -= 1
        text = f"{whole[: kept // 2]}...{whole[len(whole) - (kept + 1) // 2 :]}"
    return text


def write_sheet(path: Path, columns: Sequence[Sequence[NDArray[np.uint8]]]) -> None:
    """Write side-by-side pictures of one size as columns beside each other; empty columns are left out."""
    columns = [column for column in columns if column]
    height, width, _ = columns[0][0].shape
    y_step, x_step = height + GAP_PX, width + GAP_PX
    lines = max(len(column) for column in columns)
    sheet = np.full((lines * y_step - GAP_PX, len(columns) * x_step - GAP_PX, 3), PAPER, np.uint8)
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            sheet[y * y_step : y * y_step + height, x * x_step : x * x_step + width] = picture
    save_image(path, sheet, quality=90)
