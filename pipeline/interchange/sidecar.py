"""`headcast.json` beside an exported dataset: what the other layout has no place for.

Frame rate and frame numbers, which coefficients the numbers are, which FLAME they belong to and how far it stays from
the head that was fitted, and what was rectified. Import reads it back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.dataset import write_json
from pipeline.errors import UserError
from pipeline.interchange.checking import Folder
from pipeline.interchange.recording import FLAME_VERSIONS

FILE = "headcast.json"
SCHEMA = 1


@dataclass(frozen=True)
class Sidecar:
    """What `headcast.json` tells.

    Attributes:
        format: of the dataset.
        subject: its name here.
        fps: frames a second, as "30000/1001".
        numbers: [T] the frame's number in its video.
        basis: what the coefficients are. names: [E] of them, in order.
        about: the coefficients in a sentence.
        flame: version; empty where there is no FLAME.
        residual_mm: how far FLAME's vertices stay from the fitted head: {"median": ..., "p95": ...}; None where it is
            FLAME that was fitted.
        rectified: {"K": of the pictures before, "to": of those written, "size": [w,h] before}; empty where nothing was.
        scale: the dataset's lengths in a metre. origin: where its world's origin lies in the head frame, metres.
        left_out: coefficients that were not written -> their deviation in the clip.
    """

    format: str
    subject: str
    fps: str
    numbers: tuple[int, ...]
    basis: str
    names: tuple[str, ...]
    about: str = ""
    flame: str = ""
    residual_mm: dict[str, float] | None = None
    rectified: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    left_out: dict[str, float] = field(default_factory=dict)


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write `headcast.json`."""
    write_json(folder / FILE, {"schema": SCHEMA, **asdict(sidecar)})


def read_sidecar(folder: Folder) -> Sidecar | None:
    """What lies beside the dataset; None where nothing does.

    Raises:
        UserError: it is there and damaged.
    """
    if not folder.has(FILE):
        return None
    document = folder.json(FILE)
    try:
        if document.values.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {document.values.get('schema')!r}, this version reads {SCHEMA}")
        sidecar = Sidecar(
            format=document.text("format"),
            subject=document.text("subject"),
            fps=document.text("fps"),
            numbers=tuple(int(n) for n in document.take("numbers", (None,)).tolist()),
            basis=document.text("basis"),
            names=tuple(str(name) for name in document.values.get("names", ())),
            about=str(document.values.get("about", "")),
            flame=str(document.values.get("flame", "")),
            scale=document.number("scale", 1e-6, 1e6) if "scale" in document else 1.0,
            origin=tuple(document.take("origin", (3,)).tolist()) if "origin" in document else (0.0, 0.0, 0.0),
        )
        if not 0 < Fraction(sidecar.fps) <= 1000:
            raise ValueError(f"fps is {sidecar.fps[:40]}")
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{document.where} cannot be used: {error}.", f"take '{FILE}' away, or mend it") from None
    return sidecar


def flame_version(chosen: str | None, sidecar: Sidecar | None) -> str:
    """The FLAME that a dataset's numbers belong to, as its user or its sidecar says; empty where neither does.

    Raises:
        UserError: they say different ones, or the sidecar names none that there is.
    """
    told = sidecar.flame if sidecar else ""
    if told and told not in FLAME_VERSIONS:
        raise UserError(f"'{FILE}' names '{told[:40]}', which is no FLAME.", f"one of {', '.join(FLAME_VERSIONS)}")
    if told and chosen and chosen != told:
        raise UserError(
            f"The dataset's numbers belong to {told}, by its {FILE}, not to {chosen}.",
            "leave the version out: one's numbers are meaningless in another",
        )
    return chosen or told
