"""Pictures that let a person judge a fit: the mesh over frames, the head from the side, and curves over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cameras import look_at, make_intrinsics
from pipeline.geometry import project_points, transform_points
from pipeline.mesh_render import lambert, rasterize_mesh, shade

if TYPE_CHECKING:
    from numpy.typing import NDArray

MESH_COLOR = (0.35, 0.75, 1.0)
LANDMARK_COLOR = (255, 225, 40)


def overlay(
    image: NDArray[np.uint8],
    vertices_cam: NDArray[np.floating],
    faces: NDArray[np.int32],
    K: NDArray[np.floating],
    landmarks: NDArray[np.floating] | None = None,
    opacity: float = 0.35,
) -> NDArray[np.uint8]:
    """A frame [H, W, 3] with the shaded mesh half transparent over it, and landmarks as dots.

    Args:
        image: sRGB frame.
        vertices_cam: [V, 3] in camera space.
        faces: [F, 3] that are drawn.
        K: [3, 3] intrinsics of the image.
        landmarks: [L, 2] pixels to mark, or None.
        opacity: of the mesh.
    """
    height, width = image.shape[:2]
    raster = rasterize_mesh(vertices_cam, faces, K, width, height)
    corners = vertices_cam[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    light = lambert(normals)[np.maximum(raster.face_index, 0)]
    mesh = 255 * light[..., None] * np.array(MESH_COLOR, np.float32)
    alpha = opacity * (raster.face_index >= 0)[..., None]
    drawn = (image + alpha * (mesh - image) + 0.5).astype(np.uint8)
    if landmarks is not None:
        x, y = np.floor(landmarks[np.isfinite(landmarks).all(1)]).astype(int).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        drawn[y[inside], x[inside]] = LANDMARK_COLOR
    return drawn


def draw_torso(
    image: NDArray[np.uint8],
    T_cam_torso: NDArray[np.floating],
    K: NDArray[np.floating],
    where: NDArray[np.bool_],
    confidence: float,
) -> NDArray[np.uint8]:
    """A frame [H, W, 3] with a grid over it that moves with the torso, five centimetres wide.

    Args:
        image: sRGB frame.
        T_cam_torso: [4, 4]. K: [3, 3] intrinsics of the image.
        where: [H, W] pixels of the torso; elsewhere nothing is drawn.
        confidence: in [0, 1], from red to green.
    """
    import cv2

    ticks = np.arange(-0.5, 0.501, 0.05)
    x, y = np.meshgrid(ticks, ticks)
    points = np.stack([x, y, np.zeros_like(x)], -1).reshape(-1, 3)
    pixels = project_points(transform_points(T_cam_torso, points), K).reshape(*x.shape, 2)
    # Quarters of a pixel, for smooth motion; OpenCV's pixel centres are whole numbers.
    grid = np.rint(4 * (pixels - 0.5)).clip(-(2**20), 2**20).astype(np.int32)
    color = (255 * (1 - confidence), 255 * confidence, 0)
    lines = [*grid, *np.ascontiguousarray(grid.swapaxes(0, 1))]
    drawn = cv2.polylines(image.copy(), lines, False, color, 1, cv2.LINE_AA, 2)
    return np.where(where[..., None], drawn, image).astype(np.uint8)


def front_and_side(vertices: NDArray[np.floating], faces: NDArray[np.int32], size: int = 400) -> NDArray[np.uint8]:
    """Three views [size, 3 size, 3] of a head's `vertices` [V, 3] and `faces` [F, 3]: front, halfway, left side."""
    shown = vertices[np.unique(faces)]
    low, high = shown.min(0), shown.max(0)
    target, reach = (low + high) / 2, float(np.max(high - low))
    # A long lens, so that proportions can be judged.
    K = make_intrinsics(7.5 * size, size, size)
    views = []
    for yaw in (0.0, np.pi / 4, np.pi / 2):
        eye = target + 8.5 * reach * np.array([np.sin(yaw), 0.0, np.cos(yaw)])
        T_cam_head = look_at(eye, target, np.array([0.0, 1.0, 0.0]))
        views.append(shade(transform_points(T_cam_head, vertices.astype(np.float64)), faces, K, size, size))
    return (255 * np.concatenate(views, 1) + 0.5).astype(np.uint8)


def plot_curves(
    path: Path,
    times: NDArray[np.floating],
    panels: Sequence[tuple[str, Mapping[str, NDArray[np.float64]]]],
    unusable: NDArray[np.bool_],
    shots: NDArray[np.int64] | None = None,
) -> None:
    """Write curves over time as a picture.

    Args:
        path: a .png.
        times: [T] seconds.
        panels: (axis label, {name: values [T]}) from top to bottom.
        unusable: [T] frames shaded grey.
        shots: [T] the shot of each frame: curves break at cuts, which are marked; one shot if None.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    half = float(np.median(np.diff(times))) / 2 if len(times) > 1 else 0.5
    cuts = np.zeros(0, np.int64) if shots is None else np.flatnonzero(np.diff(shots)) + 1
    edges = np.flatnonzero(np.diff(np.concatenate([[0], unusable.astype(np.int8), [0]])))
    for row, (label, curves) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        for name, values in curves.items():
            broken = np.insert(np.asarray(values, np.float64), cuts, np.nan)
            axes.plot(np.insert(times.astype(np.float64), cuts, times[cuts]), broken, label=name, linewidth=1)
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            axes.axvspan(times[first] - half, times[last - 1] + half, color="0.85", linewidth=0)
        for cut in cuts:
            axes.axvline((times[cut - 1] + times[cut]) / 2, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_ylabel(label)
        axes.margins(x=0)
        if len(curves) > 1:
            axes.legend(loc="upper right", fontsize="small", ncols=len(curves))
    axes.set_xlabel("seconds")
    # Without this the file would name the library's version, and its bytes change with it.
    figure.savefig(path, dpi=90, metadata={"Software": None})
