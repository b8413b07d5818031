"""Views of an avatar that its clip never had: how far the clip saw the head, what it cut off, and a strip of views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.evaluation_figures import GAP_PX, PAPER, titled
from pipeline.export import neutral_splats
from pipeline.geometry import quaternion_to_matrix, transform_points
from pipeline.viewpoint import ROOM, angles_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.api import Avatar
    from pipeline.avatars import AvatarModel
    from pipeline.clip import Clip

VIEWS = ((-40, 0), (-20, 0), (0, 0), (20, 0), (40, 0), (0, 15), (0, -15))
"""Degrees of yaw and pitch in the strip."""
SMILE = {"mouthSmileLeft": 0.7, "mouthSmileRight": 0.7, "cheekSquintLeft": 0.3, "cheekSquintRight": 0.3}
TILE_PX = 256
BOTTOM_BAND, OTHER_BAND = 0.08, 0.03
"""Shares of the crop's side over which the avatar fades at its lower edge, and at the others."""
SEEN_SHARE = (1, 99)
"""Percentiles of the angles that count as seen: single frames teach nothing."""
HOLDS_DEG = 10
"""How far beyond the angles seen views were found to hold (docs/render.md)."""


def soft_edge(model: AvatarModel, clip: Clip) -> torch.Tensor:
    """[N] factors of the opacities that fade an avatar out where its clip was cut, on the avatar's device.

    What lies beyond the crop or the picture was never seen, and hangs there in streaks; what ends there looks torn.
    A Gaussian counts as far out as it reaches with one standard deviation.
    """
    splats, T_cam_head = neutral_splats(model), model.neutral.T_cam_head.double().cpu().numpy()
    camera = clip.main_camera
    K, side = clip.Ks[camera], clip.resolution
    means = transform_points(T_cam_head, splats.means.astype(np.float64))
    axes = T_cam_head[:3, :3] @ quaternion_to_matrix(splats.quats.astype(np.float64))
    spread = np.linalg.norm(axes * splats.scales[:, None], axis=-1)
    depth = means[:, 2:].clip(1e-3)
    flat = (means @ K.T)[:, :2] / depth
    reach = spread[:, :2] * np.diag(K)[:2] / depth
    rows, columns = np.nonzero(clip.inside()[camera] > 0.5)
    low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
    inside = np.minimum(
        (flat - reach - low) / (OTHER_BAND * side),
        (high - flat - reach) / (np.array([OTHER_BAND, BOTTOM_BAND]) * side),
    )
    share = inside.min(1).clip(0, 1)
    factors = share * share * (3 - 2 * share)
    return torch.as_tensor(factors, dtype=torch.float32, device=model.neutral.T_cam_head.device)


def angles_seen(clip: Clip, frames: NDArray[np.int64], model: AvatarModel) -> dict[str, list[float]]:
    """From where these frames saw the head: the least and the most `yaw` and `pitch`, degrees from the view at rest.

    Args:
        clip: the subject's.
        frames: numbers of those that the avatar was trained on.
        model: whose pose at rest counts as 0.
    """
    rest = angles_of(model.neutral.T_cam_head.double().cpu().numpy())
    ends = np.percentile(angles_of(clip.Ts_cam_head[frames]) - rest, SEEN_SHARE, axis=0).round(1)
    return {name: ends[:, column].tolist() for column, name in enumerate(("yaw", "pitch"))}


def seen_text(seen: dict[str, list[float]]) -> str:
    """What `angles_seen` found, in words."""
    (left, right), (below, above) = seen["yaw"], seen["pitch"]
    return (
        f"The clip shows this head over {right - left:.0f} degrees from side to side and {above - below:.0f} up and "
        f"down. Views beyond are guesses: some {HOLDS_DEG} degrees farther they hold, from below half of that, then "
        "holes open before the ears and under the chin; the back of the head was never there. A clip in which the head "
        "turns farther widens this."
    )


def strip(avatar: Avatar, size: int = TILE_PX) -> NDArray[np.uint8]:
    """[H,W,3] the views of `VIEWS` side by side, at rest and below it smiling where the avatar can."""
    smile = {name: value for name, value in SMILE.items() if name in avatar.expression_names}
    names = [f"pitch {pitch:+d}" if pitch else f"yaw {yaw:+d}" if yaw else "as filmed" for yaw, pitch in VIEWS]
    look = avatar.viewpoints(size)
    cameras = [look(yaw, pitch, ROOM) for yaw, pitch in VIEWS]

    def line(expression: dict[str, float] | None) -> NDArray[np.uint8]:
        driven: Any = avatar.condition(expression)
        return titled({name: avatar.render(driven, camera=at) for name, at in zip(names, cameras, strict=True)})

    lines = [line(None), *([line(smile)] if smile else [])]
    gap = np.full((GAP_PX, lines[0].shape[1], 3), PAPER, np.uint8)
    return np.concatenate([part for row in lines for part in (row, gap)][:-1])
