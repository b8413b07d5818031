"""What an export lost: the avatar's own Gaussians and those read back, rendered from the same four cameras."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.avatars import AvatarModel, Gaussians
    from pipeline.splats import Splats
    from pipeline.viewpoint import Camera

SIZE_PX = 512
VIEWS_DEG = ((0, 0), (40, 0), (-40, 0), (0, 25))
"""Yaw and pitch of the cameras round the head at rest."""


class Loss(NamedTuple):
    """PSNR over white of what was read back against the avatar, in dB, at most `metrics.PSNR_CAP_DB`."""

    psnr_db: float
    """Mean over pictures."""
    least_psnr_db: float
    pictures: int

    def account(self) -> dict[str, float | int]:
        """For a product's account."""
        return {
            "psnr_db": round(self.psnr_db, 2),
            "least_psnr_db": round(self.least_psnr_db, 2),
            "compared": self.pictures,
        }

    def __str__(self) -> str:
        return (
            f"Read back and rendered from {self.pictures} views: {self.psnr_db:.1f} dB PSNR against the avatar, "
            f"{self.least_psnr_db:.1f} dB at least."
        )


def cameras_of(avatar: AvatarModel) -> list[Camera]:
    """Cameras in the clip's own axes, which frame the avatar at rest."""
    from pipeline.api import Avatar

    shown = Avatar(avatar)
    return [shown.camera(SIZE_PX, yaw, pitch) for yaw, pitch in VIEWS_DEG]


def loss_of(pairs: Iterable[tuple[Gaussians, Gaussians]], cameras: list[Camera], threads: int | None = None) -> Loss:
    """Compare the avatar with what was read back.

    Args:
        pairs: the avatar's Gaussians and those read back (`pipeline.export.gaussians_of`).
        cameras: each pair is looked at through all of them.
        threads: of the rasteriser.
    """
    import numpy as np
    import torch

    from pipeline.avatars import splat
    from pipeline.metrics import psnr

    def picture(gaussians: Gaussians, camera: Camera) -> np.ndarray:
        K, view = torch.from_numpy(camera.K).float(), torch.from_numpy(camera.T_cam_world).float()
        with torch.no_grad():
            shown = splat(gaussians, K, camera.width, camera.height, torch.ones(3), threads=threads, view=view)
        return np.asarray(shown.image.clamp(0, 1).numpy())

    found = [psnr(picture(own, camera), picture(read, camera)) for own, read in pairs for camera in cameras]
    return Loss(float(np.mean(found)), min(found), len(found))


def rest_loss(avatar: AvatarModel, read: Splats, threads: int | None = None) -> Loss:
    """Of Gaussians read back, in the head's axes, against the avatar at rest."""
    import torch

    from pipeline.export import gaussians_of

    rest = avatar.neutral
    with torch.no_grad():
        own = avatar.gaussians(rest)
    return loss_of([(own, gaussians_of(read, rest.T_cam_head))], cameras_of(avatar), threads)
