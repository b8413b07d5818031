"""`headcast status`: how the subjects stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from pipeline.cli.common import Answer, Common


@dataclass(frozen=True)
class Status(Common):
    """Show what is fresh, stale, failed or running, and why."""

    subject: tyro.conf.Positional[str | None] = None
    """One subject in detail; by default all of them."""

    def answer(self) -> Answer:
        from pipeline.dataset import Dataset
        from pipeline.run import account, last_config
        from pipeline.stage import inspect_stages
        from stages import STAGES

        dataset = Dataset(self.data)
        subjects = [dataset.existing(self.subject)] if self.subject else dataset.subjects()
        documents = [account(s, inspect_stages(s, STAGES, last_config(s))) for s in subjects]
        if self.subject:
            return documents[0], _status_lines(documents[0]), 0
        text = "\n".join(_status_lines(document) for document in documents)
        return {"schema": 1, "subjects": documents}, text or f"No subjects in '{self.data}'.", 0


def _status_lines(document: dict[str, Any]) -> str:
    lines = [f"{document['subject']}  ({document['folder']})"]
    for stage in document["stages"]:
        verdict = (stage["verdict"] or {}).get("text", "")
        tail = stage["why"] if stage["state"] != "fresh" else verdict
        lines.append(f"  {stage['stage']:<9}{stage['state']:<9}{tail}")
    if document["report"]:
        lines.append(f"  report   {document['report']}")
    return "\n".join(lines)
