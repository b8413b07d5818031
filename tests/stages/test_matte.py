"""Matte keeps what belongs to the tracked face, steady over time, and shows the network key frames only."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from face_clips import Image, decoded_subject, empty_room, face_frames, stage_run

from pipeline.assets import asset_path
from pipeline.config import Config, MatteConfig
from pipeline.dataset import Subject, read_json, write_json
from pipeline.errors import Interrupted, StageError, UserError
from pipeline.frames import FrameSet, alpha_file, save_image
from stages import matte, track


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """The models, fetched before the stages work, as a run does."""
    asset_path("face_landmarker")
    asset_path("u2netp")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Nine tracked frames of a face, then two of an empty room."""
    folder = tmp_path_factory.mktemp("matte")
    small = [cv2.resize(image, (320, 180), interpolation=cv2.INTER_AREA) for image in face_frames()[:9]]
    room = cv2.resize(empty_room(), (320, 180))
    subject = decoded_subject(folder / "ada", [*small, room, room])
    run = stage_run(subject, folder / "work")
    track.track(run)
    (folder / "work").rename(subject.stage("track"))
    return subject


def matted(subject: Subject, work: Path, **settings: Any) -> tuple[Any, list[Image]]:
    run = stage_run(subject, work, Config(matte=MatteConfig(**settings)))
    result = matte.run(run)
    frames = FrameSet.load(subject.stage("decode"))
    return result, [frames.alpha(i, work) for i in range(len(frames))]


def boundary_error(a: Image, b: Image) -> float:
    """Mean distance in pixels between two alphas' boundaries."""
    return float(np.abs(a.astype(float) - b).sum() / max(matte.boundary_length(a.astype(np.float32)), 1e-6))


def test_the_person_is_kept_and_frames_without_a_face_are_empty(subject: Subject, tmp_path: Path) -> None:
    result, alphas = matted(subject, tmp_path / "work")
    assert len(alphas) == 11
    with np.load(subject.stage("track") / "track.npz", allow_pickle=False) as file:
        boxes = file["boxes"]
    for alpha, (x0, y0, x1, y1) in zip(alphas[:9], boxes[:9].astype(int), strict=True):
        face = alpha[(3 * y0 + y1) // 4 : (y0 + 3 * y1) // 4, (3 * x0 + x1) // 4 : (x0 + 3 * x1) // 4]
        assert face.min() > 250
        assert alpha[:10, :40].max() == 0
        assert alpha[:10, -40:].max() == 0
    assert not np.any(alphas[9:])
    assert result.verdict.text.startswith("Matte: ")
    assert "9 of 11 frames, edge jitter" in result.verdict.text
    assert result.verdict.picture == "contact.jpg"
    assert {"flicker_px", "partial_alpha_share", "ms_per_frame"} <= set(result.metrics)
    assert not (tmp_path / "work" / "alpha" / "000011.png").exists()


def test_flow_between_key_frames_stands_in_for_the_network(subject: Subject, tmp_path: Path) -> None:
    _, every = matted(subject, tmp_path / "every", key_every=1)
    _, third = matted(subject, tmp_path / "third", key_every=3)
    errors = [boundary_error(a, b) for a, b in zip(every[:9], third[:9], strict=True)]
    assert max(errors) < 0.6
    assert float(np.mean(errors)) < 0.3


def test_a_stopped_run_resumes_to_the_same_bytes(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = Config(matte=MatteConfig(padding=0)), [0]

    def stop() -> bool:
        seen[0] += 1
        return seen[0] > 2

    with pytest.raises(Interrupted):
        matte.run(stage_run(subject, tmp_path / "work", config, stop_requested=stop))
    there = len(list((tmp_path / "work" / "scratch").rglob("*.png")))
    assert 0 < there < 9
    calls = [0]
    shown = matte.Network._shown

    def counting(self: matte.Network, *arguments: Any) -> Image:
        calls[0] += 1
        return shown(self, *arguments)

    monkeypatch.setattr(matte.Network, "_shown", counting)
    _, resumed = matted(subject, tmp_path / "work", padding=0)
    assert 0 < calls[0] < 9
    _, whole = matted(subject, tmp_path / "whole", padding=0)
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_the_network_sees_only_what_is_picture(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def shown(self: matte.Network, image: Image, padding: float) -> Image:
        shapes.append(image.shape)
        return np.full(image.shape[:2], 200, np.uint8)

    monkeypatch.setattr(matte.Network, "_shown", shown)
    frames = FrameSet.load(subject.stage("decode"))
    smaller = dataclasses.replace(frames, contents=np.tile([200, 100], (len(frames), 1)))
    alpha = matte.Network(stage_run(subject, tmp_path / "work"), smaller).alpha(0, 0.1)
    assert shapes == [(100, 200, 3)]
    assert (alpha[:100, :200] == 200).all() and alpha.sum() == 200 * 100 * 200


def test_u2netp_gives_what_rembg_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    import rembg
    from PIL import Image as Pillow

    monkeypatch.setenv("U2NET_HOME", str(asset_path("u2netp").parent))
    session = rembg.new_session("u2netp", providers=["CPUExecutionProvider"])
    image = face_frames()[0]
    theirs = np.asarray(session.predict(Pillow.fromarray(image))[0])
    ours = matte.open_model("u2netp")(image)
    assert np.abs(ours.astype(float) - theirs).mean() < 1.5
    assert ((ours > 127) != (theirs > 127)).mean() < 0.002


def test_a_wrong_or_missing_model_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path))
    with pytest.raises(StageError, match="is not on this machine") as missing:
        matte.open_model("u2netp")
    assert missing.value.fix == "run: headcast assets fetch u2netp"
    (tmp_path / "u2netp.onnx").write_bytes(b"not the network")
    with pytest.raises(UserError, match="has sha256") as wrong:
        matte.open_model("u2netp")
    assert wrong.value.fix == "delete that file, then run: headcast assets fetch u2netp"
    with pytest.raises(UserError, match="'nonsense' cannot be the matting model"):
        matte.open_model("nonsense")


def disc(x: float, y: float, radius: float = 40, size: int = 160) -> Image:
    row, column = np.mgrid[:size, :size] + 0.5
    return (np.clip(radius - np.hypot(column - x, row - y) + 0.5, 0, 1) * 255).astype(np.uint8)


def textured(x: float, y: float) -> Image:
    """A patterned disc before a patterned ground."""
    rng = np.random.default_rng(3)
    ground, pattern = (
        cv2.resize(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8), (160, 160), interpolation=cv2.INTER_CUBIC)
        for _ in range(2)
    )
    moved = cv2.warpAffine(pattern, np.float32([[1, 0, x - 80], [0, 1, y - 80]]), (160, 160))
    share = disc(x, y)[..., None] / 255
    return (moved * share + ground * (1 - share)).astype(np.uint8)


def test_carrying_moves_the_alpha_with_the_picture() -> None:
    carried = matte.carry(textured(76, 80), textured(80, 82), disc(76, 80))
    assert boundary_error(disc(80, 82), carried) < 1
    assert boundary_error(disc(80, 82), disc(76, 80)) > 2


def test_where_both_sides_disagree_the_network_is_asked(tmp_path: Path) -> None:
    images = [textured(50, 80), empty_room()[:160, :160], textured(110, 80)]
    subject = decoded_subject(tmp_path / "ada", images)
    run = stage_run(subject, tmp_path / "work")
    network = matte.Network(run, FrameSet.load(subject.stage("decode")))
    asked: list[int] = []

    def predict(image: Image) -> Image:
        which = int(np.argmin([np.abs(image.astype(float) - other).mean() for other in images]))
        asked.append(which)
        return disc((50, 30, 110)[which], 80)

    network._predict = predict
    network.fill(np.ones(3, bool), 0.0)
    assert sorted(asked) == [0, 1, 2]
    assert boundary_error(disc(30, 80), network.alpha(1, 0.0)) < 0.1


@pytest.mark.parametrize(
    ("present", "shots", "every", "keys"),
    [
        ([1] * 7, [0] * 7, 2, [0, 2, 4, 6]),
        ([1] * 6, [0] * 6, 2, [0, 2, 4, 5]),
        ([0, 1, 1, 1, 1, 0, 1, 0, 1, 1], [0] * 10, 3, [1, 4, 6, 8, 9]),
        ([0, 0], [0] * 2, 2, []),
        ([1] * 4, [0] * 4, 1, [0, 1, 2, 3]),
        ([1] * 8, [0] * 4 + [1] * 4, 3, [0, 3, 4, 7]),
    ],
)
def test_key_frames_hold_the_ends_of_every_run(
    present: list[int], shots: list[int], every: int, keys: list[int]
) -> None:
    assert matte.key_frames(np.array(present, bool), np.array(shots), every) == keys


def test_only_what_hangs_together_with_the_face_is_kept() -> None:
    alpha = np.maximum(disc(50, 60, 30), disc(130, 120, 20))
    face = disc(50, 60, 12)
    kept = matte.belonging(alpha, face)
    np.testing.assert_array_equal(kept[:, :85], disc(50, 60, 30)[:, :85])
    assert not kept[100:, 100:].any()
    assert not matte.belonging(disc(130, 120, 20), face).any()


def test_jitter_counts_jumps_and_not_slow_motion() -> None:
    def mean(places: list[float]) -> float:
        jitter = matte.Jitter()
        for place in places:
            jitter.add(disc(80 + place, 80))
        return jitter.mean()

    assert mean([0] * 6) == 0
    assert mean([0, 1, 0, 1, 0, 1]) == pytest.approx(2 / np.pi, rel=0.1)  # a 1 px jump, averaged round the disc
    assert mean([0, 0.1, 0.2, 0.3, 0.4, 0.5]) < 0.05


def test_alphas_that_are_given_are_taken_as_they_are(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matte, "Network", lambda *a: pytest.fail("the network was asked"))
    own = Subject(Path(shutil.copytree(subject.root, tmp_path / "ada")))
    record = read_json(own.stage("decode") / "frames.json")
    record["clips"][0]["alpha"] = True
    write_json(own.stage("decode") / "frames.json", record)
    (own.stage("decode") / "alpha").mkdir()
    with np.load(own.stage("track") / "track.npz", allow_pickle=False) as file:
        x0, y0, x1, y1 = file["boxes"][:9].mean(0).astype(int)
    truth = []
    for index in range(11):
        alpha = np.full((180, 320), index, np.uint8)  # as it is: also what the network's answers would be freed from
        alpha[y0 : y1 + 60, x0:x1] = 255
        save_image(own.stage("decode") / alpha_file(index), alpha)
        truth.append(alpha)
    result, alphas = matted(own, tmp_path / "whole")
    assert all(np.array_equal(a, b) for a, b in zip(alphas, truth, strict=True))
    assert result.verdict.text.startswith("Matte: good. 11 frames from the video's own alpha channel, edge jitter 0.0")
    assert {"flicker_px", "partial_alpha_share", "ms_per_frame"} <= set(result.metrics)
    with pytest.raises(Interrupted):
        matte.run(stage_run(own, tmp_path / "work", stop_requested=iter([False, False, True]).__next__))
    assert len(list((tmp_path / "work" / "alpha").iterdir())) == 2
    _, resumed = matted(own, tmp_path / "work")
    assert all(np.array_equal(a, b) for a, b in zip(resumed, truth, strict=True))
    for index in range(3):
        save_image(own.stage("decode") / alpha_file(index), 255 - truth[index])
    result, _ = matted(own, tmp_path / "inverted")
    assert result.verdict.level == "poor"
    assert "the face is left out in frames 0-2" in result.verdict.text
    for index in range(11):
        save_image(own.stage("decode") / alpha_file(index), 255 - truth[index])
    with pytest.raises(UserError, match="The tracked face is in none of 9 frames by the video's own alpha channel"):
        matted(own, tmp_path / "all")


def test_alphas_that_were_given_and_are_gone_stop_the_stage(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The source of 'ada' is missing"):
        matted(subject, tmp_path / "work", alpha="0" * 64)
