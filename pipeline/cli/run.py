"""`headcast run`, `rerun` and `demo`: one subject brought up to date."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli.common import Answer, Common, Settings, Store, start_flow
from pipeline.errors import UserError


@dataclass(frozen=True)
class Run(Common):
    """Make an avatar from one or more videos of one person, or bring it up to date.

    Stages that are finished and unchanged are left alone; a run that was stopped goes on where it was. Without a video,
    a subject that is there already (--subject) is brought up to date with the settings of its last run.
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
    tracking: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Another tracker's file of the video: a Live Link Face table, or a dump of MediaPipe's landmarks."""
    no_check: bool = False
    """Do not look at new videos beforehand and say what to film again."""
    preset: Literal["quick", "standard", "best"] | None = None
    """quick, by default: a minute or two on two cores, 256 px. standard: minutes, 512 px. best: hours, for a GPU."""
    avatar: Literal["rigged", "gaussianhead", "gaussianhead-plus"] | None = None
    """The avatar model: rigged, which is ours, the fast one and the default (docs/avatars.md compares them)."""
    head: Literal["anny", "flame", "flame2023open", "flame2023", "flame2020", "gnm"] | None = None
    """The head model; anny, by default, needs no licence and no file, headcast doctor tells where the others go."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render; auto takes a GPU where there is one."""
    stage_minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Time limit of each stage, which then works in a process of its own; 120 for what is submitted, else none."""
    store: Store = None
    """An object store that holds the dataset, such as s3://bucket/folder; --data is then this machine's copy."""
    first: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None
    """Run this stage again even if it is fresh, and what follows as needed."""
    last: Annotated[str | None, tyro.conf.arg(name="to", metavar="STAGE")] = None
    """Stop after this stage (decode, track, matte, fit, train, evaluate, export)."""
    set: Settings = ()
    """Change a setting, for example --set train.steps=500; may be given several times (docs/settings.md lists all)."""
    rerun: bool = False
    """When it is done, write a recording of it all for the rerun viewer (headcast export SUBJECT --to rerun)."""

    def answer(self) -> Answer:
        request = self.request()
        if not self.rerun:
            return carry_out(request)
        from pipeline.exports import TARGETS
        from pipeline.exports.rerun import require

        require()  # before hours of work
        *before, needed = TARGETS["rerun"].stages
        if self.last in before:
            raise UserError(
                f"A recording needs stage '{needed}', and --to {self.last} stops before it.", "leave it away"
            )
        document, text, code = carry_out(request)
        if code == 0:
            document |= {"recording": str(self._record(document["subject"]))}
        return document, text, code

    def _record(self, name: str) -> Path:
        from pipeline.exports.rerun import record
        from pipeline.progress import default_reporter
        from pipeline.run import stop_signals

        with stop_signals() as stop_requested:
            return record(self.data, name, reporter=default_reporter(name), stop_requested=stop_requested)

    def request(self) -> Any:
        """The options as a `RunRequest`.

        Raises:
            UserError: neither a video nor a subject is named.
        """
        from pipeline.run import RunRequest

        if not self.videos and self.subject is None:
            raise UserError(
                "No video is named.", "for example: headcast run my_video.mp4; headcast run --help tells more"
            )
        options = {"train.avatar": self.avatar, "fit.head": self.head, "track.person": self.person}
        settings = [*(f"{name}={value}" for name, value in options.items() if value is not None), *self.set]
        return RunRequest(
            data=self.data,
            subject=self.subject,
            videos=self.videos,
            like=self.like,
            alpha=self.alpha,
            tracking=self.tracking,
            check=not self.no_check,
            preset=self.preset,
            settings=tuple(settings),
            first=self.first,
            last=self.last,
            device=self.device,
            stage_minutes=self.stage_minutes,
            store=self.store,
        )

    def resume_command(self) -> str | None:
        from pipeline.dataset import subject_name_for

        return _rerun_command(self.subject or subject_name_for(self.videos[0]), self.data, self.store)


@dataclass(frozen=True)
class Rerun(Common):
    """Run a subject's failed stage, or a named one, and what follows, with the settings of its last run."""

    subject: tyro.conf.Positional[str] = tyro.MISSING
    """The subject's name."""
    first: Annotated[str | None, tyro.conf.arg(name="from", metavar="STAGE")] = None
    """Run this stage again even if it is fresh; by default the first that is not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train and render; auto takes a GPU where there is one."""
    stage_minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Time limit of each stage; stages then work in a process of their own, which is ended when it is over."""
    store: Store = None
    """An object store that holds the dataset, such as s3://bucket/folder; --data is then this machine's copy."""

    def answer(self) -> Answer:
        from pipeline.run import RunRequest

        return carry_out(
            RunRequest(
                data=self.data,
                subject=self.subject,
                first=self.first,
                device=self.device,
                stage_minutes=self.stage_minutes,
                store=self.store,
            )
        )

    def resume_command(self) -> str | None:
        return _rerun_command(self.subject, self.data, self.store)


@dataclass(frozen=True)
class Demo(Common):
    """Run the whole pipeline on the sample clip."""

    preset: Literal["quick", "standard", "best"] = "quick"
    """Budget of the run, as in `headcast run`."""

    def answer(self) -> Answer:
        from pipeline.assets import asset_path, ensure_assets
        from pipeline.progress import default_reporter
        from pipeline.run import RunRequest

        ensure_assets({"sample_clip"}, default_reporter())
        clip = asset_path("sample_clip")
        # The sample is known for what goes wrong in it.
        return carry_out(RunRequest(data=self.data, subject="demo", videos=(clip,), preset=self.preset, check=False))

    def resume_command(self) -> str | None:
        return _rerun_command("demo", self.data)


def _rerun_command(subject: str, data: Path, store: str | None = None) -> str:
    return shlex.join(["headcast", "rerun", subject, "--data", str(data), *(["--store", store] if store else [])])


def carry_out(request: Any) -> Answer:
    """Bring a subject up to date; Prefect starts only when there is something to do."""
    from pipeline.progress import default_reporter
    from pipeline.run import account, check_writable, nothing_to_do, prepare
    from pipeline.stage import inspect_stages
    from stages import STAGES

    states = nothing_to_do(request, STAGES)
    worked: list[str] = []
    if states is None:
        check_writable(request.data)
        from flows.results import results_in
        from flows.subject import subject_flow

        def bring_up_to_date(request: Any) -> Any:
            flow: Any = subject_flow.with_options(**results_in(request.store))
            return flow(request)

        worked = start_flow(bring_up_to_date, request)
    subject, config, wanted = prepare(request, STAGES)
    if states is None:
        states = inspect_stages(subject, wanted, config)
    else:
        default_reporter(subject.name).message(f"{subject.name}: everything is fresh, nothing to do.")
    document = account(subject, states, worked)
    if worked and states[-1].stage == STAGES[-1].name:
        from pipeline.report import next_steps

        steps = [shlex.join(["headcast", *words]) for words in next_steps(subject).values()]
        default_reporter(subject.name).message(f"Next: {'; '.join(steps[:2])}")
    return document, str(subject.report), 0
