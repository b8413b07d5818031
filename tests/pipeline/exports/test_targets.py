"""Every target on a subject: written, read back, rendered again, its loss told; options at fault refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reenact_data import change_fit, write_dataset

from pipeline.api import load_subject
from pipeline.avatars import conditions_of, load_avatar, save_avatar, splat
from pipeline.bake import bake
from pipeline.dataset import Dataset, read_json, write_json
from pipeline.errors import UserError
from pipeline.evaluation import ClipRenderer
from pipeline.export import gaussians_of
from pipeline.exports import TARGETS, check_export, export
from pipeline.exports.arkit import Mesh, added, read_deltas, read_mesh, write_mesh
from pipeline.exports.gltf import read_splats
from pipeline.exports.loss import cameras_of, loss_of, rest_loss
from pipeline.glb import Glb
from pipeline.metrics import psnr
from pipeline.ply import read_ply
from pipeline.sog import read_sog
from pipeline.splats import Splats
from pipeline.spz import read_spz


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anna, whose avatar has negative colours too, moves with everything, and is baked."""
    dataset = write_dataset(tmp_path_factory.mktemp("exports"))
    anna = dataset.existing("anna")
    avatar = load_avatar(anna.stage("train"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        spreads = {"basis": 0.1, "torso_basis": 0.5, "colors": 0.05, "quats": 0.3, "twist.weight": 0.3}
        for name, size in spreads.items():
            weight = avatar.state_dict()[name]
            weight += size * torch.randn(weight.shape, generator=generator)
    description = read_json(anna.stage("train") / "avatar.json")
    save_avatar(avatar, anna.stage("train"), description["training"])
    clip = load_subject("anna", dataset.root).clip
    known = conditions_of(clip)
    baked = bake(
        load_avatar(anna.stage("train")), known, torch.from_numpy(clip.Ks).float()[clip.cameras], 64, threads=1
    )
    folder = anna.stage("export") / "baked"
    folder.mkdir(parents=True)
    save_avatar(baked, folder)
    train = json.loads((anna.stage("train") / "stage.json").read_text())
    about = {"schema": 1, "stage": "export", "key": "key e", "digest": "digest e", "inputs": {"train": train["digest"]}}
    write_json(anna.stage("export") / "stage.json", {**about, "outputs": []})
    return dataset.root


def made(data: Path, target: str, tmp_path: Path | None = None, **options: str) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / "out" if tmp_path else None
    plan = check_export(data, "anna", target, out=out, options=options, threads=1)
    return plan.product.path, export(plan)


@pytest.mark.parametrize(
    ("target", "options", "file", "read", "least_db"),
    [
        ("ply", {}, "avatar.ply", read_ply, 45),
        ("spz", {}, "avatar.spz", read_spz, 42),
        ("spz", {"version": "2"}, "avatar.spz", read_spz, 40),
        ("sog", {}, "avatar.sog", read_sog, 42),
        ("gltf", {}, "avatar.glb", read_splats, 45),
    ],
)
def test_the_face_at_rest_comes_back(
    data: Path, tmp_path: Path, target: str, options: dict[str, str], file: str, read: Any, least_db: float
) -> None:
    path, account = made(data, target, tmp_path, **options)
    avatar = load_avatar(data / "anna" / "train")
    splats = read(path / file)
    assert len(splats) == avatar.count == account["gaussians"]
    loss = rest_loss(avatar, splats, 1)
    assert loss.least_psnr_db > least_db
    assert account["least_psnr_db"] == pytest.approx(loss.least_psnr_db, abs=0.01)
    assert f"{loss.psnr_db:.1f} dB" in account["text"] and account["bytes"] == (path / file).stat().st_size


def test_the_loss_is_that_of_the_pictures(data: Path) -> None:
    """A Gaussian that is lost, or moved, shows in it; nothing lost is no loss."""
    avatar = load_avatar(data / "anna" / "train")
    head = avatar.neutral.T_cam_head
    splats = read_ply(made(data, "ply")[0] / "avatar.ply")
    own, cameras = gaussians_of(splats, head), cameras_of(avatar)
    assert loss_of([(own, own)], cameras, 1) == (100, 100, 4)
    moved = Splats(splats.means + np.float32(0.002), splats.quats, splats.scales, splats.opacities, splats.sh)
    assert loss_of([(own, gaussians_of(moved, head))], cameras, 1).psnr_db < 40


@pytest.mark.parametrize("axes", ["world", "head"])
def test_a_sequence_shows_the_clip_through_its_camera(data: Path, tmp_path: Path, axes: str) -> None:
    """Columns and `sequence.json`, read as a viewer reads them, give the evaluation's pictures."""
    path, account = made(data, "ply-sequence", tmp_path, first="3", last="19", every="8", axes=axes, columns="used")
    about = json.loads((path / "sequence.json").read_text())
    assert [entry["frame"] for entry in about["frames"]] == [3, 11, 19] and about["fps"] == "30000/1001"
    assert sorted(p.name for p in path.glob("*.ply")) == ["000000.ply", "000001.ply", "000002.ply"]
    assert account["frames"] == 3 and account["least_psnr_db"] > 40
    still = [entry["T_cam_ply"] == about["frames"][0]["T_cam_ply"] for entry in about["frames"]]
    assert all(still) == (axes == "world")
    subject = load_subject("anna", data)
    theirs = ClipRenderer.of(subject.avatar().model, subject.clip, 1)
    camera = about["cameras"][0]
    for entry in about["frames"]:
        assert entry["time"] == pytest.approx(subject.clip.times[entry["frame"]])
        in_file = read_ply(path / entry["file"]).turned()
        shown = gaussians_of(in_file, torch.tensor(entry["T_cam_ply"]))
        size = camera["width"]
        picture = splat(shown, torch.tensor(camera["K"]), size, size, torch.ones(3), threads=1).image.clamp(0, 1)
        inside = theirs.inside[0] == 1
        assert psnr(theirs.render(entry["frame"]).image, picture.numpy(), inside) > 40


def test_the_rig_bundle_drives_itself_to_the_avatars_gaussians(data: Path) -> None:
    """`drive.py`, as it lies in the bundle, in a process that has nothing of headcast, with every joint moved."""
    path, account = made(data, "rig")
    assert account["form"] == "rigged" and account["least_psnr_db"] > 60 and "CC0" in account["text"]
    subject = load_subject("anna", data)
    avatar = subject.avatar().model
    condition = subject.condition(7)
    turn = torch.eye(4)
    turn[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.2, 0.1], [0.2, 0, -0.3], [-0.1, 0.3, 0]]))
    turn[:3, 3] = torch.tensor([0.01, -0.02, 0.005])
    condition = condition._replace(
        expression=torch.linspace(0, 1, 52),
        T_cam_skull=condition.T_cam_head @ turn,
        T_cam_torso=condition.T_cam_head @ turn.inverse(),
        eyes=torch.tensor([[0.1, -0.2, 0.02], [-0.05, 0.2, 0.0]]),
    )
    pose = ("T_cam_head", "T_cam_torso", "T_cam_skull", "eyes", "torso_shape")
    arrays = {name: getattr(condition, name).numpy() for name in pose}
    np.savez(path.parent / "asked.npz", expression=condition.expression.numpy(), **arrays)
    script = (
        "import sys, numpy as np, drive; rig = drive.load('.'); asked = dict(np.load(sys.argv[1]));"
        "np.savez(sys.argv[2], **drive.drive(rig, asked.pop('expression'), asked));"
        "assert not {'pipeline', 'torch'} & set(sys.modules); drive.drive(rig, {'jawOpen': 0.7}, drive.neutral(rig))"
    )
    files = [path.parent / "asked.npz", path.parent / "driven.npz"]
    subprocess.run([sys.executable, "-c", script, *files], cwd=path, check=True, timeout=60)
    wanted = avatar.gaussians(condition)
    with np.load(files[1]) as driven:
        quats = torch.nn.functional.normalize(wanted.quats, dim=1).numpy()
        for name in ("means", "scales", "opacities", "colors"):
            np.testing.assert_allclose(driven[name], getattr(wanted, name).numpy(), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(np.abs((driven["quats"] * quats).sum(1)), 1, atol=1e-4)


def test_the_rig_bundle_says_what_its_gaussians_hang_on(data: Path) -> None:
    path, _ = made(data, "rig")
    about = read_json(path / "rig.json")
    with np.load(path / "rig.npz") as rig:
        assert {name: list(rig[name].shape) for name in rig} == {n: a["shape"] for n, a in about["arrays"].items()}
        avatar = load_avatar(data / "anna" / "train")
        corners = rig["head_vertices"][rig["head_faces"][rig["triangle"]]]
        spots = np.einsum("nc,nci->ni", rig["bary"], corners)
        theirs = avatar.state_dict()["rig_vertices"][avatar.state_dict()["rig_corners"].long()]
        expected = torch.einsum("nc,nci->ni", avatar.state_dict()["rig_bary"], theirs)
        np.testing.assert_allclose(spots, expected, atol=3e-4)
        np.testing.assert_allclose(rig["head_skinning"].sum(1), 1, atol=1e-3)
        np.testing.assert_allclose(rig["skinning"].sum(1), 1, atol=1e-5)
    docs = (Path(__file__).parents[3] / "docs" / "exports.md").read_text()
    assert [name for name in about["arrays"] if f"`{name}`" not in docs] == []


def test_blendshapes_come_back(data: Path) -> None:
    path, account = made(data, "arkit", gaussians="ply")
    baked = load_avatar(data / "anna" / "export" / "baked")
    mesh = read_mesh(path / "mesh" / "head.glb")
    assert mesh.names == baked.expression_names and mesh.shapes.shape == (52, len(mesh.vertices), 3)
    assert account["mesh_error_m"] == 0 and mesh.colors.std() > 0.05
    head = load_subject("anna", data).clip.personal_head()
    jaw = mesh.names.index("jawOpen")
    np.testing.assert_allclose(mesh.shapes[jaw], head.expression_basis[jaw], atol=1e-6)
    eyes = head.regions["eyes"]
    assert np.linalg.norm(mesh.shapes[mesh.names.index("eyeLookUpLeft")][eyes], axis=1).max() > 5e-4
    lines = (path / "mesh" / "jawOpen.obj").read_text().split("\n")
    vertices = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    np.testing.assert_allclose(vertices, mesh.vertices + mesh.shapes[jaw], atol=1e-6)
    assert len(list((path / "mesh").glob("*.obj"))) == 53

    rest = read_ply(path / "gaussians" / "neutral.ply")
    deltas = read_deltas(path / "gaussians" / "deltas.npz", len(rest))
    one = torch.zeros(52)
    one[jaw] = 1
    own = baked.gaussians(baked.neutral._replace(expression=one))
    head_pose, cameras = baked.neutral.T_cam_head, cameras_of(baked)
    for read in (added(rest, deltas["jawOpen"]), read_ply(path / "gaussians" / "jawOpen.ply")):
        assert loss_of([(own, gaussians_of(read, head_pose))], cameras, 1).least_psnr_db > 40
    assert loss_of([(own, gaussians_of(rest, head_pose))], cameras, 1).least_psnr_db < 40
    assert account["least_psnr_db"] > 40


@pytest.mark.parametrize(
    ("target", "options", "complaint"),
    [
        ("ply", {"version": "2"}, "has no option 'version'"),
        ("spz", {"version": "4"}, "'version=4' is not a whole number from 2 to 3"),
        ("spz", {"version": "two"}, "'version=two' is not a whole number"),
        ("ply-sequence", {"first": "24"}, "'first=24' is not a whole number from 0 to 23"),
        ("ply-sequence", {"last": "-1"}, "from 0 to 23"),
        ("ply-sequence", {"first": "9", "last": "3"}, "'last=3' lies before 'first=9'"),
        ("ply-sequence", {"every": "0"}, "'every=0'"),
        ("ply-sequence", {"axes": "moon"}, "'axes=moon' is none of: world, head"),
        ("arkit", {"gaussians": "all"}, "'gaussians=all' is none of: deltas, ply"),
        ("rig", {"licence": "yours"}, "'licence=yours' is none of"),
    ],
)
def test_options_at_fault_are_refused_and_nothing_is_written(
    data: Path, tmp_path: Path, target: str, options: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        made(data, target, tmp_path, **options)
    assert error.value.fix and not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["rig", "arkit"])
def test_a_head_that_may_not_be_passed_on_is_not_written(
    data: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "anna", tmp_path / "data" / "anna", ignore=shutil.ignore_patterns("exported"))
    change_fit(Dataset(tmp_path / "data").existing("anna"), head=np.array("flame2020"))
    with pytest.raises(UserError, match="a mesh of FLAME 2020, which may not be passed on") as error:
        made(tmp_path / "data", target, tmp_path)
    assert "licence=mine" in error.value.fix
    # The next thing that is asked for is the user's own file.
    monkeypatch.setenv("HEADCAST_HEADS", str(tmp_path))
    with pytest.raises(UserError, match=r"generic_model\.pkl"):
        made(tmp_path / "data", target, tmp_path, licence="mine")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"targetNames": ["one"]}, "52 shapes have 1 names|2 shapes have 1 names"),
        ({"indices": True}, "no triples of vertices"),
        ({"targets": [{}]}, "POSITION"),
    ],
)
def test_hostile_meshes_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    rng = np.random.default_rng(0)
    faces = np.array([[0, 1, 2], [1, 2, 3]], np.int32)
    points = rng.random((3, 4, 3)).astype(np.float32)
    write_mesh(tmp_path / "a.glb", Mesh(points[0], faces, points[1:], ("one", "two"), points[0]))
    glb = Glb.read(tmp_path / "a.glb")
    mesh = glb.document["meshes"][0]
    if "targetNames" in change:
        mesh["extras"] = change
    elif "indices" in change:
        mesh["primitives"][0]["indices"] = glb.add(np.array([0, 1, 9], np.uint32), indices=True)
    else:
        mesh["primitives"][0] |= change
    glb.write(tmp_path / "b.glb")
    with pytest.raises(UserError, match=complaint):
        read_mesh(tmp_path / "b.glb")


def test_hostile_deltas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deltas.npz"
    with pytest.raises(UserError, match="No such file"):
        read_deltas(path, 3)
    path.write_bytes(b"PK and no more")
    with pytest.raises(UserError, match="no deltas"):
        read_deltas(path, 3)
    for deltas, complaint in ((np.zeros((1, 2, 14)), "shape"), (np.full((1, 3, 14), np.nan), "not finite")):
        np.savez(path, names=np.array(["jawOpen"]), deltas=deltas)
        with pytest.raises(UserError, match=complaint):
            read_deltas(path, 3)
    np.savez(path, names=np.array(["jawOpen"]), deltas=np.array([object()]))
    with pytest.raises(UserError, match="no deltas"):
        read_deltas(path, 3)


@pytest.mark.parametrize("target", ["spz", "sog"])
def test_splat_transform_reads_the_same(data: Path, tmp_path: Path, target: str) -> None:
    """PlayCanvas' program turns our files into PLY files that look as ours do."""
    program = shutil.which("splat-transform")
    if program is None:
        pytest.skip("splat-transform is not installed (npm install -g @playcanvas/splat-transform)")
    path, _ = made(data, target, tmp_path)
    subprocess.run(
        [program, path / f"avatar.{target}", tmp_path / "a.ply"], check=True, timeout=120, capture_output=True
    )
    avatar = load_avatar(data / "anna" / "train")
    assert rest_loss(avatar, read_ply(tmp_path / "a.ply"), 1).least_psnr_db > 42


def test_every_target_is_taught() -> None:
    from pipeline.cli.export import Export

    docs = (Path(__file__).parents[3] / "docs" / "exports.md").read_text()
    for name, target in TARGETS.items():
        assert f"{name}: " in (Export.__doc__ or ""), name
        assert f"`{name}`" in docs, name
        assert importlib.util.find_spec(target.module) is not None
