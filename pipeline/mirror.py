"""A run's copy of a subject kept in step with an object store: what is finished there is taken, what is made goes back.

With no store every step does nothing, so that a run reads the same with one and without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.dataset import RUN_RECORD, Subject
from pipeline.errors import StoreDamaged, UserError
from pipeline.progress import Reporter
from pipeline.stage import MANIFEST, State, read_manifest
from pipeline.store import SOURCE, DatasetStore, open_store, source_key


@dataclass
class Mirror:
    """A subject here and in a store; the caller holds it in both places."""

    subject: Subject
    reporter: Reporter
    store: DatasetStore | None = None
    still_held: Callable[[], None] = lambda: None
    """Raises when the subject is no longer held, before anything is published."""

    def pull_source(self, known: bool) -> None:
        """Take over what the store knows of the subject: the settings of its last run and its source.

        Args:
            known: whether the source is what the store has; else new videos are given in its place.

        Raises:
            StoreDamaged: the source is not what was stored.
        """
        if self.store is None or not known:
            return
        self.store.pull_run_record(self.subject)
        with self._damage_set_aside():
            self.store.pull(self.subject, SOURCE, reporter=self.reporter)

    def push_source(self) -> None:
        """Take the source and the settings of this run to the store."""
        if self.store is not None:
            self.store.push_source(self.subject, self.reporter, self.still_held)

    def fetch(self, inspect: Callable[[], list[State]]) -> list[State]:
        """Bring the stages that are not fresh here but finished there, with the keys that are wanted, in order.

        What is damaged there is named and put aside; the stage is then left to be made here.

        Args:
            inspect: tells the states of the stages, in order (`pipeline.stage.inspect_stages`).

        Returns:
            The states after that.
        """
        states = inspect()
        while self.store is not None:
            first = next((state for state in states if state.name != "fresh"), None)
            if first is None or first.key is None or not self._bring(first.stage, first.key):
                break
            states = inspect()
        return states

    def _bring(self, stage: str, key: str) -> bool:
        """Pull a stage if the store has it under this key; whether it did."""
        assert self.store is not None
        try:
            with self._damage_set_aside():
                manifest = self.store.manifest(self.subject.name, stage)
                wanted = manifest is not None and manifest["key"] == key
                return wanted and bool(self.store.pull(self.subject, stage, reporter=self.reporter))
        except StoreDamaged as damage:
            self.reporter.message(f"{damage.what} It is made anew.")
            return False

    def publish(self, stage: str) -> None:
        """Take a finished stage to the store, unless the store has it."""
        if self.store is not None:
            self.store.push(self.subject, stage, self.reporter, self.still_held)

    def push_report(self) -> None:
        """Take the report to the store."""
        if self.store is not None and self.subject.report.is_file():
            self.still_held()
            self.store.push_report(self.subject)

    @contextlib.contextmanager
    def _damage_set_aside(self) -> Iterator[None]:
        """Put what turns out to be damaged in the store aside, so that the next push replaces it."""
        try:
            yield
        except StoreDamaged as damage:
            assert self.store is not None
            self.still_held()
            self.store.set_aside(damage)
            raise


def open_mirror(url: str | None, subject: Subject, reporter: Reporter) -> Mirror:
    """The mirror of a subject at a store's URL, or one that does nothing where there is none.

    Raises:
        UserError: there is no such store, or it refuses us.
        Unavailable: it does not answer.
    """
    if url is None:
        return Mirror(subject, reporter)
    store = open_store(url)
    store.check()
    return Mirror(subject, reporter, store)


def in_step(url: str, subject: Subject, new: bool = False) -> bool:
    """Whether a store has the source, settings and stages of the local copy and no others; reads only.

    Args:
        url: of the store.
        subject: the local copy.
        new: whether the subject need not be anywhere yet.

    Raises:
        UserError, Unavailable: as `open_mirror`; UserError also where neither knows the subject.
    """
    store = open_store(url)
    store.check()
    there = store.manifests(subject.name)
    here: dict[str, Any] = {path.parent.name: read_manifest(path.parent) for path in subject.root.glob(f"*/{MANIFEST}")}
    try:
        here[SOURCE] = {"key": source_key(subject)}
    except UserError:
        if not new and SOURCE not in there:
            known = ", ".join(store.subjects()) or "none"
            raise UserError(
                f"No subject '{subject.name}' in '{store.url}' (there: {known}).",
                "check the name and --store, or make it with: headcast run VIDEO --subject NAME --store URL",
            ) from None
        return False
    run_record = subject.root / RUN_RECORD
    return (
        set(here) == set(there)
        and all(manifest is not None and manifest["key"] == there[part]["key"] for part, manifest in here.items())
        and run_record.is_file()
        and run_record.read_bytes() == store.run_record(subject.name)
    )
