"""The command line. Light at the top: `headcast --help` must not wait for torch or Prefect."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline import __version__
from pipeline.errors import HeadcastError, Interrupted, UserError
from pipeline.threads import one_blas_thread

Data = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Json = Annotated[bool, tyro.conf.arg(name="json")]
Settings = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="SECTION.FIELD=VALUE")
]


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    data: Data = Path("data")
    """The dataset directory, a folder of subjects."""
    json: Json = False
    """Print one JSON document on standard output and nothing else there."""
    verbose: bool = False
    """Show what happens inside, and tracebacks of defects."""


@dataclass(frozen=True)
class Run(Common):
    """Make an avatar from one or more videos of one person, or bring it up to date.

    Stages that are finished and unchanged are left alone; a run that was stopped goes on where it was.
    """

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="VIDEO...")] = ()
    """A video file, or a folder of images; several clips of the same person make one avatar."""
    subject: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The subject's name; by default made from the first file's name."""
    person: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Which of several people: their number from the left where the most are seen; by default who is seen longest."""
    like: Annotated[Path | None, tyro.conf.arg(metavar="PHOTO")] = None
    """Which of several people: a photograph of the one; needs a face recognition model of your own."""
    alpha: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER_OR_VIDEO")] = ()
    """Alphas of your own: a video or a folder of images, one for every frame; for several clips given once for each."""
    no_check: bool = False
    """Do not look at new videos beforehand and say what to film again."""
    preset: Literal["quick", "standard", "best"] = "quick"
    """quick: a minute or two on two cores, 256 px. standard: minutes, 512 px. best: the paper's budget, for a GPU."""
    avatar: Literal["rigged", "gaussianhead", "gaussianhead-plus"] = "rigged"
    """The avatar model: rigged is ours and the fast one (docs/avatars.md compares them)."""
    head: Literal["anny", "flame", "flame2023open", "flame2023", "flame2020", "gnm"] = "anny"
    """The head model; anny needs no licence and no file, headcast doctor tells where the others go."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render; auto takes a GPU where there is one."""
    first: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None
    """Run this stage again even if it is fresh, and what follows as needed."""
    last: Annotated[str | None, tyro.conf.arg(name="to", metavar="STAGE")] = None
    """Stop after this stage (decode, track, matte, fit, train, evaluate, export)."""
    set: Settings = ()
    """Change a setting, for example --set train.steps=500; may be given several times (docs/settings.md lists all)."""


@dataclass(frozen=True)
class Status(Common):
    """Show what is fresh, stale, failed or running, and why."""

    subject: tyro.conf.Positional[str | None] = None
    """One subject in detail; by default all of them."""


@dataclass(frozen=True)
class Rerun(Common):
    """Run a subject's failed stage, or a named one, and what follows, with the settings of its last run."""

    subject: tyro.conf.Positional[str] = tyro.MISSING
    """The subject's name."""
    first: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None
    """Run this stage again even if it is fresh; by default the first that is not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class Doctor(Common):
    """Check everything the stages will need, before any work. Exit code 0: fine, 1: degraded, 2: blocked."""

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[VIDEO...]")] = ()
    """Check these clips of one person too: is the face large, sharp and lit, does it turn and speak."""


@dataclass(frozen=True)
class Assets(Common):
    """List the models and sample clips with their licences, or fetch them ahead of time for an offline site."""

    action: tyro.conf.Positional[Literal["list", "fetch"]] = "list"
    """list them, or fetch what is missing."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these; by default all that a run or the tests need (the LPIPS weights, 244 MB, only when named)."""


@dataclass(frozen=True)
class Demo(Common):
    """Run the whole pipeline on the sample clip."""

    preset: Literal["quick", "standard", "best"] = "quick"
    """Budget of the run, as in `headcast run`."""


@dataclass(frozen=True)
class Bench(Common):
    """Measure this machine; times are noisy, so leave it alone meanwhile.

    raster: the rasteriser's forward and backward pass on the three standard scenes against its torch reference and
    against the arithmetic limit, the pairs of pixels and Gaussians that it evaluates against those that contribute, the
    photometric loss, rendering alone, and a whole training step; about a minute. run: whole runs, twice each. matte:
    decode, track and matte on composites of known alpha (a synthetic subject with loose hair over footage, with noise
    and compression), SAD, MSE, MAD, gradient error, dtSSD, IoU and flicker; a few minutes. With videos also what their
    whole runs, kept in --data, say of the matte; of one filmed before a screen, the network's alpha against the key.
    avatars: every avatar model on every clip, likeness on held-out frames beside that of the best training frame and
    other baselines, speed and size, with a picture in --data/SUBJECT/bench/; what is finished there is not done again,
    and the exit code is 1 if a model failed on a clip. ablation: the same for gaussianhead with one part left out each.
    """

    what: tyro.conf.Positional[Literal["raster", "run", "matte", "avatars", "ablation"]] = "raster"
    """What to measure."""
    videos: tyro.conf.Positional[tuple[Path, ...]] = ()
    """For run, avatars and ablation: the clips; by default the sample clip. For matte: clips beside the composites."""
    preset: Literal["quick", "standard", "best"] = "quick"
    """The budget of a run; not for raster."""
    avatar: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()
    """For avatars: only this model (as headcast run --help names them); may be given several times."""
    set: Settings = ()
    """For avatars and ablation: a setting of every run, as in headcast run."""
    threads: int | None = None
    """For raster: threads of everything; by default as many as torch takes."""
    peak_gflops: float = 456.0
    """For raster: float32 arithmetic per second that the limit supposes, in 1e9 (default: two AMD Zen 5 cores)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: parse, run, print errors bare, exit with the promised code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["version"]):
        sys.stdout.write(f"headcast {__version__}\n")
        return
    one_blas_thread()
    commands: dict[str, Callable[..., Any]] = {
        "run": Run,
        "status": Status,
        "rerun": Rerun,
        "doctor": Doctor,
        "assets": Assets,
        "demo": Demo,
        "bench": Bench,
    }
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="headcast",
        description="From a video of one person to a head avatar that can be driven. Start with: headcast demo",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    sys.exit(execute(command))


def execute(command: Any) -> int:
    """Run a parsed command and return its exit code."""
    _set_up_logging(command.verbose)
    handlers: dict[type, Callable[[Any], tuple[dict[str, Any], str, int]]] = {
        Run: _run,
        Status: _status,
        Rerun: _rerun,
        Doctor: _doctor,
        Assets: _assets,
        Demo: _demo,
        Bench: _bench,
    }
    with _stdout_kept_clean(command.json) as answer:
        try:
            document, text, code = handlers[type(command)](command)
        except (HeadcastError, KeyboardInterrupt) as error:
            return _report_error(command, error, answer)
        answer(json.dumps(document, indent=2, ensure_ascii=False) if command.json else text)
        return code


def _set_up_logging(verbose: bool) -> None:
    """Warnings on standard error; the orchestrator's own lines only when asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    if not verbose:
        handler.addFilter(lambda record: record.name.partition(".")[0] in ("pipeline", "stages", "flows"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


@contextlib.contextmanager
def _stdout_kept_clean(as_json: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that prints the answer; with `--json`, whatever else is printed goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    if as_json:
        os.dup2(2, 1)
    try:
        with open(kept, "w", closefd=False) as stream:

            def answer(text: str) -> None:
                stream.write(text + "\n")
                stream.flush()

            yield answer
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _report_error(command: Any, error: BaseException, answer: Callable[[str], None]) -> int:
    """Print an error for a person, and as JSON when asked; after a stop, the command that resumes comes last."""
    if command.verbose:
        logging.getLogger(__name__).debug("traceback", exc_info=error)
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    failure = error if isinstance(error, HeadcastError) else Interrupted("Stopped. What is finished is kept.")
    sys.stderr.write(f"{'' if stopped else 'error: '}{failure}\n")
    resume = _resume_command(command) if stopped else None
    if resume:
        sys.stderr.write(f"To go on: {resume}\n")
    if command.json:
        error_data = {"what": failure.what, "fix": failure.fix, "resume": resume}
        answer(json.dumps({"schema": 1, "error": error_data}, indent=2, ensure_ascii=False))
    return failure.exit_code


def _resume_command(command: Any) -> str | None:
    import shlex

    if not isinstance(command, Run | Rerun | Demo):
        return None
    subject = "demo" if isinstance(command, Demo) else command.subject
    if isinstance(command, Run) and subject is None:
        from pipeline.dataset import subject_name_for

        subject = subject_name_for(command.videos[0])
    return shlex.join(["headcast", "rerun", str(subject), "--data", str(command.data)])


def _run(command: Run) -> tuple[dict[str, Any], str, int]:
    from pipeline.run import RunRequest

    if not command.videos:
        raise UserError("No video is named.", "for example: headcast run my_video.mp4; headcast run --help tells more")
    settings = [f"train.avatar={command.avatar}", f"fit.head={command.head}", *command.set]
    if command.person is not None:
        settings.append(f"track.person={command.person}")
    return _carry_out(
        RunRequest(
            data=command.data,
            subject=command.subject,
            videos=command.videos,
            like=command.like,
            alpha=command.alpha,
            check=not command.no_check,
            preset=command.preset,
            settings=tuple(settings),
            first=command.first,
            last=command.last,
            device=command.device,
        )
    )


def _rerun(command: Rerun) -> tuple[dict[str, Any], str, int]:
    from pipeline.run import RunRequest

    return _carry_out(
        RunRequest(data=command.data, subject=command.subject, first=command.first, device=command.device)
    )


def _demo(command: Demo) -> tuple[dict[str, Any], str, int]:
    from pipeline.assets import asset_path, ensure_assets
    from pipeline.progress import default_reporter
    from pipeline.run import RunRequest

    ensure_assets({"sample_clip"}, default_reporter())
    clip = asset_path("sample_clip")
    # The sample is known for what goes wrong in it.
    return _carry_out(RunRequest(data=command.data, subject="demo", videos=(clip,), preset=command.preset, check=False))


def _carry_out(request: Any) -> tuple[dict[str, Any], str, int]:
    """Bring a subject up to date; Prefect starts only when there is something to do."""
    from pipeline.run import account, check_writable, nothing_to_do, prepare
    from pipeline.stage import inspect_stages
    from stages import STAGES

    states = nothing_to_do(request, STAGES)
    worked: list[str] = []
    subject, config, wanted = prepare(request, STAGES)
    if states is None:
        check_writable(request.data)
        from flows.subject import subject_flow

        try:
            worked = subject_flow(request)
        except (HeadcastError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever Prefect meets while it starts or talks to its server
            raise HeadcastError(
                f"The orchestrator failed: {type(error).__name__}: {error}.",
                "run the same command again, with --verbose for its log; what is finished is kept",
            ) from error
        states = inspect_stages(subject, wanted, config)
    else:
        sys.stderr.write(f"{subject.name}: everything is fresh, nothing to do.\n")
    document = account(subject, states, worked)
    return document, str(subject.report), 0


def _status(command: Status) -> tuple[dict[str, Any], str, int]:
    from pipeline.dataset import Dataset
    from pipeline.run import account, last_config
    from pipeline.stage import inspect_stages
    from stages import STAGES

    dataset = Dataset(command.data)
    subjects = [dataset.existing(command.subject)] if command.subject else dataset.subjects()
    documents = [account(s, inspect_stages(s, STAGES, last_config(s))) for s in subjects]
    if command.subject:
        return documents[0], _status_lines(documents[0]), 0
    text = "\n".join(_status_lines(document) for document in documents)
    return {"schema": 1, "subjects": documents}, text or f"No subjects in '{command.data}'.", 0


def _status_lines(document: dict[str, Any]) -> str:
    lines = [f"{document['subject']}  ({document['folder']})"]
    for stage in document["stages"]:
        verdict = (stage["verdict"] or {}).get("text", "")
        tail = stage["why"] if stage["state"] != "fresh" else verdict
        lines.append(f"  {stage['stage']:<9}{stage['state']:<9}{tail}")
    if document["report"]:
        lines.append(f"  report   {document['report']}")
    return "\n".join(lines)


def _doctor(command: Doctor) -> tuple[dict[str, Any], str, int]:
    from pipeline.config import Config
    from pipeline.doctor import examine
    from pipeline.finding import LEVELS, worst
    from stages import STAGES

    findings = examine(command.data, {name for stage in STAGES for name in stage.assets(Config())}, command.videos)
    lines = [f"{f.level:<9}{f.what}" + (f"\n         -> {f.fix}" if f.fix else "") for f in findings]
    level = worst(findings)
    document = {"schema": 1, "level": level, "findings": [vars(finding) for finding in findings]}
    return document, "\n".join([*lines, f"Overall: {level}."]), LEVELS.index(level)


def _assets(command: Assets) -> tuple[dict[str, Any], str, int]:
    from pipeline.assets import ensure_assets, list_assets
    from pipeline.heads import list_heads
    from pipeline.progress import default_reporter

    assets = list_assets()
    known = {asset["name"] for asset in assets}
    unknown = sorted(set(command.names) - known)
    if unknown:
        raise UserError(f"There is no asset '{unknown[0]}'.", f"choose from: {', '.join(sorted(known))}")
    if command.action == "fetch":
        ensure_assets(set(command.names) or {a["name"] for a in assets if not a["on_request"]}, default_reporter())
    rows = [asset for asset in list_assets() if not command.names or asset["name"] in command.names]
    lines = [_asset_lines(asset) for asset in rows if not asset["matting"]]
    networks = [_asset_lines(asset) for asset in rows if asset["matting"]]
    if networks:
        lines += ["", "Matting networks for --set matte.model=NAME, fetched when one is chosen:", *networks]
    heads = [] if command.names else list_heads()
    if heads:
        lines += ["", "Head models for --head that you bring yourself (anny comes with headcast):"]
        lines += [f"{h['name']:<21}{h['state']:<9}  {h['licence']}\n    {h['path']}, from {h['page']}" for h in heads]
    return {"schema": 1, "assets": rows, "heads": heads}, "\n".join(lines), 0


def _asset_lines(a: dict[str, Any]) -> str:
    size = f"{a['size'] / 1e6:>7.1f}" if a["size"] % 1_000_000 else f"{a['size'] // 1_000_000:>5}  "
    return f"{a['name']:<22}{a['state']:<9}{size} MB  {a['licence']}\n    {a['about']}; {a['path']}"


def _bench(command: Bench) -> tuple[dict[str, Any], str, int]:
    from pipeline.progress import default_reporter

    for option, given, meant in (
        ("--set", command.set, ("avatars", "ablation")),
        ("--avatar", command.avatar, ("avatars",)),
    ):
        if given and command.what not in meant:
            raise UserError(
                f"{option} says nothing to bench {command.what}.", f"it is for: bench {' and '.join(meant)}"
            )
    if command.what == "raster":
        for name, value in (("threads", command.threads), ("peak-gflops", command.peak_gflops)):
            if value is not None and value <= 0:
                raise UserError(f"--{name} is {value}.", "give a number above 0")
        from pipeline.bench_raster import bench, table

        reporter = default_reporter()
        document = bench(threads=command.threads, peak_gflops=command.peak_gflops, report=reporter.message)
        return document, table(document), 0
    from pipeline import bench_avatars, bench_matte, bench_run
    from pipeline.assets import SAMPLE_CLIP, asset_path, ensure_assets
    from pipeline.config import AVATARS, Config
    from pipeline.run import usable_cores
    from stages import STAGES

    needed = {name for stage in STAGES for name in stage.assets(Config())}
    if command.what == "matte":
        reporter = default_reporter()
        ensure_assets(needed | set(bench_matte.GROUND_CLIPS), reporter)
        document = bench_matte.bench(command.videos, command.preset, command.data, report=reporter.message)
        return document, bench_matte.table(document), 0
    reporter = default_reporter()
    ensure_assets(needed, reporter)
    videos = command.videos or (asset_path(SAMPLE_CLIP),)
    if command.what == "run":
        document = bench_run.bench_runs(videos, command.preset)
        return document, bench_run.table(document), 0
    unknown = sorted(set(command.avatar) - set(AVATARS))
    if unknown:
        raise UserError(f"There is no avatar model '{unknown[0]}' to train.", f"choose from: {', '.join(AVATARS)}")
    models = {name: bench_avatars.Row(name) for name in command.avatar or AVATARS}
    rows = bench_avatars.ABLATION if command.what == "ablation" else models
    document = bench_avatars.bench(
        videos,
        rows,
        command.what,
        command.preset,
        command.data,
        command.set,
        threads=usable_cores(),
        report=reporter.message,
    )
    return document, bench_avatars.table(document), 0 if document["complete"] else 1


if __name__ == "__main__":
    main()
