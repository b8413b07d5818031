"""The recording for the rerun viewer: written, read back, whole; nothing else is started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reenact_data

from pipeline.cli.run import Run
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.exports import check_export, export
from pipeline.exports.rerun import FILE, record

rerun = pytest.importorskip("rerun", reason="the extra 'rerun' is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    dataset = reenact_data.write_dataset(tmp_path_factory.mktemp("data"))
    subject = dataset.subject("anna")
    for stage in ("track", "matte"):
        subject.stage(stage).mkdir(exist_ok=True)
        about = {"schema": 1, "stage": stage, "key": f"key {stage}", "digest": f"digest {stage}"}
        (subject.stage(stage) / "stage.json").write_text(json.dumps({**about, "inputs": {}, "outputs": []}))
    landmarks = np.random.default_rng(0).uniform(0, 64, (reenact_data.FRAMES, 478, 3)).astype(np.float32)
    np.savez(subject.stage("track") / "track.npz", landmarks=landmarks)
    return dataset


def columns(path: Path, entity: str, *names: str) -> list[tuple[Any, ...]]:
    """Rows of an entity over time: frame, nanoseconds, and these components."""
    rows: list[tuple[Any, ...]] = []
    for chunk in rerun.chunk.RrdReader(path).stream().to_chunks():
        if chunk.entity_path == f"/{entity}" and not chunk.is_static:
            batch = chunk.to_record_batch()
            times = batch["time"].cast("int64").to_pylist()
            rows += zip(batch["frame"].to_pylist(), times, *(batch[name].to_pylist() for name in names), strict=True)
    return sorted(rows, key=lambda row: int(row[0]))


def test_it_has_all_entities_and_frames(trained: Dataset, tmp_path: Path) -> None:
    plan = check_export(trained.root, "anna", "rerun", out=tmp_path / "out", options={"splats": "5"}, threads=1)
    account = export(plan)
    count, path = reenact_data.FRAMES, tmp_path / "out" / FILE
    found = account["entities"]
    image = "world/camera/image"
    assert account["frames"] == count
    assert all(found[name] == count for name in (image, f"{image}/alpha", f"{image}/landmarks", "world/head"))
    assert (found["world"], found["world/camera"], found["world/avatar"]) == (0, 1, -(-count // 5))
    fit = reenact_data.read_fit(trained.subject("anna"))
    names = [str(name) for name in fit["expression_names"]]
    assert all(found[f"expression/{name}"] == found["degrees/yaw"] == count for name in names)
    frames, times, scalars = zip(*columns(path, f"expression/{names[0]}", "Scalars:scalars"), strict=True)
    assert frames == tuple(range(count))
    np.testing.assert_allclose([value for (value,) in scalars], fit["expression"][:, 0], atol=1e-6)
    listing = json.loads((trained.subject("anna").stage("decode") / "frames.json").read_text())["frames"]
    np.testing.assert_allclose(np.array(times) / 1e9, [frame["time"] for frame in listing], atol=1e-6)
    # The frames are the clip's own files, byte for byte.
    blob = np.asarray(columns(path, image, "EncodedImage:blob")[3][2][0], np.uint8).tobytes()
    assert blob == (trained.subject("anna").stage("decode") / listing[3]["file"]).read_bytes()


def test_head_and_gaussians_lie_where_the_clip_has_them(trained: Dataset, tmp_path: Path) -> None:
    options = {"first": "4", "last": "12", "every": "4", "splats": "1"}
    account = export(check_export(trained.root, "anna", "rerun", out=tmp_path / "out", options=options, threads=1))
    assert account["frames"] == 3
    fit = reenact_data.read_fit(trained.subject("anna"))
    for entity, component in (("world/head", "Mesh3D:vertex_positions"), ("world/avatar", "GaussianSplats3D:centers")):
        rows = columns(tmp_path / "out" / FILE, entity, component)
        assert [frame for frame, *_ in rows] == [4, 8, 12]
        for frame, _, points in rows:
            middle = np.asarray(points).mean(0)
            assert np.linalg.norm(middle - fit["Ts_cam_head"][frame, :3, 3]) < 0.12


def test_no_server_is_started_and_no_connection_made(
    trained: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("serve_grpc", "serve_web_viewer", "spawn", "connect_grpc"):
        monkeypatch.setattr(rerun, name, lambda *a, **k: pytest.fail("something was started"))
    before = sockets()
    export(check_export(trained.root, "anna", "rerun", out=tmp_path / "out", options={"last": "1"}, threads=1))
    assert sockets() == before


def sockets() -> set[str]:
    """Internet sockets of this process."""
    open_here = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    inodes = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        lines = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        inodes |= {f"socket:[{line.split()[9]}]" for line in lines}
    return open_here & inodes


def test_recordings_that_are_switched_off_are_not_taken_for_whole(
    trained: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RERUN", "off")
    with pytest.raises(UserError, match="switched off by the environment variable RERUN"):
        export(check_export(trained.root, "anna", "rerun", out=tmp_path / "out", options={"last": "1"}, threads=1))
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_what_to_install(trained: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(UserError, match="rerun-sdk") as caught:
        Run(videos=(Path("film.mp4"),), rerun=True).answer()
    assert caught.value.fix == "install it with: pip install 'headcast[rerun]'"


def test_a_run_that_stops_early_cannot_be_recorded() -> None:
    with pytest.raises(UserError, match="needs stage 'train', and --to fit stops before it"):
        Run(videos=(Path("film.mp4"),), rerun=True, last="fit").answer()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"every": "0"}, "every=0"),
        ({"first": "5", "last": "2"}, "lies before"),
        ({"splats": "many"}, "splats=many"),
        ({"colour": "1"}, "no option 'colour'"),
    ],
)
def test_bad_options_are_refused(trained: Dataset, tmp_path: Path, options: dict[str, str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        export(check_export(trained.root, "anna", "rerun", out=tmp_path / "out", options=options))
    assert not (tmp_path / "out").exists()


def test_a_run_renews_its_recording_and_nothing_else(trained: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trained.subject("anna")
    monkeypatch.setattr("pipeline.cli.run.carry_out", lambda request: ({"subject": "anna"}, "report", 0))
    wish = Run(data=trained.root, videos=(Path("anna.mp4"),), rerun=True)
    document, text, _ = wish.answer()
    path = Path(document["recording"])
    assert (text, path) == ("report", subject.root / "exported" / "rerun" / FILE)
    made = path.stat().st_mtime_ns
    assert record(trained.root, "anna") == path and path.stat().st_mtime_ns == made
    reenact_data.finish(subject, "train", "2")
    wish.answer()
    assert path.stat().st_mtime_ns > made
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    (path.parent / "mine.txt").write_text("not headcast's")
    with pytest.raises(UserError, match="a folder that headcast did not write"):
        wish.answer()
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.txt"]
