"""Colours as users name them: a few words, or six hexadecimal digits."""

from __future__ import annotations

import re

COLOURS = {"white": "ffffff", "black": "000000", "grey": "808080", "green": "00b140"}


def check_colour(text: str, *others: str) -> str:
    """The text, where it names a colour or is one of `others`.

    Raises:
        ValueError: it does not.
    """
    if text not in (*others, *COLOURS) and not re.fullmatch(r"#?[0-9a-fA-F]{6}", text):
        names = ", ".join((*others, *COLOURS))
        raise ValueError(f"choose {names}, or give six hexadecimal digits such as 20242c")
    return text


def colour_of(text: str) -> tuple[float, ...]:
    """sRGB in [0, 1] of a text that `check_colour` let pass."""
    return tuple(byte / 255 for byte in bytes.fromhex(COLOURS.get(text, text).removeprefix("#")))
