"""The head model of an imported dataset, driven by the dataset's own coefficients.

What a dataset tells of its head decides: FLAME's parameters, by the user's own FLAME; meshes, by a linear basis of
them; neither, by where MediaPipe's landmarks are seen in the frames, triangulated with the dataset's cameras, onto
which anny is brought. Identity is part of the template, so that there are no identity coefficients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.heads import HeadModel
from pipeline.heads.stored import StoredHead

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.interchange.recording import Recording
    from pipeline.landmark_embedding import Render

    Floats = NDArray[np.float64]
    Looks = Mapping[int, Floats]

LANDMARKS = 478
LEAST_LOOKS = 3
"""Frames in which a face has to be found before a head can be made from landmarks."""
JAW_STEP_RAD = 0.05
"""Least turn over which the jaw's rotation is linearised."""
RIDGE = 1e-3
"""Of the regression of meshes on coefficients, in deviations of a coefficient, per frame."""
MESH_RMS_M, MOST_COMPONENTS = 1e-4, 48
"""How near a linear basis comes to the meshes, and the most components that are spent on it."""
MESH_REACH_PX = 36
"""How far beside a mesh its edge is taken for the face's, where the face is 512 pixels wide: about a centimetre."""
# Eyeballs: how round a part of the mesh is (spread of its radius), and how large.
ROUND, EYE_RADIUS_M = 0.2, (0.008, 0.02)
FACE_M = 0.17
"""Largest side of the box around a face's landmarks."""
PIXEL_NOISE, SHAPE_M = 1.5, 0.002
"""What triangulation expects: error of a detection in pixels, and how far a coefficient's deviation moves a point."""
FACE_SHAPE_M, TRIANGULATIONS = 0.003, 2
"""How far a face's landmarks lie from those of anny that is likest, and how often both are brought together."""
ANNY_ROUNDS = 8
IRISES = (473, 468)
"""MediaPipe's landmarks in the middle of the left and the right iris."""
EYES_SHARE = 0.06
"""Widths of the face that irises may be seen away from their eyeballs: a gaze of 25 degrees moves them by 0.035."""
WRONG_CONVENTION = (
    "its matrices are probably in another convention than its format has: see which tool wrote it, and name the "
    "format: headcast import FOLDER --format NAME"
)


@dataclass(frozen=True, eq=False)
class ImportedHead:
    """A dataset's head in headcast's terms, T frames.

    Attributes:
        stored: the head model, without identity coefficients.
        coefficients: [T,E] of its `expression_names`.
        eyes: [T,2,3] rotation vectors of the left and the right eye.
        Ts_cam_head: [T,4,4]; the origin is the neck's pivot.
        Ts_cam_torso: [T,4,4] where the dataset tells how the neck turns; else None.
        about: what it was made of, in a few words.
        from_looks: whether detections made it, which then agree with it more than they would by themselves.
    """

    stored: StoredHead
    coefficients: NDArray[np.float32]
    eyes: Floats
    Ts_cam_head: Floats
    Ts_cam_torso: Floats | None
    about: str
    from_looks: bool

    def landmarks_cam(self) -> Floats:
        """MediaPipe's landmarks [T,478,3] in the camera's coordinates."""
        from pipeline.fitting import reduce_to_landmarks

        at = reduce_to_landmarks(self.stored.model)
        points = at.points(
            np.zeros(0), np.zeros((1 + len(at.expression), LANDMARKS, 3)), self.coefficients.astype(np.float64)
        )
        for eye in range(2):
            on_eye = at.eye == eye
            turned = rotvec_to_matrix(self.eyes[:, eye])
            centre = at.eye_centres[eye]
            points[:, on_eye] = np.einsum("tij,tlj->tli", turned, points[:, on_eye] - centre) + centre
        return transform_points(self.Ts_cam_head, points)


def looks_needed(recording: Recording) -> int:
    """In how many frames MediaPipe has to look for the landmarks."""
    return 24 if recording.flame is not None or recording.meshes else 96


def imported_head(
    recording: Recording,
    dataset: Path,
    Ks: Floats,
    looks: Looks,
    report: Callable[[str], None] | None = None,
) -> ImportedHead:
    """The head of a dataset.

    Args:
        recording: of T frames.
        dataset: the folder that its paths are in.
        Ks: [T,3,3] of the frames that were looked at.
        looks: frame -> MediaPipe's landmarks [478,2] in pixels; empty where no face was found.
        report: announces what takes a minute.

    Raises:
        UserError: FLAME is needed and is not there, or a mesh is damaged.
        StageError: too few faces are found to make a head.
    """
    from pipeline.heads import head_file

    if recording.flame is not None and (head_file(recording.flame.version).path.is_file() or not recording.meshes):
        return flame_head(recording, report)
    if len(looks) < LEAST_LOOKS:
        raise StageError(
            f"A face is found in {len(looks)} of the dataset's frames that were looked at; a head made from landmarks "
            f"needs {LEAST_LOOKS}.",
            "see that its pictures show a face from the front, at least 100 pixels wide",
        )
    if recording.meshes:
        from pipeline.interchange.insta import read_meshes

        meshes, faces = read_meshes(dataset, recording.meshes)
        return mesh_head(recording, meshes, faces, Ks, looks)
    return landmark_head(recording, Ks, looks)


def flame_head(recording: Recording, report: Callable[[str], None] | None = None) -> ImportedHead:
    """The head of FLAME's parameters: its expressions, and its jaw linearised about its mean.

    Raises:
        UserError: the user's FLAME file is not there, or is not FLAME.
        StageError: a new FLAME file needs MediaPipe's model, and that cannot be had.
    """
    import torch

    from pipeline.heads import head_file, load_head
    from pipeline.heads.flame import EYES, JAW, NECK, ROOT, load_flame

    track = recording.flame
    assert track is not None
    flame = load_flame(track.version)
    prepared = load_head(track.version, report)
    shape, expression = torch.from_numpy(track.shape), torch.from_numpy(track.expression)
    offset = None if track.static_offset is None else torch.from_numpy(track.static_offset[: len(flame.template)])
    count, expressions = expression.shape

    def posed(given: Floats, jaws: Floats) -> Floats:
        """Vertices [n,V,3] with expressions [n,E] and the jaw turned by [n,3]."""
        still, eyes = torch.zeros(len(jaws), 3, dtype=torch.float64), torch.zeros(len(jaws), 2, 3, dtype=torch.float64)
        turns = (still, still, torch.from_numpy(jaws), eyes, still)
        return flame.vertices(shape, torch.from_numpy(given), *turns, offset).numpy()

    middle = track.jaw.mean(0)
    steps = np.diag(np.maximum(track.jaw.std(0), JAW_STEP_RAD))
    jaws = np.concatenate([middle[None], middle + steps, middle - steps])
    turned = posed(np.zeros((len(jaws), expressions)), jaws)
    jaw = (turned[1:4] - turned[4:]) / (2 * steps.diagonal()[:, None, None])
    template = turned[0] - np.tensordot(middle, jaw, 1)
    # With a jaw that stays, FLAME is linear in its expressions: here they turn along with the jaw at its mean.
    moved = posed(np.eye(expressions), np.repeat(middle[None], expressions, 0)) - turned[0]

    at_rest = flame.joints(shape, expression[:1, :0], offset)[0].numpy()
    joints = flame.joints(shape, expression, offset).numpy()
    left, right = sorted(EYES, key=lambda eye: -at_rest[eye, 0])
    order = [NECK, NECK, left, right]
    pivot = at_rest[NECK]
    weights = flame.weights.numpy()
    basis = [moved, jaw]
    names = [*recording.coefficient_names, *(f"{track.version}-jaw/{axis}" for axis in "xyz")]
    values = [recording.coefficients, track.jaw]
    if track.eyelids is not None:
        # The tracker's lids are no part of FLAME: the avatar sees the numbers, the mesh does not move.
        basis.append(np.zeros((2, *template.shape)))
        names += ["metrical-eyelid/left", "metrical-eyelid/right"]
        values.append(track.eyelids)
    head = replace(
        prepared,
        name=f"imported-{track.version}",
        template=(template - pivot).astype(np.float32),
        faces=flame.faces.astype(np.int32),
        expression_basis=np.concatenate(basis).astype(np.float32),
        expression_names=tuple(names),
        skin_weights=np.stack(
            [weights[:, NECK] + weights[:, JAW], weights[:, ROOT], weights[:, left], weights[:, right]], axis=1
        ).astype(np.float32),
        joints=(at_rest[order] - pivot).astype(np.float32),
        **_no_identity(len(template)),
    )
    # Joints move a little with the expression; the head frame's origin is the neck of the face at rest.
    Ts_cam_root = recording.Ts_cam_head(joints[:, ROOT])
    necks = rotvec_to_matrix(track.neck)
    shifts = joints[:, NECK] + np.einsum("tij,tj->ti", necks, pivot - joints[:, NECK])
    torso = Ts_cam_root @ make_rigid(np.eye(3), pivot) if track.neck.any() else None
    file = head_file(track.version)
    licence = f"The head is made with {file.title} ({file.licence})"
    licence += "." if file.may_be_passed_on else ": do not pass these files on."
    return ImportedHead(
        StoredHead(head, licence, file.may_be_passed_on),
        np.concatenate(values, 1).astype(np.float32),
        track.eyes[:, [EYES.index(left), EYES.index(right)]],
        Ts_cam_root @ make_rigid(necks, shifts),
        torso,
        f"{file.title} with {expressions} expressions and the jaw, {count} frames",
        from_looks=False,
    )


def mesh_head(
    recording: Recording, meshes: NDArray[np.floating], faces: NDArray[np.int32], Ks: Floats, looks: Looks
) -> ImportedHead:
    """The head of a mesh a frame: what its coefficients explain, and principal components of the rest.

    Args:
        recording: of T frames. meshes: [T,V,3] in its head frame. faces: [F,3].
        Ks, looks: as `imported_head`.

    Raises:
        StageError: the mesh is not where the face is seen.
    """
    from pipeline.heads.anny import load_anny
    from pipeline.heads.external import CARRIED_REGIONS
    from pipeline.heads.transfer import register, similarity
    from pipeline.landmark_embedding import embed

    template, basis, extra = mesh_basis(recording.coefficients, meshes)
    left, right = _eyeballs(template, faces)
    rough = _bare_head("imported-mesh", template, faces, left, right)
    renders = [_as_render(recording.Ts_cam_world[i], meshes[i], Ks[i], looks[i], recording.size) for i in looks]
    _check_eyes(recording, meshes, (left, right), Ks, looks)
    try:
        embedding = embed(rough, renders, MESH_REACH_PX)
    except StageError:
        raise _wrong_cameras() from None
    rough = replace(
        rough,
        landmark_faces=embedding["faces"],
        landmark_bary=embedding["bary"],
        landmark_spread=embedding["spread"],
    )
    anny = load_anny()
    registration = register(rough, anny)
    masks = registration.carry_masks(anny)
    skin = ~(left | right)
    torso = masks["torso"] & skin
    regions = {name: masks[name] & skin for name in CARRIED_REGIONS}
    share = np.einsum("vc,vc->v", registration.bary, anny.skin_weights[:, 1][anny.faces[registration.faces]]) * skin
    # The eyes turn with the mesh, so that nothing is left to turn.
    weights = np.stack([1 - share, share, np.zeros(len(share)), np.zeros(len(share))], 1)
    scale, rotation, translation = similarity(_at_landmarks(rough), _at_landmarks(anny))
    pivot = -rotation.T @ translation / scale
    centres = [template[side].mean(0) for side in (left, right)]
    # Components are this dataset's own: those of another have other names, so that nobody mistakes them.
    digest = hashlib.sha256(np.concatenate([template[None], basis]).astype(np.float32).tobytes()).hexdigest()[:8]
    names = [f"insta-mesh-{digest}/{index:02d}" for index in range(extra.shape[1])]
    head = replace(
        rough,
        template=(template - pivot).astype(np.float32),
        expression_basis=basis.astype(np.float32),
        expression_names=(*recording.coefficient_names, *names),
        skin_weights=weights.astype(np.float32),
        joints=(np.stack([pivot, pivot, *centres]) - pivot).astype(np.float32),
        regions={**rough.regions, **regions, "torso": torso, "head": ~torso},
    )
    return ImportedHead(
        StoredHead(head, "The head is the dataset's own mesh: its licence is the dataset's.", False),
        np.concatenate([recording.coefficients, extra], 1).astype(np.float32),
        np.zeros((len(recording), 2, 3)),
        recording.Ts_cam_world @ make_rigid(np.eye(3), pivot),
        None,
        f"the dataset's meshes ({len(template):,} vertices), told by its coefficients and {len(names)} components more",
        from_looks=True,
    )


def _check_eyes(
    recording: Recording,
    meshes: NDArray[np.floating],
    eyeballs: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    Ks: Floats,
    looks: Looks,
) -> None:
    """See that the meshes' eyes are where eyes are seen: the one thing that landmarks found on a mesh do not tell.

    Raises:
        StageError: they are not.
    """
    shares = []
    for row, seen in looks.items():
        centres = np.stack([meshes[row][side].mean(0) for side in eyeballs]).astype(np.float64)
        in_camera = transform_points(recording.Ts_cam_world[row], centres)
        if (in_camera[:, 2] <= 0).any():
            raise StageError(f"The head lies behind the camera in frame {row}.", WRONG_CONVENTION)
        apart = np.linalg.norm(project_points(in_camera, Ks[row]) - seen[list(IRISES)], axis=1).mean()
        shares.append(apart / np.ptp(seen[:, 0]))
    if np.median(shares) > EYES_SHARE:
        raise StageError(
            f"The eyes of the dataset's meshes lie {np.median(shares):.2f} of the face's width away from those that "
            "its frames show.",
            WRONG_CONVENTION,
        )


def mesh_basis(coefficients: Floats, meshes: NDArray[np.floating]) -> tuple[Floats, Floats, Floats]:
    """A linear basis of meshes [T,V,3]: template [V,3], basis [E+P,V,3], and the components' coefficients [T,P].

    The first E shapes are those of `coefficients` [T,E], by least squares with a ridge; then come the principal
    components of what is left, one deviation each, until `MESH_RMS_M` is reached.
    """
    count, vertices = meshes.shape[:2]
    flat = meshes.reshape(count, -1).astype(np.float64)
    mean, middle = flat.mean(0), coefficients.mean(0)
    spread = np.maximum(coefficients.std(0), 1e-6)
    X = (coefficients - middle) / spread
    explained = np.linalg.solve(X.T @ X + RIDGE * count * np.eye(X.shape[1]), X.T @ (flat - mean))
    left = flat - mean - X @ explained
    energies, vectors = np.linalg.eigh(left @ left.T)
    energies, vectors = energies[::-1].clip(min=0), vectors[:, ::-1]
    # What is left of the squared error after 0, 1, 2, ... components; a vertex's error is over three coordinates.
    rest = np.concatenate([[energies.sum()], energies.sum() - np.cumsum(energies)]) / (count * vertices)
    enough = np.flatnonzero(rest <= MESH_RMS_M**2)
    kept = min(int(enough[0]) if len(enough) else count, MOST_COMPONENTS, max(count - 1, 0))
    extra = vectors[:, :kept] * np.sqrt(count)
    shapes = [explained / spread[:, None], extra.T @ left / count]
    template = mean - middle @ shapes[0]
    return template.reshape(-1, 3), np.concatenate(shapes).reshape(-1, vertices, 3), extra


def landmark_head(recording: Recording, Ks: Floats, looks: Looks) -> ImportedHead:
    """anny, brought onto the landmarks that the frames show, moved as the dataset's coefficients move them.

    Raises:
        StageError: the cameras do not bring the landmarks together.
    """
    from pipeline.heads.anny import load_anny
    from pipeline.personal import personalise

    anny = load_anny()
    rows = np.array(sorted(looks))
    middle = recording.coefficients[rows].mean(0)
    spread = np.maximum(recording.coefficients[rows].std(0), 1e-6)
    seen = (
        np.stack([looks[row] for row in rows]),
        Ks[rows],
        recording.Ts_cam_world[rows],
        (recording.coefficients[rows] - middle) / spread,
    )
    points, moves = triangulate(*seen)
    for _ in range(TRIANGULATIONS):
        identity, scale, rotation, translation = _onto(anny, points)
        neutral = anny.template + np.tensordot(identity, anny.identity_basis, 1)
        on_anny = _at_landmarks(replace(anny, template=neutral.astype(np.float32)))
        points, moves = triangulate(*seen, expected=scale * on_anny @ rotation.T + translation)
    identity, scale, rotation, translation = _onto(anny, points)
    neutral = anny.template + np.tensordot(identity, anny.identity_basis, 1)
    joints = anny.joints + np.tensordot(identity, anny.joints_identity_basis, 1)
    # From the dataset's world to anny's frame, in metres.
    shapes = moves @ rotation / scale / spread[:, None, None]
    place = (points - translation) @ rotation / scale - np.tensordot(middle, shapes, 1)
    names = recording.coefficient_names
    plain = replace(
        anny,
        name="imported-anny",
        template=neutral.astype(np.float32),
        joints=joints.astype(np.float32),
        expression_basis=np.zeros((len(names), len(neutral), 3), np.float32),
        expression_names=names,
        **_no_identity(len(neutral)),
    )
    head = personalise(plain, place - _at_landmarks(plain), shapes)
    Ts_cam_head = recording.Ts_cam_world @ make_rigid(rotation, translation)
    Ts_cam_head[:, :3, 3] /= scale
    return ImportedHead(
        StoredHead(head, "The head is anny's (CC0), brought onto the dataset's landmarks: free to pass on.", True),
        recording.coefficients.astype(np.float32),
        np.zeros((len(recording), 2, 3)),
        Ts_cam_head,
        None,
        f"anny on landmarks triangulated from {len(rows)} frames, one unit of the dataset being {1 / scale:.3g} m",
        from_looks=True,
    )


def triangulate(
    looks: Floats, Ks: Floats, Ts_cam_world: Floats, coefficients: Floats, expected: Floats | None = None
) -> tuple[Floats, Floats]:
    """Points [L,3] at mean coefficients and what a deviation of each coefficient moves them by, [E,L,3], in the world.

    Linear least squares on the rays (the direct linear transform; Hartley and Zisserman 2004, section 12.2), its rows
    divided by the depth of the round before, with a ridge on the moves; far rows count less (Huber).

    Args:
        looks: [n,L,2] pixels. Ks: [n,3,3]. Ts_cam_world: [n,4,4].
        coefficients: [n,E] in deviations from their mean.
        expected: [L,3] where points lie as far as the rays do not tell: a head that hardly turns leaves depth open.

    Raises:
        StageError: the points come to lie behind the cameras.
    """
    count, landmarks = looks.shape[:2]
    rays = np.concatenate([looks, np.ones((count, landmarks, 1))], 2) @ np.linalg.inv(Ks).transpose(0, 2, 1)
    # u (r3 p + t3) = r1 p + t1, and the same for v, of each landmark in each frame.
    R, t = Ts_cam_world[:, :3, :3], Ts_cam_world[:, :3, 3]
    rows = rays[..., :2, None] * R[:, None, None, 2] - R[:, None, :2]
    right = t[:, None, :2] - rays[..., :2] * t[:, None, 2:]
    unit = np.concatenate([np.ones((count, 1)), coefficients], 1)
    weights = np.ones((count, landmarks))
    points = np.zeros((landmarks, 3)) if expected is None else expected
    moves = np.zeros((coefficients.shape[1], landmarks, 3))
    focal = np.sqrt(Ks[:, 0, 0] * Ks[:, 1, 1])
    for step in range(4):
        solved = unit if step else unit[:, :1]
        columns = 3 * solved.shape[1]
        # A metre in the world's own units, by the face's height.
        metre = float(np.ptp(points, 0).max()) / FACE_M
        ridge = np.zeros(columns)
        ridge[3:] = 1 / max(SHAPE_M * metre, 1e-12) ** 2
        design = np.einsum("nlki,ne->lnkei", rows * weights[..., None, None], solved).reshape(landmarks, -1, columns)
        wanted = (right * weights[..., None]).transpose(1, 0, 2).reshape(landmarks, -1, 1)
        towards = np.zeros((landmarks, columns, 1))
        if expected is not None:
            ridge[:3] = 1 / (FACE_SHAPE_M * metre) ** 2
            towards[:, :3, 0] = ridge[:3] * expected
        normal = design.transpose(0, 2, 1) @ design + np.diag(ridge)
        try:
            solution = np.linalg.solve(normal, design.transpose(0, 2, 1) @ wanted + towards)[..., 0]
        except np.linalg.LinAlgError:
            raise _wrong_cameras() from None
        solution = solution.reshape(landmarks, -1, 3)
        points = solution[:, 0]
        moves = solution[:, 1:].transpose(1, 0, 2) if step else moves
        at = points + np.tensordot(coefficients, moves, 1)
        depth = np.einsum("ni,nli->nl", R[:, 2], at) + t[:, None, 2]
        if not np.isfinite(at).all() or np.median(depth) <= 0:
            raise _wrong_cameras()
        depth = np.maximum(depth, 1e-3 * np.median(depth))
        miss = np.linalg.norm(np.einsum("nlki,nli->nlk", rows, at) - right, axis=2) / depth * focal[:, None]
        limit = 2 * max(PIXEL_NOISE, float(np.median(miss)))
        weights = np.sqrt(limit / np.maximum(miss, limit)) * focal[:, None] / depth / PIXEL_NOISE
    return points, moves


def _wrong_cameras() -> StageError:
    return StageError(
        "The dataset's cameras do not bring the face's landmarks together before them.",
        WRONG_CONVENTION,
    )


def _onto(anny: HeadModel, points: Floats) -> tuple[Floats, float, Floats, Floats]:
    """anny's identity [S], and the similarity that brings it to points [478,3]: scale, rotation, translation."""
    from pipeline.fitting import IDENTITY, reduce_to_landmarks
    from pipeline.heads.transfer import MAX_SPREAD_M, similarity

    at = reduce_to_landmarks(anny)
    used = at.face & (anny.landmark_spread < MAX_SPREAD_M)
    sigma = IDENTITY * (at.identity_high - at.identity_low) / 2
    A = (at.identity[:, used] / at.error_m[used, None]).reshape(len(sigma), -1).T
    identity = np.zeros(len(sigma))
    for _ in range(ANNY_ROUNDS):
        own = at.mean[used] + np.tensordot(identity, at.identity[:, used], 1)
        scale, rotation, translation = similarity(own, points[used])
        if not np.isfinite(scale) or scale <= 0:
            raise _wrong_cameras()
        wanted = (points[used] - translation) @ rotation / scale - at.mean[used]
        b = (wanted / at.error_m[used, None]).ravel()
        identity = np.linalg.solve(A.T @ A + np.diag(1 / sigma**2), A.T @ b).clip(at.identity_low, at.identity_high)
    return identity, scale, rotation, translation


def _no_identity(vertices: int) -> dict[str, Any]:
    """The fields of a head model whose identity is in its template."""
    return {
        "identity_basis": np.zeros((0, vertices, 3), np.float32),
        "identity_names": (),
        "identity_low": np.zeros(0, np.float32),
        "identity_high": np.zeros(0, np.float32),
        "joints_identity_basis": np.zeros((0, 4, 3), np.float32),
        "uv": None,
        "uv_faces": None,
        "expression_to_native": None,
        "native_names": (),
        "transfer_error": None,
    }


def _at_landmarks(head: HeadModel) -> Floats:
    corners = head.template[head.faces[head.landmark_faces]].astype(np.float64)
    return np.asarray(np.einsum("lc,lci->li", head.landmark_bary, corners))


def _eyeballs(template: Floats, faces: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks [V] of the left and the right eyeball: the mesh's two round parts of an eye's size, foremost first.

    Raises:
        StageError: it has none.
    """
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = sparse.csr_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (len(template),) * 2)
    parts = connected_components(graph, directed=False)[1]
    found = []
    for part in np.flatnonzero(np.bincount(parts) > 20):
        mask = parts == part
        centre = (template[mask].min(0) + template[mask].max(0)) / 2
        radius = np.linalg.norm(template[mask] - centre, axis=1)
        if radius.std() < ROUND * radius.mean() and EYE_RADIUS_M[0] < radius.mean() < EYE_RADIUS_M[1]:
            found.append((radius.std() / radius.mean(), centre[0], mask))
    if len(found) < 2:
        raise StageError(
            f"The dataset's mesh has {len(found)} eyeballs; a head with two is needed.",
            "import its FLAME parameters instead, with the user's own FLAME: headcast doctor tells where it goes",
        )
    left, right = sorted(sorted(found, key=lambda one: one[0])[:2], key=lambda one: -one[1])
    return left[2], right[2]


def _bare_head(
    name: str, template: Floats, faces: NDArray[np.int32], left: NDArray[np.bool_], right: NDArray[np.bool_]
) -> HeadModel:
    """A mesh as a head of which nothing is known but its eyes."""
    from pipeline.heads.external import NativeHead, rough_head

    weights = np.stack([~(left | right), np.zeros_like(left), left, right], 1).astype(np.float64)
    native = NativeHead(
        template=template,
        faces=faces,
        identity_basis=np.zeros((0, len(template), 3), np.float32),
        identity_names=(),
        controls=np.zeros((0, len(template), 3), np.float32),
        control_names=(),
        skin_weights=weights,
        joints=np.zeros((4, 3)),
        joints_identity_basis=np.zeros((0, 4, 3)),
    )
    nowhere = np.zeros(len(template), bool)
    rough = rough_head(name, native)
    regions = {"eyelids": nowhere, "ears": nowhere, "eye_sockets": nowhere, **rough.regions}
    return replace(rough, version="1", regions=regions)


def _as_render(
    T_cam_head: Floats, vertices: NDArray[np.floating], K: Floats, look: Floats, size: tuple[int, int]
) -> Render:
    """A frame as `pipeline.landmark_embedding` sees one: a square picture with the mesh under it."""
    from pipeline.landmark_embedding import SIZE, Render

    in_camera = transform_points(T_cam_head, vertices.astype(np.float64))
    low, high = look.min(0), look.max(0)
    side = 1.3 * float((high - low).max())
    corner = (low + high - side) / 2
    to_square = np.array([[SIZE / side, 0, -corner[0] * SIZE / side], [0, SIZE / side, -corner[1] * SIZE / side]])
    square = np.concatenate([to_square, [[0, 0, 1]]])
    return Render(in_camera, square @ K, look @ to_square[:, :2].T + to_square[:, 2])
