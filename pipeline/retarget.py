"""From one person's performance to another's avatar: what is carried over, from which rest, and how far it may go.

A performance is a table of named numbers for each frame: the expression coefficients, both eyes' pitch and yaw, and
how far the head is turned and moved from its mean pose. It is carried over by name, as departures from the driver's own
neutral to the avatar's own; what goes beyond all that the avatar's clip showed is eased to a limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.avatars import AvatarModel, Condition
from pipeline.avatars.rig import with_predicted_torso
from pipeline.clip import Clip
from pipeline.errors import UserError
from pipeline.expressions import basis_of
from pipeline.gaze import eyes_of
from pipeline.geometry import make_rigid, matrix_to_rotvec, rotvec_to_matrix
from pipeline.heads import EXPRESSIONS
from pipeline.torso import mean_pose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pipeline.coefficients import Coefficients

    Floats = NDArray[np.float64]

EYES = ("eyePitchLeft", "eyeYawLeft", "eyePitchRight", "eyeYawRight")
"""Radians; down and towards the subject's left are positive, as in `pipeline.gaze`."""
TURN = ("headPitch", "headYaw", "headRoll")
"""Rotation vector, in the head's own axes, from its mean pose; radians: down, to the subject's left, left ear up."""
MOVE = ("headX", "headY", "headZ")
"""Metres from the mean pose in the camera's axes: right, down, away."""

NEUTRAL_PERCENTILE = 10.0
"""A coefficient's neutral: faces rest at their low values, and a few frames that lie below are noise."""
# How far beyond what the avatar's clip showed a number may go: coefficients, radians of eyes and head, metres. Lids may
# close in full: half a blink looks worse than skin never seen. A head raised or turned farther shows holes under the
# chin and before the ear, a body that is pushed up the edge where it is cut.
OVERSHOOT = {
    **{"expression": 0.3, "eyeBlinkLeft": 10.0, "eyeBlinkRight": 10.0},
    **dict.fromkeys(EYES, 0.3),
    **{"headPitch": 0.05, "headYaw": 0.08, "headRoll": 0.15},
    **dict.fromkeys(MOVE, 0.002),
}
# Numbers that exceed what was seen by less than this are not worth telling.
TOLD = {"expression": 0.02, **dict.fromkeys(EYES, 0.02), **dict.fromkeys(TURN, 0.02), **dict.fromkeys(MOVE, 0.001)}
MAX_GAP_SECONDS = 0.5
"""Between usable frames that lie farther apart the nearer one is held."""


@dataclass(frozen=True)
class Performance:
    """What a clip shows of its person, in D columns.

    Attributes:
        names: [D] the clip's expression names, then `EYES`, `TURN` and `MOVE`.
        values: [T,D].
        usable: [T] whether a row can be relied on.
        neutral: [D] the person at rest: low percentiles of the coefficients, median gaze, mean head pose.
        low, high: [D] the least and the most that usable frames show.
        Ts_cam_rest: [C,4,4] each camera's mean head pose.
    """

    names: tuple[str, ...]
    values: Floats
    usable: NDArray[np.bool_]
    neutral: Floats
    low: Floats
    high: Floats
    Ts_cam_rest: Floats

    @staticmethod
    def of(clip: Clip) -> Performance:
        """The performance of a fitted clip.

        Raises:
            UserError: none of its frames can be used.
        """
        if not clip.usable.any():
            raise UserError("None of the clip's frames can be used.", "look at the fit in its report and film again")
        Ts_cam_rest = np.stack([_rest_pose(clip, camera) for camera in range(len(clip.Ks))])
        departures = Ts_cam_rest[clip.cameras][:, :3, :3].swapaxes(1, 2) @ clip.Ts_cam_head[:, :3, :3]
        moves = clip.Ts_cam_head[:, :3, 3] - Ts_cam_rest[clip.cameras][:, :3, 3]
        expression, eyes = clip.expression.astype(np.float64), clip.eyes[..., :2].reshape(-1, 4).astype(np.float64)
        values = np.concatenate([expression, eyes, matrix_to_rotvec(departures), moves], 1)
        return Performance._of_values((*clip.expression_names, *EYES, *TURN, *MOVE), values, clip.usable, Ts_cam_rest)

    @staticmethod
    def _of_values(
        names: tuple[str, ...], values: Floats, usable: NDArray[np.bool_], Ts_cam_rest: Floats
    ) -> Performance:
        """With the neutral and the range that usable rows show; turns and moves are from the mean pose already."""
        seen, expressions = values[usable], len(names) - len((*EYES, *TURN, *MOVE))
        neutral = np.concatenate(
            [
                np.percentile(seen[:, :expressions], NEUTRAL_PERCENTILE, 0),
                np.median(seen[:, expressions:][:, : len(EYES)], 0),
                np.zeros(len(TURN) + len(MOVE)),
            ]
        )
        return Performance(names, values, usable, neutral, seen.min(0), seen.max(0), Ts_cam_rest)

    @staticmethod
    def of_table(table: Coefficients, names: Sequence[str]) -> Performance:
        """The performance of a table of coefficients; what it has no column for stays at rest.

        Args:
            table: as read from a file.
            names: the avatar's expression names.

        Raises:
            UserError: the table has an expression that the avatar does not know.
        """
        columns = (*names, *EYES, *TURN, *MOVE)
        check_names((*columns, *table.names), columns)
        values = np.zeros((len(table), len(columns)))
        for name in table.names:
            values[:, columns.index(name)] = table.values[:, table.names.index(name)]
        expression, eyes, turns = (slice(len(names)), slice(len(names), len(names) + 4), slice(-6, -3))
        if not set(EYES) & set(table.names):
            turned = eyes_of(torch.from_numpy(values[:, expression]), names) if set(EXPRESSIONS) <= set(names) else None
            values[:, eyes] = 0 if turned is None else turned[..., :2].reshape(-1, 4).numpy()
        seen = values[table.usable]
        T_rest = mean_pose(
            make_rigid(rotvec_to_matrix(seen[:, turns]), seen[:, -3:]), np.full(len(seen), 1 / len(seen))
        )
        values[:, turns] = matrix_to_rotvec(T_rest[:3, :3].T @ rotvec_to_matrix(values[:, turns]))
        values[:, -3:] -= T_rest[:3, 3]
        return Performance._of_values(columns, values, table.usable, T_rest[None])

    def resting_at(self, frame: int) -> Performance:
        """The same performance, at rest in this frame instead of in its low percentiles and mean pose."""
        turns, moves = slice(-6, -3), slice(-3, None)
        values = self.values.copy()
        R_rest = rotvec_to_matrix(values[frame, turns])
        values[:, turns] = matrix_to_rotvec(R_rest.T @ rotvec_to_matrix(values[:, turns]))
        values[:, moves] -= values[frame, moves]
        seen = values[self.usable]
        return replace(self, values=values, neutral=values[frame], low=seen.min(0), high=seen.max(0))

    def at(self, ticks: Floats, times: Floats, shots: NDArray[np.int64]) -> tuple[Floats, NDArray[np.bool_]]:
        """Values [n,D] at any times, and which of them [n] only hold a frame because none is near.

        Args:
            ticks: [n] seconds.
            times: [T] seconds of the frames, rising.
            shots: [T] numbers of their shots; nothing is blended across a cut.
        """
        rows = np.flatnonzero(self.usable)
        known = times[rows]
        after = np.searchsorted(known, ticks).clip(1, max(len(known) - 1, 1))
        before, after = rows[after - 1], rows[np.minimum(after, len(known) - 1)]
        gap = times[after] - times[before]
        share = np.divide(ticks - times[before], gap, out=np.zeros_like(ticks), where=gap > 0).clip(0, 1)
        apart = (gap > MAX_GAP_SECONDS) | (shots[before] != shots[after])
        share = np.where(apart, np.round(share), share)[:, None]
        values = (1 - share) * self.values[before] + share * self.values[after]
        away = np.abs(ticks - np.where(share[:, 0] < 0.5, times[before], times[after]))
        return values, away > MAX_GAP_SECONDS / 2


def _rest_pose(clip: Clip, camera: int) -> Floats:
    """[4,4] the mean head pose of a camera's usable frames, or of all of its frames where none can be used."""
    of_camera = clip.cameras == camera
    chosen = of_camera & clip.usable
    chosen = chosen if chosen.any() else of_camera
    return mean_pose(clip.Ts_cam_head[chosen], np.full(chosen.sum(), 1 / chosen.sum()))


class Transfer(NamedTuple):
    """A driver's performance on the avatar's scale."""

    wanted: Floats
    """[n,D] as the driver gave it, coefficients within [0, 1]."""
    values: Floats
    """[n,D] eased to the limits."""


def transfer(values: Floats, driver: Performance, avatar: Performance, overshoot: float = 1.0) -> Transfer:
    """What an avatar is to do: its own neutral, and the driver's departures from the driver's.

    Args:
        values: [n,D] of the driver, in its columns.
        driver, avatar: the driver's clip and the one that the avatar was made from.
        overshoot: how much of `OVERSHOOT` is allowed; 0 keeps all within what the avatar's clip showed.

    Raises:
        UserError: the columns do not have the same names.
    """
    check_names(driver.names, avatar.names)
    column = [driver.names.index(name) for name in avatar.names]
    wanted = avatar.neutral + (values - driver.neutral)[:, column]
    coefficient = ~np.isin(avatar.names, (*EYES, *TURN, *MOVE))
    # An imported dataset's own coefficients have other ranges: theirs is what the clip showed.
    wanted[:, coefficient] = wanted[:, coefficient].clip(
        np.minimum(avatar.low[coefficient], 0), np.maximum(avatar.high[coefficient], 1)
    )
    return Transfer(wanted, soft_limit(wanted, avatar.low, avatar.high, overshoot * allowed_overshoot(avatar.names)))


def check_names(driver: Sequence[str], avatar: Sequence[str]) -> None:
    """Refuse a driver whose numbers have other names than the avatar's.

    Raises:
        UserError: which are missing or unknown.
    """
    missing, unknown = sorted(set(avatar) - set(driver)), sorted(set(driver) - set(avatar))
    if any("/" in name for name in (*missing, *unknown)) and (own := basis_of(avatar)) != (given := basis_of(driver)):
        raise UserError(
            f"The avatar is driven by {own}, the driver gives {given}: numbers of one mean nothing to the other.",
            f"drive it with a subject or a table of {own}",
        )
    if missing or unknown:
        parts = [f"it lacks {_some(missing)}"] if missing else []
        parts += [f"the avatar does not know {_some(unknown)}"] if unknown else []
        raise UserError(
            f"The driver's coefficients are not those of the avatar: {'; '.join(parts)}.",
            "fit both subjects with head models that share their expression names (anny has the 52 of ARKit)",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def allowed_overshoot(names: Sequence[str]) -> Floats:
    """`OVERSHOOT` of the named columns [D]."""
    return _by_column(OVERSHOOT, names)


def soft_limit(values: Floats, low: Floats, high: Floats, room: Floats) -> Floats:
    """Values [n,D] left alone within `low` and `high` [D], eased beyond, never farther than `room` [D] from them.

    It rises everywhere and its slope is 1 at both ends of the range, so that nothing jumps.
    """
    inside = np.clip(values, low, high)
    excess = values - inside
    share = np.divide(excess, room, out=np.zeros_like(excess), where=np.broadcast_to(room > 0, excess.shape))
    return inside + room * np.tanh(share)


def conditions_for(avatar: AvatarModel, values: Floats, own: Performance, camera: int) -> Condition:
    """The conditions of n rows of an avatar's performance, float32 on its device.

    The skull moves with the head, the torso as it did with the head in training: as far as that was seen. The rest of
    the head's turn is left to the neck, and of its move the whole body follows.

    Args:
        avatar: the model.
        values: [n,D].
        own: the performance of the avatar's own clip.
        camera: number of the clip's camera before which the avatar performs.
    """
    column = {name: number for number, name in enumerate(own.names)}
    at_rest = avatar.neutral
    T_cam_rest = own.Ts_cam_rest[camera]

    def tensor(array: Floats) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=at_rest.T_cam_head.device)

    def part(rows: Floats, names: Sequence[str]) -> Floats:
        return rows[:, [column[name] for name in names]]

    def heads(rows: Floats) -> Floats:
        turned = T_cam_rest[:3, :3] @ rotvec_to_matrix(part(rows, TURN))
        return make_rigid(turned, T_cam_rest[:3, 3] + part(rows, MOVE))

    seen = np.clip(values, own.low, own.high)
    head, followed = tensor(heads(values)), tensor(heads(seen))
    eyes = nn.functional.pad(tensor(part(values, EYES)).view(-1, 2, 2), (0, 1))
    bend = at_rest.torso_shape.expand(len(head), -1)
    expression = tensor(part(values, avatar.expression_names))
    conditions = with_predicted_torso(
        avatar, Condition(expression, followed, followed, torch.zeros_like(eyes[:, 0]), eyes, bend, followed)
    )
    torso = conditions.T_cam_torso.clone()
    torso[:, :3, 3] += tensor(part(values - seen, MOVE))
    neck = matrix_to_rotvec(torso[:, :3, :3].transpose(-1, -2) @ head[:, :3, :3])
    return conditions._replace(T_cam_head=head, T_cam_torso=torso, neck=neck, T_cam_skull=head)


def limits_hit(result: Transfer, avatar: Performance) -> dict[str, dict[str, Any]]:
    """For each number that goes beyond what the avatar's clip showed: how far and how often, the farthest first.

    Args:
        result: the transfer.
        avatar: the performance of the avatar's own clip.
    """
    excess = np.maximum(result.wanted - avatar.high, avatar.low - result.wanted)
    worth = _by_column(TOLD, avatar.names)
    shares = (excess / allowed_overshoot(avatar.names)).max(0)
    found = {}
    for column in np.argsort(-shares, kind="stable"):
        beyond = excess[:, column] > worth[column]
        if beyond.any():
            found[avatar.names[column]] = {
                "frames": int(beyond.sum()),
                "seen": _span(avatar.low[column], avatar.high[column]),
                "wanted": _span(result.wanted[:, column].min(), result.wanted[:, column].max()),
                "shown": _span(result.values[:, column].min(), result.values[:, column].max()),
            }
    return found


def _span(low: float, high: float) -> list[float]:
    return [round(float(low), 4), round(float(high), 4)]


def _by_column(table: dict[str, float], names: Sequence[str]) -> Floats:
    return np.array([table.get(name, table["expression"]) for name in names])
