"""The subject as a dataset of NeRFBlendShape, INSTA, VHAP or IMavatar: what their programs load, complete.

One module for all four: the layout is the target's name. docs/interchange.md tells what is where.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.exports import Export, choice, number
from pipeline.exports.licence import OPTION, check_flame_licence
from pipeline.interchange import FORMATS
from pipeline.interchange.outgoing import Wanted, outgoing
from pipeline.interchange.rectify import rectified
from pipeline.interchange.sidecar import Sidecar

VERSION = 1
OPTIONS = {
    "flame": "which FLAME to write: 2020, 2023 or 2023open; by default the one that the target's programs read",
    "coefficients": "of nerfblendshape: how many, those that vary most; 46 is what its programs want, 0 keeps all",
    "clip": "number of the clip, from 0, where the subject was filmed in several",
    **OPTION,
}
WANTED = {
    "nerfblendshape": Wanted(),
    "insta": Wanted("flame2020", 300, 100, eyelids=True),
    "vhap": Wanted("flame2023", 300, 100, static_offset=True),
    "imavatar": Wanted("flame2020", 100, 50, square=True),
}

READERS = {
    "nerfblendshape": "NeRFBlendShape and gaussian-head",
    "insta": "INSTA",
    "vhap": "GaussianAvatars and LAM, as VHAP exports it",
    "imavatar": "IMavatar and PointAvatar",
}


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write the dataset into an empty folder.

    Raises:
        UserError: FLAME is not on this machine, may not be passed on, or an option is wrong.
        StageError: stages do not belong together.
    """
    wanted = WANTED[export.target]
    if wanted.flame:
        if "coefficients" in export.options:
            raise UserError(
                f"The export '{export.target}' has no option 'coefficients'.", "its coefficients are FLAME's"
            )
        version = choice(export, "flame", wanted.flame.removeprefix("flame"), "2020", "2023", "2023open")
        wanted = replace(wanted, flame=f"flame{version}")
        _see_that_it_is_there(wanted.flame)
    elif "flame" in export.options:
        raise UserError(f"The export '{export.target}' has no option 'flame'.", "it holds no head model")
    licence = check_flame_licence(export, wanted.flame) if export.target == "insta" else ""
    clip = number(export, "clip", 0, 0, 9999) if "clip" in export.options else None
    layout = importlib.import_module(FORMATS[export.target].module)
    more: dict[str, Any] = {}
    if export.target == "nerfblendshape":
        more["coefficients"] = number(export, "coefficients", 46, 0, 9999)

    found = outgoing(export.subject, wanted, clip=clip, report=export.reporter.message, on_round=_stoppable(export))
    if found.landmarks is not None:
        more["landmarks"] = found.landmarks
    recording, pictures, warped = rectified(found.recording, found.pictures, layout.RECTIFY)
    sidecar = Sidecar(
        format=export.target,
        subject=export.subject.name,
        fps=str(recording.fps),
        numbers=tuple(int(each) for each in recording.numbers),
        basis=recording.basis,
        names=recording.coefficient_names,
        about=found.about,
        flame=found.flame.name if found.flame else "",
        residual_mm=found.residual_mm,
        rectified=warped,
    )
    with export.reporter.task(f"export {export.target}", len(recording), "frames") as task:

        def on_frame() -> None:
            _stoppable(export)()
            task.advance()

        warnings = layout.write(
            recording, pictures, folder, flame=found.flame, sidecar=sidecar, on_frame=on_frame, **more
        )
    told = [f"{len(recording)} frames of {recording.size[0]}x{recording.size[1]} for {READERS[export.target]}"]
    told.append(f"coefficients: {found.about}")
    if found.residual_mm:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in found.residual_mm.items())
        told.append(f"{wanted.flame} stays from the fitted head by (mm): {parts}")
    if warped:
        told.append("rectified, as its readers know no other camera")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    text = ". ".join([*(part[0].upper() + part[1:] for part in told), *(each.rstrip(".") for each in warnings)]) + "."
    text = f"{text} {licence}".strip()
    about = {key: value for key, value in asdict(sidecar).items() if key not in ("numbers", "names")}
    return {"frames": len(recording), "bytes": size, "warnings": warnings, **about, "text": text}


def _see_that_it_is_there(flame: str) -> None:
    """Refuse what needs a FLAME that is not on this machine.

    Raises:
        UserError: where to get it and where it goes, or which other one is there.
    """
    from pipeline.heads import head_file
    from pipeline.heads.flame import FLAME_FILES

    file = head_file(flame)
    if file.path.is_file():
        return
    others = [each.name.removeprefix("flame") for each in FLAME_FILES if each.path.is_file()]
    other = f"\n     or, for programs that read what is here: --set flame={others[0]}" if others else ""
    raise UserError(f"This needs {file.title}, which is not on this machine.", file.missing() + other)


def _stoppable(export: Export) -> Any:
    from pipeline.errors import Interrupted

    def check() -> None:
        if export.stop_requested():
            raise Interrupted("Stopped as asked; nothing was written.")

    return check
