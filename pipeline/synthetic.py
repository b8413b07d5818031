"""A synthetic subject with known truth: a head model painted, lit and moved before a known camera.

Tests fit and train on it and compare with what made it; `make_clip` is all most of them need. To write its images as a
video: `pipeline.video.write_video(path, clip.images, clip.fps)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.heads import HeadModel, load_head
from pipeline.mesh_render import lambert, rasterize_mesh, vertex_normals

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Turns head axes (y up, z out of the face) into camera axes (y down, z forward) for a face that looks into the camera.
FACING = np.diag([1.0, -1.0, -1.0])

IRIS_RADIUS_M = 5.9e-3
PUPIL_RADIUS_M = 2.2e-3

# What a talking, smiling, frowning face moves, and how far; blinks and gaze come on top.
_EXPRESSION_PEAKS = {
    "jawOpen": 0.6,
    "mouthSmileLeft": 0.7,
    "mouthSmileRight": 0.7,
    "mouthPucker": 0.6,
    "mouthFunnel": 0.4,
    "mouthUpperUpLeft": 0.4,
    "mouthUpperUpRight": 0.4,
    "mouthLowerDownLeft": 0.4,
    "mouthLowerDownRight": 0.4,
    "mouthFrownLeft": 0.3,
    "mouthFrownRight": 0.3,
    "browInnerUp": 0.7,
    "browOuterUpLeft": 0.6,
    "browOuterUpRight": 0.6,
    "browDownLeft": 0.6,
    "browDownRight": 0.6,
    "eyeSquintLeft": 0.5,
    "eyeSquintRight": 0.5,
    "jawLeft": 0.2,
    "mouthLeft": 0.2,
}
_GAZE_PEAKS = {"yaw": 0.6, "pitch": 0.5}


@dataclass(frozen=True)
class Look:
    """The subject's colours, sRGB in [0, 1], and light."""

    skin: tuple[float, float, float] = (0.82, 0.64, 0.54)
    lips: tuple[float, float, float] = (0.68, 0.36, 0.36)
    hair: tuple[float, float, float] = (0.22, 0.15, 0.11)
    iris: tuple[float, float, float] = (0.28, 0.24, 0.18)
    cloth: tuple[float, float, float] = (0.25, 0.38, 0.52)
    light: tuple[float, float, float] = (-0.4, -0.6, -1.0)
    """Where the light comes from, in camera axes."""
    ambient: float = 0.45
    """Share of light that has no direction."""


@dataclass(frozen=True, eq=False)
class SyntheticClip:
    """A rendered clip and everything that made it."""

    images: NDArray[np.uint8]
    """[T, H, W, 3] sRGB over the background."""
    alpha: NDArray[np.float32]
    """[T, H, W] the subject's coverage, anti-aliased."""
    background: NDArray[np.float32]
    """[H, W, 3] in [0, 1]."""
    K: NDArray[np.float64]
    """[3, 3]."""
    Ts_cam_head: NDArray[np.float64]
    """[T, 4, 4]."""
    identity: NDArray[np.float32]
    """[S]."""
    expression: NDArray[np.float32]
    """[T, 52]."""
    neck: NDArray[np.float32]
    """[T, 3]."""
    eyes: NDArray[np.float32]
    """[T, 2, 3]."""
    landmarks: NDArray[np.float64]
    """[T, 478, 3] true places of MediaPipe's landmarks: in pixels, z about its mean, nearer is smaller."""
    fps: Fraction
    head: HeadModel


def _paint(
    head: HeadModel, points: NDArray[np.float32], regions: dict[str, NDArray[np.float32]], look: Look
) -> NDArray[np.float32]:
    """Albedo [P, 3] at `points` [P, 3] of the template, given how far each lies in each region [P] (0 to 1)."""

    def mix(color: tuple[float, float, float], amount: NDArray) -> None:
        albedo[:] += amount[:, None] * (np.asarray(color, dtype=np.float32) - albedo)

    def step(value: NDArray, edge: float, softness: float) -> NDArray:
        t = np.clip((value - edge) / softness + 0.5, 0, 1)
        return t * t * (3 - 2 * t)

    x, y, z = points.T
    left, right = head.joints[2], head.joints[3]
    half_gap, eye_y = 0.5 * (left[0] - right[0]), left[1]
    albedo = np.empty_like(points)
    albedo[:] = look.skin
    # Mottled skin: some low-frequency contrast for whatever looks at pixels.
    mottle = np.sin(210 * x + 3 * np.sin(150 * y)) * np.sin(230 * y + 90 * z) * np.sin(170 * z + 1)
    albedo *= 1 + 0.05 * mottle[:, None]
    cheek = np.exp(-(((np.abs(x) - 0.042) / 0.016) ** 2) - ((y - eye_y + 0.035) / 0.014) ** 2)
    mix((0.80, 0.48, 0.42), 0.5 * cheek)

    scalp = (1 - regions["face"]) * (1 - regions["ears"]) * step(y, 0.01, 0.02)
    mix(look.hair, scalp * (0.9 + 0.1 * np.sin(900 * x) * np.sin(700 * z)))
    along = (np.abs(x) - half_gap) / 0.02
    brow_height = eye_y + 0.0215 - 0.004 * along**2 + 0.001 * along
    brow = step(-np.abs(y - brow_height), -0.0032, 0.003) * step(-np.abs(along - 0.1), -0.95, 0.3) * step(z, 0.07, 0.01)
    mix(look.hair, 0.85 * brow * regions["face"])
    mix(look.lips, regions["lips"])
    mix((0.30, 0.18, 0.15), 0.8 * regions["eyelids"] * (1 - regions["eyes"]))
    mix((0.30, 0.10, 0.10), regions["mouth_interior"])
    mix((0.66, 0.33, 0.33), regions["tongue"])
    mix((0.92, 0.90, 0.85), regions["teeth"])

    eye = regions["eyes"]
    for centre in (left, right):
        offset = points - centre
        radius = np.hypot(offset[:, 0], offset[:, 1])
        here = eye * (np.abs(offset[:, 0]) < half_gap)
        front = here * (offset[:, 2] > 0)
        mix((0.93, 0.91, 0.89), here)
        mix(look.iris, front * step(-radius, -IRIS_RADIUS_M, 0.0008))
        mix((0.03, 0.03, 0.03), front * step(-radius, -PUPIL_RADIUS_M, 0.0006))

    stripes = 0.85 + 0.3 * step(np.sin(y * 260), 0.0, 0.6)
    mix(look.cloth, regions["torso"])
    albedo *= (1 + regions["torso"] * (stripes - 1))[:, None]
    return albedo


@dataclass(frozen=True, eq=False)
class Hair:
    """Loose strands that stand off the head and move with it."""

    points: NDArray[np.float64]
    """[S, P, 3] along each strand from its root, in the head frame, metres."""
    widths: NDArray[np.float64]
    """[S] metres."""
    shades: NDArray[np.float32]
    """[S] brightness, about 1."""


def grow_hair(head: HeadModel, vertices: NDArray[np.floating], count: int, generator: np.random.Generator) -> Hair:
    """Strands of 2 to 6 cm all over the scalp of a head's `vertices` [V, 3], bent by chance and by their weight."""
    bare = np.any([head.regions[name] for name in _PAINTED_REGIONS if name in head.regions], axis=0)
    scalp = head.faces[(~bare & (head.template[:, 1] > np.maximum(0.02, head.template[:, 2])))[head.faces].all(1)]
    corners = vertices[scalp].astype(np.float64)
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    chosen = generator.choice(len(corners), count, p=areas / areas.sum())
    roots = np.einsum("sc,sci->si", generator.dirichlet(np.ones(3), count), corners[chosen])
    outward = roots - np.array([0, 0.03, 0.01])
    heading = outward / np.linalg.norm(outward, axis=1, keepdims=True) + generator.normal(0, 0.35, (count, 3))
    bend = generator.normal(0, 0.12, (count, 3)) - [0, 0.12, 0]
    step = generator.uniform(0.02, 0.06, (count, 1)) / (_STRAND_POINTS - 1)
    points = [roots]
    for _ in range(_STRAND_POINTS - 1):
        points.append(points[-1] + step * heading / np.linalg.norm(heading, axis=1, keepdims=True))
        heading = heading + bend
    widths, shades = generator.uniform(2e-4, 7e-4, count), generator.uniform(0.6, 1.5, count)
    return Hair(np.stack(points, axis=1), widths, shades.astype(np.float32))


def _strand_samples(
    hair: Hair, T_cam_head: NDArray[np.float64], K: NDArray[np.float64], depth: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The samples of a picture that show hair, as flat indices [N], and how bright it is there [N].

    Args:
        K: [3, 3] intrinsics of the samples.
        depth: [H, W] of the head at each sample; what lies behind it is hidden.
    """
    height, width = depth.shape
    camera = transform_points(T_cam_head, hair.points)
    places = project_points(camera, K)
    reach = np.abs(np.diff(places, axis=1)).max(-1).sum(1).max()
    # Linear between the points, densely enough that no sample on the way is passed over.
    at = np.linspace(0, _STRAND_POINTS - 1, max(int(1.5 * reach), 2))
    first = np.minimum(at.astype(int), _STRAND_POINTS - 2)
    share = (at - first)[:, None]
    values = np.concatenate([places, camera[..., 2:]], axis=-1)
    along = (1 - share) * values[:, first] + share * values[:, first + 1]
    thickness = np.maximum(np.round(hair.widths * K[0, 0] / camera[..., 2].mean(1)), 1).astype(int)
    indices, shades = [], []
    for offset in np.ndindex(int(thickness.max()), int(thickness.max())):
        drawn = thickness > max(offset)
        x, y = (np.floor(along[drawn, :, axis] + offset[axis] - thickness[drawn, None] / 2 + 0.5) for axis in (0, 1))
        inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        flat = (y * width + x)[inside].astype(np.int64)
        shown = along[drawn, :, 2][inside] < depth.reshape(-1)[flat] + _STRAND_DEPTH_M
        indices.append(flat[shown])
        shades.append(np.broadcast_to(hair.shades[drawn, None], x.shape)[inside][shown])
    return np.concatenate(indices), np.concatenate(shades)


_STRAND_POINTS = 12
_STRAND_DEPTH_M = 2e-3
"""A root may lie this far inside the mesh and still be seen."""
_PAINTED_REGIONS = ("face", "ears", "lips", "eyelids", "mouth_interior", "tongue", "teeth", "eyes", "torso")


def render_head(
    head: HeadModel,
    vertices: NDArray[np.floating],
    T_cam_head: NDArray[np.float64],
    K: NDArray[np.float64],
    width: int,
    height: int,
    look: Look | None = None,
    background: NDArray[np.floating] | float = 1.0,
    supersample: int = 2,
    hair: Hair | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A painted, lit picture [H, W, 3] in [0, 1] and its alpha [H, W].

    Args:
        vertices: [V, 3] of `head` in the head frame.
        background: what shows behind, anything that broadcasts to [H, W, 3].
        supersample: samples a pixel along each axis; their mean is the pixel.
        hair: strands of the colour of the look's hair; none is thinner than a sample.
    """
    look = look or Look()
    n = supersample
    vertices_cam = transform_points(T_cam_head, np.asarray(vertices, dtype=np.float64))
    raster = rasterize_mesh(vertices_cam, head.faces, np.diag([n, n, 1.0]) @ K, n * width, n * height)
    seen = raster.face_index >= 0
    corners, bary = head.faces[raster.face_index[seen]], raster.bary[seen]

    def at_pixels(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.einsum("pc,pc...->p...", bary, values[corners])

    masks = np.stack([head.regions.get(name, np.zeros(len(vertices), bool)) for name in _PAINTED_REGIONS], axis=1)
    amounts = at_pixels(masks.astype(np.float32))
    regions = dict(zip(_PAINTED_REGIONS, amounts.T, strict=True))
    normals = at_pixels(vertex_normals(vertices_cam, head.faces))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    # Both sides of a face are drawn; the inside of the mouth is lit as if its wall faced the camera.
    normals[normals[:, 2] > 0] *= -1
    color = _paint(head, at_pixels(head.template), regions, look)
    color *= lambert(normals, look.light, look.ambient)[:, None]

    premultiplied = np.zeros((n * height, n * width, 4), dtype=np.float32)
    premultiplied[seen] = np.concatenate([color, np.ones((len(color), 1), np.float32)], axis=1)
    if hair is not None:
        strands, shade = _strand_samples(hair, T_cam_head, np.diag([n, n, 1.0]) @ K, raster.depth)
        colors = np.asarray(look.hair, np.float32) * shade[:, None]
        premultiplied.reshape(-1, 4)[strands] = np.concatenate([colors, np.ones((len(strands), 1), np.float32)], axis=1)
    premultiplied = premultiplied.reshape(height, n, width, n, 4).mean(axis=(1, 3))
    alpha = premultiplied[..., 3]
    picture = premultiplied[..., :3] + (1 - alpha[..., None]) * np.asarray(background, dtype=np.float32)
    return picture.clip(0, 1), alpha


def _wander(generator: np.random.Generator, seconds: NDArray[np.float64], channels: int) -> NDArray[np.float64]:
    """Smooth random curves [T, channels] within [-1, 1]: three sines each, between 0.1 and 0.6 Hz."""
    frequency = generator.uniform(0.1, 0.6, (3, channels))
    phase = generator.uniform(0, 2 * np.pi, (3, channels))
    weight = generator.dirichlet(np.ones(3), channels).T
    return np.sum(weight * np.sin(2 * np.pi * frequency * seconds[:, None, None] + phase), axis=1)


def _random_expression(
    generator: np.random.Generator, seconds: NDArray[np.float64], names: tuple[str, ...]
) -> NDArray[np.float32]:
    """Smooth expression curves [T, 52] in [0, 1] with speech, smiles, frowns, gaze and short blinks."""
    expression = np.zeros((len(seconds), len(names)))
    curves = _wander(generator, seconds, len(_EXPRESSION_PEAKS))
    for (name, peak), curve in zip(_EXPRESSION_PEAKS.items(), curves.T, strict=True):
        expression[:, names.index(name)] = peak * np.clip(1.6 * curve, 0, 1) ** 1.5
    # Left and right smile, frown and raise their brows nearly together.
    for index, name in enumerate(names):
        if name.endswith("Left") and name in _EXPRESSION_PEAKS and name[:-4] + "Right" in _EXPRESSION_PEAKS:
            expression[:, names.index(name[:-4] + "Right")] = 0.85 * expression[:, index]

    yaw, pitch = _wander(generator, seconds, 2).T
    gaze = {
        "eyeLookOutLeft": yaw * _GAZE_PEAKS["yaw"],
        "eyeLookInLeft": -yaw * _GAZE_PEAKS["yaw"],
        "eyeLookInRight": yaw * _GAZE_PEAKS["yaw"],
        "eyeLookOutRight": -yaw * _GAZE_PEAKS["yaw"],
        "eyeLookUpLeft": pitch * _GAZE_PEAKS["pitch"],
        "eyeLookUpRight": pitch * _GAZE_PEAKS["pitch"],
        "eyeLookDownLeft": -pitch * _GAZE_PEAKS["pitch"],
        "eyeLookDownRight": -pitch * _GAZE_PEAKS["pitch"],
    }
    for name, curve in gaze.items():
        expression[:, names.index(name)] = np.maximum(curve, 0)

    blink_times = np.cumsum(generator.uniform(0.8, 2.5, int(seconds[-1]) + 2))
    closed = np.clip(1.3 * (1 - np.abs(seconds[:, None] - blink_times) / 0.18), 0, 1).max(axis=1)
    for side in ("Left", "Right"):
        expression[:, names.index(f"eyeBlink{side}")] = closed * closed * (3 - 2 * closed)
    return expression.astype(np.float32)


def default_intrinsics(width: int, height: int) -> NDArray[np.float64]:
    """Intrinsics [3, 3] that put every convention to the test: fx != fy and an off-centre principal point."""
    focal = 1.4 * max(width, height)
    return np.array([[focal, 0, 0.53 * width], [0, 1.03 * focal, 0.47 * height], [0, 0, 1]])


def make_clip(
    frames: int,
    width: int,
    height: int,
    seed: int,
    *,
    head: HeadModel | None = None,
    K: NDArray[np.float64] | None = None,
    fps: Fraction = Fraction(25),
    background: Literal["plain", "textured"] = "textured",
    look: Look | None = None,
    identity_scale: float = 0.3,
    motion: float = 1.0,
    supersample: int = 2,
    hair: int = 0,
) -> SyntheticClip:
    """Render a talking head that nods, turns, blinks and looks around, smoothly and at random.

    Args:
        frames: number of frames.
        width, height: of the frames in pixels; narrower than half their height, they cut the face.
        seed: of everything random; the same arguments give the same clip.
        head: the head model, `anny` by default.
        K: [3, 3] intrinsics, `default_intrinsics` by default.
        background: one colour, or soft blobs of colour.
        identity_scale: how far the subject is from the average, as a share of the plausible identity range.
        motion: scale of head rotation and translation; 1 turns about 20 degrees to the sides.
        supersample: samples a pixel along each axis.
        hair: number of loose strands, a few tenths of a millimetre wide; they need four samples a pixel.
    """
    generator = np.random.default_rng(seed)
    head = head or load_head("anny")
    K = default_intrinsics(width, height) if K is None else np.asarray(K, dtype=np.float64)
    seconds = np.arange(frames) / float(fps)

    identity = identity_scale * generator.uniform(head.identity_low, head.identity_high)
    expression = torch.from_numpy(_random_expression(generator, seconds, head.expression_names))
    turn = motion * np.array([0.22, 0.38, 0.12]) * _wander(generator, seconds, 3)
    # The torso follows a fifth of the head's turn.
    neck = (0.8 * turn).astype(np.float32)
    eyes = head.eyes_from_expression(expression)

    # A face of average height fills 42 % of the frame's; then the frame ends above where the head model's chest does.
    distance = 0.24 * K[1, 1] / (0.42 * height)
    middle = np.linalg.solve(K, [0.5 * width, 0.52 * height, 1.0]) * distance
    sway = motion * np.array([0.02, 0.012, 0.04]) * _wander(generator, seconds, 3)
    Ts_cam_head = make_rigid(FACING @ rotvec_to_matrix(turn), middle + np.array([0, 0.02, 0]) + sway)

    with torch.no_grad():
        vertices = head.vertices(
            torch.from_numpy(identity.astype(np.float32)), expression, torch.from_numpy(neck), eyes
        )
        landmarks_head = head.landmarks(vertices).numpy().astype(np.float64)
    landmarks_cam = transform_points(Ts_cam_head, landmarks_head)
    mean_depth = landmarks_cam[..., 2].mean(axis=1, keepdims=True)
    landmarks = np.concatenate(
        [project_points(landmarks_cam, K), (K[0, 0] * (landmarks_cam[..., 2] / mean_depth - 1))[..., None]], axis=-1
    )

    strands = grow_hair(head, vertices[0].numpy(), hair, np.random.default_rng(seed + 1)) if hair else None
    backdrop = _backdrop(generator, width, height, background)
    images = np.empty((frames, height, width, 3), dtype=np.uint8)
    alpha = np.empty((frames, height, width), dtype=np.float32)
    for t in range(frames):
        picture, alpha[t] = render_head(
            head, vertices[t].numpy(), Ts_cam_head[t], K, width, height, look, backdrop, supersample, strands
        )
        images[t] = np.round(picture * 255)
    return SyntheticClip(
        images=images,
        alpha=alpha,
        background=backdrop,
        K=K,
        Ts_cam_head=Ts_cam_head,
        identity=identity.astype(np.float32),
        expression=expression.numpy(),
        neck=neck,
        eyes=eyes.numpy(),
        landmarks=landmarks,
        fps=fps,
        head=head,
    )


def _backdrop(
    generator: np.random.Generator, width: int, height: int, kind: Literal["plain", "textured"]
) -> NDArray[np.float32]:
    """A background [H, W, 3] in [0, 1]."""
    base = np.full((height, width, 3), (0.62, 0.66, 0.70), dtype=np.float32)
    if kind == "plain":
        return base
    y, x = np.mgrid[:height, :width] / max(width, height)
    for _ in range(6):
        u, v = generator.uniform(0, 1, 2)
        blob = np.exp(-((x - u) ** 2 + (y - v) ** 2) / generator.uniform(0.005, 0.04))
        base += blob[..., None].astype(np.float32) * generator.uniform(-0.25, 0.25, 3).astype(np.float32)
    return base.clip(0, 1)


def write_frames(clip: SyntheticClip, folder: Path) -> None:
    """Write the images as `000000.png`, `000001.png`, ... into a folder, made where it is missing."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(clip.images):
        cv2.imwrite(str(folder / f"{index:06d}.png"), np.ascontiguousarray(image[..., ::-1]))
