"""A finished synthetic subject for the stages that come after training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dataset import Subject

FRAMES, WIDTH, HEIGHT, RESOLUTION = 24, 96, 80, 64


@pytest.fixture(scope="session")
def finished_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of decode, matte, fit and train of a synthetic clip; the avatar is as training starts it."""
    import cv2

    from pipeline.avatars import TrainingData, conditions_of, save_avatar
    from pipeline.avatars.rigged import RiggedAvatar
    from pipeline.clip import load_clip, load_crops
    from pipeline.config import TrainConfig
    from pipeline.synthetic import make_clip

    root = tmp_path_factory.mktemp("finished") / "ada"
    clip = make_clip(FRAMES, WIDTH, HEIGHT, seed=4, background="plain")
    for folder in ("decode", "matte/alpha", "matte/foreground", "matte/confidence", "fit", "train"):
        (root / folder).mkdir(parents=True)
    entries = []
    for i, (image, alpha) in enumerate(zip(clip.images, clip.alpha, strict=True)):
        # PNG under the documented name: readers go by content, and the truth stays exact.
        cv2.imencode(".png", image[..., ::-1])[1].tofile(root / f"matte/foreground/{i:06d}.jpg")
        cv2.imwrite(str(root / f"matte/alpha/{i:06d}.png"), np.round(alpha * 255).astype(np.uint8))
        cv2.imwrite(str(root / f"matte/confidence/{i:06d}.png"), np.full(alpha.shape, 255, np.uint8))
        entries.append(
            {"index": i, "file": f"frames/{i:06d}.jpg", "time": i / 25, "source_frame": i, "sharpness": 100.0}
        )
    listing = {"schema": 1, "width": WIDTH, "height": HEIGHT, "fps": "25/1", "count": FRAMES, "frames": entries}
    (root / "decode/frames.json").write_text(json.dumps(listing))
    np.savez(
        root / "fit/fit.npz",
        Ks=np.tile(clip.K, (FRAMES, 1, 1)),
        image_size=np.array([WIDTH, HEIGHT]),
        Ts_cam_head=clip.Ts_cam_head,
        Ts_cam_skull=clip.Ts_cam_head,
        Ts_cam_torso=clip.Ts_cam_head,
        neck=clip.neck,
        eyes=clip.eyes,
        identity=clip.identity,
        expression=clip.expression,
        expression_names=np.array(clip.head.expression_names),
        landmark_offsets=np.zeros((478, 3), np.float32),
        expression_offsets=np.zeros((52, 478, 3), np.float32),
        usable=np.arange(FRAMES) != FRAMES - 2,
        residual_px=np.full(FRAMES, 0.4, np.float32),
        head=np.array("anny"),
        crops=np.tile([10.0, 0, 76], (FRAMES, 1)),
        clips=np.zeros(FRAMES, np.int64),
        shots=np.zeros(FRAMES, np.int64),
    )
    subject = Subject(root)
    loaded = load_clip(subject, RESOLUTION)
    frames = np.arange(0, 14, 2)
    crops = load_crops(loaded, frames)
    rows = conditions_of(loaded)
    conditions = type(rows)(*(value[torch.from_numpy(frames)] for value in rows))
    data = TrainingData(crops.images, crops.alphas, conditions, loaded.Ks, clip.head, loaded.identity)
    avatar = RiggedAvatar.start(data, TrainConfig(gaussians=1500), np.random.default_rng(0))
    save_avatar(avatar, root / "train", {"resolution": RESOLUTION, "steps": 200, "frames": len(data)})
    log = [{"step": step, "loss": 1 / step, "psnr_train": 20 + step / 50, "psnr_val": None} for step in (100, 200)]
    (root / "train/log.json").write_text(json.dumps(log))
    manifest = {"schema": 1, "stage": "train", "outputs": [], "metrics": {"train_seconds": 2.0, "steps": 200}}
    (root / "train/stage.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def finished_subject(finished_files: Path, tmp_path: Path) -> Subject:
    """A subject of one's own with these files."""
    import shutil

    return Subject(Path(shutil.copytree(finished_files, tmp_path / "ada")))
