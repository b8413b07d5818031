"""What of expressions, poses and gaze a clip showed in training, what held-out frames ask for, what was never shown.

Angles are degrees as the camera sees them, with the signs of docs/conventions.md and `pipeline.api.Pose`: down, to the
subject's left and left ear up are positive.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.advice import head_angles_deg

SPANS = ("train", "test")
NEEDED = ("expression", "expression_names", "Ts_cam_head", "eyes", "usable")
"""Arrays of `fit.npz` that this rests on."""
HARDLY = 0.2
"""A coefficient that stayed below this was hardly shown."""
MARGIN = {"expression": 0.05, "angle": 1.0}
"""What a held-out frame may lie beyond the training range before that is told."""
NEIGHBOUR_SHARE = 0.05
"""Frames nearer in time than this share of the training frames are neighbours, which show the same."""
UNIT_FRAMES = 300
"""About so many training frames tell how far apart training frames are."""
TOLD = 3
"""So many of the things that a frame has and training lacked are told."""

ACTIONS = (
    (("jawOpen",), 0.5, "opened the mouth"),
    (("eyeBlinkLeft", "eyeBlinkRight"), 0.5, "closed the eyes"),
    (("mouthSmileLeft", "mouthSmileRight"), 0.5, "smiled"),
    (("mouthPucker", "mouthFunnel"), 0.4, "pursed the lips"),
    (("browInnerUp", "browOuterUpLeft", "browOuterUpRight"), 0.4, "raised the brows"),
    (("browDownLeft", "browDownRight"), 0.4, "frowned"),
)
"""Coefficients, of which the largest counts; from where on the action is seen; what it is called."""
DIRECTIONS = {
    "yaw": ("turned left", "turned right", 15.0),
    "pitch": ("looked down", "looked up", 10.0),
    "roll": ("tilted the head right", "tilted the head left", 8.0),
    "gaze yaw": ("turned the eyes left", "turned the eyes right", 10.0),
    "gaze pitch": ("turned the eyes down", "turned the eyes up", 8.0),
}
"""For each angle what its positive and its negative side are called, and from where on a side was seen."""
FORMS = {
    "yaw": ("turned {:.0f}° left", "turned {:.0f}° right"),
    "pitch": ("facing {:.0f}° down", "facing {:.0f}° up"),
    "roll": ("tilted {:.0f}° right", "tilted {:.0f}° left"),
    "gaze yaw": ("eyes {:.0f}° left", "eyes {:.0f}° right"),
    "gaze pitch": ("eyes {:.0f}° down", "eyes {:.0f}° up"),
}


class Range(NamedTuple):
    """Of one coefficient the lowest and the highest value in training and in the held-out frames."""

    name: str
    train: tuple[float, float]
    test: tuple[float, float]

    @property
    def label(self) -> str:
        """Its name, without the basis of an imported dataset's own."""
        return self.name.rpartition("/")[2]

    @property
    def span(self) -> tuple[float, float]:
        """What a chart shows of it: 0 to 1, or of an imported dataset's own coefficient all that was seen."""
        if "/" not in self.name:
            return 0.0, 1.0
        low, high = min(self.train[0], self.test[0]), max(self.train[1], self.test[1])
        return low, max(high, low + 1e-9)

    def share(self, value: float) -> float:
        """Where a value lies in `span`, from 0 to 1."""
        low, high = self.span
        return (value - low) / (high - low)

    @property
    def beyond(self) -> bool:
        """Whether held-out frames go beyond training."""
        low, high = self.span
        margin = MARGIN["expression"] * (high - low)
        return self.test[1] > self.train[1] + margin or self.test[0] < self.train[0] - margin


@dataclass(frozen=True)
class Coverage:
    """Values of all T frames, and which of them are usable training and held-out frames.

    Attributes:
        names: of the E coefficients.
        expression: [T,E] coefficients.
        angles: name in `DIRECTIONS` -> [T] degrees.
        train, test: numbers of frames.
    """

    names: tuple[str, ...]
    expression: NDArray[np.float64]
    angles: dict[str, NDArray[np.float64]]
    train: NDArray[np.int64]
    test: NDArray[np.int64]

    @staticmethod
    def of(fit: Mapping[str, NDArray[Any]], split: Mapping[str, Sequence[int]]) -> Coverage | None:
        """From the arrays of `fit.npz` and the split of `metrics.json`; None where they do not tell or do not fit."""
        if not set(NEEDED) <= set(fit):
            return None
        usable, eyes, poses = fit["usable"].astype(bool), fit["eyes"].astype(np.float64), fit["Ts_cam_head"]
        expression, names = fit["expression"].astype(np.float64), tuple(str(name) for name in fit["expression_names"])
        count = len(usable)
        shapes = [(expression, (count, len(names))), (eyes, (count, 2, 3)), (poses, (count, 4, 4))]
        if any(array.shape != shape or not np.isfinite(array).all() for array, shape in shapes):
            return None
        spans = [
            np.arange(max(0, int(first)), min(count, int(last) + 1)) for first, last in (split[name] for name in SPANS)
        ]
        train, test = (span[usable[span]] for span in spans)
        if not len(train) or not len(test):
            return None
        return Coverage(names, expression, angles_deg(poses, eyes), train, test)

    def ranges(self) -> list[Range]:
        """Of every coefficient what was seen."""

        def seen(frames: NDArray[np.int64], i: int) -> tuple[float, float]:
            values = self.expression[frames, i]
            return float(values.min()), float(values.max())

        return [Range(name, seen(self.train, i), seen(self.test, i)) for i, name in enumerate(self.names)]

    def never_shown(self) -> list[str]:
        """In words what training never showed and the avatar can therefore only guess."""
        found = []
        for names, enough, action in ACTIONS:
            there = [self.names.index(name) for name in names if name in self.names]
            if there and (most := float(self.expression[self.train][:, there].max())) < enough:
                found.append(f"never {action} beyond {most:.2f} of 1")
        for name, (positive, negative, enough) in DIRECTIONS.items():
            values = self.angles[name][self.train]
            for words, most in ((positive, float(values.max())), (negative, float(-values.min()))):
                if most < enough:
                    found.append(f"never {words}" + (f" beyond {most:.0f}°" if most >= 0.5 else ""))
        return found

    def span(self, angle: str) -> str:
        """From where to where an angle went in training, in words."""
        values = self.angles[angle][self.train]
        return f"{_angle(angle, values.max())} to {_angle(angle, values.min())}"

    def hardly_shown(self) -> list[str]:
        """Coefficients that stayed below `HARDLY` in training; of ARKit's only, as others have ranges of their own."""
        return [found.name for found in self.ranges() if "/" not in found.name and found.train[1] < HARDLY]

    @functools.cached_property
    def _limits(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest of all values [E+5] in training."""
        seen = self._values[self.train]
        return seen.min(0), seen.max(0)

    @functools.cached_property
    def _values(self) -> NDArray[np.float64]:
        """[T,E+5] coefficients and angles."""
        return np.column_stack([self.expression, *self.angles.values()])

    @functools.cached_property
    def _margins(self) -> NDArray[np.float64]:
        # An imported dataset's own coefficients have ranges of their own.
        low, high = self._limits
        ranges = [max(high[i] - low[i], 1e-9) if "/" in name else 1.0 for i, name in enumerate(self.names)]
        return np.array([MARGIN["expression"] * size for size in ranges] + len(self.angles) * [MARGIN["angle"]])

    def lacking(self, frame: int) -> list[str]:
        """What a frame has beyond all that training showed, the most telling first."""
        values, (low, high) = self._values[frame], self._limits
        excess = np.maximum(values - high, low - values) / self._margins
        found = []
        for i in np.argsort(-excess)[:TOLD]:
            if excess[i] <= 1:
                break
            above = values[i] > high[i]
            bound = high[i] if above else low[i]
            if i < len(self.names):
                found.append(f"{self.names[i]} {values[i]:.2f} (training: {'up to' if above else 'from'} {bound:.2f})")
            else:
                name = list(self.angles)[i - len(self.names)]
                found.append(f"{_angle(name, values[i])} (training: {_angle(name, bound)})")
        return found

    def beyond(self) -> NDArray[np.int64]:
        """The held-out frames that have something which training lacked."""
        (low, high), values = self._limits, self._values[self.test]
        excess = np.maximum(values - high, low - values) / self._margins
        return np.asarray(self.test[(excess > 1).any(1)])

    def novelty(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """For each held-out frame how far from training it is, and the training frame that is nearest.

        Distances are over coefficients and angles in deviations of the training frames, and in units of what lies
        between a training frame and the nearest other one that is no neighbour in time: above 1, a frame is newer than
        training frames are to each other.
        """
        spread = self._values[self.train].std(0)
        moving = spread > 1e-6
        scaled = self._values[:, moving] / spread[moving]
        found = [_nearest(scaled[frame], scaled[self.train]) for frame in self.test]
        chosen = self.train[:: max(1, len(self.train) // UNIT_FRAMES)]
        gap = max(1, round(NEIGHBOUR_SHARE * len(self.train)))
        far = [chosen[np.abs(chosen - frame) > gap] for frame in chosen]
        among = [
            _nearest(scaled[frame], scaled[others])[0] for frame, others in zip(chosen, far, strict=True) if len(others)
        ]
        unit = float(np.median(among)) if among else 0.0
        distances = np.array([distance for distance, _ in found])
        return distances / (unit or 1.0), self.train[[place for _, place in found]]


def angles_deg(
    Ts_cam_head: NDArray[np.floating[Any]], eyes: NDArray[np.floating[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The angles named in `DIRECTIONS` [T], from heads' poses [T,4,4] and rotation vectors of both eyes [T,2,3]."""
    yaw, pitch = head_angles_deg(Ts_cam_head)
    x, y = Ts_cam_head[:, 0, 1], Ts_cam_head[:, 1, 1]
    gaze = np.degrees(eyes.mean(1, dtype=np.float64))
    roll = np.degrees(np.arctan2(-x, -y)).astype(np.float64)
    return {"yaw": yaw, "pitch": pitch, "roll": roll, "gaze yaw": gaze[:, 1], "gaze pitch": gaze[:, 0]}


def _nearest(row: NDArray[np.float64], rows: NDArray[np.float64]) -> tuple[float, int]:
    """Distance and place of the nearest of some rows."""
    squared = ((rows - row) ** 2).sum(1)
    place = int(squared.argmin())
    return float(np.sqrt(squared[place])), place


def _angle(name: str, value: float) -> str:
    return FORMS[name][0 if value >= 0 else 1].format(abs(value))
