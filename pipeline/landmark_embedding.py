"""Find where MediaPipe's 478 face landmarks lie on a head model, by looking at renders of it.

The head is rendered, painted, with random identities, poses and expressions, and MediaPipe looks at each picture. A
landmark's hits on the surface are its candidates, and each is judged by how far it lies from the landmark's detections
(median distance over all renders). A point that only looks right on a closed mouth, on the other lip, loses to one that
also opens with its own lip. Of the best tenth the one nearest to their mean is taken, as medians are noisy along the
face's contour, and its median distance is kept as the landmark's spread.

Landmarks of the irises may only lie on the eyeballs, all others only on the outer skin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import StageError
from pipeline.faces import Detector
from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.heads import HeadModel
from pipeline.mesh_render import rasterize_mesh
from pipeline.synthetic import FACING, Look, render_head

EMBEDDING_VERSION = 1
RENDERS = 240
SIZE = 512
IRIS = slice(468, 478)


def find_landmarks(
    head: HeadModel, detector: Detector, renders: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """The embedding of `embed`, over `renders` (`RENDERS`) random renders; the same for the same head and seed.

    Raises:
        StageError: MediaPipe sees no face in most of the renders, or a landmark never on the head.
    """
    count = renders or RENDERS
    found = render_and_detect(head, detector, count, np.random.default_rng(seed))
    if len(found) < count / 2:
        raise StageError(
            f"MediaPipe sees a face in {len(found)} of {count} renders of the head model {head.name}.",
            "the file may hold another mesh than its name says; get it again from its publisher",
        )
    return embed(head, found)


@dataclass(frozen=True)
class Render:
    """One picture of the head: the mesh in camera space [V, 3], its camera, and the detected landmarks [478, 2]."""

    vertices_cam: np.ndarray
    K: np.ndarray
    detected: np.ndarray


def detect(detector: Detector, image: np.ndarray) -> np.ndarray | None:
    """Landmarks [478, 2] in pixels on an image [H, W, 3] in [0, 1], or None where no face is found."""
    faces = detector.detect(np.round(image * 255).astype(np.uint8))
    return faces[0].landmarks[:, :2].astype(np.float64) if faces else None


def random_expression(generator: np.random.Generator, names: tuple[str, ...]) -> np.ndarray:
    """A random expression [52]: a few actions at random strength, the jaw open in half of all cases."""
    expression = np.zeros(len(names), dtype=np.float32)
    for index in generator.choice(len(names), generator.integers(0, 6), replace=False):
        # Alone, mouthClose pushes the lips through each other.
        if names[index] not in ("mouthClose", "tongueOut"):
            expression[index] = generator.uniform(0.2, 0.8)
    if generator.random() < 0.5:
        expression[names.index("jawOpen")] = generator.uniform(0.1, 0.8)
    return expression


def render_and_detect(head: HeadModel, detector: Detector, count: int, generator: np.random.Generator) -> list[Render]:
    """Up to `count` random renders in which MediaPipe finds the face; the first is the neutral head from the front."""
    K = np.array([[1.6 * SIZE, 0, SIZE / 2], [0, 1.6 * SIZE, SIZE / 2], [0, 0, 1]])
    renders = []
    for index in range(count):
        strength = 0.0 if index == 0 else 1.0
        identity = 0.3 * strength * generator.uniform(head.identity_low, head.identity_high)
        expression = torch.from_numpy(strength * random_expression(generator, head.expression_names))[None]
        turn = strength * np.deg2rad([15, 32, 10]) * generator.uniform(-1, 1, 3)
        position = np.array([0, 0.02, 0.75]) + strength * np.array([0.02, 0.02, 0.08]) * generator.uniform(-1, 1, 3)
        T_cam_head = make_rigid(FACING @ rotvec_to_matrix(turn), position)
        vertices = head.vertices(
            torch.from_numpy(identity.astype(np.float32)),
            expression,
            torch.from_numpy((0.7 * turn).astype(np.float32))[None],
            head.eyes_from_expression(expression),
        )[0].numpy()
        light = (generator.uniform(-0.8, 0.8), generator.uniform(-0.9, -0.2), -1.0)
        picture, _ = render_head(head, vertices, T_cam_head, K, SIZE, SIZE, Look(light=light), 0.7)
        detected = detect(detector, picture)
        if detected is not None:
            renders.append(Render(transform_points(T_cam_head, vertices.astype(np.float64)), K, detected))
    return renders


def prediction_errors(
    head: HeadModel, renders: list[Render], faces: np.ndarray, bary: np.ndarray, landmark: int | slice
) -> np.ndarray:
    """How far surface points (`faces` [P], `bary` [P, 3]) lie from what was detected in each render, metres [P, T].

    `landmark` is one landmark for all points, or a slice of as many landmarks as there are points.
    """
    errors = []
    for render in renders:
        points = np.einsum("pc,pci->pi", bary, render.vertices_cam[head.faces[faces]])
        offset = project_points(points, render.K) - render.detected[landmark]
        errors.append(np.linalg.norm(offset, axis=-1) * points[:, 2] / render.K[0, 0])
    return np.stack(errors, axis=1)


def embed(head: HeadModel, renders: list[Render], reach: int = 0) -> dict[str, np.ndarray]:
    """The embedding: `faces` [478], `bary` [478, 3], `spread` [478] in metres, and `hits` [478], counts.

    Args:
        head: the model.
        renders: of it.
        reach: pixels from the surface's edge up to which a landmark that misses it is taken to be at that edge: a mesh
            that was fitted to pictures may be narrower than the face.

    Raises:
        StageError: a landmark never hit the surface it may lie on.
    """
    inside = np.zeros(len(head.template), dtype=bool)
    for name in ("eyes", "eye_sockets", "teeth", "tongue", "mouth_interior", "torso"):
        # The rim of the mouth's inside is lip.
        inside |= head.regions.get(name, inside) & ~head.regions["lips"]
    skin = np.flatnonzero(~inside[head.faces].any(axis=1))
    eyeballs = np.flatnonzero(head.regions["eyes"][head.faces].all(axis=1))

    hits: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(478)]
    for render in renders:
        for allowed, landmarks in ((skin, range(IRIS.start)), (eyeballs, range(IRIS.start, IRIS.stop))):
            raster = rasterize_mesh(render.vertices_cam, head.faces[allowed], render.K, SIZE, SIZE)
            for landmark in landmarks:
                column, row = np.floor(render.detected[landmark]).astype(int)
                if 0 <= column < SIZE and 0 <= row < SIZE and raster.face_index[row, column] < 0 and reach:
                    column, row = _nearest(raster.face_index, column, row, reach)
                if 0 <= column < SIZE and 0 <= row < SIZE and raster.face_index[row, column] >= 0:
                    face = allowed[raster.face_index[row, column]]
                    hits[landmark].append((face, raster.bary[row, column]))

    chosen_faces, chosen_bary, spread = [], [], []
    for landmark, candidates in enumerate(hits):
        if not candidates:
            raise StageError(
                f"Landmark {landmark} never hit the head model {head.name} in {len(renders)} renders.",
                "the file may hold another mesh than its name says; get it again from its publisher",
            )
        faces = np.array([face for face, _ in candidates])
        bary = np.stack([weights for _, weights in candidates])
        medians = np.median(prediction_errors(head, renders, faces, bary, landmark), axis=1)
        best_tenth = np.argsort(medians)[: max(1, len(medians) // 10)]
        places = np.einsum("pc,pci->pi", bary[best_tenth], head.template[head.faces[faces[best_tenth]]])
        best = best_tenth[np.linalg.norm(places - places.mean(axis=0), axis=1).argmin()]
        chosen_faces.append(faces[best])
        chosen_bary.append(bary[best])
        spread.append(medians[best])
    return {
        "faces": np.array(chosen_faces, dtype=np.int32),
        "bary": np.array(chosen_bary, dtype=np.float32),
        "spread": np.array(spread, dtype=np.float32),
        "hits": np.array([len(candidates) for candidates in hits], dtype=np.int32),
    }


def _nearest(face_index: np.ndarray, column: int, row: int, reach: int) -> tuple[int, int]:
    """Column and row of the covered pixel that is nearest; the same again where none is within reach."""
    top, left = max(row - reach, 0), max(column - reach, 0)
    rows, columns = np.nonzero(face_index[top : row + reach + 1, left : column + reach + 1] >= 0)
    if not len(rows):
        return column, row
    best = int(((rows + top - row) ** 2 + (columns + left - column) ** 2).argmin())
    return int(columns[best]) + left, int(rows[best]) + top
