"""The mesh rasteriser: pixel-centre convention, perspective correctness, occlusion, no gaps."""

import numpy as np
import pytest

from pipeline import mesh_render
from pipeline.geometry import transform_points
from pipeline.heads import load_head

WIDTH, HEIGHT = 61, 47
# Skewed, fx != fy, principal point off centre.
K = np.array([[70.0, 1.5, 25.3], [0, 82.0, 29.7], [0, 0, 1]])


@pytest.fixture(scope="module")
def head_cam() -> tuple[np.ndarray, np.ndarray]:
    """The head's vertices in a camera, and its faces."""
    head = load_head("anny")
    T_cam_head = np.diag([1.0, -1, -1, 1])
    T_cam_head[2, 3] = 0.45
    return transform_points(T_cam_head, head.template.astype(np.float64)), head.faces


def pixel_rays() -> np.ndarray:
    """Camera-space directions with z = 1 through the pixel centres [H, W, 3]."""
    columns, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    return np.stack([columns, rows, np.ones_like(columns)], axis=-1) @ np.linalg.inv(K).T


def test_surface_points_lie_on_the_pixel_rays(head_cam: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = head_cam
    raster = mesh_render.rasterize_mesh(vertices, faces, K, WIDTH, HEIGHT)
    seen = raster.face_index >= 0
    assert 300 < seen.sum() < seen.size
    points = mesh_render.interpolate(raster, faces, vertices)
    expected = pixel_rays() * np.where(seen, raster.depth, 0)[..., None]
    np.testing.assert_allclose(points[seen], expected[seen], atol=1e-6)
    np.testing.assert_allclose(raster.bary[seen].sum(axis=1), 1, atol=1e-6)
    assert (raster.bary[~seen] == 0).all()
    assert np.isinf(raster.depth[~seen]).all()


def test_nearest_surface_matches_brute_force(head_cam: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = head_cam
    raster = mesh_render.rasterize_mesh(vertices, faces, K, WIDTH, HEIGHT)
    rays = pixel_rays()
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    for row, column in [(20, 25), (10, 22), (30, 31), (38, 25), (2, 2)]:
        # Moeller and Trumbore, "Fast, minimum storage ray/triangle intersection", 1997.
        p = np.cross(rays[row, column], c - a)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / np.einsum("fi,fi->f", b - a, p)
            u = -np.einsum("fi,fi->f", a, p) * inverse
            q = np.cross(-a, b - a)
            v = (q @ rays[row, column]) * inverse
            distance = np.einsum("fi,fi->f", c - a, q) * inverse
            hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 0)
        expected = distance[hit].min(initial=np.inf)
        assert raster.depth[row, column] == pytest.approx(expected, rel=1e-6)


def test_a_square_covers_exactly_the_pixels_whose_centres_it_holds() -> None:
    unit = np.eye(3)
    square = np.array([[2.4, 3.6, 1], [9.6, 3.6, 1], [9.6, 7.4, 1], [2.4, 7.4, 1]])
    for faces in ([[0, 1, 2], [0, 2, 3]], [[2, 1, 0], [3, 2, 0]]):
        covered = mesh_render.silhouette(square, np.array(faces, dtype=np.int32), unit, 12, 10)
        expected = np.zeros((10, 12), dtype=bool)
        expected[4:7, 2:10] = True
        np.testing.assert_array_equal(covered, expected)


def test_a_fine_grid_has_no_gaps() -> None:
    side = 40
    x, y = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    vertices = np.stack([x, y, 2 + 0.3 * np.sin(5 * x) * np.cos(4 * y)], axis=-1).reshape(-1, 3)
    corner = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).ravel()
    faces = np.concatenate(
        [np.stack([corner, corner + 1, corner + side], 1), np.stack([corner + 1, corner + side + 1, corner + side], 1)]
    ).astype(np.int32)
    covered = mesh_render.silhouette(vertices, faces, np.array([[100.0, 0, 32], [0, 100.0, 32], [0, 0, 1]]), 64, 64)
    assert covered.all()


def test_what_is_behind_the_camera_is_not_drawn() -> None:
    triangle = np.array([[-1, -1, 2.0], [1, -1, 2.0], [0, 1, -0.5]])
    assert not mesh_render.silhouette(triangle, np.array([[0, 1, 2]], dtype=np.int32), K, WIDTH, HEIGHT).any()


def test_silhouette_of_a_part_lies_within_the_whole(head_cam: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = head_cam
    whole = mesh_render.silhouette(vertices, faces, K, WIDTH, HEIGHT)
    part = mesh_render.silhouette(vertices, faces, K, WIDTH, HEIGHT, load_head("anny").regions["head"])
    assert part.any()
    assert not (part & ~whole).any()
    assert (whole & ~part).any()


def test_shading_shows_the_background_beside_the_mesh(head_cam: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = head_cam
    picture = mesh_render.shade(vertices, faces, K, WIDTH, HEIGHT, background=0.25)
    covered = mesh_render.silhouette(vertices, faces, K, WIDTH, HEIGHT)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert (picture[~covered] == 0.25).all()
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture[covered].std() > 0.02


def test_normals_of_a_sphere_point_outwards() -> None:
    from scipy.spatial import ConvexHull

    directions = np.random.default_rng(0).normal(size=(400, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    hull = ConvexHull(directions)
    faces = hull.simplices.astype(np.int32)
    a, b, c = (directions[faces[:, corner]] for corner in range(3))
    inwards = np.einsum("fi,fi->f", np.cross(b - a, c - a), hull.equations[:, :3]) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    cosine = np.einsum("vi,vi->v", mesh_render.vertex_normals(directions, faces), directions)
    assert cosine.min() > 0.95
