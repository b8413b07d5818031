"""Alphas steadied over time: each frame's together with its neighbours', moved to it by the picture's motion."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.matting.flow import dense_flow, half_grey, warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FRESH = 0.35
"""Weight of a frame's own answer beside what its neighbours say; a neighbour n frames away counts (1 - FRESH)^n."""
REACH = 8
"""Frames at which a neighbour no longer counts: 0.65^8 is 3 %."""
FLOW_SIDE = 256
"""Flow is taken at half size, or less: longer side in pixels at most."""
MISFIT = (8.0, 30.0)
"""Grey values by which a moved frame may miss the picture before the neighbour counts less, and not at all."""


class Motion:
    """Dense flow between neighbours of a run of n frames, both ways, and how far it can be trusted."""

    def __init__(self, images: Sequence[NDArray[np.uint8]]) -> None:
        import cv2

        greys = []
        for image in images:
            grey = half_grey(image)
            shrink = FLOW_SIDE / max(grey.shape)
            greys.append(grey if shrink >= 1 else cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=3))
        self._size = images[0].shape[1::-1]
        self.forth = [dense_flow(a, b) for a, b in itertools.pairwise(greys)]
        """[n - 1] from each frame to the next: where its pixels come from."""
        self.back = [dense_flow(b, a) for a, b in itertools.pairwise(greys)]
        """[n - 1] from each frame's follower to it."""
        pairs = zip(greys[:-1], greys[1:], self.forth, strict=True)
        self.trust_forth = [_trust(warp(a, flow), b) for a, b, flow in pairs]
        pairs = zip(greys[1:], greys[:-1], self.back, strict=True)
        self.trust_back = [_trust(warp(b, flow), a) for b, a, flow in pairs]

    def from_before(self, frame: int, alpha: NDArray[Any]) -> NDArray[Any]:
        """An alpha of the frame before `frame`, moved to it."""
        return warp(alpha, self.forth[frame - 1])

    def from_after(self, frame: int, alpha: NDArray[Any]) -> NDArray[Any]:
        """An alpha of the frame after `frame`, moved to it."""
        return warp(alpha, self.back[frame])

    def full_size(self, trust: NDArray[np.float32]) -> NDArray[np.float32]:
        """A trust at the frames' size."""
        import cv2

        return np.asarray(cv2.resize(trust, self._size, interpolation=cv2.INTER_LINEAR), np.float32)


def _trust(moved: NDArray[np.uint8], grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[h, w] 1 where a moved frame shows what the other does, 0 where it does not: uncovered ground, lost motion."""
    import cv2

    misfit = cv2.blur(cv2.absdiff(moved, grey), (5, 5)).astype(np.float32)
    low, high = MISFIT
    return np.clip((high - misfit) / (high - low), 0, 1)


def fuse(alphas: Sequence[NDArray[np.uint8]], motion: Motion) -> list[NDArray[np.uint8]]:
    """The alphas [H, W] of a run of frames, each with its neighbours' before and after, those near counting more.

    A recursive average forward and one backward in time: inside a run nothing lags; at its ends one side is missing.
    """
    count = len(alphas)
    forward, backward = [alphas[0]], [alphas[-1]]
    for frame in range(1, count):
        carried = motion.from_before(frame, forward[-1])
        forward.append(_blend(alphas[frame], carried, motion.full_size(motion.trust_forth[frame - 1])))
    for frame in range(count - 2, -1, -1):
        carried = motion.from_after(frame, backward[-1])
        backward.append(_blend(alphas[frame], carried, motion.full_size(motion.trust_back[frame])))
    backward.reverse()
    # Each of the two holds the frame's own answer once.
    own = np.float32(FRESH / (2 - FRESH))
    fused = []
    for one, other, alpha in zip(forward, backward, alphas, strict=True):
        both = (one.astype(np.float32) + other) / np.float32(2 - FRESH) - own * alpha
        fused.append((np.clip(both, 0, 255) + 0.5).astype(np.uint8))
    return fused


def _blend(alpha: NDArray[np.uint8], carried: NDArray[np.uint8], trust: NDArray[np.float32]) -> NDArray[np.uint8]:
    kept = np.float32(1 - FRESH) * trust
    return np.asarray(alpha + kept * (carried.astype(np.float32) - alpha) + np.float32(0.5)).astype(np.uint8)


def middle_of_three(
    before: NDArray[np.uint8] | None, alpha: NDArray[np.uint8], after: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """The median of an alpha and its neighbours moved to it; itself at the ends of a run."""
    if before is None or after is None:
        return alpha
    return np.maximum(np.minimum(before, after), np.minimum(np.maximum(before, after), alpha))
