"""FLAME fitted to the vertices of another head: another model or version of FLAME, or fewer of its coefficients.

Least squares in float64 over the clip: one shape, per frame expression, jaw and head pose. With jaw and eyes held,
FLAME is its shaped template plus what the joints do to it; that part is taken from the last estimate, which leaves a
linear problem for shape, expression and a small turn of the jaw. Ridges keep the coefficients plausible.
Poses are found by Kabsch's method (1976). The neck stays straight: the head's turn is FLAME's root's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import StageError
from pipeline.interchange.recording import FlameTrack, Recording

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.clip import Clip
    from pipeline.heads import HeadModel
    from pipeline.heads.flame import Flame

    Floats = NDArray[np.float64]

ROUNDS = 12
SHAPE_RIDGE, EXPRESSION_RIDGE = 0.4, 1.0
"""Error, RMS over the vertices, that one standard deviation of a coefficient is worth, in units of the places' own."""
JAW_RIDGE_M = 1e-4
"""The same of a radian of the jaw's turn in one round, in metres."""
RIGID_RIDGE = 1e-7
EXACT_M, REGISTERED_M = 1e-6, 5e-5
"""How sure places are: of FLAME's own topology, and of another mesh's surface."""
JAW_STEP_RAD = 1e-3
FAR_M = 2e-3
"""A vertex that was brought so far from the other head's surface counts half."""
REGION_WEIGHTS = {"head": 0.3, "face": 1.0, "lips": 2.0, "eyelids": 2.0}
"""Later ones count."""
CHUNK = 64
LEFT, RIGHT = 0, 1


@dataclass(frozen=True, eq=False)
class Target:
    """What FLAME is fitted to.

    Attributes:
        vertices: [T,5023,3] metres in the camera, where FLAME's vertices belong.
        weights: [5023] how much each counts; 0 where it is not known where it belongs.
        face: [5023] the skin of the face, for the residual.
        eyes: [T,2,3] turns of FLAME's joints 3 and 4 in the head's axes; None to find them by the eyeballs.
        about: a sentence on what it is.
        noise: metres, how sure the places are.
    """

    vertices: Floats
    weights: Floats
    face: NDArray[np.bool_]
    eyes: Floats | None
    about: str
    noise: float = EXACT_M


def target_of(
    fitted: Clip,
    rows: NDArray[np.int64],
    flame: Flame,
    imported: Recording | None,
    dataset: Path,
    report: Callable[[str], None],
) -> Target:
    """Where FLAME's vertices belong, frame by frame.

    Args:
        fitted: the subject's fit.
        rows: [T] of its frames.
        flame: the one that is to be fitted.
        imported: the recording, of an imported subject.
        dataset: where its files lie.
        report: told what takes long.

    Raises:
        UserError: a FLAME that is needed is not on this machine.
    """
    from pipeline.geometry import transform_points
    from pipeline.heads.flame import VERTICES, load_flame

    everywhere, face = np.ones(VERTICES), _face(flame)
    if imported is not None and imported.flame is not None:
        source = load_flame(imported.flame.version)
        vertices, eyes = _of_track(source, imported.flame, rows)
        placed = transform_points(imported.Ts_cam_world[rows], vertices)
        return Target(placed, everywhere, face, eyes, f"{flame.name} fitted to the vertices of {imported.basis}")
    if imported is not None and imported.meshes:
        from pipeline.interchange.insta import read_meshes

        meshes, _ = read_meshes(dataset, [imported.meshes[row] for row in rows])
        if meshes.shape[1] == VERTICES:
            placed = transform_points(imported.Ts_cam_world[rows], meshes)
            return Target(placed, everywhere, face, None, f"{flame.name} fitted to the dataset's meshes")
    head = fitted.personal_head()
    if len(head.template) == VERTICES:
        vertices = np.stack(list(_vertices(fitted, head, rows)))
        return Target(
            vertices, everywhere, face, _eyes_of(fitted, rows, flame), f"{flame.name} fitted to {head.name}'s vertices"
        )
    return _registered(fitted, head, rows, flame, report)


def _registered(
    fitted: Clip, head: HeadModel, rows: NDArray[np.int64], flame: Flame, report: Callable[[str], None]
) -> Target:
    """Every vertex of FLAME at its place on the fitted head's surface, which has another mesh."""
    from dataclasses import replace

    from pipeline.heads import load_head
    from pipeline.heads.transfer import register

    own = load_head(flame.name, report)
    neutral = head.template + np.einsum("s,svi->vi", fitted.identity, head.identity_basis).astype(np.float32)
    person = replace(head, template=neutral)
    found = register(own, person)
    weights = np.zeros(len(own.template))
    for name, weight in REGION_WEIGHTS.items():
        weights[own.regions[name]] = weight
    # Eyeballs are turned, not fitted; the neck bends with the torso, which FLAME's root does not.
    weights[own.regions["eyes"] | own.regions["torso"]] = 0
    weights *= own.skin_weights[:, 0] > 0.9
    weights /= 1 + (found.distance / FAR_M) ** 2
    corners = head.faces[found.faces]
    vertices = np.stack(
        [np.einsum("vc,vci->vi", found.bary, posed[corners]) for posed in _vertices(fitted, head, rows)]
    )
    face = own.regions["face"] & (weights > 0)
    return Target(
        vertices, weights, face, _eyes_of(fitted, rows, flame), f"{flame.name} fitted to {head.name}'s surface"
    )


def _vertices(fitted: Clip, head: HeadModel, rows: NDArray[np.int64]) -> list[Floats]:
    """Vertices [V,3] of the fitted head in the camera, frame by frame."""
    import torch

    from pipeline.geometry import transform_points

    found: list[Floats] = []
    identity = torch.from_numpy(fitted.identity.astype(np.float32))
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        pose = (fitted.expression[part], fitted.neck[part], fitted.eyes[part])
        with torch.no_grad():
            posed = head.vertices(identity, *(torch.from_numpy(value.astype(np.float32)) for value in pose))
        found += list(transform_points(fitted.Ts_cam_head[part], posed.numpy().astype(np.float64)))
    return found


def _of_track(source: Flame, track: FlameTrack, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Vertices [T,5023,3] of an imported FLAME in its world, and its eyes' turns."""
    import torch

    moving = {name: getattr(track, name)[rows] for name in ("expression", "rotation", "neck", "jaw", "eyes")}
    offset = None
    if track.static_offset is not None:
        offset = torch.tensor(track.static_offset[: len(source.template)])
    found = []
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        values = {name: torch.tensor(value[part]) for name, value in moving.items()}
        translation = torch.tensor(track.translation[rows][part])
        posed = source.vertices(torch.tensor(track.shape), **values, translation=translation, static_offset=offset)
        found.append(posed.numpy())
    return np.concatenate(found), moving["eyes"]


def _eyes_of(fitted: Clip, rows: NDArray[np.int64], flame: Flame) -> Floats:
    """The fit's turns of the left and the right eye as those of FLAME's joints 3 and 4."""
    eyes = fitted.eyes[rows].astype(np.float64)
    joints = (flame.regressor @ flame.template).numpy()
    return eyes if joints[3, 0] > joints[4, 0] else eyes[:, ::-1].copy()


def _face(flame: Flame) -> NDArray[np.bool_]:
    """[5023] what moves with the jaw or the expression by a millimetre: the face, as far as the numbers alone tell."""
    moves = flame.expressions.norm(dim=2).amax(dim=0).numpy()
    skin = (flame.weights[:, 3:].sum(1) < 0.5).numpy()
    return (moves > 1e-3) & skin


def refit(
    flame: Flame,
    target: Target,
    shapes: int,
    expressions: int,
    on_round: Callable[[], None] = lambda: None,
) -> tuple[FlameTrack, dict[str, float]]:
    """Fit FLAME to vertices.

    Args:
        flame: the model.
        target: where its vertices belong.
        shapes, expressions: how many coefficients may be used.
        on_round: called after each round.

    Returns:
        FLAME's parameters in the camera's axes, and how far its vertices stay from their places, in millimetres:
        "face_median", "face_p95", "head_median", "head_p95", over vertices and frames.

    Raises:
        StageError: fewer vertices than the problem needs are known.
    """
    import torch

    used = np.flatnonzero(target.weights > 0)
    if len(used) < 500:
        raise StageError(f"Only {len(used)} of FLAME's vertices have a place.", "fit the subject again")
    model = _Part(flame, used, shapes, expressions)
    weights = torch.tensor(target.weights[used] / target.weights[used].sum())
    places = torch.tensor(target.vertices[:, used])
    frames = len(places)
    eyes = torch.tensor(target.eyes) if target.eyes is not None else torch.zeros(frames, 2, 3, dtype=torch.float64)
    shape = torch.zeros(shapes, dtype=torch.float64)
    expression = torch.zeros(frames, expressions, dtype=torch.float64)
    jaw = torch.zeros(frames, 3, dtype=torch.float64)
    for _ in range(ROUNDS):
        posed = model.vertices(shape, expression, jaw, eyes)
        R, t = _rigid(posed, places, weights)
        local = torch.einsum("tji,tvj->tvi", R, places - t[:, None])
        if target.eyes is None:
            eyes = _eyes_by_balls(flame, target, model, shape, expression, R, t)
        shape, expression, jaw = _solve(model, weights, local, posed, shape, expression, jaw, eyes, target.noise)
        on_round()
    posed = model.vertices(shape, expression, jaw, eyes)
    R, t = _rigid(posed, places, weights)
    track = _as_track(flame, shape, expression, jaw, eyes, R, t)
    off = (torch.einsum("tij,tvj->tvi", R, posed) + t[:, None] - places).norm(dim=2).numpy() * 1e3
    on_face = target.face[used]
    residual: dict[str, float] = {}
    for name, chosen in (("face", off[:, on_face]), ("head", off)):
        residual |= {f"{name}_median": float(np.median(chosen)), f"{name}_p95": float(np.percentile(chosen, 95))}
    return track, {name: round(value, 4) for name, value in residual.items()}


class _Part:
    """FLAME at some of its vertices, root and neck straight."""

    def __init__(self, flame: Flame, used: NDArray[np.int64], shapes: int, expressions: int) -> None:
        import torch

        chosen = torch.from_numpy(used)
        self.template = flame.template[chosen]
        self.shapes, self.expressions = flame.shapes[:shapes, chosen], flame.expressions[:expressions, chosen]
        # Pose correctives of the jaw and the eyes; the neck's are of a straight neck: none.
        self.correctives = flame.pose_directions[9:, chosen]
        self.weights = flame.weights[chosen]
        self.joint_template = flame.regressor @ flame.template
        self.joint_shapes = torch.einsum("jv,svi->sji", flame.regressor, flame.shapes[:shapes])
        self.joint_expressions = torch.einsum("jv,evi->eji", flame.regressor, flame.expressions[:expressions])

    def shaped(self, shape: Tensor, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices [T,U,3] and joints [T,5,3] before anything turns."""
        import torch

        vertices = self.template + torch.einsum("s,svi->vi", shape, self.shapes)
        joints = self.joint_template + torch.einsum("s,sji->ji", shape, self.joint_shapes)
        return (
            vertices + torch.einsum("te,evi->tvi", expression, self.expressions),
            joints + torch.einsum("te,eji->tji", expression, self.joint_expressions),
        )

    def vertices(self, shape: Tensor, expression: Tensor, jaw: Tensor, eyes: Tensor) -> Tensor:
        """Vertices [T,U,3], as `Flame.vertices` with root, neck and translation zero."""
        return self.posed(*self.shaped(shape, expression), jaw, eyes)

    def posed(self, shaped: Tensor, joints: Tensor, jaw: Tensor, eyes: Tensor) -> Tensor:
        """The same of what is shaped already."""
        import torch

        from pipeline.geometry import rotvec_to_matrix

        turns = rotvec_to_matrix(torch.cat([jaw[:, None], eyes], 1))
        bent = (turns - torch.eye(3, dtype=torch.float64)).reshape(len(turns), 27)
        rest = shaped + torch.einsum("tp,pvi->tvi", bent, self.correctives)
        moved = rest
        for number in range(3):
            offset = rest - joints[:, None, 2 + number]
            turned = torch.einsum("tij,tvj->tvi", turns[:, number], offset)
            moved = moved + self.weights[:, 2 + number, None] * (turned - offset)
        return moved


def _rigid(source: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation [T,3,3] and translation [T,3] that bring points [T,U,3] to their places (Kabsch 1976)."""
    import torch

    mean, to = (torch.einsum("v,tvi->ti", weights, points) for points in (source, places))
    covariance = torch.einsum("v,tvi,tvj->tij", weights, places - to[:, None], source - mean[:, None])
    U, _, Vt = torch.linalg.svd(covariance)
    signs = torch.ones(len(source), 3, dtype=source.dtype)
    signs[:, 2] = torch.sign(torch.linalg.det(U) * torch.linalg.det(Vt))
    R = (U * signs[:, None]) @ Vt
    return R, to - torch.einsum("tij,tj->ti", R, mean)


def _solve(
    model: _Part,
    weights: Tensor,
    local: Tensor,
    posed: Tensor,
    shape: Tensor,
    expression: Tensor,
    jaw: Tensor,
    eyes: Tensor,
    noise: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, expressions and jaws that bring the shaped head nearest to `local` [T,U,3], what joints do held."""
    import torch

    frames, shapes, expressions = len(local), len(shape), expression.shape[1]
    root = weights.sqrt()[None, :, None]
    shaped, joints = model.shaped(shape, expression)
    wanted = (root * (local - (posed - shaped) - model.template)).reshape(frames, -1)
    S, E = ((root * basis).reshape(len(basis), -1) for basis in (model.shapes, model.expressions))

    # What a small turn and move of the whole head would do: not the shape's nor the expression's to explain. The next
    # round finds the pose itself.
    turns = torch.cross(
        torch.eye(3, dtype=torch.float64)[None, :, None].expand(frames, 3, *posed.shape[1:]),
        posed[:, None].expand(frames, 3, *posed.shape[1:]),
        dim=3,
    )
    moves = torch.eye(3, dtype=torch.float64)[None, :, None].expand(frames, 3, *posed.shape[1:])
    rigid = (root[:, None] * torch.cat([turns, moves], 1)).reshape(frames, 6, -1)
    free = torch.full((6,), RIGID_RIDGE**2, dtype=torch.float64)

    # Shape and mean expression together, from the mean over the frames.
    both = torch.cat([S, E, rigid.mean(0)])
    ridge = torch.cat(
        [
            torch.full((size,), value**2, dtype=torch.float64)
            for size, value in ((shapes, noise * SHAPE_RIDGE), (expressions, noise * EXPRESSION_RIDGE))
        ]
        + [free]
    )
    mean = torch.linalg.solve(both @ both.T + torch.diag(ridge), both @ wanted.mean(0))
    shape = mean[:shapes]

    jacobians = []
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = JAW_STEP_RAD
        changed = model.posed(shaped, joints, jaw + step, eyes) - posed
        jacobians.append((root * changed / JAW_STEP_RAD).reshape(frames, -1))
    J = torch.cat([torch.stack(jacobians, 1), rigid], 1)
    left = wanted - shape @ S
    size = expressions + 9
    normal = torch.zeros(frames, size, size, dtype=torch.float64)
    normal[:, :expressions, :expressions] = E @ E.T
    cross = torch.einsum("tju,eu->tej", J, E)
    normal[:, :expressions, expressions:] = cross
    normal[:, expressions:, :expressions] = cross.transpose(1, 2)
    normal[:, expressions:, expressions:] = J @ J.transpose(1, 2)
    jaw_ridge = torch.full((3,), JAW_RIDGE_M**2, dtype=torch.float64)
    normal += torch.diag(torch.cat([ridge[shapes : shapes + expressions], jaw_ridge, free]))
    right = torch.cat([left @ E.T, torch.einsum("tju,tu->tj", J, left)], 1)
    found = torch.linalg.solve(normal, right)
    return shape, found[:, :expressions], jaw + found[:, expressions : expressions + 3]


def _eyes_by_balls(
    flame: Flame, target: Target, model: _Part, shape: Tensor, expression: Tensor, R: Tensor, t: Tensor
) -> Tensor:
    """Turns [T,2,3] of the eyes that bring FLAME's eyeballs nearest to where they belong, about their own centres."""
    import torch

    from pipeline.geometry import matrix_to_rotvec

    found = []
    for joint in (3, 4):
        ball = torch.nonzero(flame.weights[:, joint] > 0.99)[:, 0]
        rest = flame.template[ball] + torch.einsum("s,svi->vi", shape, flame.shapes[: len(shape), ball])
        there = torch.einsum("tji,tvj->tvi", R, torch.tensor(target.vertices[:, ball.numpy()]) - t[:, None])
        even = torch.full((len(ball),), 1 / len(ball), dtype=torch.float64)
        turns, _ = _rigid(rest.expand(len(there), -1, -1), there, even)
        found.append(matrix_to_rotvec(turns))
    return torch.stack(found, 1)


def _as_track(
    flame: Flame, shape: Tensor, expression: Tensor, jaw: Tensor, eyes: Tensor, R: Tensor, t: Tensor
) -> FlameTrack:
    import torch

    from pipeline.geometry import matrix_to_rotvec

    root = flame.joints(shape, expression)[:, 0]
    rotation = matrix_to_rotvec(R.numpy())
    translation = t - root + torch.einsum("tij,tj->ti", R, root)
    return FlameTrack(
        version=flame.name,
        shape=shape.numpy(),
        expression=expression.numpy(),
        rotation=rotation,
        translation=translation.numpy(),
        neck=np.zeros((len(R), 3)),
        jaw=jaw.numpy(),
        eyes=eyes.numpy(),
    )
