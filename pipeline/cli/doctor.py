"""`headcast doctor`: is everything there, and is this video fit for an avatar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import Answer, Common


@dataclass(frozen=True)
class Doctor(Common):
    """Check everything the stages will need, before any work. Exit code 0: fine, 1: degraded, 2: blocked."""

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[VIDEO...]")] = ()
    """Check these clips of one person too: is the face large, sharp and lit, does it turn and speak."""

    def answer(self) -> Answer:
        from pipeline.config import Config
        from pipeline.doctor import examine
        from pipeline.finding import LEVELS, worst
        from stages import STAGES

        findings = examine(self.data, {name for stage in STAGES for name in stage.assets(Config())}, self.videos)
        lines = [f"{f.level:<9}{f.what}" + (f"\n         -> {f.fix}" if f.fix else "") for f in findings]
        level = worst(findings)
        document = {"schema": 1, "level": level, "findings": [vars(finding) for finding in findings]}
        return document, "\n".join([*lines, f"Overall: {level}."]), LEVELS.index(level)
