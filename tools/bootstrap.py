"""Set headcast up in `.venv`: system libraries, pinned packages, assets. Standard library only; run by `make setup`.

Running it again does nothing unless a pin, the project file or Python changed.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "headcast-setup.sha256"

# mediapipe's native library links against these even when it draws nothing.
SYSTEM_LIBRARIES = {"libEGL.so.1": "libegl1", "libGLESv2.so.2": "libgles2"}

# Several OpenCV wheels overwrite each other in one folder, and the others want a desktop's libraries. These names are
# answered by empty wheels of a local version (pinned in constraints.txt) that depend on the headless contrib build.
OPENCV_STAND_INS = ("opencv-contrib-python", "opencv-python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--extras", default="dev", help="of pyproject.toml, separated by commas (default: %(default)s)")
    extras = parser.parse_args().extras
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python runs this file to be told so
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}.", "make setup PYTHON=python3.11")
    install_system_libraries()
    want = fingerprint(extras)
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == want:
        return
    make_venv()
    install_packages(extras)
    STAMP.write_text(want)
    say("set-up done: .venv/bin/headcast --help")


def fingerprint(extras: str) -> str:
    """What the environment depends on."""
    parts = [sys.version.encode(), str(ROOT).encode(), extras.encode()]
    parts += [(ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml", "tools/bootstrap.py")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def install_system_libraries() -> None:
    missing = [package for library, package in SYSTEM_LIBRARIES.items() if not loads(library)]
    if importlib.util.find_spec("ensurepip") is None:
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if shutil.which("apt-get") is None:
        fail(f"System packages are missing: {', '.join(missing)}.", "install them with this system's package manager")
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    shown = " ".join((["sudo"] if sudo else []) + command)
    if sudo and (shutil.which("sudo") is None or subprocess.run([*sudo, "true"], capture_output=True).returncode != 0):
        fail(f"System packages are missing: {', '.join(missing)}.", shown)
    say(f"installing system packages: {', '.join(missing)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*sudo, "apt-get", "update", "-qq"], env=quiet, stdout=subprocess.DEVNULL, check=False)
    done = subprocess.run([*sudo, *command, "-qq"], env=quiet, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        fail(f"Could not install {', '.join(missing)}.", shown)


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def make_venv() -> None:
    """Make `.venv`, anew when it was made by another Python."""
    shown: list[str | Path] = [PYTHON, "-c", "import sys; print(sys.version)"]
    if PYTHON.exists() and subprocess.run(shown, capture_output=True, text=True).stdout.strip() == sys.version:
        return
    say("making .venv")
    shutil.rmtree(VENV, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", VENV], check=False).returncode != 0:
        fail("Python cannot make a virtual environment here.", "sudo apt-get install python3-venv")


def install_packages(extras: str) -> None:
    say("installing packages (about 3 GB on disk; a few minutes the first time)")
    with tempfile.TemporaryDirectory() as folder:
        for name in OPENCV_STAND_INS:
            write_stand_in(Path(folder), name, pinned(name), "opencv-contrib-python-headless")
        pip: list[str | Path] = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--find-links", folder, "--constraint", "constraints.txt"]
        options += ["--editable", f".[{extras}]" if extras else "."]
        if subprocess.run([*pip, *options], cwd=ROOT, check=False).returncode != 0:
            fail(
                "pip could not install the packages (its message is above).",
                "check the network or the package mirror (pip config list), then run the same command again",
            )
    if subprocess.run([PYTHON, "-m", "pip", "check"], stdout=subprocess.DEVNULL, check=False).returncode != 0:
        fail("The installed packages do not fit together.", ".venv/bin/python -m pip check")


def pinned(name: str) -> str:
    """The version that constraints.txt pins a package to."""
    found = re.search(rf"^{re.escape(name)}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        fail(f"constraints.txt pins no {name}.", "restore the file from the repository")
    return found.group(1)


def write_stand_in(folder: Path, name: str, version: str, requirement: str) -> None:
    """An empty wheel that answers to `name` and requires another package of the same public version."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    public = version.partition("+")[0]
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        f"Summary: Answered by {requirement}\nRequires-Dist: {requirement}=={public}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: headcast\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={wheel_hash(text)},{len(text.encode())}\n" for path, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def wheel_hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def say(text: str) -> None:
    print(f"headcast: {text}", flush=True)


def fail(what: str, fix: str) -> NoReturn:
    sys.exit(f"headcast: {what}\n  -> {fix}")


if __name__ == "__main__":
    main()
