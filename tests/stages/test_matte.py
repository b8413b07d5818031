"""Matte keeps what belongs to the tracked face, steady over time, whatever tells the alpha, and says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from discs import disc, textured
from face_clips import Image, decoded_subject, empty_room, face_frames, stage_run

from pipeline.assets import asset_path
from pipeline.config import Config, MatteConfig
from pipeline.dataset import Subject, read_json, write_json
from pipeline.errors import Interrupted, StageError, UserError
from pipeline.frames import FrameSet, alpha_file, confidence_file, save_image
from pipeline.matting import network
from pipeline.matting.flow import boundary_length
from pipeline.matting.metrics import iou, mad
from pipeline.synthetic import SyntheticClip, make_clip
from stages import matte, track

FRAMES = 30
KINDS = (("alpha", "png"), ("foreground", "jpg"), ("confidence", "png"))


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """The models, fetched before the stages work, as a run does."""
    for name in ("face_landmarker", "palm_detection", "hand_landmark", "selfie_segmentation", "u2netp"):
        asset_path(name)


@cache
def talking() -> list[Image]:
    """Frames [180, 320, 3] of a face that talks."""
    return [cv2.resize(image, (320, 180), interpolation=cv2.INTER_AREA) for image in face_frames()[:FRAMES]]


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """[FRAMES, 478, 3] of that face, as the track stage finds them."""
    folder = tmp_path_factory.mktemp("tracked")
    run = stage_run(decoded_subject(folder / "ada", talking()), folder / "work")
    track.track(run)
    with np.load(folder / "work" / "track.npz", allow_pickle=False) as file:
        assert file["detected"].all()
        return np.asarray(file["landmarks"])


def with_track(subject: Subject, landmarks: np.ndarray, **changes: np.ndarray) -> Subject:
    """The subject with what matte reads of a finished track."""
    count = len(landmarks)
    arrays = {
        "landmarks": landmarks.astype(np.float32),
        "detected": np.ones(count, bool),
        "others": np.zeros((count, 0, 4), np.float32),
        "covered": np.zeros((count, 478), bool),
        "hands": np.zeros((count, 0, 21, 2), np.float32),
    }
    subject.stage("track").mkdir()
    np.savez(subject.stage("track") / "track.npz", **{**arrays, **changes})
    return subject


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, landmarks: np.ndarray) -> Subject:
    """Nine tracked frames of a face, then two of an empty room."""
    room = cv2.resize(empty_room(), (320, 180))
    made = decoded_subject(tmp_path_factory.mktemp("matte") / "ada", [*talking()[:9], room, room])
    return with_track(made, landmarks[[*range(9), 8, 8]], detected=np.arange(11) < 9)


def matted(subject: Subject, work: Path, **settings: Any) -> tuple[Any, list[Image]]:
    run = stage_run(subject, work, Config(matte=MatteConfig(**settings)))
    result = matte.run(run)
    frames = FrameSet.load(subject.stage("decode"))
    return result, [frames.alpha(i, work) for i in range(len(frames))]


def written(work: Path) -> dict[str, bytes]:
    """All that the stage publishes."""
    files = [path for path in work.rglob("*") if path.is_file() and "scratch" not in path.relative_to(work).parts]
    return {str(path.relative_to(work)): path.read_bytes() for path in files}


def boundary_error(a: Image, b: Image) -> float:
    """Mean distance in pixels between two alphas' boundaries."""
    return float(np.abs(a.astype(float) - b).sum() / max(boundary_length(a.astype(np.float32)), 1e-6))


def grey(path: Path) -> Image:
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), np.uint8)


def face_box(landmarks: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the middle of a face."""
    (x0, y0), (x1, y1) = landmarks[:, :2].min(0), landmarks[:, :2].max(0)
    rows, columns = ((3 * low + high) / 4 for low, high in ((y0, y1), (x0, x1)))
    return (
        slice(int(rows), int((y0 + 3 * y1) / 4)),
        slice(int(columns), int((x0 + 3 * x1) / 4)),
    )


def answering(monkeypatch: pytest.MonkeyPatch, subject: Subject, alphas: list[Image]) -> list[int]:
    """Have every network answer with these alphas; returns the list that will hold the frames it was asked for."""
    frames, asked = FrameSet.load(subject.stage("decode")), []
    images = [frames.image(index).astype(float) for index in range(len(frames))]

    def predict(image: Image) -> Image:
        asked.append(int(np.argmin([np.abs(image - other).mean() for other in images])))
        return alphas[asked[-1]]

    @contextlib.contextmanager
    def opened(model: str) -> Iterator[Callable[[Image], Image]]:
        yield predict

    monkeypatch.setattr(network, "open_network", opened)
    return asked


@pytest.fixture(scope="module")
def whole(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of an undisturbed run on it."""
    work = tmp_path_factory.mktemp("whole") / "work"
    matted(subject, work)
    return work


@pytest.mark.parametrize("model", ["selfie_segmentation", "u2netp"])
def test_the_person_is_kept_and_frames_without_a_face_are_empty(
    subject: Subject, landmarks: np.ndarray, tmp_path: Path, model: str
) -> None:
    result, alphas = matted(subject, tmp_path / "work", model=model, padding=0)
    assert len(alphas) == 11
    for alpha, points in zip(alphas[:9], landmarks, strict=False):
        assert alpha[face_box(points)].min() > 250
        assert alpha[:10, :40].max() == 0
        assert alpha[:10, -40:].max() == 0
    assert not np.any(alphas[9:])
    assert result.verdict.text.startswith("Matte: ")
    assert f"9 of 11 frames from the network {model}, edge jitter 0." in result.verdict.text
    assert result.verdict.picture == "contact.jpg"
    assert result.metrics["flicker_px"] < 0.5 and 0 < result.metrics["partial_alpha_share"] < 0.5
    assert result.metrics["ms_per_frame"] > 0
    assert (result.metrics["model"], result.metrics["frames"], result.metrics["lost_frames"]) == (model, 9, 0)
    names = {f"{folder}/{i:06d}.{end}" for folder, end in KINDS for i in range(11)}
    assert set(written(tmp_path / "work")) == names | {"matte.json", "contact.jpg"}


def test_flow_between_key_frames_stands_in_for_the_network(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, shown = [], matte.Network._shown

    def counting(self: matte.Network, image: Image, padding: float) -> Image:
        asked.append(padding)
        return shown(self, image, padding)

    monkeypatch.setattr(matte.Network, "_shown", counting)
    _, every = matted(subject, tmp_path / "every", model="u2netp", key_every=1, padding=0)
    assert len(asked) == 9
    _, third = matted(subject, tmp_path / "third", model="u2netp", padding=0)
    assert len(asked) == 9 + 4, "frames 0, 3, 6 and 8: it is a slow one"
    errors = [boundary_error(a, b) for a, b in zip(every[:9], third[:9], strict=True)]
    assert max(errors) < 0.6
    assert float(np.mean(errors)) < 0.3


@pytest.mark.parametrize("checks", [1, 5, 12, 15, 18])
def test_a_stopped_run_resumes_to_the_same_bytes(subject: Subject, whole: Path, tmp_path: Path, checks: int) -> None:
    """Stopped while borders are compared, while the network is asked, and before frames are cut or measured."""
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        matte.run(stage_run(subject, tmp_path / "work", stop_requested=lambda: next(calls) == checks))
    matted(subject, tmp_path / "work")
    assert written(tmp_path / "work") == written(whole)


def test_what_was_asked_is_not_asked_again(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, config = iter(range(1000)), Config(matte=MatteConfig(padding=0, source="network"))
    alphas = [disc(120, 90, 60, (180, 320))] * 11
    first = answering(monkeypatch, subject, alphas)
    with pytest.raises(Interrupted):
        matte.run(stage_run(subject, tmp_path / "work", config, stop_requested=lambda: next(calls) == 2))
    assert 0 < len(first) < 9
    second = answering(monkeypatch, subject, alphas)
    with contextlib.suppress(StageError):
        matted(subject, tmp_path / "work", padding=0, source="network")
    assert sorted(first + second) == list(range(9))


def test_a_kill_between_the_files_of_a_frame_is_healed(subject: Subject, whole: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(whole, tmp_path / "work"))
    for name in ("alpha/000004.png", "alpha/000010.png", "matte.json", "contact.jpg"):
        (work / name).unlink()
    for name in ("foreground/000004.jpg", "confidence/000010.png"):
        (work / name).write_bytes(b"half a fi")
    matted(subject, work)
    assert written(work) == written(whole)


def test_where_chunks_meet_does_not_show(
    landmarks: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = with_track(decoded_subject(tmp_path / "ada", talking()), landmarks)
    _, at_once = matted(long, tmp_path / "whole")
    cuts, cut = [], matte._cut_chunk

    def counting(clip: Any, network: Any, padding: float, chunk: matte.Chunk, on_frame: Any) -> None:
        cuts.append(len(chunk.frames))
        cut(clip, network, padding, chunk, on_frame)

    monkeypatch.setattr(matte, "_cut_chunk", counting)
    monkeypatch.setattr(matte, "CHUNK", 1)
    _, in_pieces = matted(long, tmp_path / "pieces")
    assert sorted(cuts) == [6, 12, 12]
    errors = np.array([boundary_error(a, b) for a, b in zip(at_once, in_pieces, strict=True)])
    assert errors[[*range(2, 10), *range(14, 22), *range(26, 30)]].max() < 0.002
    assert errors.max() < 0.01


def test_what_covers_the_face_is_not_believed(
    subject: Subject, landmarks: np.ndarray, whole: Path, tmp_path: Path
) -> None:
    own = Subject(Path(shutil.copytree(subject.root, tmp_path / "ada")))
    shutil.rmtree(own.stage("track"))
    points = landmarks[[*range(9), 8, 8]]
    covered, hands = np.zeros((11, 478), bool), np.full((11, 1, 21, 2), np.nan, np.float32)
    middle = points[3, :, :2].mean(0)
    covered[3] = np.linalg.norm(points[3, :, :2] - middle, axis=1) < 12
    rng = np.random.default_rng(0)
    hands[5, 0] = np.array([60, 120]) + rng.uniform(-15, 15, (21, 2))
    with_track(own, points, detected=np.arange(11) < 9, covered=covered, hands=hands)
    matted(own, tmp_path / "work")
    before, after = (
        [grey(work / confidence_file(index)) for index in range(11)] for work in (whole, tmp_path / "work")
    )
    x, y = middle.astype(int)
    assert before[3][y, x] > 200 and after[3][y, x] == 0
    columns, rows = hands[5, 0].astype(int).T
    assert not after[5][rows, columns].any() and before[5][rows, columns].all()
    for index in (0, 1, 2, 4, 6, 7, 8, 9, 10):
        np.testing.assert_array_equal(before[index], after[index])
    assert (after[3] <= before[3]).all() and (after[5] <= before[5]).all()
    same = {name for name in written(whole) if not name.startswith("confidence")}
    assert all(written(whole)[name] == written(tmp_path / "work")[name] for name in same)


@cache
def synthetic() -> SyntheticClip:
    return make_clip(9, 160, 160, seed=3, background="plain", hair=300, supersample=4)


def before_screen(root: Path) -> tuple[Subject, np.ndarray]:
    """A synthetic subject before a lit green screen, and its true alpha [T, H, W]."""
    made = synthetic()
    light = np.linspace(0.85, 1.1, 160)[:, None, None]
    rng = np.random.default_rng(0)
    pictures = made.images - 255 * (1 - made.alpha[..., None]) * made.background
    pictures = pictures + (1 - made.alpha[..., None]) * light * np.array([40, 170, 60])
    noisy = pictures + rng.normal(0, 2, pictures.shape)
    images = list(noisy.round().clip(0, 255).astype(np.uint8))
    return with_track(decoded_subject(root, images), made.landmarks), made.alpha


def test_a_green_screen_is_keyed_and_leaves_no_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, truth = before_screen(tmp_path / "ada")
    monkeypatch.setattr(network, "open_network", lambda *a: pytest.fail("the network was asked"))
    result, alphas = matted(own, tmp_path / "work")
    assert "9 of 9 frames from the green screen" in result.verdict.text
    assert result.metrics["screen"] == "green" and "model" not in result.metrics
    found = np.stack(alphas) / 255
    assert iou(truth, found) > 0.98 and mad(truth, found) < 0.01
    frames = FrameSet.load(own.stage("decode"))
    edge = (truth[4] > 0.2) & (truth[4] < 0.8)
    spill = [
        (image[edge, 1].astype(float) - image[edge][:, [0, 2]].max(1)).mean()
        for image in (frames.image(4), frames.foreground(4, tmp_path / "work"))
    ]
    assert spill[0] > 20 and spill[1] < 0.3 * spill[0]
    chosen, _ = matted(own, tmp_path / "chosen", source="chroma")
    assert chosen.verdict.text == result.verdict.text


def test_a_screen_is_left_alone_where_the_network_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, truth = before_screen(tmp_path / "ada")
    asked = answering(monkeypatch, own, [(255 * cv2.blur(alpha, (9, 9))).astype(np.uint8) for alpha in truth])
    result, alphas = matted(own, tmp_path / "work", source="network", padding=0)
    assert sorted(asked) == list(range(9))
    assert "from the network selfie_segmentation" in result.verdict.text
    assert mad(truth, np.stack(alphas) / 255) < 0.02


def test_a_screen_that_is_not_there_is_missed(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="There is no even green or blue screen behind 'ada'") as missed:
        matted(subject, tmp_path / "work", source="chroma")
    assert "leave matte.source at auto" in missed.value.fix


def test_a_second_person_and_furniture_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = synthetic()
    shift = 96
    images, both, mine = [], [], []
    for picture, alpha in zip(made.images, made.alpha, strict=True):
        wide = np.full((160, 160 + shift, 3), 158, np.uint8)
        wide[:, shift:] = picture
        share = alpha[..., None]
        wide[:, :160] = (share * picture + (1 - share) * wide[:, :160]).round()
        one, other = np.zeros((2, 160, 160 + shift), np.float32)
        one[:, :160], other[:, shift:] = alpha, alpha
        blob = np.zeros_like(one)
        blob[10:30, 235:250] = 1
        images.append(wide)
        mine.append(one)
        both.append((255 * np.max([one, other, blob], 0)).astype(np.uint8))
    assert (np.minimum(mine[4], np.roll(mine[4], shift, 1)) > 0.5).any(), "they touch"
    box = np.concatenate([made.landmarks[..., :2].min(1), made.landmarks[..., :2].max(1)], 1)
    others = (box + np.array([shift, 0, shift, 0]))[:, None].astype(np.float32)
    own = with_track(decoded_subject(tmp_path / "ada", images), made.landmarks, others=others)
    answering(monkeypatch, own, both)
    result, alphas = matted(own, tmp_path / "work", padding=0)
    assert "a second person touches the subject in frames 0-8: split at the seam" in result.verdict.text
    for alpha, points, whole_one in zip(alphas, made.landmarks, mine, strict=True):
        rows, columns = face_box(points)
        assert alpha[rows, columns].min() > 250
        assert not alpha[rows, columns.start + shift : columns.stop + shift].any()
        assert not alpha[10:30, 235:250].any()
        head = whole_one[:100] > 0.9
        assert alpha[:100][head].mean() > 245


@pytest.mark.parametrize("pixels", [0, 3])
def test_whether_the_camera_stands_is_told(
    landmarks: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    cells = np.random.default_rng(1).integers(0, 255, (40, 80, 3)).astype(np.uint8)
    wall = cv2.resize(cells, (400, 180), interpolation=cv2.INTER_CUBIC)
    alphas = [disc(160, 90, 70, (180, 320))] * 12
    share = alphas[0][..., None] / 255
    images = [
        (share * face + (1 - share) * wall[:, i * pixels : i * pixels + 320]).astype(np.uint8)
        for i, face in enumerate(talking()[:12])
    ]
    own = with_track(decoded_subject(tmp_path / "ada", images), landmarks[:12])
    answering(monkeypatch, own, alphas)
    result, _ = matted(own, tmp_path / "work", padding=0)
    assert result.metrics["still_camera"] is (pixels == 0)
    said = "no clean plate of what is behind: the camera or the background moves" in result.verdict.text
    assert said == (pixels > 0)


def test_nobody_and_lost_frames_are_named(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.zeros((180, 320), np.uint8)
    answering(monkeypatch, subject, [nothing] * 11)
    with pytest.raises(StageError, match="The tracked person is in none of 9 frames by the network") as nobody:
        matted(subject, tmp_path / "nobody", padding=0)
    assert "--alpha" in nobody.value.fix
    person = disc(160, 90, 75, (180, 320))
    answering(monkeypatch, subject, [*[person] * 5, *[nothing] * 6])
    result, _ = matted(subject, tmp_path / "lost", padding=0, fuse=False)
    assert result.verdict.level == "poor"
    assert "the person is lost in frames 5-8" in result.verdict.text
    assert result.metrics["lost_frames"] == 4


def test_a_track_of_another_clip_is_refused(subject: Subject, landmarks: np.ndarray, tmp_path: Path) -> None:
    own = Subject(Path(shutil.copytree(subject.root, tmp_path / "ada")))
    shutil.rmtree(own.stage("track"))
    with_track(own, landmarks[:5])
    with pytest.raises(StageError, match="The track has 5 frames, the clip 11") as refused:
        matted(own, tmp_path / "work")
    assert refused.value.fix == "headcast rerun ada --from track"


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
    clip = matte.Clip(stage_run(subject, tmp_path / "work"))
    clip.frames = smaller
    alpha = matte.Network(clip, lambda image: pytest.fail("not through the border")).alpha(0, 0.1)
    assert shapes == [(100, 200, 3)]
    assert (alpha[:100, :200] == 200).all() and alpha.sum() == 200 * 100 * 200


def test_where_both_sides_disagree_the_network_is_asked(tmp_path: Path) -> None:
    images = [textured(50, 80), empty_room()[:160, :160], textured(110, 80)]
    subject = with_track(decoded_subject(tmp_path / "ada", images), np.ones((3, 478, 3)))
    run = stage_run(subject, tmp_path / "work", Config(matte=MatteConfig(key_every=2)))
    asked: list[int] = []

    def predict(image: Image) -> Image:
        which = int(np.argmin([np.abs(image.astype(float) - other).mean() for other in images]))
        asked.append(which)
        return disc((50, 30, 110)[which], 80)

    answers = matte.Network(matte.Clip(run), predict)
    answers.fill(0.0)
    assert sorted(asked) == [0, 1, 2]
    assert boundary_error(disc(30, 80), answers.alpha(1, 0.0)) < 0.1


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
        points = file["landmarks"][:9, :, :2].reshape(-1, 2)
    (x0, y0), (x1, y1) = points.min(0).astype(int), points.max(0).astype(int)
    truth = []
    for index in range(11):
        alpha = np.full((180, 320), index, np.uint8)  # as it is: also what the network's answers would be freed from
        alpha[y0 : y1 + 60, x0:x1] = 255
        save_image(own.stage("decode") / alpha_file(index), alpha)
        truth.append(alpha)
    result, alphas = matted(own, tmp_path / "whole")
    assert all(np.array_equal(a, b) for a, b in zip(alphas, truth, strict=True))
    assert result.verdict.text.startswith(
        "Matte: good. 9 of 11 frames from the video's own alpha channel, edge jitter 0."
    )
    assert set(written(tmp_path / "whole")) >= {f"{folder}/{i:06d}.{end}" for folder, end in KINDS for i in range(11)}
    assert {"flicker_px", "partial_alpha_share", "ms_per_frame"} <= set(result.metrics)
    with pytest.raises(Interrupted):
        matte.run(stage_run(own, tmp_path / "work", stop_requested=iter([False, False, True]).__next__))
    assert len(list((tmp_path / "work" / "alpha").iterdir())) == 4
    _, resumed = matted(own, tmp_path / "work")
    assert all(np.array_equal(a, b) for a, b in zip(resumed, truth, strict=True))
    for index in range(3):
        save_image(own.stage("decode") / alpha_file(index), 255 - truth[index])
    result, _ = matted(own, tmp_path / "inverted")
    assert result.verdict.level == "poor"
    assert "the person is lost in frames 0-2" in result.verdict.text
    for index in range(11):
        save_image(own.stage("decode") / alpha_file(index), 255 - truth[index])
    with pytest.raises(UserError, match="The tracked face is in none of 9 frames by the video's own alpha channel"):
        matted(own, tmp_path / "all")


def test_alphas_that_were_given_and_are_gone_stop_the_stage(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The source of 'ada' is missing"):
        matted(subject, tmp_path / "work", alpha="0" * 64)
