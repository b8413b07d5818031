"""An avatar as other tools want it: its neutral state as plain Gaussians, and what its lesser forms cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.avatars import AvatarModel, Condition, Gaussians
from pipeline.clip import Clip, load_crops
from pipeline.evaluation import ClipRenderer, Picture
from pipeline.geometry import invert_rigid, matrix_to_quaternion, quaternion_multiply, transform_points
from pipeline.metrics import psnr
from pipeline.rasterize import render_uint8
from pipeline.rasterize.reference import sh_bases
from pipeline.splats import Splats, colors_to_sh
from pipeline.viewpoint import framing

if TYPE_CHECKING:
    from numpy.typing import NDArray


def neutral_splats(avatar: AvatarModel) -> Splats:
    """The avatar's Gaussians at rest, in the head's axes and metres."""
    neutral = avatar.neutral
    with torch.no_grad():
        return splats_of(avatar.gaussians(neutral), invert_rigid(neutral.T_cam_head))


def splats_of(gaussians: Gaussians, T_axes_cam: Tensor) -> Splats:
    """What an avatar gave, in other axes.

    Args:
        gaussians: in the camera's coordinates, or with what leads to them.
        T_axes_cam: [4,4] from the camera's axes to those that are wanted, y up.
    """
    T = T_axes_cam if gaussians.T_cam_world is None else T_axes_cam @ gaussians.T_cam_world
    quats = quaternion_multiply(matrix_to_quaternion(T[:3, :3]).expand_as(gaussians.quats), gaussians.quats)
    arrays = (
        transform_points(T, gaussians.means),
        quats / quats.norm(dim=-1, keepdim=True),
        gaussians.scales,
        gaussians.opacities,
        gaussians.colors,
    )
    means, unit_quats, scales, opacities, colors = (value.float().cpu().numpy() for value in arrays)
    if gaussians.sh_degree is None:
        sh = colors_to_sh(colors)
    else:
        sh = np.zeros((len(means), 16, 3), np.float32)
        sh[:, : colors.shape[1]] = colors
        sh = _turned_harmonics(sh, T[:3, :3])
    return Splats(means, unit_quats, scales, opacities, sh)


def gaussians_of(splats: Splats, T_cam_axes: Tensor) -> Gaussians:
    """The other way: Gaussians to rasterise, from plain arrays and where their axes lie in the camera's."""
    arrays = (splats.means, splats.quats, splats.scales, splats.opacities, splats.sh)
    means, quats, scales, opacities, sh = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    return Gaussians(means, quats, scales, opacities, sh, 3, T_cam_axes.float())


def _turned_harmonics(sh: NDArray[np.float32], rotation: Tensor) -> NDArray[np.float32]:
    """Coefficients [N,16,3] of harmonics of the same colours in axes to which `rotation` [3,3] takes.

    The matrix between the two is the one that agrees in more directions than there are harmonics.
    """
    R = rotation.double().cpu()
    if torch.allclose(R, torch.eye(3, dtype=R.dtype), atol=1e-6):
        return sh
    directions = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(64, 3))), dim=1)
    turn = torch.linalg.lstsq(sh_bases(3, directions), sh_bases(3, directions @ R)).solution
    return np.asarray(np.einsum("jk,nkc->njc", turn.numpy(), sh), np.float32)


def portrait(splats: Splats, T_cam_head: np.ndarray, size: int, threads: int | None = None) -> np.ndarray:
    """A picture [size,size,3] uint8 of Gaussians over white, framed to fill it.

    Args:
        splats: in the head's axes.
        T_cam_head: [4,4] where the head is seen from; only what lies before the camera is framed.
        size: width and height in pixels.
        threads: of the rasteriser.
    """
    K = framing(transform_points(T_cam_head, splats.means.astype(np.float64)), size, size).K
    arrays = (splats.means, splats.quats, splats.scales, splats.opacities, splats.sh)
    means, quats, scales, opacities, sh = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    return render_uint8(
        means, quats, scales, opacities, sh, torch.from_numpy(np.asarray(T_cam_head)), torch.from_numpy(K), size, size,
        background=torch.ones(3), sh_degree=3, threads=threads,
    )  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """The held-out frames beside what an avatar shows of them: what a lesser form of it costs is measured here.

    Attributes:
        renderer: the avatar and what drives it.
        frames: [n] numbers.
        truth, full: [n] pictures [R,R,3] in [0,1] over white, of the film and of the avatar.
    """

    renderer: ClipRenderer
    frames: list[int]
    truth: list[NDArray[np.float32]]
    full: list[NDArray[np.float32]]

    @staticmethod
    def of(renderer: ClipRenderer, clip: Clip, frames: list[int]) -> HeldOut:
        """The pictures of these frames of the clip."""
        crops = load_crops(clip, frames, threads=renderer.threads)
        truth = [Picture.of(crops, i).image for i in range(len(frames))]
        return HeldOut(renderer, frames, truth, [renderer.render(frame).image for frame in frames])

    def shown(self, avatar: AvatarModel, conditions: Condition | None = None) -> list[NDArray[np.float32]]:
        """The same pictures of another avatar, of which `conditions`, where given, drive the whole clip."""
        renderer = replace(self.renderer, avatar=avatar, conditions=conditions or self.renderer.conditions)
        return [renderer.render(frame).image for frame in self.frames]

    def psnr(self, pictures: list[NDArray[np.float32]]) -> float:
        """Of pictures against the film, dB, mean over frames."""
        return mean_psnr(self.truth, pictures)

    def loss_db(self, avatar: AvatarModel) -> float:
        """What another avatar's pictures lose to the full one's, dB of PSNR against the film."""
        return self.psnr(self.full) - self.psnr(self.shown(avatar))


def mean_psnr(first: list[NDArray[np.float32]], second: list[NDArray[np.float32]]) -> float:
    """Mean over pairs of pictures, dB."""
    return float(np.mean([psnr(a, b) for a, b in zip(first, second, strict=True)]))
