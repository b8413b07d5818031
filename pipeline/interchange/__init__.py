"""Other projects' datasets: tracked heads as NeRFBlendShape, INSTA, VHAP and IMavatar keep them, read and written.

A format is a module with `detect(folder)`, `read(folder, options)` and `write(recording, pictures, folder)`. Between
them stands one `Recording` (`pipeline.interchange.recording`) in headcast's own conventions, so that axes, units and
names change at these borders only. `docs/interchange.md` has every layout.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pipeline.interchange.recording import Recording

DEFAULT_FPS = Fraction(25)


class Format(NamedTuple):
    """A layout of tracked heads."""

    module: str
    about: str
    """One line for people."""
    sign: str
    """What `detect` goes by, in words."""


FORMATS = {
    "nerfblendshape": Format(
        "pipeline.interchange.nerfblendshape",
        "NeRFBlendShape and gaussian-head: transforms.json with 46 coefficients of its own",
        "transforms.json whose frames have img_id and exp_ori",
    ),
    "insta": Format(
        "pipeline.interchange.insta",
        "INSTA: transforms.json with FLAME meshes, head motion in the camera",
        "transforms.json whose frames have mesh_path and exp_path",
    ),
    "vhap": Format(
        "pipeline.interchange.vhap",
        "VHAP, for GaussianAvatars: transforms.json with a FLAME file a frame",
        "transforms.json whose frames have flame_param_path",
    ),
    "imavatar": Format(
        "pipeline.interchange.imavatar",
        "IMavatar and PointAvatar: flame_params.json",
        "flame_params.json",
    ),
    "metrical": Format(
        "pipeline.interchange.metrical",
        "metrical-tracker's own output, which INSTA's data is made of: a .frame file a frame",
        "a folder checkpoint/ with .frame files",
    ),
}


@dataclass(frozen=True)
class ReadOptions:
    """What a layout does not tell and the user may say.

    Attributes:
        fps: frames a second; None takes the sidecar's, else `DEFAULT_FPS`.
        flame: the FLAME that the numbers belong to ("flame2020", "flame2023", "flame2023open"); None takes the
            sidecar's, else what the format's own programs use.
    """

    fps: Fraction | None = None
    flame: str | None = None


def formats_of(folder: Path) -> list[str]:
    """The formats that a folder may be in, by its files alone."""
    return [name for name, format_ in FORMATS.items() if importlib.import_module(format_.module).detect(folder)]


def detect(folder: Path) -> str:
    """The format of a folder, by its files alone.

    Raises:
        UserError: it is none of them, or more than one.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder '{folder}'.", "name the folder of a tracked dataset")
    found = formats_of(folder)
    if not found:
        from pipeline.interchange.tracking import KINDS

        signs = "; ".join(f"{name}: {sign}" for name, sign in ({n: f.sign for n, f in FORMATS.items()} | KINDS).items())
        raise UserError(f"'{folder}' is no dataset that headcast can import.", f"looked for {signs}")
    if len(found) > 1:
        raise UserError(
            f"'{folder}' looks like {' and like '.join(found)}.", f"say which with: --format {found[0]} (or {found[1]})"
        )
    return found[0]


def read(folder: Path, format_name: str = "auto", options: ReadOptions | None = None) -> Recording:
    """Read and check everything of a dataset but its pixels; pictures are checked for being there and for their size.

    Args:
        folder: the dataset.
        format_name: one of `FORMATS`, or "auto".
        options: what the layout does not tell.

    Raises:
        UserError: the folder, or the first thing in it that is wrong, with its file, frame and key.
    """
    if format_name != "auto" and format_name not in FORMATS:
        fix = did_you_mean(format_name, FORMATS) or f"choose one of: auto, {', '.join(FORMATS)}"
        raise UserError(f"There is no format '{format_name}'.", fix)
    name = detect(folder) if format_name == "auto" else format_name
    recording: Recording = importlib.import_module(FORMATS[name].module).read(folder, options or ReadOptions())
    return recording
