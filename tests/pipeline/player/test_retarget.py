"""The page transfers a performance as pipeline.retarget does and follows a face steadily; modules run in Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch

from pipeline import gaze
from pipeline.exports import webcam
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.retarget import EYES, MOVE, TURN, Performance, transfer

PLAYER = Path(webcam.__file__).parent.parent / "player"
NAMES = (*(f"eyeLook{way}{side}" for side in ("Left", "Right") for way in ("In", "Out", "Up", "Down")), "jawOpen")
OPENED = """<!doctype html><link rel="icon" href="data:,"><script type="module">
import * as retarget from "./retarget.js";
import * as follower from "./follower.js";
window.modules = { ...retarget, ...follower };
</script>"""


def person(seed: int) -> Performance:
    """Somebody who moves at random, with a few numbers that never change."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-0.2, 0.3, (40, len(NAMES) + 10))
    values[:, : len(NAMES)] = rng.uniform(0, 0.8, (40, len(NAMES)))
    values[:, 3] = 0.0
    low, high = values.min(0), values.max(0)
    neutral = np.where(np.arange(values.shape[1]) < len(NAMES) + 4, rng.uniform(low, high), 0.0)
    pose = make_rigid(rotvec_to_matrix(rng.normal(size=3)), rng.normal(size=3))
    names = (*NAMES, *EYES, *TURN, *MOVE)
    return Performance(names, values, np.ones(40, bool), neutral, low, high, pose[None])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A page that has the modules as `modules`."""
    folder = tmp_path_factory.mktemp("site")
    for module in ("rigid", "retarget", "follower"):
        shutil.copy(PLAYER / f"{module}.js", folder)
    (folder / "index.html").write_text(OPENED)
    profile = tmp_path_factory.mktemp("profile")
    with browser.serve(folder) as url, browser.chromium(profile) as opened, opened.visit(url) as visit:
        visit.page.wait_for_function("window.modules")
        yield visit.page
        browser.check_clean(visit)


def test_transfers_as_python_does(page: Any) -> None:
    driver, avatar = person(1), person(2)
    rows = np.random.default_rng(3).uniform(-1.5, 1.5, (60, len(driver.names)))
    expected = transfer(rows, driver, avatar).values
    found = page.evaluate(
        "([rows, neutral, avatar]) => rows.map((row) => Array.from(modules.transfer(row, neutral, avatar)))",
        [rows.tolist(), driver.neutral.tolist(), webcam.limits(avatar, 0)],
    )
    assert np.abs(expected - np.clip(expected, avatar.low, avatar.high)).max() > 0.01, "some are beyond the limits"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_drive_has_the_players_order_and_the_head_in_its_own_axes(page: Any) -> None:
    avatar, wanted = person(2), list(reversed(NAMES))
    row = np.random.default_rng(4).uniform(-0.4, 0.4, len(avatar.names))
    drive = page.evaluate(
        """([row, avatar, names]) => {
            const drive = modules.driveOf(Float64Array.from(row), avatar, names);
            return { ...drive, expression: Array.from(drive.expression), head: Array.from(drive.head) };
        }""",
        [row.tolist(), webcam.limits(avatar, 0), wanted],
    )
    rest, (turn, move) = avatar.Ts_cam_rest[0], np.split(row[-6:], 2)
    head = make_rigid(rest[:3, :3] @ rotvec_to_matrix(turn), rest[:3, 3] + move)
    np.testing.assert_allclose(np.reshape(drive["head"], (4, 4)), head, atol=1e-5)
    np.testing.assert_allclose(drive["expression"], row[[NAMES.index(name) for name in wanted]], atol=1e-6)
    np.testing.assert_allclose(drive["eyes"], row[len(NAMES) :][:4])


def test_gaze_is_pythons(page: Any) -> None:
    coefficients = torch.rand(1, len(NAMES), generator=torch.Generator().manual_seed(5))
    expected = gaze.eyes_of(coefficients, NAMES)[0, :, :2].flatten()
    named = dict(zip(NAMES, coefficients[0].tolist(), strict=True))
    found = page.evaluate("([named, range]) => modules.eyesOf(named, range)", [named, gaze.GAZE_RANGE_RAD])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_one_euro_filter_is_that_of_the_paper(page: Any) -> None:
    rng = np.random.default_rng(6)
    seconds, rows = np.cumsum(rng.uniform(0.02, 0.2, 50)), np.cumsum(rng.normal(size=(50, 3)), 0)
    cutoffs, slopes = [1.0, 0.5, 2.0], [0.0, 1.0, 3.0]
    found = page.evaluate(
        """([rows, seconds, cutoffs, slopes]) => {
            const filter = new modules.OneEuro(cutoffs, slopes);
            return rows.map((row, i) => Array.from(filter.filter(row, seconds[i])));
        }""",
        [rows.tolist(), seconds.tolist(), cutoffs, slopes],
    )

    def share(cutoff: Any, step: float) -> Any:
        return 1 / (1 + 1 / (2 * np.pi * cutoff * step))

    smooth, speed, expected = rows[0], np.zeros(3), [rows[0]]
    for row, step in zip(rows[1:], np.diff(seconds), strict=True):
        speed = speed + share(1.0, step) * ((row - smooth) / step - speed)
        smooth = smooth + share(np.array(cutoffs) + slopes * np.abs(speed), step) * (row - smooth)
        expected.append(smooth)
    np.testing.assert_allclose(found, expected, atol=1e-9)


FOLLOW = """([avatar, names, faces]) => {
    const follower = new modules.Follower(avatar, names);
    return faces.map(([jaw, nod, seconds, act]) => {
        if (act) follower.takeNeutral();
        const c = Math.cos(nod), s = Math.sin(nod), pose = [1, 0, 0, 0, 0, c, -s, 0, 0, s, c, 0.5, 0, 0, 0, 1];
        const drive = follower.follow(jaw === null ? null : { coefficients: { jawOpen: jaw }, pose }, seconds);
        return [drive.expression[names.indexOf("jawOpen")], ...drive.head];
    });
}"""


def test_a_face_is_followed_from_its_neutral_and_let_go_of_when_lost(page: Any) -> None:
    avatar = person(2)
    limits = webcam.limits(avatar, 0)
    jaw = avatar.names.index("jawOpen")
    limits["low"][jaw], limits["high"][jaw], limits["neutral"][jaw] = 0.0, 1.0, 0.1
    ticks = np.arange(0, 12, 0.1)
    faces: list[list[Any]] = [[0.3 if t < 3 else 0.8, 0.2, t, 0] for t in ticks]
    for face in faces:
        face[0] = None if 6 <= face[2] < 9 else face[0]
    found = np.array(page.evaluate(FOLLOW, [limits, list(NAMES), faces]))
    shown, heads = found[:, 0], found[:, 1:].reshape(-1, 4, 4)
    np.testing.assert_allclose(shown[ticks < 3], 0.1, atol=1e-6, err_msg="a mouth that rests open is a mouth at rest")
    np.testing.assert_allclose(shown[(ticks > 4) & (ticks < 6.4)], 0.6, atol=0.01, err_msg="followed, then held")
    assert (np.diff(shown[(ticks > 6.5) & (ticks < 9)]) < 1e-9).all()
    np.testing.assert_allclose(shown[(ticks > 7.7) & (ticks < 9)], 0.1, atol=1e-6, err_msg="at rest again")
    np.testing.assert_allclose(shown[-5:], 0.6, atol=0.02, err_msg="found again")
    np.testing.assert_allclose(heads, np.broadcast_to(avatar.Ts_cam_rest[0], heads.shape), atol=1e-5)


def test_who_begins_with_an_open_mouth_closes_it_later_and_who_shows_a_neutral_has_it_kept(page: Any) -> None:
    limits = webcam.limits(person(2), 0)
    jaw = limits["names"].index("jawOpen")
    limits["low"][jaw], limits["high"][jaw], limits["neutral"][jaw] = 0.0, 1.0, 0.1
    ticks = np.arange(0, 20, 0.1)
    faces = [[0.7 if t < 2 or 10 < t < 12 else 0.0, 0.0, t, 0] for t in ticks]
    shown = np.array(page.evaluate(FOLLOW, [limits, list(NAMES), faces]))[:, 0]
    assert shown[(ticks > 11) & (ticks < 12)].min() > 0.7
    np.testing.assert_allclose(shown[-20:], 0.1, atol=0.02)
    faces = [[0.3, 0.0, t, 0] for t in ticks]
    faces[20][3] = 1
    for face in faces[100:]:
        face[0] = 0.6
    shown = np.array(page.evaluate(FOLLOW, [limits, list(NAMES), faces]))[:, 0]
    np.testing.assert_allclose(shown[-20:], 0.4, atol=0.01, err_msg="0.3 is kept, though 0.6 came to stay")
