"""Summaries of a dataset as Prometheus metrics, in the text format that node_exporter's textfile collector reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from pipeline.stage import StateName
from pipeline.summary import LEVELS, STANDINGS, Summary

STATES: tuple[StateName, ...] = get_args(StateName)
Sample = tuple[dict[str, str], float | None]


def prometheus_text(told: Sequence[Summary]) -> str:
    """The figures of all subjects: gauges without time stamps, as the textfile collector wants them."""
    stages = {stage.stage: None for summary in told for stage in summary.stages}
    by_stage = {name: [s for summary in told for s in summary.stages if s.stage == name] for name in stages}
    families: list[tuple[str, str, Iterable[Sample]]] = [
        (
            "subjects",
            "Subjects of the dataset by how they stand.",
            [({"state": state}, sum(s.standing == state for s in told)) for state in STANDINGS],
        ),
        (
            "verdicts",
            "Subjects by the worst verdict of their finished stages.",
            [({"level": level}, sum(s.level == level for s in told)) for level in LEVELS],
        ),
        (
            "stages",
            "Subjects by the state of each stage.",
            [
                ({"stage": name, "state": state}, sum(s.state == state for s in parts))
                for name, parts in by_stage.items()
                for state in STATES
            ],
        ),
        (
            "stage_seconds",
            "Time that each stage took, of all subjects together.",
            [({"stage": name}, sum(s.seconds or 0.0 for s in parts)) for name, parts in by_stage.items()],
        ),
        (
            "stage_bytes",
            "Size of each stage's finished files, of all subjects together.",
            [({"stage": name}, sum(s.bytes for s in parts)) for name, parts in by_stage.items()],
        ),
        ("subject_psnr_db", "PSNR on held-out frames.", _each(told, "psnr")),
        ("subject_baseline_psnr_db", "PSNR of the best baseline on the same frames.", _each(told, "psnr_baseline")),
        ("subject_bytes", "Size of the subject's finished files.", _each(told, "bytes")),
        (
            "subject_finished_timestamp_seconds",
            "When the subject's last stage was finished.",
            [({"subject": s.subject}, s.last_finished.timestamp() if s.last_finished else None) for s in told],
        ),
        (
            "subject_failed_timestamp_seconds",
            "When a stage of the subject failed last, while it stands as failed.",
            [({"subject": s.subject}, s.failed_at.timestamp() if s.failed_at else None) for s in told],
        ),
    ]
    return "".join(_family(f"headcast_{name}", about, samples) for name, about, samples in families)


def _each(told: Sequence[Summary], field: str) -> list[Sample]:
    return [({"subject": summary.subject}, getattr(summary, field)) for summary in told]


def _family(name: str, about: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        if value is not None:
            inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """A label's value by the exposition format's rules."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
