"""Write docs/settings.md from the settings themselves; a test checks that it is up to date."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

from pipeline.config import PRESETS, Avatar, describe, preset_config

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"


def settings_page() -> str:
    """The page's text."""
    lines = [
        "# Settings",
        "",
        "Written by `tools/write_settings_doc.py`. Change one with `--set section.field=value`; a stage whose settings",
        "changed runs again, the others stay. Values are shown per preset where presets differ.",
        "",
    ]

    def values_of(name: str) -> list[Any]:
        # What one avatar model alone reads is shown as its presets have it.
        avatar: Avatar = "gaussianhead" if name.startswith("train.gaussianhead.") else "rigged"
        plain = (preset_config(preset, avatar).model_dump() for preset in PRESETS)
        return [functools.reduce(operator.getitem, name.split("."), settings) for settings in plain]

    section = ""
    for name, kind, text in describe():
        head = name.partition(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {section}", "", "| setting | type | value | meaning |", "|---|---|---|---|"]
        values = values_of(name)
        shown = str(values[0]) if len({str(v) for v in values}) == 1 else " / ".join(map(str, values))
        kind = kind.replace("|", "or")
        lines.append(f"| `{name}` | {kind} | {shown} | {' '.join(text.split())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(settings_page())
