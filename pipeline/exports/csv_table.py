"""What a subject does, as a CSV table for `pipeline.coefficients`: expression, gaze, the head's turn and move.

`layout=plain` has all of it, under the subject's own expression names. `layout=livelink` is laid out as Epic's Live
Link Face app records: ARKit's coefficients only, and no move of the head.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError, UserError
from pipeline.exports import Export, choice
from pipeline.frames import counted
from pipeline.geometry import rotvec_to_matrix
from pipeline.heads import EXPRESSIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.retarget import Performance

    Floats = NDArray[np.float64]

VERSION = 1
OPTIONS = {
    "layout": "plain: time, usable and every column by its own name; livelink: as the Live Link Face app writes it"
}
FILE = "coefficients.csv"
ANY_RESOLUTION = 64
"""The clip's pictures are not looked at."""
SAME = 1e-6
"""What reading the plain table back may differ by, and times 10 the app's layout, whose angles are Euler's."""
TICK_SECONDS = 5e-5
"""Timecodes go to a thousandth of a frame."""
EYE_COLUMNS = ("LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll", "RightEyeYaw", "RightEyePitch", "RightEyeRoll")
LIVE_LINK_HEADER = (
    "Timecode",
    "BlendshapeCount",
    *(name[0].upper() + name[1:] for name in EXPRESSIONS),
    *("HeadYaw", "HeadPitch", "HeadRoll"),
    *EYE_COLUMNS,
)


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `coefficients.csv` and read it back.

    Raises:
        UserError: no frame can be used, the option is at fault, or the app's layout cannot hold the coefficients.
        StageError: the table does not read back.
    """
    from fractions import Fraction

    from pipeline.clip import load_clip
    from pipeline.dataset import read_json
    from pipeline.retarget import Performance

    recorded = choice(export, "layout", "plain", "livelink") == "livelink"
    clip = load_clip(export.subject, ANY_RESOLUTION)
    performance, usable = Performance.of(clip), clip.usable
    fps = Fraction(read_json(export.subject.stage("decode") / "frames.json")["fps"])
    foreign = [name for name in clip.expression_names if name not in EXPRESSIONS]
    path = folder / FILE
    if not recorded:
        write_table(path, performance.names, performance.values, clip.times, usable)
    elif foreign:
        raise UserError(
            f"'{export.subject.name}' has coefficients of its own, such as '{foreign[0]}', and the app's layout is for "
            "ARKit's only.",
            "write them under their own names: --set layout=plain",
        )
    else:
        base = 60 if fps <= 60 else math.ceil(fps)
        faceless = np.flatnonzero(~usable).tolist()
        write_live_link(path, performance.names, performance.values, times=clip.times, base=base, faceless=faceless)
    if not foreign:
        _check_same(path, performance, clip.times, recorded)
    text = f"{counted(len(clip), 'row')} of {len(performance.names)} numbers, {usable.sum()} usable"
    if foreign:
        text += (
            f". The coefficients are the subject's own ({foreign[0]}, ...), not ARKit's: headcast reenact does not "
            "read them"
        )
    return {
        "layout": "livelink" if recorded else "plain",
        "rows": len(clip),
        "usable": int(usable.sum()),
        "names": list(performance.names),
        "fps": str(fps),
        "text": f"{text}.",
    }


def write_table(path: Path, names: Sequence[str], values: Floats, times: Floats, usable: NDArray[np.bool_]) -> None:
    """Write the plain layout.

    Args:
        path: the file.
        names: [N] columns of `values`.
        values: [T,N] coefficients, radians, metres.
        times: [T] seconds. usable: [T].
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["time", "usable", *names])
        for time, good, row in zip(times, usable, values, strict=True):
            rows.writerow([repr(float(time)), int(good), *(f"{number:.9g}" for number in row)])


def write_live_link(
    path: Path,
    names: Sequence[str],
    values: Floats,
    *,
    fps: float = 59.94,
    base: int = 60,
    start: float = 3661.5,
    sense: float = -1.0,
    times: Floats | None = None,
    faceless: Sequence[int] = (),
) -> Path:
    """Write a performance as the Live Link Face app does.

    Args:
        path: the file.
        names: [N] columns of `values`; what is missing is 0.
        values: [T,N] coefficients, radians; turns are rotation vectors in the head's axes.
        fps: rows a second by the clock; base: frames a second that the timecode counts.
        start: seconds after midnight.
        sense: 1 where yaw is to the subject's left, as older versions of the app have it; -1 as newer ones do.
        times: [T] seconds after `start`; by default a row each frame.
        faceless: rows without a face, which the app leaves empty.
    """
    from pipeline.retarget import EYES, TURN

    def column(name: str) -> Floats:
        return values[:, names.index(name)] if name in names else np.zeros(len(values))

    R = rotvec_to_matrix(np.stack([column(name) for name in TURN], 1))
    pitch = np.arcsin((-R[:, 1, 2]).clip(-1, 1))  # R = Ry(yaw) Rx(pitch) Rz(roll)
    yaw, roll = np.arctan2(R[:, 0, 2], R[:, 2, 2]), np.arctan2(R[:, 1, 0], R[:, 1, 1])
    left_pitch, left_yaw, right_pitch, right_yaw = (column(name) for name in EYES)
    still = np.zeros(len(values))
    columns = [column(name) for name in EXPRESSIONS] + [sense * yaw, pitch, sense * roll]
    columns += [sense * left_yaw, left_pitch, still, sense * right_yaw, right_pitch, still]
    lines = [",".join(LIVE_LINK_HEADER)]
    empty = set(faceless)
    for number, row in enumerate(np.stack(columns, 1)):
        at = start + (number / fps if times is None else times[number])
        seconds, frames = divmod(round(at * base, 3), base)
        clock = f"{int(seconds) // 3600 % 24:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
        stamp = f"{clock}:{frames:06.3f}"
        lines.append(f"{stamp},0" if number in empty else f"{stamp},61," + ",".join(f"{x:.10f}" for x in row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\r\n")
    return path


def _check_same(path: Path, performance: Performance, times: Floats, recorded: bool) -> None:
    """See that the table reads back as what was written.

    Raises:
        UserError: the reader takes the app's angles otherwise.
        StageError: it does not read back.
    """
    from pipeline.coefficients import read_coefficients

    table = read_coefficients(path)
    rows = performance.usable
    wanted = performance.values[:, [performance.names.index(name) for name in table.names]]
    off = np.abs(table.values - np.where(np.isin(table.names, EXPRESSIONS), wanted.clip(0, 1), wanted))[rows]
    worst = off.max(0)
    late = float(np.abs(table.times - (times - times[0])).max())
    if late > (TICK_SECONDS if recorded else SAME) or (table.usable != rows).any():
        raise StageError(f"'{path.name}' reads back with other times, by up to {late:.2g} s.", "report it as a bug")
    if (worst <= (10 * SAME if recorded else SAME)).all():
        return
    name = table.names[int(worst.argmax())]
    if recorded:
        raise UserError(
            f"The app's layout would not be understood: '{name}' reads back off by {worst.max():.2g}, since the fit's "
            "eyes and its eyeLook* coefficients contradict one another.",
            "write the plain layout: --set layout=plain",
        )
    raise StageError(f"'{name}' reads back off by {worst.max():.2g}.", "report it as a bug")
