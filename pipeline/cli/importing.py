"""`headcast import`: another project's tracked dataset as a subject."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pipeline.cli.common import Answer, Common, Settings, Store
from pipeline.cli.run import carry_out
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.interchange.tracking import Tracked


@dataclass(frozen=True)
class Import(Common):
    """Make a subject of another project's tracked dataset, so that headcast run --from train goes straight on.

    Its frames, alphas, camera, poses and coefficients are taken as they are; nothing is tracked or fitted anew. All is
    checked before anything is written. Formats (what each holds: docs/interchange.md):

    nerfblendshape: NeRFBlendShape, gaussian-head. Example: headcast import id1 --fps 25

    insta: INSTA and what it is read by. Example: headcast import bala --subject bala

    vhap: VHAP's export, for GaussianAvatars. Example: headcast import UNION10_074_EMO1 --flame 2023

    imavatar: IMavatar, PointAvatar. Example: headcast import yufeng/MVI_1810 --format imavatar

    metrical: metrical-tracker's own output, a .frame file a frame. Example: headcast import output/bala

    Two more are a video with what another tracker saw in it. That becomes the subject's tracking, and the head is
    fitted to it as to any other subject:

    livelink: a take of the Live Link Face app, .mov and .csv. Example: headcast import 20240506_MySlate_7

    mediapipe: a video, or images, and one dump of MediaPipe's face landmarks. Example: headcast import take7
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = tyro.MISSING
    """The dataset, or the video's folder; its files are hard-linked into --data, or copied."""
    format: Literal["auto", "nerfblendshape", "insta", "vhap", "imavatar", "metrical", "livelink", "mediapipe"] = "auto"
    """Its layout; auto tells it by the files."""
    subject: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The subject's name; by default made from the folder's."""
    fps: Annotated[str | None, tyro.conf.arg(metavar="N/M")] = None
    """Frames a second, for example 25 or 30000/1001; by default what headcast.json beside it says, else 25."""
    flame: Literal["2020", "2023", "2023open"] | None = None
    """The FLAME that its numbers belong to; by default what the format's own programs use."""
    check: bool = False
    """Only look whether it can be imported, and tell what is in it."""
    force: bool = False
    """Put it in the place of a subject of that name which was made from something else."""
    store: Store = None
    """An object store that holds the dataset, such as s3://bucket/folder; --data is then this machine's copy."""
    set: Settings = ()
    """Change a setting, for example --set decode.max_side_px=512; may be given several times."""

    def answer(self) -> Answer:
        request = self.request()
        if self.check:
            return self._tell(request)
        document, text, code = self._bring_in(request) if request.imports and not self.store else carry_out(request)
        from pipeline.progress import default_reporter

        name = document["subject"]
        step = shlex.join(["headcast", "run", "--subject", name, "--from", "train", *self._places()])
        default_reporter(name).message(f"Next: {step}")
        return document, text, code

    def _bring_in(self, request: Any) -> Answer:
        """Bring the subject up to its fit in this process: to start an orchestrator takes longer than some imports."""
        import contextlib

        from pipeline import run
        from pipeline.errors import HeadcastError
        from pipeline.progress import default_reporter
        from pipeline.report import build_report
        from pipeline.stage import inspect_stages
        from stages import STAGES

        subject, config, wanted = run.prepare(request, STAGES)
        run.check_input(request, subject)
        run.check_writable(request.data)
        try:
            worked = run.carry_out(request, STAGES, default_reporter(subject.name))
        finally:
            # A full disk must not hide a stage's own error.
            with contextlib.suppress(OSError, HeadcastError):
                if (subject.source / "source.json").is_file():
                    build_report(subject, STAGES, config)
        return run.account(subject, inspect_stages(subject, wanted, config), worked), str(subject.report), 0

    def request(self) -> Any:
        """The options as a `RunRequest`.

        Raises:
            UserError: the frame rate is none.
        """
        from fractions import Fraction

        from pipeline.run import Import as Dataset
        from pipeline.run import RunRequest

        tracked = self._tracked()
        if tracked is not None:
            return self._tracked_request(tracked)
        try:
            fps = None if self.fps is None else Fraction(self.fps)
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"'{self.fps}' is no frame rate.", "give frames a second, such as --fps 25 or --fps 30000/1001"
            ) from None
        flame = None if self.flame is None else f"flame{self.flame}"
        dataset = Dataset(folder=self.folder, format=self.format, fps=fps, flame=flame, force=self.force)
        return RunRequest(
            data=self.data, subject=self.subject, imports=dataset, settings=self.set, last="fit", store=self.store
        )

    def _tracked(self) -> Tracked | None:
        """The video and another tracker's file in the folder; None where it is a dataset.

        Raises:
            UserError: which files are meant is not plain.
        """
        from pipeline.interchange import formats_of
        from pipeline.interchange.tracking import KINDS, find_tracked

        if self.format in KINDS or (self.format == "auto" and self.folder.is_dir() and not formats_of(self.folder)):
            return find_tracked(self.folder, self.format)
        return None

    def _tracked_request(self, tracked: Tracked) -> Any:
        """The run of a video with another tracker's file.

        Raises:
            UserError: an option says nothing to it, or it may not take the place of the subject's source.
        """
        from pipeline.dataset import Dataset, subject_name_for
        from pipeline.run import RunRequest
        from pipeline.source import is_registered

        said = next((f"--{name}" for name in ("fps", "flame") if getattr(self, name) is not None), None)
        if said:
            raise UserError(f"{said} says nothing to '{self.folder}', which is a video.", "leave it away")
        subject = Dataset(self.data).subject(self.subject or subject_name_for(self.folder.absolute()))
        taken = (subject.source / "source.json").is_file() and not is_registered(subject, [tracked.video])
        if taken and not self.force:
            raise UserError(
                f"'{self.folder}' would become the subject '{subject.name}', which was made from something else.",
                "name another with --subject, or put the video in its place with --force",
            )
        return RunRequest(
            data=self.data,
            subject=subject.name,
            videos=(tracked.video,),
            tracking=tracked.file,
            settings=(*tracked.settings, *self.set),
            last="fit",
            store=self.store,
        )

    def _tell(self, request: Any) -> Answer:
        """Read and check everything, and say what there is."""
        from pipeline.interchange.tracking import kind_of
        from pipeline.run import check_input, prepare
        from stages import STAGES

        subject, *_ = prepare(request, STAGES)
        check_input(request, subject)
        can = f"'{self.folder}' can be imported as the subject '{subject.name}':"
        if request.tracking is not None:
            kind, video, file = kind_of(request.tracking), request.videos[0].name, request.tracking.name
            document = {"schema": 1, "subject": subject.name, "format": kind, "video": video, "tracking": file}
            told = [f"{can} {kind}, '{video}' with '{file}'."]
            tracked = self._tracked()
            return document, "\n".join([*told, *(tracked.notes if tracked else ())]), 0
        recording = request.imports.read()
        first, last = int(recording.numbers[0]), int(recording.numbers[-1])
        document = {
            "schema": 1,
            "subject": subject.name,
            "format": recording.format,
            "frames": len(recording),
            "numbers": [first, last],
            "width": recording.size[0],
            "height": recording.size[1],
            "fps": str(recording.fps),
            "alpha": recording.alpha,
            "basis": recording.basis,
            "coefficients": len(recording.coefficient_names),
            "flame": recording.flame.version if recording.flame is not None else None,
            "files": len(recording.files),
            "notes": list(recording.notes),
        }
        lines = [
            f"{can} {recording.format}, {len(recording)} frames "
            f"({first} to {last}) of {recording.size[0]}x{recording.size[1]}, {recording.fps} a second, "
            f"{len(recording.coefficient_names)} coefficients ({recording.basis}), "
            f"{ALPHAS[recording.alpha]}.",
            *recording.notes,
        ]
        return document, "\n".join(lines), 0

    def resume_command(self) -> str | None:
        options = {"--format": self.format, "--subject": self.subject, "--fps": self.fps, "--flame": self.flame}
        told = [word for name, value in options.items() if value not in (None, "auto") for word in (name, str(value))]
        told += [word for setting in self.set for word in ("--set", setting)]
        return shlex.join(
            ["headcast", "import", str(self.folder), *told, *(["--force"] if self.force else []), *self._places()]
        )

    def _places(self) -> list[str]:
        """The options that name dataset and store, where they are not the usual."""
        data = [] if self.data == Path("data") else ["--data", str(self.data)]
        return [*data, *(["--store", self.store] if self.store else [])]


ALPHAS = {
    "channel": "alphas in the pictures' own channel",
    "masks": "alphas in masks",
    "parsing": "alphas from a parsing",
    "none": "no alphas",
}
