"""Bake an avatar of any model: sample its Gaussians, find the few shapes they move in, and what weights these.

Sampled are the training conditions, mixtures of them, and each coefficient alone, so that coefficients which never move
in the clip do as the model itself says. What an error of a Gaussian's number costs in the picture is measured through
the rasteriser; the shapes are the principal components in that metric, and so fine their steps of eight bits are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.avatars import AvatarModel, Condition, Gaussians, row, splat
from pipeline.avatars.baked import (
    COLUMNS,
    GAZE,
    LOG_SCALE,
    POSE,
    BakedAvatar,
    Bones,
    drive_of,
    inputs_of,
    pose,
    shares,
)
from pipeline.expressions import ranges_of
from pipeline.frames import evenly
from pipeline.gaze import eyes_of
from pipeline.geometry import (
    invert_rigid,
    make_rigid,
    matrix_to_quaternion,
    matrix_to_rotvec,
    quaternion_multiply,
    rotvec_to_matrix,
    transform_points,
)
from pipeline.rasterize.reference import sh_to_colors
from pipeline.torso import Torso, TorsoPredictor

MOTION, SHADING, HIDDEN = 56, 12, 64
"""Shapes of mean and turn, shapes of scale, colour and opacity, and units of the correctives' network."""

OWN_ROWS, MIXED_ROWS = 120, 160
MIXED_WEIGHT, PROBE_WEIGHT = 0.7, 0.6
"""What a mixture of training conditions and a coefficient alone count beside a training condition."""
MIXING = (-0.3, 1.3)
RAISED, RAISED_BY = 2.0, 0.5
"""So many of a mixture's coefficients, on average, are raised at random by so much at most: beyond the clip."""
SAMPLE_BYTES = 400_000_000
"""Memory for samples; avatars of more Gaussians than fit get fewer of them."""
LEAST_ROWS = 32
GAZES = 2 * GAZE + 1
METRIC_FRAMES = 12
LEAST_SENSITIVITY = 0.3
"""Hidden Gaussians count so much of an average one: another pose may show them."""
NOISE_DB = 58.0
"""PSNR of the full picture with the rounding of the shapes' values alone."""
RIDGE = 1e-3
# How far a Gaussian may depart from rest, by column: a coefficient alone can drive a model where it never was.
FARTHEST = (0.1,) * 3 + (2.0,) * 3 + (1.5,) * 3 + (0.7,) * 3 + (8.0,)
# Spread of the drive below which it counts as constant: coefficients; radians; then by turn, move and shape.
FLOORS = {"expression": 0.05, "gaze": 0.05, "turn": 0.02, "move": 0.005, "shape": 0.0005}
OPACITY_LIMIT = 1e-4
NETWORK_STEPS, NETWORK_RATE, NETWORK_DECAY = 400, 1e-2, 1e-4
PROBE_SHIFT_M = 1.0


class Samples(NamedTuple):
    """S conditions and what they count."""

    conditions: Condition
    weights: Tensor
    """[S]."""
    own: int
    """The first so many are conditions of the clip."""


def sample_rows(avatar: AvatarModel, frames: int) -> tuple[int, int, int]:
    """How many training conditions, mixtures and probes are sampled of a clip of so many training frames."""
    probes = len(avatar.expression_names) + GAZES
    rows = min(OWN_ROWS + MIXED_ROWS, max(LEAST_ROWS, SAMPLE_BYTES // (4 * COLUMNS * avatar.count) - probes))
    own = min(frames, rows * OWN_ROWS // (OWN_ROWS + MIXED_ROWS))
    return own, rows - own, probes


@torch.no_grad()
def bake(
    avatar: AvatarModel,
    conditions: Condition,
    Ks: Tensor,
    size: int,
    *,
    threads: int | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> BakedAvatar:
    """Linear blendshapes that come near an avatar of any model.

    Args:
        avatar: the full model, on any device.
        conditions: T training conditions; never those of held-out frames.
        Ks: [T,3,3] intrinsics of the pictures that shall come near.
        size: their width and height in pixels.
        threads: of the rasteriser.
        on_sample: called after each evaluation of the full model.

    Returns:
        the baked avatar, on the CPU, as its file will give it.
    """
    names = avatar.expression_names
    conditions, neutral = (Condition(*(value.cpu() for value in given)) for given in (conditions, avatar.neutral))
    count, mixed, _ = sample_rows(avatar, len(conditions.eyes))
    own = np.array(evenly(len(conditions.eyes), count))
    samples = _samples(conditions, own, mixed, neutral, names)
    joints = _joints(avatar, neutral)
    weights = shares(joints)
    alone = Condition(*(value[None] for value in neutral))
    (start,), bone = _evaluate(avatar, alone), row(Bones.of(alone), 0)
    quats = torch.nn.functional.normalize(_unturned(start, weights, bone), dim=1).half().float()
    rest = at_rest(start, quats, weights, bone)
    rest[LOG_SCALE.start :] = rest[LOG_SCALE.start :].half().float()
    departures = torch.empty(len(samples.weights), COLUMNS, avatar.count)
    bones, farthest = Bones.of(samples.conditions), torch.tensor(FARTHEST)[:, None]
    for i, gaussians in enumerate(_evaluate(avatar, samples.conditions)):
        departures[i] = (at_rest(gaussians, quats, weights, row(bones, i)) - rest).clamp(-farthest, farthest)
        on_sample()
    views = [(rest + departures[i], row(bones, i), Ks[own[i]]) for i in evenly(len(own), METRIC_FRAMES)]
    metric = _sensitivity(views, quats, weights, size, threads)

    parts = ((slice(0, LOG_SCALE.start), MOTION), (slice(LOG_SCALE.start, COLUMNS), SHADING))
    found = [_principal(departures[:, columns], samples, metric[columns], count) for columns, count in parts]
    latents, shown = torch.cat([part[0] for part in found], 1), torch.cat([part[2] for part in found])
    rounded = [_rounded(part[1], metric[columns], size) for (columns, _), part in zip(parts, found, strict=True)]
    typical_head = neutral.T_cam_head
    typical_torso = invert_rigid(neutral.T_cam_head) @ neutral.T_cam_torso
    drive = drive_of(samples.conditions, typical_head, typical_torso)
    mean, scale = _spread(drive[: samples.own], len(names))
    linear, normal = inputs_of(drive, mean, scale, len(names))
    heads, torsos, bends = (conditions[i].double().numpy() for i in (1, 2, 5))
    predictor = TorsoPredictor.fit(heads, Torso(torsos, bends, np.ones(len(heads))))
    arrays = {
        "means": rest[:3],
        "appearance": rest[6:],
        "quats": quats,
        "joints": joints,
        "motion": rounded[0][0],
        "motion_steps": rounded[0][1],
        "shading": rounded[1][0],
        "shading_steps": rounded[1][1],
        **_regression(linear, normal, latents, samples.weights, shown),
        "drive_mean": mean,
        "drive_scale": scale,
        "typical_head": typical_head,
        "typical_torso": typical_torso,
        **{f"neutral_{name}": value for name, value in neutral._asdict().items()},
        **{f"predictor_{name}": torch.from_numpy(value) for name, value in predictor._asdict().items()},
    }
    return BakedAvatar({name: value.clone() for name, value in arrays.items()}, avatar.head, names)


def at_rest(gaussians: Gaussians, quats: Tensor, joints: Tensor, bones: Bones) -> Tensor:
    """[13,N]: what `pose` makes these Gaussians from."""
    blended = (joints @ bones.rotations.flatten(1)).view(-1, 3, 3)
    means = _solve(blended, gaussians.means - joints @ bones.translations)
    own = quaternion_multiply(_unturned(gaussians, joints, bones), quats * quats.new_tensor([1, -1, -1, -1]))
    own = torch.where(own[:, :1] < 0, -own, own)
    # A half turn has no tangent; what comes near is held there.
    turn = own[:, 1:] / own[:, :1].clamp(min=0.3 * own.norm(dim=1, keepdim=True))
    opacity = torch.logit(gaussians.opacities, OPACITY_LIMIT)[None]
    return torch.cat([means.T, turn.T, gaussians.scales.clamp(min=1e-12).log().T, gaussians.colors.T, opacity])


def _unturned(gaussians: Gaussians, joints: Tensor, bones: Bones) -> Tensor:
    """[N,4] turns of Gaussians at rest, of any norm."""
    return quaternion_multiply(joints @ bones.quats * gaussians.quats.new_tensor([1, -1, -1, -1]), gaussians.quats)


def _solve(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[N,3] solutions of 3 x 3 systems by Cramer's rule: for this many, solvers are slow."""
    a, b, c = matrices.unbind(-1)
    bc = torch.linalg.cross(b, c)
    determinant = (a * bc).sum(-1, keepdim=True)
    rows = torch.stack([bc, torch.linalg.cross(c, a), torch.linalg.cross(a, b)], 1)
    return (rows @ vectors[..., None])[..., 0] / determinant


def _evaluate(avatar: AvatarModel, conditions: Condition) -> Iterator[Gaussians]:
    """The Gaussians of each condition in the camera's coordinates, in the plain colours that the camera sees."""
    device = next(avatar.buffers()).device
    prepared = avatar.prepare(Condition(*(value.to(device) for value in conditions)))
    for i in range(len(conditions.eyes)):
        means, quats, scales, opacities, colors, sh_degree, T_cam_world = avatar.deform(row(prepared, i))
        if T_cam_world is None:
            T_cam_world = torch.eye(4, device=device)
        if sh_degree is not None:
            colors = sh_to_colors(sh_degree, means, colors, T_cam_world)
        turn = matrix_to_quaternion(T_cam_world[:3, :3]).expand_as(quats)
        seen = transform_points(T_cam_world, means), quaternion_multiply(turn, quats), scales, opacities, colors
        means, quats, scales, opacities, colors = (value.cpu() for value in seen)
        yield Gaussians(means, quats, scales, opacities, colors)


def _samples(conditions: Condition, own: np.ndarray, mixed: int, neutral: Condition, names: tuple[str, ...]) -> Samples:
    """Training conditions, mixtures of their parts, and each coefficient and gaze alone.

    In the clip expression, turn, place and torso go together; mixtures tell apart which of them does what.
    """
    rng = np.random.default_rng(0)

    first, second, turned, moved, bent = (
        Condition(*(value[rows] for value in conditions))
        for rows in torch.from_numpy(rng.integers(len(conditions.eyes), size=(5, mixed)))
    )
    share, reach = torch.from_numpy(rng.uniform(*MIXING, (2, mixed))).float()
    turn = matrix_to_rotvec(first.T_cam_head[:, :3, :3].mT @ turned.T_cam_head[:, :3, :3])
    head = make_rigid(first.T_cam_head[:, :3, :3] @ rotvec_to_matrix(reach[:, None] * turn), moved.T_cam_head[:, :3, 3])
    torso = head @ invert_rigid(bent.T_cam_head) @ bent.T_cam_torso
    low, high = ranges_of(names, conditions.expression)
    raised = RAISED_BY * rng.random((mixed, len(names))) * (rng.random((mixed, len(names))) < RAISED / len(names))
    expression = torch.lerp(first.expression, second.expression, share[:, None])
    expression += (high - low) * torch.from_numpy(raised).float()
    mixtures = Condition(
        expression.clamp(low, high),
        head,
        torso,
        matrix_to_rotvec(torso[:, :3, :3].mT @ head[:, :3, :3]),
        torch.lerp(first.eyes, second.eyes, share[:, None, None]),
        bent.torso_shape,
        head @ invert_rigid(moved.T_cam_head) @ moved.T_cam_skull,
    )
    alone = torch.diag(high - low)
    # Rest itself is the last of them.
    gaze = torch.zeros(GAZES, 2, 3)
    gaze[:-1, :, :2] = torch.cat([0.3 * torch.eye(GAZE), -0.3 * torch.eye(GAZE)]).view(-1, 2, 2)
    count = len(alone) + len(gaze)
    probes = Condition(*(value.expand(count, *value.shape) for value in neutral))._replace(
        expression=(neutral.expression + torch.cat([alone, torch.zeros(len(gaze), len(names))])).clamp(low, high),
        eyes=neutral.eyes + torch.cat([eyes_of(alone, names), gaze]),
    )
    clip = Condition(*(value[torch.from_numpy(own)] for value in conditions))
    joined = Condition(*(torch.cat(parts) for parts in zip(clip, mixtures, probes, strict=True)))
    weights = [1.0] * len(own) + [MIXED_WEIGHT] * mixed + [PROBE_WEIGHT] * count
    return Samples(joined, torch.tensor(weights), len(own))


def _joints(avatar: AvatarModel, neutral: Condition) -> Tensor:
    """Bytes [N,2] of how far each Gaussian goes along when the torso and the skull alone are moved."""
    names = ("T_cam_torso", "T_cam_skull")
    probes = Condition(*(value.repeat(1 + 3 * len(names), *[1] * value.dim()) for value in neutral))
    for i, name in enumerate(names):
        getattr(probes, name)[1 + 3 * i : 4 + 3 * i, :3, 3] += PROBE_SHIFT_M * torch.eye(3)
    start, *moved = (gaussians.means for gaussians in _evaluate(avatar, probes))
    went = torch.stack([m - start for m in moved], -1).unflatten(-1, (len(names), 3))
    along = went.diagonal(dim1=1, dim2=3).mean(-1).clamp(0, PROBE_SHIFT_M) / PROBE_SHIFT_M
    found = (255 * along / along.sum(1, keepdim=True).clamp(min=1)).round()
    found[:, 0] -= (found.sum(1) - 255).clamp(min=0)
    return found.to(torch.uint8)


def _sensitivity(
    views: list[tuple[Tensor, Bones, Tensor]], quats: Tensor, joints: Tensor, size: int, threads: int | None
) -> Tensor:
    """[13,N] root of the squared error in a picture (sum over pixels and channels) per squared error in a number.

    Mean over views, by random signs at the pixels: their product with the picture has a gradient whose square is that
    sum in expectation (Hutchinson 1989).
    """
    rng, total = np.random.default_rng(1), torch.zeros(COLUMNS, len(quats))
    for rest, bones, K in views:
        with torch.enable_grad():
            leaf = rest.clone().requires_grad_()
            image = splat(pose(leaf, quats, joints, bones), K, size, size, torch.ones(3), threads=threads).image
            signs = torch.from_numpy(rng.choice(np.array([-1, 1], np.float32), image.shape))
            (gradient,) = torch.autograd.grad((image * signs).sum(), leaf)
        total += gradient.square()
    mean = total / len(views)
    return (mean + LEAST_SENSITIVITY**2 * mean.mean(1, keepdim=True)).sqrt().clamp(min=1e-9)


def _principal(departures: Tensor, samples: Samples, metric: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [S,K], 1 at most, shapes [K,C,N] that come nearest to departures [S,C,N], what each shows [K]."""
    gram = torch.zeros(2 * departures.shape[:1], dtype=torch.float64)
    for column, sensitivity in zip(departures.unbind(1), metric, strict=True):
        seen = column * (samples.weights[:, None] * sensitivity)
        gram += seen @ seen.T
    energies, vectors = torch.linalg.eigh(gram)
    energies, vectors = energies.flip(0)[:count].clamp(min=0).float(), vectors.flip(1)[:, :count].float()
    weights = vectors / samples.weights[:, None]
    unit = weights.abs().amax(0).clamp(min=1e-12)
    shapes = (vectors * samples.weights[:, None]).T @ departures.flatten(1)
    return weights / unit, (unit[:, None] * shapes).unflatten(1, departures.shape[1:]), unit * energies.sqrt()


def _rounded(bases: Tensor, metric: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eight bits [K,C,N] and steps [K,C], of half precision, of shapes.

    A step is no finer than the picture can tell; where that is coarse, most values are 0, which packs well. Where the
    largest values need more than 127 steps, of a few larger steps and of cutting them off what costs less is taken.
    """
    noise = 3 * size**2 * 10 ** (-NOISE_DB / 10)
    coarse = (12 * noise / (bases[0].numel() * len(bases))) ** 0.5 / metric.square().mean(1).sqrt()
    whole = bases.abs().amax(2) / 127
    best = torch.full_like(whole, torch.inf)
    kept, steps = torch.zeros(bases.shape, dtype=torch.int8), torch.zeros_like(whole)
    for share in (1.0, 0.7, 0.5, 0.35, 0.25, 0.15):
        step = torch.maximum(share * whole, coarse).clamp(2.0**-24, 6e4).half().float()
        values = (bases / step[..., None]).round().clamp(-127, 127)
        cost = (metric * (values * step[..., None] - bases)).square().sum(2)
        better = cost < best
        best, steps = torch.where(better, cost, best), torch.where(better, step, steps)
        kept = torch.where(better[..., None], values.to(torch.int8), kept)
    return kept, steps


def _spread(drive: Tensor, expressions: int) -> tuple[Tensor, Tensor]:
    """Mean and scale [D] of a drive [S,D]."""
    shapes = drive.shape[1] - expressions - GAZE - POSE
    floors = [FLOORS["expression"]] * expressions + [FLOORS["gaze"]] * GAZE
    floors += 2 * ([FLOORS["turn"]] * 3 + [FLOORS["move"]] * 3) + [FLOORS["shape"]] * shapes
    return drive.mean(0), drive.std(0, correction=0) + torch.tensor(floors)


def _regression(linear: Tensor, normal: Tensor, latents: Tensor, weights: Tensor, shown: Tensor) -> dict[str, Tensor]:
    """What gives the shapes' weights `latents` [S,K]: ridge regression, then a network for its rest, and both together.

    Args:
        linear, normal: [S,I] and [S,D] of `inputs_of`.
        latents: [S,K]. weights: [S] what a sample counts. shown: [K] what an error of a shape's weight costs.
    """
    # Without a floor, what is hardly shown could not be divided by what it shows.
    shown = shown / shown.max().clamp(min=1e-12) + 1e-6
    w, wanted = weights[:, None], latents * shown
    X = w * torch.cat([torch.ones_like(linear[:, :1]), linear], 1)
    normal_equations = (X.T @ X + RIDGE * torch.eye(X.shape[1])).double()
    L = torch.linalg.solve(normal_equations, (X.T @ (w * wanted)).double()).float()
    rest = w * wanted - X @ L
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(HIDDEN, normal.shape[1], generator=generator) / normal.shape[1] ** 0.5
    bias, out = torch.zeros(HIDDEN), torch.zeros(latents.shape[1], HIDDEN)
    unit = rest.square().mean().sqrt().clamp(min=1e-12)
    more = torch.zeros_like(L)
    parameters = [p.requires_grad_() for p in (hidden, bias, out, more)]
    with torch.enable_grad():
        optimiser = torch.optim.Adam(parameters, lr=NETWORK_RATE)
        for step in range(NETWORK_STEPS):
            for group in optimiser.param_groups:
                group["lr"] = NETWORK_RATE * 0.5 * (1 + np.cos(np.pi * step / NETWORK_STEPS))
            optimiser.zero_grad()
            error = w * (torch.tanh(normal @ hidden.T + bias) @ out.T) + X @ more - rest / unit
            loss = error.square().mean() + NETWORK_DECAY * sum(p.square().mean() for p in parameters)
            loss.backward()
            optimiser.step()
    L += unit * more.detach()
    return {
        "offset": L[0] / shown,
        "linear": (L[1:] / shown).T,
        "hidden": hidden.detach(),
        "hidden_bias": bias.detach(),
        "correctives": unit * out.detach() / shown[:, None],
    }
