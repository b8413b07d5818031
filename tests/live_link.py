"""CSV files as the Live Link Face app writes them, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import rotvec_to_matrix
from pipeline.heads import EXPRESSIONS
from pipeline.retarget import EYES, TURN

EYE_COLUMNS = ("LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll", "RightEyeYaw", "RightEyePitch", "RightEyeRoll")
HEADER = (
    "Timecode",
    "BlendshapeCount",
    *(name[0].upper() + name[1:] for name in EXPRESSIONS),
    *("HeadYaw", "HeadPitch", "HeadRoll"),
    *EYE_COLUMNS,
)


def write_live_link(
    path: Path,
    names: tuple[str, ...],
    values: NDArray[np.float64],
    *,
    fps: float = 59.94,
    base: int = 60,
    start: float = 3661.5,
    sense: float = -1.0,
    faceless: tuple[int, ...] = (),
) -> Path:
    """Write a performance.

    Args:
        path: the file.
        names: [N] columns of `values`; what is missing is 0.
        values: [T,N] coefficients, radians; turns are rotation vectors in the head's axes.
        fps: rows a second by the clock; base: frames a second that the timecode counts.
        start: seconds after midnight.
        sense: 1 where yaw is to the subject's left, as older versions of the app have it; -1 as newer ones do.
        faceless: rows without a face, which the app leaves empty.
    """

    def column(name: str) -> NDArray[np.float64]:
        return values[:, names.index(name)] if name in names else np.zeros(len(values))

    R = rotvec_to_matrix(np.stack([column(name) for name in TURN], 1))
    pitch = np.arcsin(-R[:, 1, 2])  # R = Ry(yaw) Rx(pitch) Rz(roll)
    yaw, roll = np.arctan2(R[:, 0, 2], R[:, 2, 2]), np.arctan2(R[:, 1, 0], R[:, 1, 1])
    left_pitch, left_yaw, right_pitch, right_yaw = (column(name) for name in EYES)
    still = np.zeros(len(values))
    columns = [column(name) for name in EXPRESSIONS] + [sense * yaw, pitch, sense * roll]
    columns += [sense * left_yaw, left_pitch, still, sense * right_yaw, right_pitch, still]
    lines = [",".join(HEADER)]
    for number, row in enumerate(np.stack(columns, 1)):
        seconds, frames = divmod(start + number / fps, 1)
        clock = f"{int(seconds) // 3600 % 24:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
        stamp = f"{clock}:{frames * base:06.3f}"
        lines.append(f"{stamp},0" if number in faceless else f"{stamp},61," + ",".join(f"{x:.10f}" for x in row))
    path.write_text("\n".join(lines) + "\n", newline="\r\n")
    return path
