"""Benchmark of faults: processes are killed with `kill -9` at random moments, and the same command is given again.

The stages are those that do next to nothing (`stages/noop.py`), in real processes. Most kills hit runs without
Prefect (`python -m stages`), which starts in a tenth of the time; some hit `headcast run` on its embedded server, some
the worker and the server of `headcast serve`. Another process reads every finished stage all the time. After each kill
nothing that was finished may be lost or different, and in the end all must equal an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.dataset import Dataset, Subject
from pipeline.errors import StageError
from pipeline.run import RunRequest
from pipeline.stage import MANIFEST, damaged_output, read_manifest

MARK = "HEADCAST_BENCH_FAULTS"
"""Set for every process of the bench, so that none of others is ever killed."""
BEHAVIOUR = {"steps": 6, "bytes": 20_000}
PACES = (0.0, 0.1, 0.4)
"""Seconds a stage takes: with none, most moments are at the beginning or end of a stage."""
MOST_KILLS = 4
"""Of one subject."""
PATIENCE_SECONDS = 240.0
SHARES = {"stage": 0.24, "run": 0.16, "group": 0.2, "replace": 0.2, "command": 0.08, "worker": 0.06, "server": 0.06}
WHAT = {
    "stage": "the process of a stage",
    "run": "the run, which leaves its stage's process behind",
    "group": "the run and its stage's process at once",
    "replace": "the same while a finished stage is made again",
    "command": "`headcast run` on Prefect's embedded server",
    "worker": "the worker of `headcast serve`, with its runs",
    "server": "the server of `headcast serve`",
}


@dataclass
class Count:
    """What became of the kills of one kind."""

    kills: int = 0
    commands: int = 0
    lost: list[str] = field(default_factory=list)
    """Finished stages that were gone or different after a kill."""
    unequal: list[str] = field(default_factory=list)
    """Stages that do not equal those of the undisturbed run in the end."""
    left: list[str] = field(default_factory=list)
    """Processes and locks that outlived their run."""
    torn: list[str] = field(default_factory=list)
    """Half-written stages that the reader saw."""
    recovery: list[float] = field(default_factory=list)
    """Seconds from a kill until everything was finished."""


def bench(
    stages: Sequence[str], kills: int, seed: int, report: Callable[[str], None], kinds: Sequence[str] = tuple(SHARES)
) -> dict[str, Any]:
    """Kill, and count what was lost.

    Args:
        stages: names, in order.
        kills: how many, shared among the kinds.
        seed: of the moments.
        report: takes a line before each part.
        kinds: what is killed, of `SHARES`.

    Raises:
        StageError: a run does not end, or ends badly without having been killed.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="headcast-faults-") as folder:
        site = Site(Path(folder), stages)
        report("an undisturbed run")
        site.measure()
        counts = {kind: Count() for kind in kinds}
        whole = sum(SHARES[kind] for kind in kinds)
        try:
            with site.reader() as torn:
                for kind, count in counts.items():
                    wanted = max(round(kills * SHARES[kind] / whole), 1)
                    report(f"{wanted} times: {WHAT[kind]}")
                    if kind in ("worker", "server"):
                        _disturb_service(site, kind, wanted, rng, count)
                    while count.kills < wanted:
                        _disturb(site, kind, min(rng.randint(1, MOST_KILLS), wanted - count.kills), rng, count)
        finally:
            site.end_all()
        for place in torn:
            counts.get(place.split("-", 1)[0], next(iter(counts.values()))).torn.append(place)
    return {
        "schema": 1,
        "seed": seed,
        "kills": sum(count.kills for count in counts.values()),
        "reads": site.reads,
        "whole": not any(c.lost or c.unequal or c.left or c.torn for c in counts.values()),
        "kinds": [
            {
                "kind": kind,
                "what": WHAT[kind],
                **{name: value for name, value in vars(count).items() if name != "recovery"},
                "longest_recovery_seconds": round(max(count.recovery, default=0.0), 2),
            }
            for kind, count in counts.items()
        ],
    }


class Site:
    """A dataset, a Prefect home and a clip of the bench's own, and the processes that work there."""

    def __init__(self, folder: Path, stages: Sequence[str]) -> None:
        import numpy as np

        from pipeline.video import write_video

        self.stages = stages
        self.data = folder / "data"
        self.home = folder / "prefect"
        self.clip = folder / "clip.mp4"
        self.token = secrets.token_hex(8)
        self.seconds: dict[tuple[bool, float], float] = {}
        """How long an undisturbed run takes: through the whole command or not, by pace."""
        self.expected: dict[str, tuple[str, str]] = {}
        self.reads = 0
        self.output = folder / "log"
        self.told = 0
        """Bytes of it when the last process was started."""
        self.output.touch()
        self.data.mkdir()
        write_video(self.clip, [np.full((64, 80, 3), shade, np.uint8) for shade in (90, 40, 90)], 25)

    def subject(self, name: str) -> Subject:
        return Dataset(self.data).subject(name)

    def start(self, arguments: list[str], pace: float, server: str | None = None) -> subprocess.Popen[bytes]:
        """Start a process of the bench in a group of its own; what it says goes to a file."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
        environment |= {"PREFECT_API_URL": server} if server is not None else {}
        environment |= {
            MARK: self.token,
            "HEADCAST_STAGES": "noop",
            "HEADCAST_NOOP": json.dumps({**BEHAVIOUR, "seconds": pace}),
            "PREFECT_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self.told = self.output.stat().st_size
        with open(self.output, "ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def run(self, name: str, first: str | None, whole_command: bool) -> list[str]:
        """Arguments of a run of a subject."""
        if whole_command:
            options = ["--subject", name, "--data", str(self.data), "--no-check", "--stage-minutes", "5"]
            return ["-m", "pipeline.cli", "run", str(self.clip), *options]
        request = RunRequest(
            data=self.data,
            subject=name,
            videos=(self.clip,),
            first=first,
            check=False,
            stage_minutes=5,
            wait_minutes=1,  # a stage's process may hold the subject for a moment longer than its run
        )
        return ["-m", "stages", request.model_dump_json()]

    def processes(self) -> dict[int, str]:
        """Living processes of the bench and their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.token}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def kill(self, chosen: Callable[[str], bool]) -> int:
        """`kill -9` the processes whose command line is chosen, at once."""
        killed = 0
        for process, command in self.processes().items():
            if chosen(command):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed += 1
        return killed

    def end_all(self) -> None:
        """Leave no process behind."""
        while self.kill(lambda command: True):
            time.sleep(0.05)

    def measure(self) -> None:
        """Undisturbed runs: what they make, and how long they take."""
        for pace in PACES:
            started = time.monotonic()
            self.wait(self.start(self.run(f"undisturbed-{pace}".replace(".", "-"), None, False), pace))
            self.seconds[False, pace] = time.monotonic() - started
        self.expected = self.keys(self.subject("undisturbed-0-0"))

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Exit code of a process.

        Raises:
            StageError: it does not end.
        """
        try:
            return process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise StageError("A run does not end.", f"its log: {self.log()}") from None

    def log(self) -> str:
        """The last words of the bench's processes."""
        return self.output.read_text(errors="replace")[-2000:]

    def keys(self, subject: Subject) -> dict[str, tuple[str, str]]:
        """Key and digest of each finished stage that is whole."""
        found = {}
        for stage in self.stages:
            manifest = read_manifest(subject.stage(stage))
            if manifest is not None and damaged_output(subject.stage(stage), manifest) is None:
                found[stage] = (manifest["key"], manifest["digest"])
        return found

    def manifests(self, subject: Subject) -> dict[str, bytes]:
        """The manifests as they are."""
        found = {}
        for stage in self.stages:
            with contextlib.suppress(OSError):
                found[stage] = (subject.stage(stage) / MANIFEST).read_bytes()
        return found

    def check_end(self, subject: Subject, count: Count) -> None:
        """Count what differs from the undisturbed run."""
        keys = self.keys(subject)
        count.unequal += [f"{subject.name}/{stage}" for stage in self.stages if keys.get(stage) != self.expected[stage]]

    def check_left(self, subject: Subject, count: Count, keep: Callable[[str], bool] = lambda command: False) -> None:
        """Count processes that outlive their run by more than a moment, and a lock that is still held."""
        left: list[str] = []
        for _ in range(100):
            left = [command for command in self.processes().values() if not keep(command)]
            if not left:
                break
            time.sleep(0.1)
        count.left += left + ([f"the lock of {subject.name}"] if subject.running() else [])

    @contextlib.contextmanager
    def service(self, pace: float, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
        """A service of the dataset (`headcast serve`) and the URL of its API."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        service = self.start(["-m", "pipeline.cli", "serve", "--data", str(self.data), "--port", port, *options], pace)
        try:
            until(self, service, lambda: b"Submit: headcast submit" in self.output.read_bytes()[self.told :])
            yield service, f"http://127.0.0.1:{port}/api"
        finally:
            service.terminate()
            self.wait(service)

    def runs_left(self) -> list[str]:
        """Runs that the service still takes for running, though every subject is finished."""
        for _ in range(60):
            queue = [sys.executable, "-m", "pipeline.cli", "queue", "--data", str(self.data), "--json"]
            done = subprocess.run(queue, capture_output=True, check=True)
            left = [run["name"] for run in json.loads(done.stdout)["runs"] if run["state"].lower() == "running"]
            if not left:
                break
            time.sleep(2.0)
        return left

    @contextlib.contextmanager
    def reader(self) -> Iterator[list[str]]:
        """A process that reads all finished stages all the time; gives the list of torn ones, filled at the end."""
        torn: list[str] = []
        script = "import sys; from pipeline.bench_faults import watch; watch(sys.argv[1], sys.argv[2:])"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(self.data), *self.stages],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            yield torn
        finally:
            answer = json.loads(process.communicate()[0])
            torn += answer["torn"]
            self.reads = answer["reads"]


def watch(data: str, stages: Sequence[str]) -> None:
    """The reader: verify every finished stage against its manifest until standard input is closed, then tell."""
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    torn, reads = set(), 0
    while not ended.wait(0.02):
        for subject in Dataset(Path(data)).subjects():
            for stage in stages:
                folder = subject.stage(stage)
                manifest = read_manifest(folder)
                if manifest is None:
                    continue
                reads += 1
                # A stage that is put in the place of another meanwhile has another manifest.
                if damaged_output(folder, manifest) is not None and read_manifest(folder) == manifest:
                    torn.add(f"{subject.name}/{stage}")
    sys.stdout.write(json.dumps({"torn": sorted(torn), "reads": reads}))


def _disturb(site: Site, kind: str, kills: int, rng: random.Random, count: Count) -> None:
    """Kill a subject's runs so often, give the command until it is done, and check after each."""
    pace = rng.choice(PACES)
    subject = site.subject(f"{kind}-{count.kills}-{count.commands}")
    first = "decode" if kind == "replace" else None
    whole = kind == "command"
    if first is not None:
        site.wait(site.start(site.run(subject.name, None, False), 0.0))
    finished = site.manifests(subject)
    killed_at: float | None = None
    while True:
        count.commands += 1
        process = site.start(site.run(subject.name, first, whole), pace)
        if kills > 0:
            # The command's time is not known beforehand; its start is most of it.
            seconds = site.seconds.get((whole, pace), 8.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.2, 1.0) * seconds)
        hit = kills > 0 and process.poll() is None and _kill(site, kind, process)
        if hit:
            killed_at = killed_at or time.monotonic()
            kills, count.kills = kills - 1, count.kills + 1
        code = site.wait(process)
        now = site.manifests(subject)
        for stage, manifest in finished.items():
            if now.get(stage) != manifest and not (first == stage and _is_safe(site, subject, stage)):
                count.lost.append(f"{subject.name}/{stage}")
        finished = now
        if code == 0:
            break
        if not hit:
            raise StageError(f"A run ended with code {code} without having been killed.", f"its log: {site.log()}")
    if killed_at is not None:
        count.recovery.append(time.monotonic() - killed_at)
    site.check_end(subject, count)
    site.check_left(subject, count)


def _disturb_service(site: Site, kind: str, kills: int, rng: random.Random, count: Count) -> None:
    """Kill worker or server of a service while it works on a subject; the service itself must finish it."""
    with site.service(PACES[-1]) as (service, _):
        while count.kills < kills:
            subject = site.subject(f"{kind}-{count.kills}")
            submit = ["submit", str(site.clip), "--subject", subject.name, "--no-check", "--data", str(site.data)]
            count.commands += 1
            while site.wait(site.start(["-m", "pipeline.cli", *submit], PACES[-1])) != 0:
                count.commands += 1  # the server that was killed is being started again
                if count.commands > 10 * kills:
                    raise StageError("The service takes no subject.", f"its log: {site.log()}")
            until(site, service, lambda subject=subject: subject.work.is_dir())  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 0.8) * len(site.stages) * PACES[-1])
            finished, killed_at = site.manifests(subject), time.monotonic()
            if kind == "server":
                hit = site.kill(lambda command: " server start" in command)
            else:
                hit = site.kill(lambda command: not any(word in command for word in (" server start", " serve ")))
            count.kills += hit > 0
            until(site, service, lambda subject=subject: len(site.keys(subject)) == len(site.stages))  # type: ignore[misc]
            count.recovery.append(time.monotonic() - killed_at)
            now = site.manifests(subject)
            count.lost += [f"{subject.name}/{stage}" for stage in finished if now[stage] != finished[stage]]
            site.check_end(subject, count)
        until(site, service, lambda: not any(Subject(path).running() for path in site.data.glob(f"{kind}-*")))
        count.left += site.runs_left()
    site.check_left(subject, count)


def until(site: Site, service: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Wait while a service works.

    Raises:
        StageError: it has ended, or takes for ever.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end or service.poll() is not None:
            raise StageError("The service does not get on.", f"its log: {site.log()}")
        time.sleep(0.05)


def _kill(site: Site, kind: str, process: subprocess.Popen[bytes]) -> bool:
    """Kill what the kind names; whether there was such a process."""
    if kind == "stage":
        return site.kill(_is_stage) > 0
    if kind in ("run", "command"):
        os.killpg(process.pid, signal.SIGKILL)
        return True
    return site.kill(lambda command: True) > 0


def _is_stage(command: str) -> bool:
    """Whether this is the process of a stage (`python -m stages DESCRIPTOR`)."""
    return " -m stages " in command and command.rpartition(" ")[2].isdigit()


def _is_safe(site: Site, subject: Subject, stage: str) -> bool:
    """Whether a stage that is made again is there in full: in its place, or finished and waiting for its rename."""
    if site.keys(subject).get(stage) == site.expected[stage]:
        return True
    waiting = [folder for folder in subject.work.glob(f"{stage}-*") if read_manifest(folder) is not None]
    return any(damaged_output(folder, read_manifest(folder) or {}) is None for folder in waiting)


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| `kill -9` of | kills | commands | finished and lost | torn reads | unequal results | left running "
        "| longest recovery s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in document["kinds"]:
        lines.append(
            f"| {kind['what']} | {kind['kills']} | {kind['commands']} | {len(kind['lost'])} | {len(kind['torn'])} "
            f"| {len(kind['unequal'])} | {len(kind['left'])} | {kind['longest_recovery_seconds']:.1f} |"
        )
    lines.append(f"\n{document['kills']} kills, seed {document['seed']}; {document['reads']} reads meanwhile.")
    return "\n".join(lines)
