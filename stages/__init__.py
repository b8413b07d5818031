"""The stages, in the order in which they run. Each is a plain function from finished inputs to files."""

from __future__ import annotations

import os

from pipeline.errors import UserError
from pipeline.stage import Stage


def _chosen() -> tuple[Stage, ...]:
    """The real stages, or with HEADCAST_STAGES=noop those that only orchestration is measured with."""
    which = os.environ.get("HEADCAST_STAGES", "real")
    if which == "noop":
        from stages import noop

        return noop.STAGES
    if which != "real":
        raise UserError(f"HEADCAST_STAGES is '{which}'.", "leave it unset, or say real or noop")
    from stages import decode, evaluate, export, fit, matte, track, train

    return (
        decode.STAGE,
        track.STAGE,
        matte.STAGE,
        fit.STAGE,
        train.STAGE,
        evaluate.STAGE,
        export.STAGE,
    )


STAGES: tuple[Stage, ...] = _chosen()
