"""Where Gaussians start: where the training frames show the subject, in the colours they show there.

Pixels of a few frames, spread over pose and expression, are drawn at random, more of them at eyes and mouth. A pixel
that sees the fitted head becomes a Gaussian on that spot of its surface; one that sees hair or clothes beside it is put
at the depth of the nearest spot and hangs on that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.avatars import Condition, TrainingData
from pipeline.avatars.rig import FEATURE_FLOOR, Rig, features_of, joint_transforms
from pipeline.errors import StageError
from pipeline.mesh_render import Raster, interpolate, rasterize_mesh
from pipeline.torso import head_cover, torso_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

START_FRAMES = 12


class Start(NamedTuple):
    """Where N Gaussians start, float32."""

    rig: Rig
    means: Tensor
    """[N,3] at rest."""
    quats: Tensor
    """[N,4] with the z axis along the surface's normal."""
    sizes: Tensor
    """[N] metres."""
    colors: Tensor
    """[N,3] in [0,1]."""
    torso: Tensor
    """[N] share of the torso, inside (0,1)."""
    skull: Tensor
    """[N] share of hair, ears or neck rather than face, inside (0,1)."""


def start_on_head(data: TrainingData, count: int, rng: np.random.Generator) -> Start:
    """Seed `count` Gaussians; see the module's text.

    Raises:
        StageError: the fitted head lies outside the crop in every frame looked at.
    """
    features = features_of(data.conditions)
    identity = data.identity.astype(np.float64)
    neutral = data.head.template + np.einsum("s,svi->vi", identity, data.head.identity_basis)
    centres = data.head.joints + np.einsum("s,sji->ji", identity, data.head.joints_identity_basis)
    eye_centres = torch.from_numpy(centres[2:].astype(np.float32))
    candidates = spread_frames(features.numpy(), min(START_FRAMES, len(data)))
    views = [view for frame in candidates if (view := _View.of(data, frame, neutral, eye_centres)) is not None]
    if not views:
        raise StageError(
            "The fitted head lies outside the training crop in every frame looked at.",
            "look at the fit's overlay; run: headcast rerun SUBJECT --from fit",
        )
    shares = np.diff(np.linspace(0, count, len(views) + 1).round().astype(int))
    parts = [_seeds(data, view, share, count, rng) for view, share in zip(views, shares, strict=True)]
    seeds = _Seeds(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    corners = data.head.faces[seeds.face]
    used, compact = np.unique(corners, return_inverse=True)
    skin = np.einsum("nc,ncj->nj", seeds.bary, data.head.skin_weights[corners])
    eyes = np.where(seeds.follow[:, None] > 0.5, skin[:, 2:], 0)
    rig = Rig(
        torch.from_numpy(neutral[used].astype(np.float32)),
        torch.from_numpy(np.ascontiguousarray(data.head.expression_basis[:, used])),
        torch.from_numpy(compact.reshape(-1, 3).astype(np.int32)),
        torch.from_numpy(seeds.bary.astype(np.float32)),
        torch.from_numpy(seeds.follow.astype(np.float32)),
        torch.from_numpy(eyes.astype(np.float32)),
        eye_centres,
    )
    torso = np.where(seeds.torso, 1, skin[:, 1] / np.maximum(skin[:, :2].sum(1), 1e-6)).clip(0.05, 0.95)
    return Start(
        rig,
        torch.from_numpy(seeds.rest),
        torch.from_numpy(_turn_z_to(seeds.normal)),
        torch.from_numpy(seeds.size),
        torch.from_numpy(seeds.color),
        torch.from_numpy(torso.astype(np.float32)),
        torch.from_numpy(seeds.skull.astype(np.float32)),
    )


def spread_frames(features: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """`count` rows of `features` [T,D] far from each other by farthest-point sampling, sorted."""
    scaled = (features - features.mean(0)) / (features.std(0) + FEATURE_FLOOR)
    chosen = [int(np.square(scaled).sum(1).argmin())]
    distance = np.square(scaled - scaled[chosen[0]]).sum(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(scaled - scaled[chosen[-1]]).sum(1))
    return np.sort(np.array(chosen))


class _Seeds(NamedTuple):
    """Where Gaussians start, n of them."""

    face: NDArray[np.int64]
    bary: NDArray[np.float64]
    follow: NDArray[np.float64]
    rest: NDArray[np.float32]
    normal: NDArray[np.float32]
    size: NDArray[np.float32]
    color: NDArray[np.float32]
    torso: NDArray[np.bool_]
    """[n] of clothes and shoulders that the head does not hide."""
    skull: NDArray[np.float64]
    """[n] how far it is hair, ears or neck rather than face."""


class _View(NamedTuple):
    """The fitted head in one training frame."""

    frame: int
    joints: NDArray[np.float64]
    """[5,4,4] Ts_cam_joint."""
    neutral: NDArray[np.float64]
    """[V,3]."""
    expressed: NDArray[np.float64]
    """[V,3], still in the head frame."""
    raster: Raster
    cover: NDArray[np.bool_]
    """[R,R] what the head may hide of the torso."""

    @classmethod
    def of(cls, data: TrainingData, frame: int, neutral: NDArray[np.float64], eye_centres: Tensor) -> _View | None:
        """None where the crop shows nothing of the head."""
        head, size = data.head, data.images.shape[1]
        condition = Condition(*(value[frame : frame + 1].double() for value in data.conditions))
        joints = joint_transforms(condition, eye_centres.double())[0].numpy()
        expressed = neutral + np.einsum("e,evi->vi", condition.expression[0].numpy(), head.expression_basis)
        blended = np.einsum("vj,jab->vab", head.skin_weights, joints[:4])
        posed = np.einsum("vab,vb->va", blended[:, :3, :3], expressed) + blended[:, :3, 3]
        raster = rasterize_mesh(posed, head.faces, data.Ks[data.camera(frame)], size, size)
        if not (raster.face_index >= 0).any():
            return None
        cover = head_cover(posed[head.regions["head"]], data.Ks[data.camera(frame)], size, size)
        return cls(frame, joints, neutral, expressed, raster, cover)


def _seeds(data: TrainingData, view: _View, share: int, total: int, rng: np.random.Generator) -> _Seeds:
    """`share` seeds from one frame's pixels; `total` seeds over all frames decide how large each has to be."""
    head, raster, size = data.head, view.raster, data.images.shape[1]
    alpha = data.alphas[view.frame].astype(np.float64) / 255

    weight = np.where(alpha > 0.3, _importance(head, raster), 0)
    flat = weight.ravel()
    if np.count_nonzero(flat) == 0:
        flat = np.ones_like(flat)
    probability = flat / flat.sum()
    too_few = bool(np.count_nonzero(flat) < share)
    pixels = rng.choice(len(flat), share, replace=too_few, p=probability)
    rows, columns = np.divmod(pixels, size)

    seen = raster.face_index >= 0
    near_rows, near_columns, distance = _nearest_seen(seen, rows, columns)
    face = raster.face_index[near_rows, near_columns].astype(np.int64)
    bary = raster.bary[near_rows, near_columns].astype(np.float64)
    depth = raster.depth[near_rows, near_columns].astype(np.float64)
    K = data.Ks[data.camera(view.frame)]
    depth_to_metres = depth / K[0, 0]
    follow = np.exp(-np.square(distance * depth_to_metres / 0.015))

    x = (columns + 0.5 - K[0, 2]) / K[0, 0] * depth
    y = (rows + 0.5 - K[1, 2]) / K[1, 1] * depth
    corners = head.faces[face]
    skin = np.einsum("nc,nci->ni", bary, head.skin_weights[corners])
    skull = follow * np.einsum("nc,nc->n", bary, head.regions["face"][corners]) if "face" in head.regions else follow
    skull = np.clip(1 - skull, 0.05, 0.95)
    weights = np.concatenate([skin, skin[:, :1] * skull[:, None]], 1)
    weights[:, 0] *= 1 - skull
    bone = np.einsum("nj,jab->nab", weights, view.joints)
    unposed = np.linalg.solve(bone[:, :3, :3], (np.stack([x, y, depth], 1) - bone[:, :3, 3])[..., None])[..., 0]
    shift = np.einsum("nc,nci->ni", bary, (view.expressed - view.neutral)[corners])
    rest = unposed - follow[:, None] * shift

    a, b, c = (view.neutral[corners[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    towards_camera = np.broadcast_to(-view.joints[0, 2, :3], normal.shape)
    normal = np.where(distance[:, None] > 0, towards_camera, normal)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)

    spacing = 1 / np.sqrt(np.maximum(total * probability[pixels], 1e-6))
    opacity = np.maximum(alpha[rows, columns], 0.3)[:, None]
    over_white = data.images[view.frame][rows, columns] / 255
    color = np.clip((over_white - (1 - opacity)) / opacity, 0, 1)
    return _Seeds(
        face,
        bary,
        follow,
        rest.astype(np.float32),
        normal.astype(np.float32),
        (np.clip(0.6 * spacing, 0.5, 8) * depth_to_metres).astype(np.float32),
        color.astype(np.float32),
        torso_mask(alpha, view.cover, view.joints[1], K)[rows, columns],
        skull,
    )


def _importance(head: HeadModel, raster: Raster) -> NDArray[np.float64]:
    """[H,W] how densely Gaussians start: 1 beside the face, more on it, most at eyes and mouth."""
    fine = np.zeros(len(head.template), np.float32)
    for region in ("lips", "eyelids", "eyes", "teeth", "tongue", "mouth_interior"):
        if region in head.regions:
            fine[head.regions[region]] = 1
    face = head.regions["face"].astype(np.float32) if "face" in head.regions else np.ones_like(fine)
    regions = interpolate(raster, head.faces, np.stack([face, fine], 1))
    return 1.0 + regions[..., 0] + 2.0 * regions[..., 1]


def _nearest_seen(
    seen: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The nearest pixel that sees the head, and its distance in pixels (0 where a pixel sees it itself)."""
    from scipy.ndimage import distance_transform_edt

    distance, nearest = distance_transform_edt(~seen, return_indices=True)
    return nearest[0][rows, columns], nearest[1][rows, columns], distance[rows, columns]


def _turn_z_to(normals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit quaternions wxyz [N,4] of the shortest turn from the z axis to unit vectors [N,3]."""
    x, y, z = normals.T
    quats = np.stack([1 + z, -y, x, np.zeros_like(x)], 1)
    quats[z < -0.9999] = (0, 1, 0, 0)
    return (quats / np.linalg.norm(quats, axis=1, keepdims=True)).astype(np.float32)
