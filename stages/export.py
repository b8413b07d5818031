"""Export: the avatar as files that other tools open."""

from __future__ import annotations

from pipeline.stage import Result, Stage, StageRun, Verdict

PICTURE_PX = 512


def run(run: StageRun) -> Result:
    """Copy the avatar, write its neutral state as a 3DGS PLY and read that back for the picture.

    Raises:
        UserError: the avatar cannot be read.
    """
    import shutil

    from pipeline.avatars import DESCRIPTION, WEIGHTS, load_avatar
    from pipeline.export import neutral_splats, portrait
    from pipeline.frames import save_image
    from pipeline.ply import read_ply, write_ply

    trained = run.subject.stage("train")
    avatar = load_avatar(trained)
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(trained / name, run.work / name)
    splats = neutral_splats(avatar)
    if run.config.export.ply:
        write_ply(run.work / "avatar.ply", splats)
        splats = read_ply(run.work / "avatar.ply")
    picture = portrait(splats, avatar.neutral.T_cam_head.double().numpy(), PICTURE_PX, run.threads)
    save_image(run.work / "neutral.jpg", picture)

    sizes = {name: (run.work / name).stat().st_size for name in (WEIGHTS, DESCRIPTION)}
    text = f"Export: good. {WEIGHTS} and {DESCRIPTION}, {sum(sizes.values()) / 1e6:.1f} MB together"
    if run.config.export.ply:
        sizes["avatar.ply"] = (run.work / "avatar.ply").stat().st_size
        text += (
            f"; avatar.ply, {sizes['avatar.ply'] / 1e6:.1f} MB: {len(splats):,} Gaussians of the face at rest, "
            "for any viewer of 3DGS files"
        )
    return Result(Verdict("good", f"{text}.", "neutral.jpg"), {"gaussians": len(splats), "bytes": sizes})


STAGE = Stage(
    name="export",
    version=1,
    inputs=("train",),
    run=run,
    description="the avatar as files that other tools open",
)
