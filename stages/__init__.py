"""The stages, in the order in which they run. Each is a plain function from finished inputs to files."""

from __future__ import annotations

from pipeline.stage import Stage
from stages import decode, evaluate, export, fit, matte, track, train

STAGES: tuple[Stage, ...] = (
    decode.STAGE,
    track.STAGE,
    matte.STAGE,
    fit.STAGE,
    train.STAGE,
    evaluate.STAGE,
    export.STAGE,
)
