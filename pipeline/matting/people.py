"""Who an alpha belongs to: the subject is kept, other people and furniture that hang together with it are cut off.

A person is expected to fill a head and shoulders around and below the face. Where two people touch, what is plainly
nearer to one of the two shapes, each in its own face's size, is that one's, and between them the seam follows the edges
of the image (watershed: Meyer 1994). What lies outside the subject's shape and hangs on by a neck is furniture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

FAINT, SOLID = 26, 128
WORK_SIDE_PX = 256
"""Longer side of the picture in which is decided; the alpha itself keeps its resolution."""

# The shape of a person in units of the face's size, from the face's middle.
HEAD_HALF_WIDTH, HEAD_HALF_HEIGHT, HEAD_RISE = 0.8, 1.0, 0.15
NECK_BEGINS, NECK_HALF_WIDTH, SHOULDERS_BEGIN, SHOULDERS_HALF_WIDTH = 0.5, 0.4, 1.3, 1.35
FACE_ASPECT = 0.75
"""Least width of a face over its height: one seen from the side is narrow, its head is not."""
NEAR = 1.4
"""What is no farther out, in units of the shape, is never furniture: hair, hats, hands."""
SEAM = 1.2
"""Difference of two people's distances, in units of their shapes, up to which the image says whose a pixel is."""
NECK_WIDTH = 0.24
"""What hangs on by less, in face sizes, is no limb."""

MIRROR_FRAMES = 24
MIRROR_LIKENESS = 0.75
"""Median correlation from which a face's motion is a mirrored copy of another's."""
LEAST_MOTION = 0.03
"""Standard deviation, of scores and of the sine of angles, below which a motion tells nothing."""


@dataclass(frozen=True)
class Kept:
    """The subject's part of an alpha."""

    alpha: Image
    """[H, W]."""
    touched: bool
    """Whether another person hung together with the subject and was split off."""


def keep_subject(alpha: Image, image: Image, hull: Image, others: NDArray[np.floating]) -> Kept:
    """The part of an alpha that is the subject's; all of it 0 where the face has none.

    Args:
        alpha: [H, W] of everybody.
        image: [H, W, 3] what it belongs to; only looked at where people touch.
        hull: [H, W] 255 inside the subject's face.
        others: [P, 4] boxes x0, y0, x1, y1 of other faces in pixels; rows of NaN are left out.
    """
    import cv2

    height, width = alpha.shape
    shrink = min(1.0, WORK_SIDE_PX / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA)
    face = cv2.resize(hull, size, interpolation=cv2.INTER_NEAREST) > 0
    there = small >= FAINT
    if not (face & there).any():
        return Kept(np.zeros_like(alpha), touched=False)
    rows, columns = np.flatnonzero(face.any(axis=1)), np.flatnonzero(face.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    away = person_distance(box, small.shape)

    mine, touched = there, False
    strangers = [other * shrink for other in others if np.isfinite(other).all()]
    together = _part_of(there, face)
    touching = [stranger for stranger in strangers if _lies_in(stranger, together)]
    if touching:
        shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        mine = there & _split(there, shown, away, touching)
        touched = bool((together & ~mine).any())

    foreign, body = there & ~mine, mine & face
    # Furniture hangs on by a narrow part, or by one that is hardly there.
    for level in (FAINT, SOLID):
        body, hanging = _hanging(mine & (small >= level), face, away < NEAR, NECK_WIDTH * _face_size(box))
        foreign |= hanging
    owned = mine
    if foreign.any():
        owned = mine & (_distance_to(body) <= _distance_to(foreign))
    owned = _part_of(owned, face)
    if (owned == there).all():
        return Kept(alpha, touched=False)
    # The faint rim of the subject stays, what is there beside it goes.
    keep = cv2.dilate(owned.astype(np.uint8), np.ones((5, 5), np.uint8)) * (owned | ~there)
    large = cv2.resize(255 * keep, (width, height), interpolation=cv2.INTER_LINEAR)
    return Kept(np.asarray(cv2.multiply(alpha, large, scale=1 / 255), np.uint8), touched)


def person_distance(box: NDArray[np.floating], shape: tuple[int, ...]) -> Floats:
    """How far every pixel [H, W] is from the middle of a person, 1 at the outline of head and shoulders.

    Args:
        box: x0, y0, x1, y1 of the face in pixels.
        shape: height and width of the picture.
    """
    size = _face_size(box)
    across = ((np.arange(shape[1], dtype=np.float32) + 0.5) - (box[0] + box[2]) / 2)[None] / size
    down = ((np.arange(shape[0], dtype=np.float32) + 0.5) - (box[1] + box[3]) / 2)[:, None] / size
    head = np.hypot(across / HEAD_HALF_WIDTH, (down + HEAD_RISE) / HEAD_HALF_HEIGHT)
    ends = [NECK_BEGINS, SHOULDERS_BEGIN]
    half = np.interp(down, ends, [NECK_HALF_WIDTH, SHOULDERS_HALF_WIDTH]).astype(np.float32)
    below = down[:, 0] > NECK_BEGINS
    head[below] = np.minimum(head[below], np.abs(across) / half[below])
    return np.asarray(head, np.float32)


def touch_words(touched: NDArray[np.bool_]) -> list[str]:
    """What to say of the frames [T] in which another person touches the subject; nothing where there are none."""
    from pipeline.frames import ranges_text

    return (
        [f"a second person touches the subject in {ranges_text(touched)}: split at the seam"] if touched.any() else []
    )


def mirror_likeness(
    scores: NDArray[np.floating],
    rotations: NDArray[np.floating],
    other_scores: NDArray[np.floating],
    other_rotations: NDArray[np.floating],
    names: Sequence[str],
) -> float:
    """How much a face's motion is another's mirrored: the median correlation of what moves, -1 to 1.

    Left and right expressions are swapped, turns to the side and tilts change their sign. 0 where hardly anything moves
    or the two are together in too few frames.

    Args:
        scores, other_scores: [n, E] expression scores of both in the frames that show both.
        rotations, other_rotations: [n, 3, 3] of the heads.
        names: [E] of the expressions.
    """
    if len(scores) < MIRROR_FRAMES:
        return 0.0
    place = {name: index for index, name in enumerate(names)}
    swapped = [place.get(_other_side(name), index) for index, name in enumerate(names)]

    def turns(Rs: NDArray[np.floating], side: int) -> NDArray[np.floating]:
        return np.stack([side * Rs[:, 0, 2], Rs[:, 1, 2], side * Rs[:, 0, 1]], axis=1)

    mine = np.concatenate([scores, turns(rotations, 1)], axis=1)
    its = np.concatenate([other_scores[:, swapped], turns(other_rotations, -1)], axis=1)
    moves = np.minimum(mine.std(axis=0), its.std(axis=0)) > LEAST_MOTION
    if moves.sum() < 3:
        return 0.0
    pairs = zip(mine.T[moves], its.T[moves], strict=True)
    return float(np.median([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def _other_side(name: str) -> str:
    """The expression of the face's other side; its own name where it has no side."""
    if "Left" in name:
        return name.replace("Left", "Right")
    return name.replace("Right", "Left")


def _face_size(box: NDArray[np.floating]) -> float:
    return max(float(box[2] - box[0]), FACE_ASPECT * float(box[3] - box[1]), 1.0)


def _hanging(mask: Mask, face: Mask, near: Mask, neck_px: float) -> tuple[Mask, Mask]:
    """The body in a mask, and the parts outside the shape `near` that are joined to it by less than a neck's width."""
    import cv2

    side = 2 * max(1, round(neck_px / 2)) + 1
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    core = (opened > 0) | (mask & near)
    body = _part_of(core, face) if (core & face).any() else face
    count, labels = cv2.connectedComponents((core & ~body).astype(np.uint8), connectivity=8)
    outside = np.bincount(labels[~near], minlength=count) > 0.5 * np.bincount(labels.ravel(), minlength=count)
    outside[0] = False
    return body, outside[labels]


def _split(there: Mask, image: Image, away: Floats, others: list[NDArray[np.floating]]) -> Mask:
    """Which of the pixels that are there [H, W] are nearer to the subject than to any other person."""
    import cv2

    theirs = np.min([person_distance(box, there.shape) for box in others], axis=0)
    lead = theirs - away
    markers = np.where(lead > SEAM, 1, np.where(lead < -SEAM, 2, 0)).astype(np.int32)
    markers[~there] = 3
    seam = cv2.watershed(image, markers)
    return (seam == 1) | ((seam == -1) & (lead > 0))


def _part_of(mask: Mask, face: Mask) -> Mask:
    """The connected part of a mask that holds most of the face; nothing where none holds any."""
    import cv2

    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    counts = np.bincount(labels[face & mask], minlength=1)
    return labels == counts.argmax() if counts.any() else np.zeros_like(mask)


def _lies_in(box: NDArray[np.floating], mask: Mask) -> bool:
    """Whether a mask covers a good part of a box."""
    x0, y0, x1, y1 = np.maximum(np.rint(box), 0).astype(int)
    inside = mask[y0:y1, x0:x1]
    return bool(inside.size and inside.mean() > 0.2)


def _distance_to(mask: Mask) -> Floats:
    import cv2

    return np.asarray(cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3), np.float32)
