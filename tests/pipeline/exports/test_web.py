"""The browser player: it draws what our own renderer draws, offline and from disk, and what is hostile stays text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import avatar_data
import browser
import numpy as np
import pytest
import reenact_data
import torch

from pipeline.avatars import Condition, load_avatar, save_avatar
from pipeline.avatars.baked import BakedAvatar
from pipeline.bake import bake
from pipeline.bench_player import READY, drawn, drive_of
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.exports import check_export, export, packing
from pipeline.exports.packing import Performance, pack, unpack
from pipeline.exports.web import AVATAR, SINGLE, write_page
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.metrics import psnr
from pipeline.viewpoint import Camera, orbit, up_of

SIZE = 128
OPTIONS = {"webcam": "false"}
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Anna, whose avatar is baked."""
    made = reenact_data.write_dataset(tmp_path_factory.mktemp("data"))
    anna = made.existing("anna")
    clip = avatar_data.clip(reenact_data.FRAMES)
    Ks = torch.from_numpy(clip.K).float().expand(reenact_data.FRAMES, 3, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.bake.SAMPLE_BYTES", 0)  # as few samples as may be
        patch.setattr("pipeline.bake.NETWORK_STEPS", 60)
        baked = bake(load_avatar(anna.stage("train")), avatar_data.conditions(clip), Ks, avatar_data.SIZE, threads=1)
    (anna.stage("export") / "baked").mkdir(parents=True)
    save_avatar(baked, anna.stage("export") / "baked")
    reenact_data.finish(anna, "export")
    return made


@pytest.fixture(scope="module")
def exported(data: Dataset) -> Path:
    plan = check_export(data.root, "anna", "web", options=OPTIONS, threads=1)
    export(plan)
    return plan.product.path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Chromium]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def baked(data: Dataset) -> BakedAvatar:
    avatar = load_avatar(data.existing("anna").stage("export") / "baked")
    assert isinstance(avatar, BakedAvatar)
    return avatar


def followed(condition: Condition) -> dict[str, Any]:
    """A condition as the page takes it, without what is to follow from head and coefficients."""
    return drive_of(condition) | dict.fromkeys(("eyes", "torso", "torsoShape", "skull"))


def ours(avatar: Any, condition: Condition, camera: Camera) -> np.ndarray:
    K, view = (torch.from_numpy(array).float() for array in (camera.K, camera.T_cam_world))
    image = avatar.render(condition, K, camera.width, camera.height, torch.ones(3), threads=1, view=view).image
    return np.asarray(image.clamp(0, 1).numpy())


@pytest.mark.parametrize("place", ["folder", "single"])
def test_it_draws_what_our_renderer_draws(
    place: str, exported: Path, data: Dataset, baked: BakedAvatar, chromium: browser.Chromium
) -> None:
    full = load_avatar(data.existing("anna").stage("train"))
    clip = avatar_data.conditions(avatar_data.clip(reenact_data.FRAMES))
    rest = baked.neutral
    opened = rest._replace(expression=rest.expression + torch.eye(52)[baked.expression_names.index("jawOpen")])
    # Not square, not in the middle, and not as wide as high.
    K = avatar_data.clip().K * [[SIZE / avatar_data.SIZE], [SIZE / avatar_data.SIZE], [1]]
    clip_camera = Camera.of_clip(K * [[1.1], [1], [1]] + [[0, 0, 3], [0, 0, -5], [0, 0, 0]], SIZE + 11, SIZE)
    head = rest.T_cam_head.double().numpy()
    aside = orbit(clip_camera, head[:3, 3], up_of(head), 0.5, 0.2, 1.3)
    with browser.serve(exported) as url:
        with chromium.visit(url if place == "folder" else (exported / SINGLE).as_uri()) as visit:
            visit.page.locator(READY).wait_for()
            for condition, camera in ((rest, clip_camera), (clip.frame(7), clip_camera), (opened, aside)):
                seen = drawn(visit.page, condition, camera)
                assert seen.std() > 0.05
                assert psnr(seen, ours(baked, condition, camera)) > 45
            assert psnr(drawn(visit.page, clip.frame(7), clip_camera), ours(full, clip.frame(7), clip_camera)) > 35
        browser.check_clean(visit)


@pytest.mark.parametrize("vectors", [True, False])
def test_its_numbers_are_those_of_the_model(
    vectors: bool, exported: Path, baked: BakedAvatar, chromium: browser.Chromium
) -> None:
    clip = avatar_data.conditions(avatar_data.clip(reenact_data.FRAMES))
    far = make_rigid(rotvec_to_matrix(torch.tensor([0.3, -2.0, 0.4])), torch.tensor([0.1, -0.05, 0.9]))
    face = baked.follow_face(torch.rand(1, 52, generator=torch.Generator().manual_seed(1)), far[None])
    packed, _ = unpack((exported / AVATAR).read_bytes())
    cases = [(c, drive_of(c)) for c in (baked.neutral, clip.frame(3))] + [(face.frame(0), followed(face.frame(0)))]
    with browser.serve(exported) as url, chromium.visit("about:blank") as visit:
        if not vectors:
            visit.page.add_init_script("delete window.WebAssembly")
        visit.page.goto(url)
        visit.page.locator(READY).wait_for()
        for condition, drive in cases:
            given = visit.page.evaluate("(drive) => player.numbers(drive)", drive)
            prepared = baked.prepare(Condition(*(value[None] for value in condition)))
            np.testing.assert_allclose(given["weights"], prepared.weights[0], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(np.reshape(given["torso"], (4, 4)), condition.T_cam_torso, atol=1e-5)
            means = np.reshape(given["means"], (3, -1)).T
            np.testing.assert_allclose(means, packed.gaussians(condition).means, atol=1e-5)
    browser.check_clean(visit)


def test_sliders_clip_and_keys(exported: Path, chromium: browser.Chromium) -> None:
    jaw = "player.drive.expression[player.names.indexOf('jawOpen')]"
    with browser.serve(exported) as url, chromium.visit(url, reduced_motion="reduce") as visit:
        page = visit.page
        page.locator(READY).wait_for()
        assert page.evaluate("player.driver") == "sliders"  # nothing moves unasked
        before = page.locator("#view").screenshot()
        page.get_by_label("Jaw open").fill("0.9")
        assert page.evaluate(jaw) == pytest.approx(0.9)
        page.wait_for_timeout(100)
        assert page.locator("#view").screenshot() != before
        page.fill("#search", "brow inner")
        assert page.locator("#groups .row:visible").count() == 1
        page.fill("#search", "")
        page.get_by_role("button", name="Closed").click()
        assert page.evaluate("player.drive.expression[player.names.indexOf('eyeBlinkLeft')]") > 0.9
        assert page.evaluate(jaw) < 0.5
        page.locator("#time").fill("0.3")
        assert page.evaluate("player.driver") == "clip"
        frame = page.evaluate("Array.from(player.drive.head)")
        page.locator("#view").press(".")
        assert page.evaluate("Array.from(player.drive.head)") != frame
        page.locator("#view").press("Space")
        page.get_by_label("Pause the clip").click()
        page.locator("#view").press("ArrowLeft")
        assert page.evaluate("player.orbit.yaw") < 0
        page.locator("#view").press("r")
        assert page.evaluate("player.orbit.yaw") == 0
        assert page.evaluate("player.rest.expression.every((value, i) => value === player.drive.expression[i])")
        page.locator("#view").press("p")
        assert not page.locator("#panel").is_visible()
    browser.check_clean(visit)


def test_without_webgl2_it_says_so(exported: Path, chromium: browser.Chromium) -> None:
    with chromium.visit("about:blank") as visit:
        visit.page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
        visit.page.goto((exported / SINGLE).as_uri())
        visit.page.get_by_text("WebGL2").wait_for()
    browser.check_clean(visit)


def test_hostile_names_stay_text(baked: BakedAvatar, chromium: browser.Chromium, tmp_path: Path) -> None:
    names = (HOSTILE, *baked.expression_names[1:])
    avatar = BakedAvatar(baked.compact_weights(), HOSTILE, names)
    clip = avatar_data.conditions(avatar_data.clip(reenact_data.FRAMES))
    packed = pack(avatar, Performance(clip, np.arange(reenact_data.FRAMES) / 25))
    write_page(tmp_path, HOSTILE, {AVATAR: packed.data})
    for page in ("index.html", SINGLE):
        with browser.serve(tmp_path) as url, chromium.visit(url + page) as visit:
            visit.page.locator(READY).wait_for()
            assert visit.page.locator("h1").text_content() == HOSTILE
            assert visit.page.evaluate("[player.names[0], typeof window.hacked]") == [HOSTILE, "undefined"]
        browser.check_clean(visit)


def test_it_fits_and_comes_back(
    data: Dataset, exported: Path, baked: BakedAvatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = check_export(data.root, "anna", "web", options=OPTIONS).product.finished()
    assert account is not None
    assert account["packed_bytes"] == (exported / AVATAR).stat().st_size <= 3_000_000
    assert account["packing_db"] > 60
    assert "dB from the baked avatar's" in account["text"]
    clip = avatar_data.conditions(avatar_data.clip(reenact_data.FRAMES))
    performance = Performance(clip, np.arange(reenact_data.FRAMES) / 25)
    packed = pack(baked, performance)
    again, told = unpack(packed.data)
    assert torch.equal(again.prepare(clip).weights, baked.prepare(clip).weights)
    for ours, theirs in zip(clip, told.conditions, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    monkeypatch.setattr(packing, "LIMIT_BYTES", packed.size * 2 // 3)
    smaller = pack(baked, performance)
    assert len(smaller.avatar.motion) < len(baked.motion)
    assert smaller.size <= packed.size * 2 // 3
    monkeypatch.setattr(packing, "LIMIT_BYTES", 1000)
    with pytest.raises(UserError, match="more than the player's"):
        pack(baked, performance)


def test_without_a_baked_avatar_it_says_so(data: Dataset) -> None:
    folder = data.existing("anna").stage("export") / "baked"
    folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(UserError, match=r"no baked avatar.*export.bake=false"):
            export(check_export(data.root, "anna", "web", options=OPTIONS, force=True))
    finally:
        folder.with_name("away").rename(folder)
