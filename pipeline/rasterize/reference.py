"""Readable twin of the Gaussian rasteriser in plain torch, differentiable by autograd.

It follows gsplat 1.5.3 (Ye et al., "gsplat: An Open-Source Library for Gaussian Splatting", JMLR 2025) in its "classic"
mode: EWA projection with a 0.3 px^2 blur, front-to-back alpha compositing. It runs in any floating dtype on any device
and is what the fast backends are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.rasterize import Outputs, check_camera, check_finite

EPS_2D = 0.3
"""Variance in px^2 added to both axes of every projected covariance."""
NEAR_PLANE = 0.01
FAR_PLANE = 1e10
ALPHA_MAX = 0.999
ALPHA_MIN = 1.0 / 255.0
"""A Gaussian contributes to a pixel only where its alpha reaches this."""
TRANSMITTANCE_MIN = 1e-4
"""A pixel is finished before the Gaussian that would bring its transmittance to this or below."""
MAX_EXTENT_SIGMAS = 3.33
"""Box half-size in standard deviations at full opacity: beyond it alpha is below ALPHA_MIN."""
ALPHA_FLOOR = 1e-10
"""What the accumulated depth is divided by at least: it makes the depth behind nothing 0."""
TILE = 16


def quat_to_rotmat(quats: Tensor) -> Tensor:
    """Rotation matrices [N,3,3] of quaternions [N,4] wxyz, which need not be normalised."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows, dim=-1).reshape(-1, 3, 3)


def project(
    means: Tensor,  # [N,3]
    quats: Tensor,  # [N,4]
    scales: Tensor,  # [N,3]
    opacities: Tensor,  # [N]
    viewmat: Tensor,  # [4,4]
    K: Tensor,  # [3,3]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Project 3D Gaussians to the image by EWA splatting (Zwicker et al. 2001).

    Returns means2d [N,2] in pixels, conics [N,3] (inverse 2D covariance: xx, xy, yy; px^-2), depths [N] and radii [N]
    int32 in pixels, 0 for a Gaussian that cannot reach the image. Other values of culled Gaussians mean nothing, but
    are finite.
    """
    R, t = viewmat[:3, :3], viewmat[:3, 3]
    points = means @ R.T + t
    x, y, z = points.unbind(-1)
    in_range = (z > NEAR_PLANE) & (z < FAR_PLANE)
    # Culled points get a harmless depth, so that no infinity meets a zero gradient and makes a NaN.
    z_safe = torch.where(in_range, z, torch.ones_like(z))
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]

    # Outside 1.3 times the field of view the Jacobian is taken at the border: there it would blow up.
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    jx = torch.clamp(x / z_safe, -(cx / fx + margin_x), (width - cx) / fx + margin_x)
    jy = torch.clamp(y / z_safe, -(cy / fy + margin_y), (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z_safe, zero, -fx * jx / z_safe, zero, fy / z_safe, -fy * jy / z_safe], -1).reshape(-1, 2, 3)

    half = J @ R @ (quat_to_rotmat(quats) * scales[:, None, :])  # [N,2,3], its square is the 2D covariance
    covars = half @ half.transpose(1, 2)
    cov_xx, cov_xy, cov_yy = covars[:, 0, 0] + EPS_2D, covars[:, 0, 1], covars[:, 1, 1] + EPS_2D
    det = (cov_xx * cov_yy - cov_xy * cov_xy).clamp_min(1e-10)
    conics = torch.stack([cov_yy, -cov_xy, cov_xx], dim=-1) / det[:, None]
    means2d = torch.stack([fx * x / z_safe + cx, fy * y / z_safe + cy], dim=-1)

    with torch.no_grad():
        extent = torch.sqrt(2.0 * torch.log((opacities / ALPHA_MIN).clamp_min(1.0))).clamp_max(MAX_EXTENT_SIGMAS)
        radius_x, radius_y = torch.ceil(extent * cov_xx.sqrt()), torch.ceil(extent * cov_yy.sqrt())
        u, v = means2d.unbind(-1)
        on_screen = (u + radius_x > 0) & (u - radius_x < width) & (v + radius_y > 0) & (v - radius_y < height)
        visible = in_range & on_screen & (opacities >= ALPHA_MIN)
        radii = torch.where(visible, torch.maximum(radius_x, radius_y), zero)
        radii = radii.clamp_max(2**30).to(torch.int32)
    return means2d, conics, z, radii


def sh_bases(degree: int, dirs: Tensor) -> Tensor:
    """Real spherical harmonics [N,(degree+1)^2] at unit directions [N,3], degree 0 to 3.

    Constants and signs of Sloan, "Efficient Spherical Harmonic Evaluation", JCGT 2013.
    """
    x, y, z = dirs.unbind(-1)
    bases = [torch.full_like(x, 0.2820947917738781)]
    if degree >= 1:
        bases += [-0.48860251190292 * y, 0.48860251190292 * z, -0.48860251190292 * x]
    if degree >= 2:
        xx_yy, xy2 = x * x - y * y, 2 * x * y
        bases += [
            0.5462742152960395 * xy2,
            -1.092548430592079 * z * y,
            0.9461746957575601 * z * z - 0.3153915652525201,
            -1.092548430592079 * z * x,
            0.5462742152960395 * xx_yy,
        ]
    if degree >= 3:
        c = -2.285228997322329 * z * z + 0.4570457994644658
        bases += [
            -0.5900435899266435 * (x * xy2 + y * xx_yy),
            1.445305721320277 * z * xy2,
            c * y,
            z * (1.865881662950577 * z * z - 1.119528997770346),
            c * x,
            1.445305721320277 * z * xx_yy,
            -0.5900435899266435 * (x * xx_yy - y * xy2),
        ]
    return torch.stack(bases, dim=-1)


def sh_to_colors(degree: int, means: Tensor, coefficients: Tensor, viewmat: Tensor) -> Tensor:
    """Colours [N,3] of SH coefficients [N,>=(degree+1)^2,3] seen from the camera: max(SH + 0.5, 0)."""
    center = -viewmat[:3, :3].T @ viewmat[:3, 3]
    dirs = F.normalize(means - center, dim=-1)
    bases = sh_bases(degree, dirs)
    return (torch.einsum("nk,nkc->nc", bases, coefficients[:, : bases.shape[-1]]) + 0.5).clamp_min(0.0)


def composite(
    means2d: Tensor,  # [N,2]
    conics: Tensor,  # [N,3]
    depths: Tensor,  # [N]
    radii: Tensor,  # [N]
    opacities: Tensor,  # [N]
    colors: Tensor,  # [N,C]
    background: Tensor | None,  # [C]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """Composite projected Gaussians front to back: image [H,W,C] and alpha [H,W] (Kerbl et al. 2023, eq. 3).

    Tiles of 16 x 16 pixels bound the memory; inside a tile every Gaussian meets every pixel.
    """
    dtype, device = means2d.dtype, means2d.device
    visible = torch.nonzero(radii > 0)[:, 0]
    order = visible[torch.argsort(depths.detach()[visible], stable=True)]
    means2d, conics, opacities, colors = means2d[order], conics[order], opacities[order], colors[order]
    lower = (means2d - radii[order, None]).detach()
    upper = (means2d + radii[order, None]).detach()

    image_rows, alpha_rows = [], []
    for top in range(0, height, TILE):
        bottom = min(top + TILE, height)
        in_row = torch.nonzero((lower[:, 1] < bottom) & (upper[:, 1] > top))[:, 0]
        image_tiles, alpha_tiles = [], []
        for left in range(0, width, TILE):
            right = min(left + TILE, width)
            near = in_row[(lower[in_row, 0] < right) & (upper[in_row, 0] > left)]
            v, u = torch.meshgrid(
                torch.arange(top, bottom, dtype=dtype, device=device) + 0.5,
                torch.arange(left, right, dtype=dtype, device=device) + 0.5,
                indexing="ij",
            )
            pixels = torch.stack([u, v], dim=-1).reshape(-1, 1, 2)
            dx, dy = (pixels - means2d[near]).unbind(-1)  # [P,G]
            a, b, c = conics[near].unbind(-1)
            sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = (opacities[near] * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
            alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)
            # Transmittance never rises, so "not yet at the stop" is a prefix of every row.
            alpha = torch.where(torch.cumprod(1 - alpha, dim=1) > TRANSMITTANCE_MIN, alpha, 0.0)
            after = torch.cumprod(1 - alpha, dim=1)
            before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1) if len(near) else after
            pixel_alpha = 1 - (after[:, -1] if len(near) else torch.ones_like(after.sum(1)))
            pixel_color = (alpha * before) @ colors[near]
            if background is not None:
                pixel_color = pixel_color + (1 - pixel_alpha)[:, None] * background
            image_tiles.append(pixel_color.reshape(bottom - top, right - left, -1))
            alpha_tiles.append(pixel_alpha.reshape(bottom - top, right - left))
        image_rows.append(torch.cat(image_tiles, dim=1))
        alpha_rows.append(torch.cat(alpha_tiles, dim=1))
    return torch.cat(image_rows), torch.cat(alpha_rows)


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    *,
    background: Tensor | None,
    sh_degree: int | None,
    depth: bool,
    threads: int | None,
) -> Outputs:
    """`pipeline.rasterize.rasterize` for one camera; `threads` is left to torch's own setting."""
    check_camera(viewmat, K)
    check_finite(means=means, quats=quats, scales=scales, opacities=opacities, colors=colors, background=background)
    means2d, conics, depths, radii = project(means, quats, scales, opacities, viewmat, K, width, height)
    if sh_degree is not None:
        colors = sh_to_colors(sh_degree, means, colors, viewmat)
    if depth:
        colors = torch.cat([colors, depths[:, None]], dim=1)
        background = None if background is None else F.pad(background, (0, 1))
    image, alpha = composite(means2d, conics, depths, radii, opacities, colors, background, width, height)
    if not depth:
        return image, alpha, means2d, radii, depths, None
    expected_depth = image[..., -1] / alpha.clamp_min(ALPHA_FLOOR)
    return image[..., :-1], alpha, means2d, radii, depths, expected_depth
