"""Fit a head model to a subject's landmarks: focal lengths, identity, and every frame's pose, expression and gaze.

A subject comes in clips, each with a focal length of its own, and clips in shots; identity is one over all of them, and
what is smooth over time is so within a shot. The fit goes in three phases, each a sequence of damped Gauss-Newton steps
(Nocedal & Wright, Numerical Optimization, 2006, ch. 10) with box constraints by active sets (Bertsekas, "Projected
Newton methods", 1982):

- *subject*: focal lengths, identity and landmark offsets, together with pose and expression of frames chosen to spread
  over both. Frames meet in the subject's unknowns only, so each frame is eliminated by its own small system (Schur
  complement).
- *motion*: pose and expression of every frame for that subject, smooth over time. Only neighbours meet, so the system
  is banded.
- *gaze*: the turn of both eyes from the iris landmarks, banded too.

Landmarks are linear in identity, expression and offsets in the head frame, so the model enters reduced to its
landmarks. A residual is whitened by the landmark's expected error in metres, seen at the head's distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from scipy.linalg import solveh_banded

from pipeline.cameras import make_intrinsics
from pipeline.dataset import write_atomic
from pipeline.geometry import make_rigid, matrix_to_rotvec, rotvec_to_matrix, skew

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

    Floats = NDArray[np.float64]

POSE = 6

# MediaPipe's landmarks: pairs on the upper and lower lid, and the eye's corners.
EYELIDS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, int]]] = {
    "eyeBlinkLeft": (((386, 374), (385, 380), (387, 373)), (263, 362)),
    "eyeBlinkRight": (((159, 145), (158, 153), (160, 144)), (33, 133)),
}
LIDS_OPEN, LIDS_CLOSED = 0.85, 0.17  # gap, in units of the usual one, from which lids begin to close, and are closed
UNUSABLE_WEIGHT = 0.05  # of a frame that is occluded, blurred or partly outside the picture
COVERED_WEIGHT = 0.01  # of a landmark that something lies over, beside its frame's

# Expected errors ("standard deviations") of what is measured, and of what the priors say. Lengths in metres.
DETECTION_M = 0.5e-3  # a landmark's error besides what its embedding wanders
NOISE_SHARE = 0.17  # share of a landmark's expected error that is left once offsets are known
DEPTH_M = 8e-3  # MediaPipe's relief
HUBER = 3.0  # whitened residual from which a landmark counts linearly (Huber, 1964)

# Priors about the subject. They count once per frame, as the data do: what a model gets wrong about a face is the same
# in every frame and does not average out, and without this a long clip would shrink and tilt the head to explain it.
FOCAL_LOG = 0.02  # log focal length about its prior
SIZE = 0.005  # relative size of the face about the average one's: perspective tells too little of it
IDENTITY = 0.15  # identity about 0, in half ranges of each coefficient
SHAPE_OFFSET_M, SHAPE_OFFSET_SHARE = 1.5e-3, 0.5  # offset of an expression's shape: at least, and per its own size

# MediaPipe's lids stay a slit apart where eyes are closed; the model's meet, and have to go on doing so.
BLINK_OFFSET_M = 1e-4

# Expression about MediaPipe's scores: at least, and per unit of the highest score in the clip. Blinks are read off the
# lids; gaze shapes hardly move landmarks.
SCORE_LEAST, SCORE_SHARE = 0.03, 0.15
BLINK = 0.003
GAZE_SHAPE = 0.03
DISTRUST = 1e-3

# Motion priors: standard deviation of speed and acceleration, as white noise sampled at 30 Hz.
REFERENCE_HZ = 30.0
SPEED = {"rotation": 3.0, "translation": 0.5, "expression": 8.0, "gaze": 10.0}  # rad/s, m/s, 1/s, rad/s
ACCELERATION = {"rotation": 20.0, "translation": 3.0, "expression": 300.0, "gaze": 300.0}
SUBJECT_FRAMES = 60
CHUNK = 64
ACTIVE_SET_ROUNDS = 4
LEAST_CURVATURE = 1e-6  # of a frame's unknowns: where a whole shot shows nothing, they stay as they are
MAX_DAMPINGS = 8
SUBJECT_ITERATIONS = 8
MOTION_ITERATIONS = 3
GAZE_ITERATIONS = 3
STEPS = SUBJECT_ITERATIONS + MOTION_ITERATIONS + GAZE_ITERATIONS

GAZE_STRAIGHT = 0.5  # rad, gaze about straight ahead
GAZE_APART = (0.03, 0.06)  # rad, difference of both eyes' pitch and yaw
GAZE_LIMIT = 0.7  # rad

TORSO_SHARE = 0.3
TORSO_SECONDS = 1.0
SQUARE_RATIO = 1.2
WHOLE_SHARE = 0.75

Phase = Literal["subject", "motion", "gaze", "done"]


@dataclass(frozen=True)
class LandmarkHead:
    """A head model at MediaPipe's L = 478 landmarks: all that a fit to landmarks needs, in float64."""

    mean: Floats
    """[L, 3] neutral average landmarks in the head frame, metres."""
    identity: Floats
    """[S, L, 3]."""
    expression: Floats
    """[E, L, 3]."""
    error_m: Floats
    """[L] expected error of a landmark's place on the head."""
    identity_low: Floats
    identity_high: Floats
    """[S] box of the identity coefficients."""
    eye: NDArray[np.int64]
    """[L] 0 or 1 for landmarks on the left or right eyeball, -1 elsewhere."""
    eye_centres: Floats
    """[2, 3] of the average head."""
    eye_centres_identity: Floats
    """[S, 2, 3]."""
    blink: tuple[int, ...]
    """Indices of the expressions that close the left and the right eye; empty where the head has other expressions."""

    @property
    def size(self) -> Floats:
        """[S] relative growth of the face (rms distance of its landmarks from their mean) with each coefficient."""
        mean = self.mean[self.face] - self.mean[self.face].mean(0)
        return np.einsum("li,sli->s", mean, self.identity[:, self.face]) / np.square(mean).sum()

    @property
    def face(self) -> NDArray[np.bool_]:
        """[L] landmarks that move with the skull and the expression, not with an eye."""
        return self.eye < 0

    def points(self, identity: Floats, offsets: Floats, expression: Floats) -> Floats:
        """Landmarks [n, L, 3] in the head frame, eyes straight, for `expression` [n, E].

        `offsets` [1 + E, L, 3] are added to the neutral landmarks and to the shape of each expression.
        """
        neutral = self.mean + np.tensordot(identity, self.identity, 1) + offsets[0]
        shapes = self.expression + offsets[1:]
        return neutral + (expression @ shapes.reshape(len(shapes), -1)).reshape(-1, *self.mean.shape)


def reduce_to_landmarks(head: HeadModel) -> LandmarkHead:
    """The head model at its landmarks."""
    corners = head.faces[head.landmark_faces]
    bary = head.landmark_bary.astype(np.float64)

    def at_landmarks(values: NDArray[np.float32]) -> Floats:
        picked = values[..., corners, :].astype(np.float64)
        return np.einsum("lc,...lci->...li", bary, picked)

    eye_weights = at_landmarks(head.skin_weights)[:, 2:4]
    return LandmarkHead(
        mean=at_landmarks(head.template),
        identity=at_landmarks(head.identity_basis),
        expression=at_landmarks(head.expression_basis),
        error_m=DETECTION_M + head.landmark_spread.astype(np.float64),
        identity_low=head.identity_low.astype(np.float64),
        identity_high=head.identity_high.astype(np.float64),
        eye=np.where(eye_weights.max(1) > 0.5, eye_weights.argmax(1), -1),
        eye_centres=head.joints[2:4].astype(np.float64),
        eye_centres_identity=head.joints_identity_basis[:, 2:4].astype(np.float64),
        blink=tuple(head.expression_names.index(name) for name in EYELIDS if name in head.expression_names),
    )


def closed_lids(
    landmarks: Floats, lids: Sequence[tuple[int, int]], corners: tuple[int, int], usable: NDArray[np.bool_]
) -> Floats:
    """How far an eye is closed [T], 0 to 1, by the gap between its lids against the clip's usual one.

    MediaPipe's blink score stops at 0.5 to 0.8 for closed eyes and differs between people; its lid landmarks do meet.

    Args:
        landmarks: [T, L, 3].
        lids: pairs of landmarks, upper and lower lid.
        corners: of the eye; their distance makes the gap independent of scale.
        usable: [T] frames that tell the usual gap.
    """
    upper, lower = np.array(lids).T
    gap = np.linalg.norm(landmarks[:, upper, :2] - landmarks[:, lower, :2], axis=2).mean(1)
    gap = gap / np.linalg.norm(landmarks[:, corners[0], :2] - landmarks[:, corners[1], :2], axis=1)
    ratio = gap / np.median(gap[usable])
    return ((LIDS_OPEN - ratio) / (LIDS_OPEN - LIDS_CLOSED)).clip(0, 1)


@dataclass(frozen=True)
class Observations:
    """What T frames of C clips show."""

    times: Floats
    """[T] seconds, rising."""
    shots: NDArray[np.int64]
    """[T] the shot of each frame, rising from 0."""
    clips: NDArray[np.int64]
    """[T] the clip of each frame, below C."""
    landmarks: Floats
    """[T, L, 3] x and y in pixels, and MediaPipe's z; rows of frames without weight are not read."""
    scores: Floats
    """[T, E] first guess at the expression, in [0, 1]."""
    scores_sigma: Floats
    """[E] expected error of the guess."""
    weights: Floats
    """[T] trust in a frame: 1 usable, 0 nothing seen."""
    sizes: Floats
    """[C, 2] width and height of each clip's picture."""
    focal_priors_px: Floats
    """[C] expected focal lengths."""
    covered: NDArray[np.bool_] | None = None
    """[T, L] landmarks that something lies over, so that the detector guessed them; none if None."""

    @classmethod
    def of(
        cls,
        times: Floats,
        landmarks: Floats,
        scores: Floats,
        expression_names: Sequence[str],
        detected: NDArray[np.bool_],
        usable: NDArray[np.bool_],
        sizes: NDArray[np.int64],
        focal_ratio: float,
        shots: NDArray[np.int64] | None = None,
        clips: NDArray[np.int64] | None = None,
        covered: NDArray[np.bool_] | None = None,
    ) -> Observations:
        """A subject's frames as a fit sees them.

        Args:
            times: [T] seconds.
            landmarks: [T, L, 3] of the detector, unsmoothed.
            scores: [T, E] MediaPipe's, in the order of `expression_names`.
            expression_names: the head model's.
            detected: [T] frames with a face; the values of others are not read.
            usable: [T] frames to trust; needs at least one.
            sizes: [C, 2] width and height of each clip's picture.
            focal_ratio: expected focal length in units of the longer side.
            shots, clips: [T] each frame's; one shot of one clip if None.
            covered: [T, L] landmarks that something lies over; none if None.
        """
        usable = usable & detected
        shots = np.zeros(len(times), np.int64) if shots is None else shots
        clips = np.zeros(len(times), np.int64) if clips is None else clips
        names = list(expression_names)
        # Each score has a resting level of its own on every face.
        guess = np.clip(scores - np.percentile(scores[usable], 5, axis=0), 0, 1)
        sigma = SCORE_LEAST + SCORE_SHARE * np.percentile(guess[usable], 98, axis=0)
        for index, name in enumerate(names):
            if name.startswith("eyeLook"):
                guess[:, index], sigma[index] = scores[:, index], GAZE_SHAPE
        for name, (lids, corners) in EYELIDS.items():
            guess[:, names.index(name)] = closed_lids(landmarks, lids, corners, usable)
            sigma[names.index(name)] = BLINK
        for shot in np.unique(shots):
            rows = np.flatnonzero(shots == shot)
            seen = rows[detected[rows]]
            known = guess[seen] if len(seen) else np.zeros((1, len(names)))
            at = times[seen] if len(seen) else times[:1]
            guess[rows] = np.stack([np.interp(times[rows], at, column) for column in known.T], 1)
        weights = np.where(usable, 1.0, np.where(detected, UNUSABLE_WEIGHT, 0.0))
        pixels, focals = sizes.astype(np.float64), focal_ratio * sizes.max(1)
        return cls(times, shots, clips, landmarks, guess, sigma, weights, pixels, focals, covered)

    def trust(self, frames: NDArray[np.int64] | slice, landmarks: NDArray[np.bool_]) -> Floats:
        """[n, M] weight of each of the chosen `landmarks` [L] in these frames."""
        weights = np.repeat(self.weights[frames, None], int(landmarks.sum()), 1)
        return (
            weights
            if self.covered is None
            else weights * np.where(self.covered[frames][:, landmarks], COVERED_WEIGHT, 1)
        )

    @property
    def centres(self) -> Floats:
        """[T, 2] principal points: the middle of each frame's picture."""
        return self.sizes[self.clips] / 2


@dataclass(frozen=True)
class FitState:
    """All unknowns of a fit, and how far it has come. A fit continues from a saved state to the same result."""

    phase: Phase
    iteration: int
    damping: float
    focals_px: Floats
    """[C] focal length of each clip."""
    depth_scale: float
    """MediaPipe's z per pixel of depth."""
    identity: Floats
    """[S]."""
    offsets: Floats
    """[1 + E, L, 3] metres, in the head frame: of the neutral landmarks and of each expression's shape; mean 0."""
    rotations: Floats
    """[T, 3, 3] `Rs_cam_head`."""
    translations: Floats
    """[T, 3] metres."""
    expression: Floats
    """[T, E] in [0, 1]."""
    gaze: Floats
    """[T, 2, 2] pitch and yaw of the left and right eye, radians."""

    @property
    def step(self) -> int:
        """Iterations done, of `STEPS`."""
        done = {
            "subject": 0,
            "motion": SUBJECT_ITERATIONS,
            "gaze": SUBJECT_ITERATIONS + MOTION_ITERATIONS,
            "done": STEPS,
        }
        return done[self.phase] + self.iteration

    @property
    def Ts_cam_head(self) -> Floats:
        """[T, 4, 4]."""
        return make_rigid(self.rotations, self.translations)

    @property
    def eyes(self) -> Floats:
        """[T, 2, 3] rotation vectors of the left and right eye."""
        return np.concatenate([self.gaze, np.zeros_like(self.gaze[..., :1])], -1)

    def intrinsics(self, observations: Observations) -> Floats:
        """`Ks` [T, 3, 3] of the frames."""
        pairs = zip(self.focals_px, observations.sizes, strict=True)
        return np.stack([make_intrinsics(focal, *size) for focal, size in pairs])[observations.clips]

    def focals(self, observations: Observations, frames: NDArray[np.int64]) -> Floats:
        """[n] focal length of each of these frames."""
        return self.focals_px[observations.clips[frames]]

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader sees the old one or this one."""
        import io

        buffer = io.BytesIO()
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> FitState:
        """Read a checkpoint."""
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        return cls(**{name: value.item() if value.ndim == 0 else value for name, value in values.items()})


def fit_head(
    head: LandmarkHead,
    observations: Observations,
    *,
    state: FitState | None = None,
    on_iteration: Callable[[FitState], None] = lambda state: None,
) -> FitState:
    """Fit the head to all frames.

    Args:
        head: the model at its landmarks.
        observations: the frames; some frames need weight 1.
        state: where to continue; from the start if None.
        on_iteration: gets the state after every iteration, to save it and to show progress.
    """
    state = initial_state(head, observations) if state is None else state
    while state.phase != "done":
        state = _PHASES[state.phase](head, observations, state)
        on_iteration(state)
    return state


def initial_state(head: LandmarkHead, observations: Observations) -> FitState:
    """The average head with MediaPipe's scores for expression, posed by scaled orthography.

    Rotation, scale and shift are the best similarity between the head's landmarks and MediaPipe's (x, y, z) (Umeyama,
    1991); depth follows from the scale and the focal prior. Frames without weight take their neighbours' poses.
    """
    seen = np.flatnonzero(observations.weights > 0)
    face = head.face
    expression = observations.scores.clip(0, 1)
    offsets = np.zeros((1 + len(head.expression), *head.mean.shape))
    model = head.points(np.zeros(len(head.identity)), offsets, expression[seen])[:, face]
    image = observations.landmarks[seen][:, face]
    model_mean, image_mean = model.mean(1, keepdims=True), image.mean(1, keepdims=True)
    covariance = np.swapaxes(image - image_mean, 1, 2) @ (model - model_mean)
    U, D, Vt = np.linalg.svd(covariance)
    mirror = np.ones_like(D)
    mirror[:, 2] = np.sign(np.linalg.det(U @ Vt))
    rotations = (U * mirror[:, None]) @ Vt
    scale = (D * mirror).sum(1) / np.square(model - model_mean).sum((1, 2))
    depth = observations.focal_priors_px[observations.clips[seen]] / scale
    turned_mean = (rotations @ model_mean[:, 0, :, None])[..., 0]
    xy = (image_mean[:, 0, :2] - observations.centres[seen]) / scale[:, None]
    translations = np.concatenate([xy, depth[:, None]], 1) - turned_mean

    index = np.arange(len(observations.times))
    # Of its own shot, if it has any.
    other_shot = observations.shots[:, None] != observations.shots[seen]
    nearest = seen[(np.abs(index[:, None] - seen) + len(index) * other_shot).argmin(1)]
    take = np.searchsorted(seen, nearest)
    return FitState(
        phase="subject",
        iteration=0,
        damping=1e-3,
        focals_px=observations.focal_priors_px,
        depth_scale=1.0,
        identity=np.zeros(len(head.identity)),
        offsets=offsets,
        rotations=rotations[take],
        translations=translations[take],
        expression=expression[nearest],
        gaze=np.zeros((len(nearest), 2, 2)),
    )


def spread_frames(observations: Observations, state: FitState, count: int) -> NDArray[np.int64]:
    """At most `count` frames of weight 1 that spread over time, pose and expression, in order.

    Half of them evenly in time; the others each farthest from those chosen so far.
    """
    usable = np.flatnonzero(observations.weights == 1)
    if len(usable) <= count:
        return usable
    features = np.concatenate([observations.scores, 2 * matrix_to_rotvec(state.rotations)], 1)[usable]
    chosen = list(np.unique(np.linspace(0, len(usable) - 1, count // 2).round().astype(int)))
    distance = np.square(features[:, None] - features[chosen]).sum(2).min(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(features - features[chosen[-1]]).sum(1))
    return usable[np.sort(chosen)]


@dataclass(frozen=True)
class _Linear:
    """Whitened, robustly weighted residuals of n frames at M landmarks, and their derivatives.

    Rows are x, y and relative depth.
    """

    residuals: Floats
    """[n, M, 3]."""
    by_point: Floats
    """[n, M, 3, 3] by the landmark's place in the head frame."""
    by_frame: Floats
    """[n, M, 3, P] by rotation (from the left), translation and expression."""
    by_log_focal: Floats
    """[n, M, 3]."""

    @property
    def by_frame_rows(self) -> Floats:
        """[n, 3 M, P]."""
        return self.by_frame.reshape(len(self.by_frame), -1, self.by_frame.shape[-1])


def _linearise(head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]) -> _Linear:
    parts = _face_residuals(head, observations, state, frames)
    size = np.linalg.norm(parts.residuals, axis=2)
    robust = np.sqrt(np.minimum(1, HUBER / np.maximum(size, 1e-12)))[..., None]
    x, y, z = np.moveaxis(parts.cam, 2, 0)
    focal, zero = state.focals(observations, frames)[:, None], np.zeros_like(x)
    whitened = robust * parts.whitening
    by_cam = np.stack(
        [
            np.stack([focal / z, zero, -focal * x / z**2], -1),
            np.stack([zero, focal / z, -focal * y / z**2], -1),
            np.stack([zero, zero, np.broadcast_to(parts.px_per_m[:, None], x.shape)], -1),
        ],
        -2,
    )
    by_cam *= whitened[..., None]
    by_point = by_cam @ state.rotations[frames, None]
    by_frame = np.empty((*x.shape, 3, POSE + len(head.expression)))
    by_frame[..., :3] = -by_cam @ skew(parts.turned)
    # Relative depth is measured about the face itself, so moving the head leaves it.
    by_frame[..., 3:6] = by_cam
    by_frame[..., 2, 3:6] = 0
    n, M = x.shape
    shapes = (head.expression + state.offsets[1:])[:, head.face].transpose(1, 2, 0)
    by_frame[..., 6:] = (
        np.matmul(by_point.transpose(1, 0, 2, 3).reshape(M, 3 * n, 3), shapes)
        .reshape(M, n, 3, -1)
        .transpose(1, 0, 2, 3)
    )
    by_log_focal = whitened * np.stack([focal * x / z, focal * y / z, zero], -1)
    return _Linear(robust * parts.residuals, by_point, by_frame, by_log_focal)


@dataclass(frozen=True)
class _FaceResiduals:
    residuals: Floats
    """[n, M, 3] whitened."""
    whitening: Floats
    """[n, M, 3] one over the expected error in pixels, times the root of the landmark's weight."""
    turned: Floats
    cam: Floats
    """[n, M, 3] landmarks with the camera's axes, about the head's origin and about the camera."""
    px_per_m: Floats
    """[n] at the head's distance."""


def _face_residuals(
    head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]
) -> _FaceResiduals:
    face = head.face
    points = head.points(state.identity, state.offsets, state.expression[frames])[:, face]
    turned = points @ np.swapaxes(state.rotations[frames], 1, 2)
    cam = turned + state.translations[frames, None]
    focal = state.focals(observations, frames)
    px_per_m = focal / state.translations[frames, 2]
    error_m = np.broadcast_to(NOISE_SHARE * head.error_m[face, None], (*cam.shape[1:2], 3)).copy()
    error_m[:, 2] = DEPTH_M
    trust = np.sqrt(observations.trust(frames, face))[..., None]
    whitening = trust / px_per_m[:, None, None] / error_m
    seen = np.where(trust > 0, observations.landmarks[frames][:, face], head.mean[face])
    residuals = np.empty_like(cam)
    projected = focal[:, None, None] * cam[..., :2] / cam[..., 2:] + observations.centres[frames, None]
    residuals[..., :2] = projected - seen[..., :2]
    depth = px_per_m[:, None] * turned[..., 2] - seen[..., 2] / state.depth_scale
    residuals[..., 2] = _without_plane(depth, seen)
    residuals = np.where(trust > 0, residuals * whitening, 0)
    return _FaceResiduals(residuals, whitening, turned, cam, px_per_m)


def _without_plane(depth: Floats, pixels: Floats) -> Floats:
    """`depth` [n, M] less the plane over the image that fits each frame's best.

    MediaPipe's z is tilted by several degrees against the head; what it tells is relief.
    """
    plane = pixels[..., :2] - pixels[..., :2].mean(1, keepdims=True)
    plane = np.concatenate([plane, np.ones_like(plane[..., :1])], 2)
    plane_T = np.swapaxes(plane, 1, 2)
    return depth - (plane @ np.linalg.solve(plane_T @ plane, plane_T @ depth[..., None]))[..., 0]


def _huber(size: Floats) -> float:
    return float(np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).sum())


def _chunks(frames: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [frames[i : i + CHUNK] for i in range(0, len(frames), CHUNK)]


def _data_cost(head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]) -> float:
    return sum(
        _huber(np.linalg.norm(_face_residuals(head, observations, state, chunk).residuals, axis=2))
        for chunk in _chunks(frames)
    )


def _move_frames(state: FitState, frames: NDArray[np.int64], step: Floats) -> FitState:
    """Move poses and expressions of `frames` [n] by `step` [n, P], expressions kept in their box."""
    rotations, translations, expression = state.rotations.copy(), state.translations.copy(), state.expression.copy()
    rotations[frames] = rotvec_to_matrix(step[:, :3]) @ rotations[frames]
    translations[frames] += step[:, 3:POSE]
    expression[frames] = (expression[frames] + step[:, POSE:]).clip(0, 1)
    return replace(state, rotations=rotations, translations=translations, expression=expression)


def _score_prior(observations: Observations, state: FitState, frames: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Expression about MediaPipe's scores: residuals [n, E], their scale [n, 1]; vague where distrusted."""
    sigma = observations.scores_sigma / np.sqrt(np.maximum(observations.weights[frames], DISTRUST))[:, None]
    return (state.expression[frames] - observations.scores[frames]) / sigma, sigma


class _System(Protocol):
    """Normal equations of one Gauss-Newton step over U unknowns."""

    @property
    def gradient(self) -> Floats:
        """[U]."""

    def solve(self, step: Floats, held: NDArray[np.bool_], damping: float) -> Floats:
        """The minimising step [U] among those equal to `step` where `held`; diagonals grow by the share `damping`."""


def _descend(
    system: _System,
    low: Floats,
    high: Floats,
    state: FitState,
    apply: Callable[[Floats], FitState],
    cost: Callable[[FitState], float],
) -> FitState:
    """One Levenberg-Marquardt step within a box; the state keeps the damping that worked.

    The box is met by active sets: what the gradient pushes out at once is held, what the solution would push out is
    held at its bound and the rest solved again.

    Args:
        system: curvature and gradient at `state`.
        low, high: [U] what the step may be.
        state: where to start.
        apply: the state after a step [U].
        cost: what must fall.
    """
    before, damping = cost(state), state.damping
    pushed_out = ((low >= 0) & (system.gradient > 0)) | ((high <= 0) & (system.gradient < 0))
    for _ in range(MAX_DAMPINGS):
        held, step = pushed_out.copy(), np.zeros_like(system.gradient)
        for _ in range(ACTIVE_SET_ROUNDS):
            step = system.solve(np.where(held, step.clip(low, high), 0), held, damping)
            outside = ~held & ((step < low) | (step > high))
            if not outside.any():
                break
            held |= outside
        candidate = apply(step.clip(low, high))
        if cost(candidate) < before:
            return replace(candidate, damping=max(damping / 5, 1e-7))
        damping *= 8
    return replace(state, damping=damping)


@dataclass(frozen=True)
class _ArrowSystem:
    """n frames of P unknowns that meet only in Q unknowns of the subject; U = n P + Q."""

    frames: Floats
    """[n, P, P]."""
    mixed: Floats
    """[n, P, Q]."""
    subject: Floats
    """[Q, Q]."""
    gradient: Floats

    def solve(self, step: Floats, held: NDArray[np.bool_], damping: float) -> Floats:
        n, P, _ = self.mixed.shape
        given_frames, given_subject = step[: n * P].reshape(n, P), step[n * P :]
        held_frames, held_subject = held[: n * P].reshape(n, P), held[n * P :]
        g_frames = self.gradient[: n * P].reshape(n, P) + (self.frames @ given_frames[..., None])[..., 0]
        g_frames += self.mixed @ given_subject
        g_subject = self.gradient[n * P :] + np.tensordot(given_frames, self.mixed, 2) + self.subject @ given_subject
        g_frames, g_subject = np.where(held_frames, 0, g_frames), np.where(held_subject, 0, g_subject)
        mixed = np.where(held_frames[:, :, None] | held_subject, 0, self.mixed)
        eliminate = _loosen(_damped(self.frames, damping), held_frames)
        solved = np.linalg.solve(eliminate, np.concatenate([mixed, g_frames[..., None]], 2))
        schur = np.tensordot(mixed, solved, ([0, 1], [0, 1]))
        curvature = _loosen(_damped(self.subject, damping), held_subject) - schur[:, :-1]
        step_subject = -np.linalg.solve(curvature, g_subject - schur[:, -1])
        step_frames = -solved[..., -1] - solved[..., :-1] @ step_subject
        return np.where(held, step, np.concatenate([step_frames.reshape(-1), step_subject]))


@dataclass(frozen=True)
class _BandedSystem:
    """T frames of P unknowns, each coupled to the same unknown of the next two frames; U = T P."""

    frames: Floats
    """[T, P, P]."""
    couplings: Floats
    """[3, T, P] added curvature between a frame and itself, the next, and the one after."""
    gradient: Floats

    def solve(self, step: Floats, held: NDArray[np.bool_], damping: float) -> Floats:
        T, P = self.frames.shape[:2]
        given = step.reshape(T, P)
        g = self.gradient.reshape(T, P) + (self.frames @ given[..., None])[..., 0] + self.couplings[0] * given
        for apart in range(1, min(3, T)):
            coupling = self.couplings[apart, : T - apart]
            g[:-apart] += coupling * given[apart:]
            g[apart:] += coupling * given[:-apart]
        H = _damped(self.frames, damping) + LEAST_CURVATURE * np.eye(P)
        lower = np.zeros((2 * P + 1, T * P))
        for p in range(P):
            lower[: P - p, p::P] = H[:, p:, p].T
        for apart in range(min(3, T)):
            lower[apart * P] += self.couplings[apart].reshape(-1)
        for row in range(1, len(lower)):
            lower[row, : T * P - row][held[row:]] = 0
        lower[1:, held] = 0
        lower[0, held] = 1
        solution = solveh_banded(lower, np.where(held, 0, -g.reshape(-1)), lower=True, overwrite_ab=True)
        return np.where(held, step, solution)


def _damped(H: Floats, damping: float) -> Floats:
    """Curvature [..., P, P] with its diagonal grown by a share (Levenberg-Marquardt)."""
    return H * (1 + damping * np.eye(H.shape[-1]))


def _loosen(H: Floats, held: NDArray[np.bool_]) -> Floats:
    """Curvature [..., P, P] with the rows and columns of `held` [..., P] unknowns made those of the identity."""
    cut = np.where(held[..., :, None] | held[..., None, :], 0, H)
    index = np.arange(H.shape[-1])
    cut[..., index, index] += held
    return cut


def _step_subject(head: LandmarkHead, observations: Observations, state: FitState) -> FitState:
    """One step for the subject's unknowns and the chosen frames, then the best landmark offsets for it."""
    frames = spread_frames(observations, initial_state(head, observations), SUBJECT_FRAMES)
    state = replace(state, depth_scale=_depth_scale(head, observations, state, frames))
    C, S = len(observations.sizes), len(head.identity)
    n, P, Q = len(frames), POSE + len(head.expression), C + S

    def apply(step: Floats) -> FitState:
        moved = _move_frames(state, frames, step[: n * P].reshape(n, P))
        focals_px = state.focals_px * np.exp(step[n * P : n * P + C])
        return replace(moved, focals_px=focals_px, identity=state.identity + step[n * P + C :])

    def cost(candidate: FitState) -> float:
        return _subject_cost(head, observations, candidate, frames)

    low, high = np.full(n * P + Q, -np.inf), np.full(n * P + Q, np.inf)
    low[: n * P], high[: n * P] = _frame_box(state, frames)
    low[n * P + C :], high[n * P + C :] = head.identity_low - state.identity, head.identity_high - state.identity
    state = _descend(_subject_system(head, observations, state, frames), low, high, state, apply, cost)
    state = _with_best_offsets(head, observations, state, frames)
    if state.iteration + 1 < SUBJECT_ITERATIONS:
        return replace(state, iteration=state.iteration + 1)
    return replace(_pose_other_frames(head, observations, state, frames), phase="motion", iteration=0, damping=1e-4)


def _step_motion(head: LandmarkHead, observations: Observations, state: FitState) -> FitState:
    """One step for the pose and expression of every frame, the subject as it is."""
    frames = np.arange(len(observations.times))
    shape = len(frames), POSE + len(head.expression)
    kinds = (("rotation", 3), ("translation", 3), ("expression", len(head.expression)))
    prior = MotionPrior.of(observations.times, observations.shots, *kinds)

    def apply(step: Floats) -> FitState:
        return _move_frames(state, frames, step.reshape(shape))

    def cost(candidate: FitState) -> float:
        score, _ = _score_prior(observations, candidate, frames)
        data = _data_cost(head, observations, candidate, frames)
        return data + 0.5 * float(np.square(score).sum()) + prior.cost(_increments(candidate))

    H, g = np.empty((*shape, shape[1])), np.empty(shape)
    for chunk in _chunks(frames):
        linear = _linearise(head, observations, state, chunk)
        H[chunk], g[chunk] = _frame_equations(linear)
    _add_score_prior(observations, state, frames, H, g)
    g += prior.gradient(_increments(state))
    system = _BandedSystem(H, prior.bands(), g.reshape(-1))
    state = _descend(system, *_frame_box(state, frames), state, apply, cost)
    if state.iteration + 1 < MOTION_ITERATIONS:
        return replace(state, iteration=state.iteration + 1)
    return replace(state, phase="gaze", iteration=0)


def _subject_system(
    head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]
) -> _ArrowSystem:
    """Normal equations of the chosen frames (n of P unknowns), log focal lengths and identity (together Q)."""
    C, S = len(observations.sizes), len(head.identity)
    n, P, Q = len(frames), POSE + len(head.expression), C + S
    of_clip = np.eye(C)[observations.clips[frames]]
    shapes = head.identity[:, head.face].transpose(1, 2, 0)
    H_frames, g_frames, mixed = np.empty((n, P, P)), np.empty((n, P)), np.empty((n, P, Q))
    H_subject, g_subject = np.zeros((Q, Q)), np.zeros(Q)
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        linear = _linearise(head, observations, state, frames[rows])
        H_frames[rows], g_frames[rows] = _frame_equations(linear)
        by_focal = linear.by_log_focal[..., None] * of_clip[rows, None, None]
        by_subject = np.concatenate([by_focal, linear.by_point @ shapes], -1)
        flat = by_subject.reshape(-1, Q)
        mixed[rows] = np.swapaxes(linear.by_frame_rows, 1, 2) @ by_subject.reshape(len(by_subject), -1, Q)
        g_subject += flat.T @ linear.residuals.reshape(-1)
        H_subject[:C] += by_focal.reshape(-1, C).T @ flat
        # Identity moves points; summed over frames that leaves 3 x 3 numbers per landmark.
        information = np.einsum("nmki,nmkj->mij", linear.by_point, linear.by_point)
        H_subject[C:, C:] += shapes.reshape(-1, S).T @ (information @ shapes).reshape(-1, S)
    H_subject[C:, :C] = H_subject[:C, C:].T
    _add_score_prior(observations, state, frames, H_frames, g_frames)
    counts = np.maximum(of_clip.sum(0), 1)
    sigma = np.concatenate([FOCAL_LOG / np.sqrt(counts), _identity_sigma(head) / np.sqrt(n)])
    from_prior = np.concatenate([np.log(state.focals_px / observations.focal_priors_px), state.identity])
    H_subject[np.diag_indices(Q)] += 1 / sigma**2
    g_subject += from_prior / sigma**2
    size = head.size / (SIZE / np.sqrt(n))
    H_subject[C:, C:] += np.outer(size, size)
    g_subject[C:] += size * (size @ state.identity)
    return _ArrowSystem(H_frames, mixed, H_subject, np.concatenate([g_frames.reshape(-1), g_subject]))


def _frame_equations(linear: _Linear) -> tuple[Floats, Floats]:
    """Curvature [n, P, P] and gradient [n, P] of each frame's own unknowns."""
    by_frame = linear.by_frame_rows
    by_frame_T = np.swapaxes(by_frame, 1, 2)
    residuals = linear.residuals.reshape(len(by_frame), -1, 1)
    return by_frame_T @ by_frame, (by_frame_T @ residuals)[..., 0]


def _add_score_prior(
    observations: Observations, state: FitState, frames: NDArray[np.int64], H: Floats, g: Floats
) -> None:
    score, sigma = _score_prior(observations, state, frames)
    index = np.arange(POSE, H.shape[-1])
    H[:, index, index] += 1 / sigma**2
    g[:, POSE:] += score / sigma


def _frame_box(state: FitState, frames: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Lowest and highest step [n P] of each frame's unknowns that keeps expressions in [0, 1]."""
    free = np.full((len(frames), POSE), np.inf)
    low = np.concatenate([-free, -state.expression[frames]], 1)
    high = np.concatenate([free, 1 - state.expression[frames]], 1)
    return low.reshape(-1), high.reshape(-1)


def _subject_cost(head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]) -> float:
    score, _ = _score_prior(observations, state, frames)
    identity = state.identity / _identity_sigma(head)
    counts = np.maximum(np.bincount(observations.clips[frames], minlength=len(observations.sizes)), 1)
    focal = np.square(np.log(state.focals_px / observations.focal_priors_px) / FOCAL_LOG) @ counts
    offsets = state.offsets[:, head.face] / _offset_sigma(head)[..., None]
    size = head.size @ state.identity / SIZE
    once = np.square(identity).sum() + size**2 + np.square(offsets).sum()
    prior = 0.5 * (np.square(score).sum() + focal + len(frames) * once)
    return _data_cost(head, observations, state, frames) + float(prior)


def _identity_sigma(head: LandmarkHead) -> Floats:
    return IDENTITY * (head.identity_high - head.identity_low) / 2


def _offset_sigma(head: LandmarkHead) -> Floats:
    """[1 + E, M] expected size of the neutral landmarks' offsets and of those of each expression's shape, metres."""
    size = np.linalg.norm(head.expression[:, head.face], axis=2)
    shapes = SHAPE_OFFSET_M + SHAPE_OFFSET_SHARE * size
    shapes[list(head.blink)] = BLINK_OFFSET_M
    return np.concatenate([head.error_m[None, head.face], shapes])


def _depth_scale(head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]) -> float:
    """Slope of MediaPipe's z over the head's depth in pixels, within a factor of two of 1."""
    parts = _face_residuals(head, observations, state, frames)
    depth = parts.px_per_m[:, None] * parts.turned[..., 2]
    seen = observations.landmarks[frames][:, head.face, 2]
    pixels = observations.landmarks[frames][:, head.face]
    depth, seen = _without_plane(depth, pixels), _without_plane(seen, pixels)
    return float(np.clip((depth * seen).sum() / np.square(depth).sum(), 0.5, 2))


def _with_best_offsets(
    head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]
) -> FitState:
    """The offsets that fit best with all else as it is, landmark by landmark. What they share goes to the poses."""
    face = head.face
    M, Z = int(face.sum()), 1 + len(head.expression)
    curvature = np.zeros((M * 9, Z * Z))
    gradient = np.zeros((Z, M * 3))
    for chunk in _chunks(frames):
        linear = _linearise(head, observations, state, chunk)
        by_point_T = np.swapaxes(linear.by_point, 2, 3)
        basis = np.concatenate([np.ones((len(chunk), 1)), state.expression[chunk]], 1)
        products = (basis[:, :, None] * basis[:, None]).reshape(len(chunk), -1)
        curvature += (by_point_T @ linear.by_point).reshape(len(chunk), -1).T @ products
        gradient += basis.T @ (by_point_T @ linear.residuals[..., None]).reshape(len(chunk), -1)
    prior = len(frames) / np.square(_offset_sigma(head)).T
    H = curvature.reshape(M, 3, 3, Z, Z).transpose(0, 3, 1, 4, 2).reshape(M, Z * 3, Z * 3)
    index = np.arange(Z * 3)
    H[:, index, index] += np.repeat(prior, 3, 1)
    current = state.offsets[:, face].transpose(1, 0, 2)
    g = gradient.reshape(Z, M, 3).transpose(1, 0, 2) + prior[..., None] * current
    moved = current - np.linalg.solve(H, g.reshape(M, Z * 3, 1)).reshape(M, Z, 3)
    shared = moved.mean(0)
    offsets = state.offsets.copy()
    offsets[:, face] = (moved - shared).transpose(1, 0, 2)
    shift = shared[0] + state.expression @ shared[1:]
    translations = state.translations + (state.rotations @ shift[..., None])[..., 0]
    return replace(state, offsets=offsets, translations=translations)


def _pose_other_frames(
    head: LandmarkHead, observations: Observations, state: FitState, frames: NDArray[np.int64]
) -> FitState:
    """Scale the start depth of the frames that the subject phase left out to the found head and focal lengths."""
    start = initial_state(head, observations)
    every = np.arange(len(observations.times))
    zoom = state.focals(observations, every) / start.focals(observations, every)
    ratio = np.median(state.translations[frames, 2] / start.translations[frames, 2] / zoom[frames])
    others = np.setdiff1d(every, frames)
    translations = state.translations.copy()
    translations[others, 2] *= ratio * zoom[others]
    return replace(state, translations=translations)


@dataclass(frozen=True)
class MotionPrior:
    """Speed and acceleration as white noise, in real time: quadratic in the increments between frames of a shot.

    The energy is half the integral of squared speed and acceleration over their expected squares, sampled at
    `REFERENCE_HZ`, so that it does not depend on the frame rate and allows for uneven times.
    """

    speed: Floats
    """[T-1] factor of an increment."""
    difference: Floats
    """[T-2, 2] factors of the increments before and after a frame that give its acceleration."""
    speed_sigma: Floats
    acceleration_sigma: Floats
    """[P] expected speed and acceleration of each unknown."""

    @classmethod
    def of(cls, times: Floats, shots: NDArray[np.int64], *groups: tuple[str, int]) -> MotionPrior:
        """The prior of unknowns that come as (kind, count) groups, at `times` [T] in `shots` [T]."""
        step = np.diff(times)
        middle = (step[1:] + step[:-1]) / 2
        root = np.sqrt(middle * REFERENCE_HZ) / middle
        counts = [count for _, count in groups]
        same_shot = np.diff(shots) == 0
        root *= same_shot[1:] & same_shot[:-1]
        return cls(
            speed=np.sqrt(step * REFERENCE_HZ) / step * same_shot,
            difference=np.stack([-root / step[:-1], root / step[1:]], 1),
            speed_sigma=np.repeat([SPEED[kind] for kind, _ in groups], counts),
            acceleration_sigma=np.repeat([ACCELERATION[kind] for kind, _ in groups], counts),
        )

    def rows(self, increments: Floats) -> tuple[Floats, Floats]:
        """Whitened speeds [T-1, P] and accelerations [T-2, P]."""
        speed = self.speed[:, None] * increments / self.speed_sigma
        change = self.difference[:, :1] * increments[:-1] + self.difference[:, 1:] * increments[1:]
        return speed, change / self.acceleration_sigma

    def cost(self, increments: Floats) -> float:
        return sum(0.5 * float(np.square(rows).sum()) for rows in self.rows(increments))

    def gradient(self, increments: Floats) -> Floats:
        """[T, P] by the unknowns themselves."""
        speed, change = self.rows(increments)
        by_increment = self.speed[:, None] * speed / self.speed_sigma
        by_increment[:-1] += self.difference[:, :1] * change / self.acceleration_sigma
        by_increment[1:] += self.difference[:, 1:] * change / self.acceleration_sigma
        edge = np.zeros((1, increments.shape[1]))
        return np.concatenate([edge, by_increment]) - np.concatenate([by_increment, edge])

    def bands(self) -> Floats:
        """[3, T, P] curvature between a frame and itself, the next, and the one after."""
        T, P = len(self.speed) + 1, len(self.speed_sigma)
        bands = np.zeros((3, T, P))
        before, after = self.difference[:, 0], self.difference[:, 1]
        for rows, sigma in (
            ([(0, -self.speed), (1, self.speed)], self.speed_sigma),
            ([(0, -before), (1, before - after), (2, after)], self.acceleration_sigma),
        ):
            for i, a in rows:
                for j, b in rows[i:]:
                    bands[j - i, i : i + len(a)] += (a * b)[:, None] / sigma**2
        return bands


def _increments(state: FitState) -> Floats:
    """[T-1, P] what changes from a frame to the next."""
    turned = matrix_to_rotvec(state.rotations[1:] @ np.swapaxes(state.rotations[:-1], 1, 2))
    return np.concatenate([turned, np.diff(state.translations, axis=0), np.diff(state.expression, axis=0)], 1)


def _step_gaze(head: LandmarkHead, observations: Observations, state: FitState) -> FitState:
    """One step for both eyes' pitch and yaw in every frame, from the iris landmarks, then the irises' own offsets.

    Closed lids hide the iris and MediaPipe guesses: frames count by how open the eyes are.
    """
    T = len(observations.times)
    blink = state.expression[:, list(head.blink)]
    irises = [head.eye == eye for eye in range(2)]
    given = np.stack([observations.trust(slice(None), iris).mean(1) for iris in irises], 1)
    trust = np.sqrt(given * np.square(1 - blink).clip(0.01, 1))
    focal = state.focals(observations, np.arange(T))
    px_per_m = focal / state.translations[:, 2]
    points = head.points(state.identity, state.offsets, np.zeros((1, len(head.expression))))[0]
    centres = head.eye_centres + np.tensordot(state.identity, head.eye_centres_identity, 1)
    prior = MotionPrior.of(observations.times, observations.shots, ("gaze", 4))
    seen = observations.weights > 0

    H, g = np.zeros((T, 4, 4)), np.zeros((T, 4))
    offsets = state.offsets.copy()
    for eye, iris in enumerate(irises):
        turned = np.einsum("tij,lj->tli", rotvec_to_matrix(state.eyes[:, eye]), points[iris] - centres[eye])
        R, cam = state.rotations, (centres[eye] + turned) @ np.swapaxes(state.rotations, 1, 2)
        cam = cam + state.translations[:, None]
        whitening = (trust[:, eye] / (px_per_m * NOISE_SHARE * head.error_m[iris].mean()))[:, None, None]
        residuals = focal[:, None, None] * cam[..., :2] / cam[..., 2:] + observations.centres[:, None]
        residuals = np.where(seen[:, None, None], (residuals - observations.landmarks[:, iris, :2]) * whitening, 0)
        by_point = whitening[..., None] * _projection_jacobian(focal[:, None], cam) @ R[:, None]
        by_gaze = (-by_point @ skew(turned))[..., :2].reshape(T, -1, 2)
        columns = slice(2 * eye, 2 * eye + 2)
        H[:, columns, columns] = np.swapaxes(by_gaze, 1, 2) @ by_gaze
        g[:, columns] = (np.swapaxes(by_gaze, 1, 2) @ residuals.reshape(T, -1, 1))[..., 0]

        if state.iteration > 0:
            turned_by = by_point @ rotvec_to_matrix(state.eyes[:, eye])[:, None]
            information = np.einsum("tmki,tmkj->mij", turned_by, turned_by)
            pull = np.einsum("tmki,tmk->mi", turned_by, residuals)
            weight = 1 / head.error_m[iris] ** 2
            H_offset = information + weight[:, None, None] * np.eye(3)
            g_offset = pull + weight[:, None] * offsets[0, iris]
            moved = offsets[0, iris] - np.linalg.solve(H_offset, g_offset[..., None])[..., 0]
            # A common shift of the iris is a turn of the eye.
            offsets[0, iris] = moved - moved.mean(0)

    gaze = state.gaze.reshape(T, 4)
    straight = np.eye(4) / GAZE_STRAIGHT**2
    apart = np.array([[1.0, 0, -1, 0], [0, 1, 0, -1]]) / np.array(GAZE_APART)[:, None]
    couple = straight + apart.T @ apart
    H += couple
    g += gaze @ couple + prior.gradient(np.diff(gaze, axis=0))
    system = _BandedSystem(H, prior.bands(), g.reshape(-1))
    step = system.solve(np.zeros(4 * T), np.zeros(4 * T, bool), 0.0)
    moved_gaze = (gaze + step.reshape(T, 4)).clip(-GAZE_LIMIT, GAZE_LIMIT).reshape(T, 2, 2)
    state = replace(state, gaze=moved_gaze, offsets=offsets, iteration=state.iteration + 1)
    return state if state.iteration < GAZE_ITERATIONS else replace(state, phase="done", iteration=0)


def _projection_jacobian(focal: Floats, cam: Floats) -> Floats:
    """Derivatives [..., 2, 3] of pixels by camera-space points [..., 3], for focal lengths that broadcast to [...]."""
    x, y, z = np.moveaxis(cam, -1, 0)
    zero = np.zeros_like(x)
    rows = np.stack([focal / z, zero, -focal * x / z**2], -1), np.stack([zero, focal / z, -focal * y / z**2], -1)
    return np.stack(rows, -2)


_PHASES = {"subject": _step_subject, "motion": _step_motion, "gaze": _step_gaze}


def reprojection_errors(head: LandmarkHead, observations: Observations, state: FitState) -> Floats:
    """[T, L] distances in pixels between the fitted landmarks and those observed; NaN where nothing is seen."""
    points = posed_landmarks(head, state)
    cam = points @ np.swapaxes(state.rotations, 1, 2) + state.translations[:, None]
    focal = state.focals(observations, np.arange(len(cam)))[:, None, None]
    pixels = focal * cam[..., :2] / cam[..., 2:] + observations.centres[:, None]
    errors = np.linalg.norm(pixels - observations.landmarks[..., :2], axis=2)
    return np.where(observations.weights[:, None] > 0, errors, np.nan)


def posed_landmarks(head: LandmarkHead, state: FitState) -> Floats:
    """[T, L, 3] fitted landmarks in the head frame, eyes turned."""
    points = head.points(state.identity, state.offsets, state.expression)
    centres = head.eye_centres + np.tensordot(state.identity, head.eye_centres_identity, 1)
    for eye in range(2):
        iris = head.eye == eye
        turn = rotvec_to_matrix(state.eyes[:, eye])
        points[:, iris] = (points[:, iris] - centres[eye]) @ np.swapaxes(turn, 1, 2) + centres[eye]
    return points


def torso_motion(
    times: Floats, rotations: Floats, weights: Floats, shots: NDArray[np.int64] | None = None
) -> tuple[Floats, Floats]:
    """A guess at the torso's rotation [T, 3, 3] from the head's `rotations` [T, 3, 3], and the neck [T, 3] between.

    Nothing here looks at the shoulders. The torso is taken to face where the head faces on average over a shot, and to
    follow a `TORSO_SHARE` of the head's departures from it, as slowly as `TORSO_SECONDS`; it hangs on the neck's pivot,
    the head frame's origin, which moves with the head.
    """
    if shots is not None:
        torso = np.empty_like(rotations)
        for shot in np.unique(shots):
            rows = shots == shot
            torso[rows] = torso_motion(times[rows], rotations[rows], weights[rows])[0]
        return torso, matrix_to_rotvec(np.swapaxes(torso, 1, 2) @ rotations)
    usable = weights == weights.max()
    U, _, Vt = np.linalg.svd(rotations[usable].mean(0))
    mean = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    departure = matrix_to_rotvec(rotations @ mean.T)
    kernel = np.exp(-0.5 * np.square((times[:, None] - times) / TORSO_SECONDS)) * np.maximum(weights, 1e-6)
    slow = kernel @ departure / kernel.sum(1, keepdims=True)
    torso = rotvec_to_matrix(TORSO_SHARE * slow) @ mean
    return torso, matrix_to_rotvec(np.swapaxes(torso, 1, 2) @ rotations)


def training_crop(boxes: Floats, width: int, height: int, margin: float) -> tuple[int, int, int]:
    """The square (x0, y0, side) in whole pixels that holds the head over the clip, with hair, chin and shoulders.

    A frame that is about square and that the grown head needs most of is taken whole (its larger side). Else the
    square is as large as the boxes of the head grown by `margin` of their height on every side, but not larger than the
    frame's shorter side, unless the head itself needs more; it is moved inside the frame where it fits.

    Args:
        boxes: [n, 4] x0, y0, x1, y1 of the fitted head without hair, in usable frames.
        width, height: of the frame.
        margin: room around the head as a share of its height.
    """
    low, high = np.percentile(boxes[:, :2], 2, axis=0), np.percentile(boxes[:, 2:], 98, axis=0)
    room = margin * float(np.median(boxes[:, 3] - boxes[:, 1]))
    middle, head_side = (low + high) / 2, float(np.max(high - low))
    side = head_side + 2 * room
    longer, shorter = max(width, height), min(width, height)
    if longer <= SQUARE_RATIO * shorter and side >= WHOLE_SHARE * shorter:
        return (width - longer) // 2, (height - longer) // 2, longer
    side = round(min(side, max(shorter, head_side)))
    corner = []
    for centre, size in zip(middle, (width, height), strict=True):
        start = round(float(centre) - side / 2)
        corner.append(min(max(start, 0), size - side) if side <= size else (size - side) // 2)
    return corner[0], corner[1], side


def head_angles(rotations: Floats) -> Floats:
    """[T, 3] yaw, pitch and roll in radians of `Rs_cam_head` [T, 3, 3]; 0 for a face that looks along the camera axis.

    Yaw is positive towards the subject's left, pitch downwards, roll towards the subject's right shoulder; applied in
    the order roll, pitch, yaw.
    """
    R = np.diag([1.0, -1.0, -1.0]) @ rotations
    yaw = np.arctan2(R[:, 0, 2], R[:, 2, 2])
    pitch = -np.arcsin(R[:, 1, 2].clip(-1, 1))
    roll = np.arctan2(R[:, 1, 0], R[:, 1, 1])
    return np.stack([yaw, pitch, roll], 1)
