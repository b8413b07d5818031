"""A small z-buffer rasteriser for triangle meshes: previews, overlays, silhouettes and synthetic data.

Not differentiable. Camera axes, `K` and pixel centres follow `docs/conventions.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Triangles with a corner nearer than this are dropped whole instead of clipped: nothing of a head comes this close.
NEAR_M = 1e-3


class Raster(NamedTuple):
    """What each pixel's centre sees."""

    face_index: NDArray[np.int32]
    """[H, W] the nearest triangle, -1 where there is none."""
    bary: NDArray[np.float32]
    """[H, W, 3] perspective-correct barycentric coordinates in it, 0 where there is none."""
    depth: NDArray[np.float32]
    """[H, W] camera z in metres, infinite where there is none."""


@numba.njit(cache=True)
def _rasterize(
    vertices: NDArray[np.float64], faces: NDArray[np.int32], K: NDArray[np.float64], width: int, height: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    face_index = np.full((height, width), -1, dtype=np.int32)
    bary = np.zeros((height, width, 3), dtype=np.float32)
    depth = np.full((height, width), np.inf, dtype=np.float32)

    projected = np.empty((len(vertices), 3))
    for v in range(len(vertices)):
        z = vertices[v, 2]
        inverse = 1.0 / z if z > NEAR_M else 0.0
        projected[v, 0] = (K[0, 0] * vertices[v, 0] + K[0, 1] * vertices[v, 1]) * inverse + K[0, 2]
        projected[v, 1] = K[1, 1] * vertices[v, 1] * inverse + K[1, 2]
        projected[v, 2] = inverse

    for f in range(len(faces)):
        x0, y0, w0 = projected[faces[f, 0]]
        x1, y1, w1 = projected[faces[f, 1]]
        x2, y2, w2 = projected[faces[f, 2]]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if w0 == 0.0 or w1 == 0.0 or w2 == 0.0 or area == 0.0:
            continue
        left = max(int(np.ceil(min(x0, x1, x2) - 0.5)), 0)
        right = min(int(np.floor(max(x0, x1, x2) - 0.5)), width - 1)
        top = max(int(np.ceil(min(y0, y1, y2) - 0.5)), 0)
        bottom = min(int(np.floor(max(y0, y1, y2) - 0.5)), height - 1)
        for row in range(top, bottom + 1):
            y = row + 0.5
            for column in range(left, right + 1):
                x = column + 0.5
                b0 = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
                b1 = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
                b2 = 1.0 - b0 - b1
                if b0 < 0.0 or b1 < 0.0 or b2 < 0.0:
                    continue
                # 1/z is linear in the image; dividing by it makes the coordinates those of the triangle in space.
                inverse = b0 * w0 + b1 * w1 + b2 * w2
                z = 1.0 / inverse
                if z < depth[row, column]:
                    depth[row, column] = z
                    face_index[row, column] = f
                    bary[row, column, 0] = b0 * w0 * z
                    bary[row, column, 1] = b1 * w1 * z
                    bary[row, column, 2] = b2 * w2 * z
    return face_index, bary, depth


def rasterize_mesh(
    vertices_cam: NDArray[np.floating], faces: NDArray[np.int32], K: NDArray[np.floating], width: int, height: int
) -> Raster:
    """Rasterise a mesh, both sides of its faces, one sample at each pixel centre.

    Args:
        vertices_cam: [V, 3] in camera space, metres.
        faces: [F, 3] vertex indices.
        K: [3, 3] intrinsics in pixels; fx and fy, skew and an off-centre principal point are all respected.
        width, height: of the image in pixels.
    """
    vertices = np.ascontiguousarray(vertices_cam, dtype=np.float64)
    indices = np.ascontiguousarray(faces, dtype=np.int32)
    return Raster(*_rasterize(vertices, indices, np.asarray(K, dtype=np.float64), width, height))


def interpolate(raster: Raster, faces: NDArray[np.int32], values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Per-vertex `values` [V, C] at every pixel [H, W, C]; zero where nothing is seen."""
    corners = values[faces[np.maximum(raster.face_index, 0)]].astype(np.float32)
    return np.einsum("hwc,hwcd->hwd", raster.bary, corners)


def vertex_normals(vertices: NDArray[np.floating], faces: NDArray[np.int32]) -> NDArray[np.float32]:
    """Unit normals [V, 3], area-weighted means over the faces at each vertex [V, 3]."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    face_normals = np.cross(b - a, c - a)
    normals = np.stack(
        [np.bincount(faces.ravel(), np.repeat(face_normals[:, axis], 3), minlength=len(vertices)) for axis in range(3)],
        axis=1,
    )
    return (normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)).astype(np.float32)


def lambert(
    normals: NDArray[np.floating], light: tuple[float, float, float] = (-0.4, -0.6, -1.0), ambient: float = 0.35
) -> NDArray[np.float32]:
    """Diffuse intensity in [0, 1] of camera-space unit normals [..., 3], lit from the direction of `light`."""
    direction = np.asarray(light, dtype=np.float32) / np.linalg.norm(light)
    return (ambient + (1 - ambient) * np.maximum(normals @ direction, 0)).astype(np.float32)


def shade(
    vertices_cam: NDArray[np.floating],
    faces: NDArray[np.int32],
    K: NDArray[np.floating],
    width: int,
    height: int,
    colors: NDArray[np.floating] | None = None,
    background: NDArray[np.floating] | float = 1.0,
) -> NDArray[np.float32]:
    """A plainly lit picture [H, W, 3] in [0, 1] of a mesh.

    Args:
        vertices_cam, faces, K, width, height: as in `rasterize_mesh`.
        colors: [V, 3] in [0, 1]; clay where left out.
        background: what shows beside the mesh, anything that broadcasts to [H, W, 3].
    """
    raster = rasterize_mesh(vertices_cam, faces, K, width, height)
    normals = interpolate(raster, faces, vertex_normals(vertices_cam, faces))
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-20)
    albedo = np.float32(0.8) if colors is None else interpolate(raster, faces, colors)
    picture = albedo * lambert(normals)[..., None] * np.ones(3, dtype=np.float32)
    seen = (raster.face_index >= 0)[..., None]
    return np.where(seen, picture, np.broadcast_to(background, picture.shape)).astype(np.float32)


def silhouette(
    vertices_cam: NDArray[np.floating],
    faces: NDArray[np.int32],
    K: NDArray[np.floating],
    width: int,
    height: int,
    vertex_mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Pixels [H, W] whose centre the mesh covers, or only its faces with all corners in `vertex_mask` [V]."""
    kept = faces if vertex_mask is None else faces[vertex_mask[faces].all(axis=1)]
    return rasterize_mesh(vertices_cam, kept, K, width, height).face_index >= 0
