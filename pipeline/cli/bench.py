"""`headcast bench`: measurements of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.cli.common import Answer, Common, Settings
from pipeline.errors import UserError


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
    status: how long it takes to tell how many finished subjects stand, in a made-up dataset; a minute.
    faults: stages, runs, worker and server are killed at random moments, and the same command is given again until all
    is done; what was lost, torn or different in the end, exit code 1 if anything was; some minutes. orchestration: what
    Prefect costs per stage, batches and submissions of 20, how long a killed worker's subject waits, status and the
    nightly's decision on 10 to --subjects finished subjects. view: how fast headcast view makes
    pictures of a subject in --data, named in place of a video; some seconds. player: how near the exported page's
    pictures are to ours, and what its JavaScript costs, for subjects in --data; wants Chromium and Playwright. import:
    datasets of 500 synthetic frames in each format, imported one after the other, beside plain copying; some minutes,
    the formats with FLAME only where FLAME is.
    """

    what: tyro.conf.Positional[
        Literal[
            "raster",
            "run",
            "matte",
            "avatars",
            "ablation",
            "status",
            "faults",
            "orchestration",
            "view",
            "player",
            "import",
        ]
    ] = "raster"
    """What to measure."""
    videos: tyro.conf.Positional[tuple[Path, ...]] = ()
    """For run, avatars and ablation: the clips; by default the sample clip. For matte: clips beside the composites. For
    import: the formats; by default all."""
    preset: Literal["quick", "standard", "best"] = "quick"
    """The budget of a run; not for raster."""
    avatar: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()
    """For avatars: only this model (as headcast run --help names them); may be given several times."""
    set: Settings = ()
    """For avatars and ablation: a setting of every run, as in headcast run."""
    threads: int | None = None
    """For raster: threads of everything; by default as many as torch takes. For view: of the rasteriser."""
    peak_gflops: float = 456.0
    """For raster: float32 arithmetic per second that the limit supposes, in 1e9 (default: two AMD Zen 5 cores)."""

    subjects: int = 1000
    """For status and orchestration: how many."""
    frames: int = 500
    """For import: of each dataset."""
    kills: int = 50
    """For faults: how many."""
    seed: int = 0
    """For faults: of the moments."""

    def answer(self) -> Answer:
        from pipeline.progress import default_reporter

        for option, given, meant in (
            ("--set", self.set, ("avatars", "ablation")),
            ("--avatar", self.avatar, ("avatars",)),
        ):
            if given and self.what not in meant:
                raise UserError(
                    f"{option} says nothing to bench {self.what}.", f"it is for: bench {' and '.join(meant)}"
                )
        if self.what == "faults":
            from pipeline import bench_faults
            from stages.noop import ORDER

            document = bench_faults.bench(tuple(ORDER), self.kills, self.seed, default_reporter().message)
            return document, bench_faults.table(document), 0 if document["whole"] else 1
        if self.what == "orchestration":
            from pipeline import bench_orchestration
            from stages.noop import STAGES as NOOP

            counts = sorted({min(count, self.subjects) for count in (10, 1000)} | {self.subjects})
            document = bench_orchestration.bench(NOOP, counts, default_reporter().message)
            return document, bench_orchestration.table(document), 0
        if self.what == "raster":
            for name, value in (("threads", self.threads), ("peak-gflops", self.peak_gflops)):
                if value is not None and value <= 0:
                    raise UserError(f"--{name} is {value}.", "give a number above 0")
            from pipeline.bench_raster import bench, table

            reporter = default_reporter()
            document = bench(threads=self.threads, peak_gflops=self.peak_gflops, report=reporter.message)
            return document, table(document), 0
        if self.what == "status":
            if self.subjects < 1:
                raise UserError(f"--subjects is {self.subjects}.", "give at least 1")
            from pipeline import bench_status
            from stages import STAGES

            document = bench_status.bench(STAGES, self.subjects, report=default_reporter().message)
            return document, bench_status.table(document), 0
        if self.what == "view":
            if len(self.videos) != 1:
                raise UserError("bench view wants one subject.", "headcast bench view SUBJECT")
            from pipeline import bench_view

            document = bench_view.bench(self.data, str(self.videos[0]), self.threads, default_reporter().message)
            return document, bench_view.table(document), 0
        if self.what == "player":
            if not self.videos:
                raise UserError("bench player wants subjects.", "headcast bench player SUBJECT...")
            from pipeline import bench_player

            document = bench_player.bench(self.data, [str(name) for name in self.videos], default_reporter().message)
            return document, bench_player.table(document), 0
        if self.what == "import":
            from pipeline import bench_import

            known = list(bench_import.COEFFICIENTS)
            formats = [str(name) for name in self.videos] or known
            if unknown := sorted(set(formats) - set(known)):
                raise UserError(f"'{unknown[0]}' is no format to measure.", f"choose from: {', '.join(known)}")
            if self.frames < 5:
                raise UserError(f"--frames is {self.frames}.", "give at least 5")
            document = bench_import.bench(formats, self.frames, default_reporter().message)
            return document, bench_import.table(document), 0
        from pipeline import bench_avatars, bench_matte, bench_run
        from pipeline.assets import SAMPLE_CLIP, asset_path, ensure_assets
        from pipeline.config import AVATARS, Config
        from pipeline.run import usable_cores
        from stages import STAGES

        needed = {name for stage in STAGES for name in stage.assets(Config())}
        if self.what == "matte":
            reporter = default_reporter()
            ensure_assets(needed | set(bench_matte.GROUND_CLIPS), reporter)
            document = bench_matte.bench(self.videos, self.preset, self.data, report=reporter.message)
            return document, bench_matte.table(document), 0
        reporter = default_reporter()
        ensure_assets(needed, reporter)
        videos = self.videos or (asset_path(SAMPLE_CLIP),)
        if self.what == "run":
            document = bench_run.bench_runs(videos, self.preset)
            return document, bench_run.table(document), 0
        unknown = sorted(set(self.avatar) - set(AVATARS))
        if unknown:
            raise UserError(f"There is no avatar model '{unknown[0]}' to train.", f"choose from: {', '.join(AVATARS)}")
        models = {name: bench_avatars.Row(name) for name in self.avatar or AVATARS}
        rows = bench_avatars.ABLATION if self.what == "ablation" else models
        document = bench_avatars.bench(
            videos,
            rows,
            self.what,
            self.preset,
            self.data,
            self.set,
            threads=usable_cores(),
            report=reporter.message,
        )
        return document, bench_avatars.table(document), 0 if document["complete"] else 1
