"""`headcast export`: an avatar as files for other tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.cli.common import Answer, Common, split_settings


@dataclass(frozen=True)
class Export(Common):
    """Write a subject as files for other tools, read them back and say what was lost.

    Targets, each with an example (all about them: docs/exports.md):

    ply: the avatar at rest as a standard 3DGS PLY, for any splat viewer.
    Example: headcast export ada --to ply

    ply-sequence: the avatar through its clip, a numbered PLY a frame, and the camera.
    Example: headcast export ada --to ply-sequence --set first=0 --set last=99 --set every=2 --set axes=head

    spz: the avatar at rest as SPZ, a fourteenth of a PLY, for Scaniverse, Cesium, three.js.
    Example: headcast export ada --to spz --set version=2

    sog: the avatar at rest as SOG, smaller still, for PlayCanvas and SuperSplat.
    Example: headcast export ada --to sog

    gltf: the avatar at rest as a GLB of Gaussians (KHR_gaussian_splatting).
    Example: headcast export ada --to gltf

    rig: all that a program of one's own needs to drive it, and drive.py, which does it with NumPy.
    Example: headcast export ada --to rig

    arkit: head mesh (OBJ, GLB with morph targets) and Gaussians as 52 ARKit blendshapes.
    Example: headcast export ada --to arkit --set gaussians=ply

    rerun: frames, landmarks, alpha, head, Gaussians and curves as a recording for the rerun viewer.
    Example: headcast export ada --to rerun --set every=2 --set splats=10

    csv: what the subject does as a table of coefficients, gaze and head pose, or as Live Link Face records it; a fit is
    enough.
    Example: headcast export ada --to csv --set layout=livelink

    nerfblendshape: a dataset as NeRFBlendShape and gaussian-head load it (docs/interchange.md); a fit is enough.
    Example: headcast export ada --to nerfblendshape --set coefficients=46

    insta: a dataset for INSTA and FateAvatar; FLAME is fitted to the head, so its file is needed.
    Example: headcast export ada --to insta --set licence=mine

    vhap: a dataset for GaussianAvatars and LAM, as VHAP exports it, with FLAME.
    Example: headcast export ada --to vhap --set flame=2023

    imavatar: a dataset for IMavatar and PointAvatar, with FLAME.
    Example: headcast export ada --to imavatar --out baselines/ada

    web: a page that plays and drives the avatar in any browser, by webcam too; a folder, and the same in one file.
    Example: headcast export ada --to web --set webcam=false
    """

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = tyro.MISSING
    """Whose avatar; trained (for csv and datasets, fitted)."""
    to: Annotated[str, tyro.conf.arg(metavar="TARGET")] = tyro.MISSING
    """What to write; see above."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The folder to write; by default DATA/SUBJECT/exported/TARGET."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of the target; may be given several times."""
    force: bool = False
    """Replace what is there, also what is fresh."""

    def answer(self) -> Answer:
        from pipeline.exports import check_export, export
        from pipeline.progress import default_reporter
        from pipeline.run import stop_signals

        with stop_signals() as stop_requested:
            plan = check_export(
                self.data,
                self.subject,
                self.to,
                out=self.out,
                options=split_settings(self.set),
                force=self.force,
                reporter=default_reporter(),
                stop_requested=stop_requested,
            )
            if not self.force and (account := plan.product.finished()) is not None:
                sys.stderr.write(f"{plan.product.path}: fresh, nothing to do.\n")
            else:
                account = export(plan)
        return account, str(plan.product.path), 0
