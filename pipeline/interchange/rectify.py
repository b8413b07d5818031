"""Pictures and cameras brought to what a reader believes: square pixels, a principal point in the middle, a square.

A reader that ignores the principal point or the aspect puts everything beside its place; a warp by `K_to inv(K)`
makes what it believes true. It is a homography of the picture about the camera's centre, exact for every depth, and
poses stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.interchange.recording import Pictures, Recording

    Floats = NDArray[np.float64]

MAX_SIDE = 8192
"""Beyond, a principal point is so far outside that the camera cannot be meant."""
SAME_PX = 1e-9


def rectified(
    recording: Recording, pictures: Pictures, how: Literal["", "centred", "square"]
) -> tuple[Recording, Pictures, dict[str, Any]]:
    """The recording as a reader believes it to be; nothing is cut off the pictures, what is added is white and clear.

    Args:
        recording: of any camera.
        pictures: of it.
        how: "centred": square pixels of the finer of both focal lengths, principal point in the middle, the same in
            every frame. "square": padded to width == height at the right and at the bottom, which the readers that ask
            for it know how to read. "": as it is.

    Returns:
        Recording, pictures, and what was done for the sidecar: empty where nothing had to be.

    Raises:
        UserError: the principal point lies so far off that the pictures would become huge; or frames have cameras of
            their own where "square" needs one.
    """
    if how == "":
        return recording, pictures, {}
    width, height = recording.size
    if how == "square":
        target = np.repeat(recording.Ks[:1], len(recording), 0)
        side = max(width, height)
        size = side, side
    else:
        target, size = _centred(recording.Ks, recording.size)
    if size == recording.size and np.abs(target - recording.Ks).max() <= SAME_PX:
        return recording, pictures, {}
    if max(size) > MAX_SIDE:
        raise UserError(
            f"Rectified pictures would have {size[0]}x{size[1]} pixels: the principal point is "
            f"{recording.Ks[0, 0, 2]:.0f}, {recording.Ks[0, 1, 2]:.0f} in pictures of {width}x{height}.",
            "check the camera of the dataset",
        )
    about = {"K": recording.Ks[0].tolist(), "to": target[0].tolist(), "size": [width, height]}
    changes = target @ np.linalg.inv(recording.Ks)
    return replace(recording, Ks=target, size=size), _Warped(pictures, changes, size), about


def _centred(Ks: Floats, size: tuple[int, int]) -> tuple[Floats, tuple[int, int]]:
    """One camera [T,3,3] for all frames that shows all that each of them shows."""
    focal = float(max(Ks[:, 0, 0].max(), Ks[:, 1, 1].max()))
    sides = []
    for axis, side in enumerate(size):
        centre, scale = Ks[:, axis, 2], focal / Ks[:, axis, axis]
        reach = float((scale * np.maximum(centre, side - centre)).max())
        sides.append(2 * math.ceil(reach - SAME_PX))
        # An odd side that is centred already stays.
        if abs(2 * reach - side) <= SAME_PX:
            sides[-1] = side
    K = np.array([[focal, 0.0, sides[0] / 2], [0.0, focal, sides[1] / 2], [0.0, 0.0, 1.0]])
    return np.repeat(K[None], len(Ks), 0), (sides[0], sides[1])


class _Warped:
    """Pictures under a homography each."""

    def __init__(self, pictures: Pictures, changes: Floats, size: tuple[int, int]) -> None:
        self._pictures, self._changes, self._size = pictures, changes, size

    def __call__(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        import cv2

        rgb, alpha = self._pictures(row)
        half = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        # OpenCV counts pixels from the centre of the first.
        matrix = np.linalg.inv(half) @ self._changes[row] @ half
        white = (255.0, 255.0, 255.0)
        colours = cv2.warpPerspective(rgb, matrix, self._size, borderMode=cv2.BORDER_CONSTANT, borderValue=white)
        opacity = cv2.warpPerspective(alpha, matrix, self._size, borderMode=cv2.BORDER_CONSTANT, borderValue=0.0)
        return np.asarray(colours, np.uint8), np.asarray(opacity, np.uint8)
