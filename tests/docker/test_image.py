"""The CPU image, built without a registry and used as its user would: what is in it, and that it makes an avatar.

HEADCAST_IMAGES=1, as root, with buildah and debootstrap; about ten minutes on two cores, and 15 GB of disk meanwhile.
The base of debootstrap is kept in pytest's cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect_server import free_port

from pipeline.assets import asset_path, ensure_assets

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("buildah", "debootstrap")
USER_ID = 10001


def unmet() -> str:
    """Why the image cannot be built here, or nothing."""
    if not os.environ.get("HEADCAST_IMAGES"):
        return "builds an image: set HEADCAST_IMAGES=1 to run it"
    if os.geteuid() != 0:
        return "buildah without a registry or user namespaces needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} here: apt-get install {' '.join(missing)}" if missing else ""


pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(unmet()), reason=unmet() or "-"),
]


class Buildah:
    """buildah on storage of its own, so that nothing else is touched, as it works without a daemon or a registry."""

    def __init__(self, folder: Path) -> None:
        self.command = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        if driver := os.environ.get("STORAGE_DRIVER"):  # which buildah forgets when it is given a root
            self.command += ["--storage-driver", driver]

    def __call__(self, *arguments: str | Path) -> str:
        environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run(
            [*self.command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()


def debian(kept: Path) -> Path:
    """A minimal Debian as a tar file, made once."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder = kept.parent / "debian"
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", folder], stdout=subprocess.DEVNULL, check=True)
        part = kept.with_suffix(".part")
        subprocess.run(["tar", "--exclude=./var/cache/apt/archives/*.deb", "-C", folder, "-cf", part, "."], check=True)
        shutil.rmtree(folder)
        part.rename(kept)
    return kept


def site_options(folder: Path) -> list[str]:
    """This machine's pip settings, and the local folders and certificates they name, for the build's steps only."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE)
    settings = {name: value for _, name, value in sorted(found, key=lambda setting: setting[0] == ":env:")}
    settings.pop("cache-dir", None)
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    options = [f"--secret=id=pip,src={file}"]
    if certificates := settings.get("cert"):
        options += [f"--secret=id=certificates,src={certificates}"]
        file.write_text(file.read_text().replace(certificates, "/etc/ssl/certs/ca-certificates.crt"))
    for name, value in settings.items():
        for place in value.split() if name != "cert" else ():
            path = Path(place.removeprefix("file://"))
            path = path.parent if path.name == "simple" else path  # an index, whose files lie beside it
            if path.is_absolute() and path.exists():
                options.append(f"--volume={path}:{path}:ro")
    return options


Run = Callable[..., str]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Buildah]:
    """buildah with the image headcast:cpu."""
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder)
    assert pytestconfig.cache is not None
    try:
        base = buildah("from", "scratch")
        buildah("add", base, debian(pytestconfig.cache.mkdir("image") / "debian-bookworm.tar"), "/")
        buildah("commit", "--rm", base, "localhost/debian")
        buildah("bud", "--format", "docker", "--file", "docker/Dockerfile", "--build-arg", "BASE=localhost/debian",
                *site_options(folder), "--tag", "headcast:cpu", ".")  # fmt: skip
        yield buildah
    finally:
        with contextlib.suppress(AssertionError):
            buildah("rmi", "--all", "--force")
        subprocess.run(["umount", folder / "storage" / "overlay"], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(buildah: Buildah, tmp_path: Path) -> Iterator[Run]:
    """Run a command in a new container, as its user or another, with /srv from `tmp_path`."""
    tmp_path.chmod(0o777)
    container = buildah("from", "headcast:cpu")

    def run(*command: str, user: str = "") -> str:
        return buildah(
            "run", *([f"--user={user}"] if user else ()), "--volume", f"{tmp_path}:/srv", container, "--", *command
        )

    yield run
    buildah("rm", container)


@pytest.fixture
def tree(buildah: Buildah) -> Iterator[Path]:
    """The image's files."""
    container = buildah("from", "headcast:cpu")
    yield Path(buildah("mount", container))
    buildah("rm", container)


def test_image_holds_no_tools_no_history_and_no_secret(
    tree: Path, buildah: Buildah, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [path.relative_to(tree) for path in tree.rglob("*")]
    names = {path.name for path in files if path.parts[:2] in {("usr", "bin"), ("bin",)} or path.parent.name == "bin"}
    assert not names & {"gcc", "g++", "cc", "make", "git", "nvcc", "mypy", "ruff", "pytest"}
    assert not {path.name for path in files} & {".env", ".netrc", ".pypirc", "id_rsa", "pip.conf"}
    assert not [path for path in files if path.name == ".git" and "site-packages" not in path.parts]
    assert not [path for path in files if path.parts[:1] in {("root",)} and ".cache" in path.parts]
    assert not any((tree / "var/lib/apt/lists").iterdir())
    assert (tree / "opt/headcast/.venv/bin/headcast").exists()

    told = json.loads(buildah("inspect", "--type", "image", "headcast:cpu"))["Docker"]
    settings = json.dumps(told)
    for option in site_options(tmp_path):
        place = option.partition("src=")[2] or option.partition("=")[2].split(":")[0]
        assert place not in settings, "the site's set-up is in the image's history"
    assert told["config"]["User"] == f"{USER_ID}:{USER_ID}"
    assert told["config"]["Healthcheck"]["Test"][0] == "CMD"
    sizes = [path.stat().st_size for path in map(tree.joinpath, files) if path.is_file() and not path.is_symlink()]
    with capsys.disabled():
        sys.stdout.write(f"\nheadcast:cpu: {sum(sizes) / 1e6:.0f} MB in {len(sizes)} files\n")
    assert sum(sizes) < 3.5e9, "CUDA's libraries, or what only a developer needs, have come along"


def test_program_cannot_be_changed_from_inside(run: Run) -> None:
    assert run("id", "-u") == str(USER_ID)
    # Folders that may not even be entered make find fail.
    assert run("sh", "-c", "find /opt/headcast /usr /etc -writable -not -type l 2>/dev/null || true") == ""


@pytest.mark.parametrize("user", [USER_ID, 54321])
def test_doctor_finds_everything_for_any_user(run: Run, user: int) -> None:
    document = json.loads(run("headcast", "doctor", "--json", user=str(user)))
    assert document["level"] == "fine", [found for found in document["findings"] if found["level"] != "fine"]


def test_health_follows_what_the_container_does(run: Run) -> None:
    check = "python /opt/headcast/docker/healthcheck.py"
    assert run("sh", "-c", check).startswith("healthy: /srv")
    assert run("sh", "-c", f"cd /opt && ! {check} 2>&1").startswith("unhealthy: /opt")
    port = free_port()
    serve = f"prefect server start --host 127.0.0.1 --port {port} >/tmp/log 2>&1 & "
    wait = f"for i in $(seq 60); do {check} 2>/dev/null && break; sleep 2; done; kill $!; wait"
    said = run(
        "sh", "-c", f"export HEADCAST_HEALTH_URL=http://127.0.0.1:{port}/api/health; ! {check} 2>&1; {serve}{wait}"
    )
    assert said.splitlines()[0].startswith("unhealthy: http") and "\nhealthy: http" in said


def test_clip_becomes_an_avatar(run: Run, tmp_path: Path) -> None:
    ensure_assets({"single_face"})
    shutil.copy(asset_path("single_face"), tmp_path / "anna.mp4")
    run("headcast", "run", "anna.mp4", "--set", "train.steps=50", "--set", "decode.max_frames=24")
    subject = tmp_path / "data" / "anna"
    assert (subject / "report.html").stat().st_uid == USER_ID
    assert json.loads((subject / "evaluate" / "metrics.json").read_text())["test"]["psnr"] > 20
