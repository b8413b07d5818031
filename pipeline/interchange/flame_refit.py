"""FLAME fitted to the vertices of another head: another model or version of FLAME, or fewer of its coefficients.

Least squares in float64 over the clip: one shape, per frame expression, jaw and head pose. With jaw and eyes held,
FLAME is its shaped template plus what the joints do to it; that part is taken from the last estimate, which leaves a
linear problem for shape, expression and a small turn of the jaw. Ridges keep the coefficients plausible.
Poses are found by Kabsch's method (1976). The neck stays straight: the head's turn is FLAME's root's.
"""

from __future__ import annotations

import math
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
EXACT_M, REGISTERED_M = 1e-6, 2e-4
"""How sure places are: of FLAME's own topology, and of another mesh's surface."""
JAW_STEP_RAD = 1e-3
SETTLED = 0.02
"""The rounds end when the error, RMS over the vertices, gets smaller by less than this share of the places' own."""
FAR_M = 2e-3
"""A vertex that was brought so far from the other head's surface counts half."""
REGION_WEIGHTS = {"head": 0.3, "face": 1.0, "lips": 2.0, "eyelids": 2.0}
"""Later ones count."""
CHUNK = 64


@dataclass(frozen=True, eq=False)
class Target:
    """What FLAME is fitted to.

    Attributes:
        vertices: [T,5023,3] metres in the camera, where FLAME's vertices belong.
        weights: [5023] how much each counts; 0 where it is not known where it belongs.
        face: [5023] the skin of the face, for the residual.
        eyes: [T,2,3,3] turns of FLAME's joints 3 and 4 in the camera; None to find them by the eyeballs.
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
        eyes = imported.Ts_cam_world[rows, None, :3, :3] @ eyes
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
        vertices,
        weights,
        face,
        _eyes_of(fitted, rows, flame),
        f"{flame.name} fitted to {head.name}'s surface",
        REGISTERED_M,
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
    """Vertices [T,5023,3] of an imported FLAME in its world, and its eyes' turns [T,2,3,3] there."""
    import torch

    from pipeline.geometry import rotvec_to_matrix

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
    head = rotvec_to_matrix(moving["rotation"]) @ rotvec_to_matrix(moving["neck"])
    return np.concatenate(found), head[:, None] @ rotvec_to_matrix(moving["eyes"])


def _eyes_of(fitted: Clip, rows: NDArray[np.int64], flame: Flame) -> Floats:
    """The fit's turns of the left and the right eye as those of FLAME's joints 3 and 4, in the camera."""
    from pipeline.geometry import rotvec_to_matrix

    turns = fitted.Ts_cam_head[rows, None, :3, :3] @ rotvec_to_matrix(fitted.eyes[rows].astype(np.float64))
    joints = (flame.regressor @ flame.template).numpy()
    return turns if joints[3, 0] > joints[4, 0] else turns[:, ::-1]


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
    model = _Part(flame, used, target.weights, shapes, expressions, target.noise)
    places = torch.tensor(target.vertices[:, used])
    frames = len(places)
    shape = torch.zeros(shapes, dtype=torch.float64)
    expression = torch.zeros(frames, expressions, dtype=torch.float64)
    jaw = torch.zeros(frames, 3, dtype=torch.float64)
    eyes = torch.zeros(frames, 2, 3, dtype=torch.float64)
    parts = [slice(start, start + CHUNK) for start in range(0, frames, CHUNK)]
    error = math.inf
    for _ in range(ROUNDS):
        before, error = error, 0.0
        wanted, posed = torch.zeros(2, len(used), 3, dtype=torch.float64)
        for part in parts:
            now = _Estimate.of(model, shape, expression[part], jaw[part], eyes[part], places[part])
            wanted += now.wanted.sum(0) / frames
            posed += now.posed.sum(0) / frames
            error += float((model.root * (now.posed - now.local)).square().sum()) / frames
        if before**0.5 - error**0.5 < target.noise * SETTLED:
            break
        new_shape = model.solve_shape(wanted, posed)
        for part in parts:
            now = _Estimate.of(model, shape, expression[part], jaw[part], eyes[part], places[part])
            expression[part], jaw[part] = model.solve_frames(now, new_shape)
            eyes[part] = _eyes(flame, target, part, new_shape, now)
        shape = new_shape
        on_round()
    R, t, off = torch.zeros(frames, 3, 3, dtype=torch.float64), torch.zeros(frames, 3, dtype=torch.float64), []
    for part in parts:
        now = _Estimate.of(model, shape, expression[part], jaw[part], eyes[part], places[part])
        R[part], t[part] = now.R, now.t
        off.append(1e3 * (now.posed - now.local).norm(dim=2).numpy())
    track = _as_track(flame, shape, expression, jaw, eyes, R, t)
    distances, on_face = np.concatenate(off), target.face[used]
    residual: dict[str, float] = {}
    for name, chosen in (("face", distances[:, on_face]), ("head", distances)):
        residual |= {f"{name}_median": float(np.median(chosen)), f"{name}_p95": float(np.percentile(chosen, 95))}
    return track, {name: round(value, 4) for name, value in residual.items()}


class _Part:
    """FLAME at some of its vertices, root and neck straight, and the least squares over them."""

    def __init__(
        self, flame: Flame, used: NDArray[np.int64], weights: Floats, shapes: int, expressions: int, noise: float
    ) -> None:
        import torch

        chosen = torch.from_numpy(used)
        self.share = torch.tensor(weights[used] / weights[used].sum())
        self.template = flame.template[chosen]
        self.shapes, self.expressions = flame.shapes[:shapes, chosen], flame.expressions[:expressions, chosen]
        # Pose correctives of the jaw and the eyes; the neck's are of a straight neck: none.
        self.correctives = flame.pose_directions[9:, chosen]
        self.weights = flame.weights[chosen]
        self.joint_template = flame.regressor @ flame.template
        self.joint_shapes = torch.einsum("jv,svi->sji", flame.regressor, flame.shapes[:shapes])
        self.joint_expressions = torch.einsum("jv,evi->eji", flame.regressor, flame.expressions[:expressions])
        # Every equation is weighted by the root of its vertex' share, so that sums are means.
        self.root = self.share.sqrt()[:, None]
        self.basis = (self.root * torch.cat([self.shapes, self.expressions])).flatten(1)
        self.gram = self.basis @ self.basis.T
        sizes = ((shapes, noise * SHAPE_RIDGE), (expressions, noise * EXPRESSION_RIDGE))
        self.ridge = torch.cat([torch.full((size,), value**2, dtype=torch.float64) for size, value in sizes])

    def shaped(self, shape: Tensor, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices [T,U,3] and joints [T,5,3] before anything turns."""
        import torch

        vertices = self.template + torch.einsum("s,svi->vi", shape, self.shapes)
        joints = self.joint_template + torch.einsum("s,sji->ji", shape, self.joint_shapes)
        return (
            vertices + torch.einsum("te,evi->tvi", expression, self.expressions),
            joints + torch.einsum("te,eji->tji", expression, self.joint_expressions),
        )

    def posed(self, shaped: Tensor, joints: Tensor, jaw: Tensor, eyes: Tensor) -> Tensor:
        """Vertices [T,U,3] of what is shaped, as `Flame.vertices` with root, neck and translation zero."""
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

    def solve_shape(self, wanted: Tensor, posed: Tensor) -> Tensor:
        """Shape [S] by the frames' mean: of what is `wanted` [U,3] before anything turns, and of `posed` [U,3].

        The mean expression is found along with it, and a small turn and move of the whole head, which are not the
        shape's to explain: the next round finds the pose itself.
        """
        import torch

        rigid = self.rigid(posed[None])[0]
        cross = rigid @ self.basis.T
        normal = torch.cat([torch.cat([self.gram, cross.T], 1), torch.cat([cross, rigid @ rigid.T], 1)])
        normal += torch.diag(torch.cat([self.ridge, torch.full((6,), RIGID_RIDGE**2, dtype=torch.float64)]))
        error = (self.root * wanted).flatten()
        found = torch.linalg.solve(normal, torch.cat([self.basis @ error, rigid @ error]))
        return found[: len(self.shapes)]

    def solve_frames(self, now: _Estimate, shape: Tensor) -> tuple[Tensor, Tensor]:
        """Expressions [T,E] and jaws [T,3] of frames of a shape [S], what the joints do held."""
        import torch

        jacobians = []
        for axis in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[axis] = JAW_STEP_RAD
            changed = self.posed(now.shaped, now.joints, now.jaw + step, now.eyes) - now.posed
            jacobians.append((self.root * changed / JAW_STEP_RAD).flatten(1))
        J = torch.cat([torch.stack(jacobians, 1), self.rigid(now.posed)], 1)
        shapes, expressions = len(self.shapes), len(self.expressions)
        S, E = self.basis.split([shapes, expressions])
        left = (self.root * now.wanted).flatten(1) - shape @ S
        normal = torch.zeros(len(J), expressions + 9, expressions + 9, dtype=torch.float64)
        normal[:, :expressions, :expressions] = self.gram[shapes:, shapes:]
        normal[:, expressions:, :expressions] = J @ E.T
        normal[:, :expressions, expressions:] = normal[:, expressions:, :expressions].mT
        normal[:, expressions:, expressions:] = J @ J.mT
        held = torch.tensor([JAW_RIDGE_M] * 3 + [RIGID_RIDGE] * 6, dtype=torch.float64)
        normal += torch.diag(torch.cat([self.ridge[shapes:], held**2]))
        right = torch.cat([left @ E.T, (J @ left[:, :, None])[:, :, 0]], 1)
        found = torch.linalg.solve(normal, right)
        return found[:, :expressions], now.jaw + found[:, expressions : expressions + 3]

    def rigid(self, posed: Tensor) -> Tensor:
        """What small turns and moves of the head do to vertices [T,U,3]: weighted, [T,6,3U]."""
        import torch

        axes = torch.eye(3, dtype=torch.float64)[None, :, None].expand(len(posed), 3, *posed.shape[1:])
        turns = torch.cross(axes, posed[:, None].expand_as(axes), dim=3)
        return (self.root * torch.cat([turns, axes], 1)).flatten(2)


@dataclass(frozen=True, eq=False)
class _Estimate:
    """What was found so far, of some frames, in FLAME's axes.

    Attributes:
        R, t: [T,3,3] and [T,3] that bring it into the camera.
        jaw, eyes: [T,3] and [T,2,3].
        shaped, joints: [T,U,3] and [T,5,3] before anything turns. posed: [T,U,3].
        local: [T,U,3] the places of the vertices.
        wanted: [T,U,3] what shape and expression have to add to the template, what the joints do held.
    """

    R: Tensor
    t: Tensor
    jaw: Tensor
    eyes: Tensor
    shaped: Tensor
    joints: Tensor
    posed: Tensor
    local: Tensor
    wanted: Tensor

    @staticmethod
    def of(model: _Part, shape: Tensor, expression: Tensor, jaw: Tensor, eyes: Tensor, places: Tensor) -> _Estimate:
        import torch

        shaped, joints = model.shaped(shape, expression)
        posed = model.posed(shaped, joints, jaw, eyes)
        R, t = _rigid(posed, places, model.share)
        local = torch.einsum("tji,tvj->tvi", R, places - t[:, None])
        wanted = local - (posed - shaped) - model.template
        return _Estimate(R, t, jaw, eyes, shaped, joints, posed, local, wanted)


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


def _eyes(flame: Flame, target: Target, part: slice, shape: Tensor, now: _Estimate) -> Tensor:
    """Turns [T,2,3] of the eyes: the known ones, else those that bring FLAME's eyeballs nearest to their places."""
    import torch

    from pipeline.geometry import matrix_to_rotvec

    if target.eyes is not None:
        turns = now.R.mT[:, None] @ torch.tensor(np.ascontiguousarray(target.eyes[part]))
        return torch.tensor(matrix_to_rotvec(turns.numpy()))
    found = []
    for joint in (3, 4):
        ball = torch.nonzero(flame.weights[:, joint] > 0.99)[:, 0]
        rest = flame.template[ball] + torch.einsum("s,svi->vi", shape, flame.shapes[: len(shape), ball])
        there = torch.tensor(target.vertices[part][:, ball.numpy()]) - now.t[:, None]
        even = torch.full((len(ball),), 1 / len(ball), dtype=torch.float64)
        turns, _ = _rigid(rest.expand(len(there), -1, -1), torch.einsum("tji,tvj->tvi", now.R, there), even)
        found.append(torch.tensor(matrix_to_rotvec(turns.numpy())))
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
