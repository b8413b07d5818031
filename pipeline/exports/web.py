"""A page that shows the avatar in any browser: a folder for a web server, and one file that opens from disk.

The page's sources are `pipeline/player/`; `pipeline/exports/packing.py` packs the avatar. docs/player.md tells of both.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.exports import Export, choice

if TYPE_CHECKING:
    from pipeline.avatars.baked import BakedAvatar
    from pipeline.clip import Clip
    from pipeline.exports.packing import Packed, Performance

VERSION = 1
OPTIONS = {"webcam": "true: driving from the viewer's webcam; false: without it, 7 MB less (9 MB in the single file)"}
SOURCES = Path(__file__).parents[1] / "player"
PAGE, STYLE, MAIN = "index.html", "player.css", "main.js"
AVATAR, SINGLE = "avatar.bin", "player.html"
LOSS_FRAMES = 8
"""Frames of the clip in which the loss of packing is measured."""
IMPORT = re.compile(r'^import (?:\* as (\w+)|\{ ([\w, ]+) \}) from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?(?:function|class|const) (\w+))", re.MULTILINE)
# Nothing comes from elsewhere, nothing goes anywhere. The camera's library compiles WebAssembly from blobs.
POLICY = (
    "default-src 'none'; script-src {scripts} blob: 'wasm-unsafe-eval'; style-src {styles}; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'"
)


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write the folder's files and `player.html`, which holds all of them.

    Raises:
        UserError: there is no baked avatar, or it is too large.
        StageError: MediaPipe for the webcam cannot be fetched.
    """
    from pipeline.exports import webcam
    from pipeline.exports.packing import pack
    from pipeline.expressions import basis_of, is_arkit

    with_webcam = choice(export, "webcam", "true", "false") == "true"
    avatar, performance, clip = _read(export)
    export.reporter.message("Packing the avatar.")
    if with_webcam and not is_arkit(avatar.expression_names):
        export.reporter.message(f"Without the webcam: the avatar is driven by {basis_of(avatar.expression_names)}.")
        with_webcam = False
    packed = pack(avatar, performance)
    assets = {AVATAR: packed.data}
    if with_webcam:
        assets[webcam.FILE] = webcam.pack(clip, export.reporter)
    write_page(folder, export.subject.name, assets)
    loss = loss_db(avatar, performance, packed, export)
    single = (folder / SINGLE).stat().st_size
    shapes, kept = (len(a.motion) + len(a.shading) for a in (avatar, packed.avatar))
    dropped = f", {kept} of {shapes} shapes" if kept < shapes else ""
    text = (
        f"{avatar.count:,} Gaussians{dropped} in {len(packed.data) / 1e6:.1f} MB ({packed.size / 1e6:.1f} unpacked); "
        f"read back, its pictures are {loss:.0f} dB from the baked avatar's. {SINGLE} ({single / 1e6:.1f} MB) opens "
        f"from disk; the rest of the folder is for a web server. Driving from a webcam is "
        f"{'in it, by MediaPipe (Apache-2.0)' if with_webcam else 'left out'}."
    )
    return {
        "gaussians": avatar.count,
        "shapes": kept,
        "frames": len(packed.performance.times),
        "packed_bytes": len(packed.data),
        "unpacked_bytes": packed.size,
        "packing_db": round(loss, 1),
        "webcam_bytes": len(assets.get(webcam.FILE, b"")),
        "text": text,
    }


def _read(export: Export) -> tuple[BakedAvatar, Performance, Clip]:
    """The baked avatar and what drives it through its clip; where a frame's fit is no good, the last good one holds."""
    import numpy as np
    import torch

    from pipeline.api import LoadedSubject
    from pipeline.avatars import DESCRIPTION, Condition, conditions_of, load_avatar
    from pipeline.avatars.baked import BakedAvatar
    from pipeline.exports.packing import Performance

    subject = export.subject
    folder = subject.stage("export") / "baked"
    if not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"Subject '{subject.name}' has no baked avatar: it was exported with export.bake=false.",
            f"run its video again without that; what is fresh stays: headcast run VIDEO --subject {subject.name}",
        )
    avatar, clip = load_avatar(folder), LoadedSubject(subject).clip
    if not isinstance(avatar, BakedAvatar):
        raise UserError(f"'{folder}' holds no baked avatar.", f"make it anew: headcast rerun {subject.name}")
    if clip.expression_names != avatar.expression_names:
        raise UserError(
            f"Fit and avatar of '{subject.name}' have other coefficients.", f"headcast rerun {subject.name}"
        )
    usable = np.flatnonzero(clip.usable)
    held = usable[np.maximum(np.searchsorted(usable, np.arange(len(clip)), side="right") - 1, 0)]
    rows = torch.from_numpy(held)
    return avatar, Performance(Condition(*(value[rows] for value in conditions_of(clip))), clip.times), clip


def loss_db(avatar: BakedAvatar, performance: Performance, packed: Packed, export: Export) -> float:
    """The least PSNR, over frames of the clip, of what the packed avatar shows against what the avatar does."""
    from pipeline.api import Avatar
    from pipeline.frames import evenly
    from pipeline.metrics import psnr

    before, after = Avatar(avatar, export.threads), Avatar(packed.avatar, export.threads)
    camera = before.camera()
    worst = float("inf")
    for frame in evenly(len(packed.performance.times), LOSS_FRAMES):
        wanted = before.render(performance.conditions.frame(frame), camera=camera) / 255
        got = after.render(packed.performance.conditions.frame(frame), camera=camera) / 255
        worst = min(worst, psnr(wanted, got))
    return worst


def write_page(folder: Path, title: str, assets: dict[str, bytes]) -> None:
    """Write a page twice: its files, and all in one.

    Args:
        folder: an empty one.
        title: for people; anything.
        assets: name -> bytes of the files that the page reads.
    """
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SOURCES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(PAGE)
    for name, data in assets.items():
        (folder / name).write_bytes(data)
    for source in [SOURCES / STYLE, *modules_of(SOURCES / MAIN)]:
        (folder / source.name).write_bytes(source.read_bytes())
    policy = POLICY.format(scripts="'self'", styles="'self'")
    (folder / PAGE).write_text(page.render(title=title, assets=list(assets), single=False, policy=policy))

    style, script = (SOURCES / STYLE).read_text(), joined_modules(SOURCES / MAIN)
    text = page.render(
        title=title,
        assets=list(assets),
        single=True,
        policy=POLICY.format(scripts=_hash(script), styles=_hash(style)),
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        embedded={name: base64.b64encode(data).decode() for name, data in assets.items()},
    )
    (folder / SINGLE).write_text(text)


def modules_of(main: Path) -> list[Path]:
    """The files of a module and of all that it imports, each after those that it needs."""
    found: list[Path] = []
    for _, _, name in IMPORT.findall(main.read_text()):
        found += [path for path in modules_of(main.with_name(f"{name}.js")) if path not in found]
    return [*found, main]


def joined_modules(main: Path) -> str:
    """One script of a module and all that it imports: each becomes a function that is called once, in order.

    Pages opened from disk may not load modules. Imports and exports are written as the top of main.js says.
    """
    parts = []
    for path in modules_of(main):
        text = path.read_text()
        body = EXPORT.sub(r"\1", IMPORT.sub(_taken, text))
        given = ", ".join(name for _, name in EXPORT.findall(text))
        parts.append(f"const module_{path.stem} = (() => {{\n{body}\nreturn {{ {given} }};\n}})();\n")
    return "\n".join(parts)


def _taken(found: re.Match[str]) -> str:
    whole, names, module = found.groups()
    return f"const {whole or f'{{ {names} }}'} = module_{module};\n"


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
