"""Exports on request: `headcast export SUBJECT --to TARGET`. A target is a module with one function, found by name.

Each writes one folder, `SUBJECT/exported/TARGET/`, with an account (`pipeline.products`) that tells what is in it and
what it lost: everything that can be read back is read back and rendered again.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.dataset import Dataset, Subject
from pipeline.errors import UserError, did_you_mean
from pipeline.products import Product, Sources, place_for
from pipeline.progress import Reporter, SilentReporter
from pipeline.run import usable_cores

FOLDER = "exported"
FITTED = ("decode", "fit", "train", "export")
PREPARED = ("decode", "matte", "fit")


class Target(NamedTuple):
    """A kind of export."""

    module: str
    """Where `write(export, folder) -> dict`, `VERSION` and `OPTIONS` are; the dict stands in the account."""
    about: str
    """One line for people."""
    stages: tuple[str, ...]
    """Finished stages that it reads."""


TARGETS = {
    "ply": Target(
        "pipeline.exports.ply", "the avatar at rest as a standard 3DGS PLY, for any splat viewer", ("train",)
    ),
    "ply-sequence": Target(
        "pipeline.exports.ply_sequence", "the avatar through its clip, a PLY a frame", ("decode", "fit", "train")
    ),
    "spz": Target("pipeline.exports.spz", "the avatar at rest as SPZ, a small file", ("train",)),
    "sog": Target("pipeline.exports.sog", "the avatar at rest as SOG, PlayCanvas' small file", ("train",)),
    "gltf": Target("pipeline.exports.gltf", "the avatar at rest as a GLB of Gaussians", ("train",)),
    "rig": Target(
        "pipeline.exports.rig",
        "all that a program of one's own needs to drive it",
        FITTED,
    ),
    "arkit": Target(
        "pipeline.exports.arkit",
        "head mesh and Gaussians as 52 ARKit blendshapes",
        FITTED,
    ),
    "web": Target(
        "pipeline.exports.web",
        "a page that plays and drives the avatar in any browser: a folder and a single file",
        FITTED,
    ),
    "nerfblendshape": Target("pipeline.exports.datasets", "a dataset for NeRFBlendShape and gaussian-head", PREPARED),
    "insta": Target("pipeline.exports.datasets", "a dataset for INSTA, with FLAME refitted", PREPARED),
    "vhap": Target("pipeline.exports.datasets", "a dataset for GaussianAvatars, with FLAME refitted", PREPARED),
    "imavatar": Target("pipeline.exports.datasets", "a dataset for IMavatar, with FLAME refitted", PREPARED),
    "csv": Target(
        "pipeline.exports.csv_table",
        "what the subject does: a table of ARKit coefficients, gaze and head pose",
        ("decode", "fit"),
    ),
    "rerun": Target(
        "pipeline.exports.rerun",
        "frames, landmarks, alpha, head, Gaussians and curves for the rerun viewer",
        ("decode", "track", "matte", "fit", "train"),
    ),
}


@dataclass(frozen=True)
class Export:
    """An export found good.

    Attributes:
        subject: whose avatar.
        options: what was set with `--set`, by name; a target refuses those that it does not know.
        threads: CPU threads to use.
        stop_requested: asked between steps.
    """

    subject: Subject
    target: str
    product: Product
    options: dict[str, str]
    reporter: Reporter = field(default_factory=SilentReporter)
    threads: int = field(default_factory=usable_cores)
    stop_requested: Callable[[], bool] = lambda: False


def number(export: Export, option: str, default: int, low: int, high: int) -> int:
    """What an option that takes whole numbers says.

    Raises:
        UserError: it is none, or lies outside `low` to `high`.
    """
    text = export.options.get(option, str(default))
    if not re.fullmatch(r"-?[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(f"'{option}={text[:40]}' is not a whole number from {low} to {high}.", _about(export, option))
    return int(text)


def span(export: Export, count: int) -> range:
    """The frames that the options `first`, `last` and `every` choose of so many.

    Raises:
        UserError: an option is no such number, or they choose none.
    """
    most = count - 1
    first, last = number(export, "first", 0, 0, most), number(export, "last", most, 0, most)
    frames = range(first, last + 1, number(export, "every", 1, 1, count))
    if not frames:
        raise UserError(f"'last={last}' lies before 'first={first}'.", f"choose frames of 0 to {most}")
    return frames


def choice(export: Export, option: str, *known: str) -> str:
    """What an option says that takes one of some words, by default the first.

    Raises:
        UserError: it is none of them.
    """
    text = export.options.get(option, known[0])
    if text not in known:
        raise UserError(f"'{option}={text[:40]}' is none of: {', '.join(known)}.", _about(export, option))
    return text


def _about(export: Export, option: str) -> str:
    options = importlib.import_module(TARGETS[export.target].module).OPTIONS
    return f"{option}: {options[option]}"


def check_export(
    data: Path,
    name: str,
    target: str,
    *,
    out: Path | None = None,
    options: dict[str, str] | None = None,
    force: bool = False,
    **how: Any,
) -> Export:
    """Check a request against the dataset. Reads only.

    Args:
        data: the dataset directory.
        name: of the subject.
        target: one of `TARGETS`.
        out: the folder to write; by default `SUBJECT/exported/TARGET`.
        options: of the target.
        force: replace what is there.
        how: fields of `Export` that change nothing of what is written.

    Raises:
        UserError: the subject, the target, an option or the place is at fault.
    """
    if target not in TARGETS:
        fix = did_you_mean(target, TARGETS) or f"choose one of: {', '.join(TARGETS)}"
        raise UserError(f"There is no export '{target}'.", fix)
    subject, options = Dataset(data).existing(name), options or {}
    sources = Sources.of(avatar=(subject, TARGETS[target].stages))
    module = importlib.import_module(TARGETS[target].module)
    unknown = sorted(set(options) - set(module.OPTIONS))
    if unknown:
        known = ", ".join(f"{option} ({about})" for option, about in module.OPTIONS.items()) or "it has none"
        raise UserError(f"The export '{target}' has no option '{unknown[0]}'.", f"its options: {known}")
    path = place_for(subject, FOLDER, target, out)
    settings = {"target": target, "options": options}
    product = Product(path, sources, settings, version=module.VERSION, folder=True, force=force)
    product.check_free()
    return Export(subject, target, product, options, **how)


def export(plan: Export) -> dict[str, Any]:
    """Write it, unless this very export is there; returns its account.

    Raises:
        HeadcastError: what went wrong; nothing was written then.
    """
    finished = None if plan.product.force else plan.product.finished()
    if finished is not None:
        plan.reporter.message(f"{plan.product.path}: fresh, left as it is")
        return finished
    write = importlib.import_module(TARGETS[plan.target].module).write
    account = plan.product.make(lambda folder: write(plan, folder))
    plan.reporter.message(account["text"])
    return account
