"""A dataset of two synthetic subjects: `anna` with an avatar, as training starts it, and `bert`, who is only fitted."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import avatar_data
import numpy as np
from tones import write_tone

from pipeline.avatars import save_avatar
from pipeline.avatars.rigged import RiggedAvatar
from pipeline.config import TrainConfig
from pipeline.dataset import Dataset, Subject, write_json
from pipeline.frames import frame_file, save_image
from pipeline.source import register_source

FRAMES, FPS = 24, Fraction(30000, 1001)
TONE_BEGINS = 0.4
INPUTS = {
    "decode": ("source",),
    "matte": ("decode",),
    "fit": ("decode",),
    "train": ("decode", "fit"),
    "export": ("decode", "fit", "train"),
}


def write_dataset(root: Path) -> Dataset:
    """Write both subjects; bert is anna's double, and his source has a tone that begins after `TONE_BEGINS` seconds."""
    anna = avatar_data.write_subject(root / "anna", FRAMES)
    listing = json.loads((anna.stage("decode") / "frames.json").read_text())
    listing["fps"] = str(FPS)
    (anna.stage("decode") / "frames").mkdir()
    for entry, image in zip(listing["frames"], avatar_data.clip(FRAMES).images, strict=True):
        entry["time"] = round(float(entry["index"] / FPS), 6)
        save_image(anna.stage("decode") / frame_file(entry["index"]), image.round().clip(0, 255).astype(np.uint8))
    write_json(anna.stage("decode") / "frames.json", listing)
    video = write_tone(
        root / "bert.mp4",
        begins=TONE_BEGINS,
        seconds=1.5,
        fps=FPS,
        images=list(avatar_data.clip(FRAMES).images.round().clip(0, 255).astype(np.uint8)),
    )
    register_source(anna, [video])
    for stage in ("decode", "fit"):
        finish(anna, stage)
    shutil.copytree(anna.root, root / "bert")
    data = avatar_data.training_data(FRAMES)
    avatar = RiggedAvatar.start(data, TrainConfig(gaussians=1500), np.random.default_rng(0))
    anna.stage("train").mkdir()
    save_avatar(avatar, anna.stage("train"), {"resolution": avatar_data.SIZE, "steps": 0, "frames": FRAMES})
    finish(anna, "train")
    return Dataset(root)


def finish(subject: Subject, stage: str, tag: str = "1") -> None:
    """Write a manifest that says the stage is finished, and made from what lies there now."""
    inputs = {name: f"digest of {name}" for name in INPUTS[stage]}
    for name in INPUTS[stage]:
        manifest = subject.stage(name) / "stage.json"
        if manifest.is_file():
            inputs[name] = json.loads(manifest.read_text())["digest"]
    text = f"{subject.name} {stage} {tag}"
    about = {"schema": 1, "stage": stage, "key": f"key {text}", "digest": f"digest {text}"}
    write_json(subject.stage(stage) / "stage.json", {**about, "inputs": inputs, "outputs": []})


def change_fit(subject: Subject, **arrays: Any) -> None:
    """Replace arrays of a subject's fit."""
    path = subject.stage("fit") / "fit.npz"
    with np.load(path, allow_pickle=False) as file:
        fit = dict(file)
    np.savez(path, **{**fit, **arrays})


def read_fit(subject: Subject) -> dict[str, Any]:
    """The arrays of a subject's fit."""
    with np.load(subject.stage("fit") / "fit.npz", allow_pickle=False) as file:
        return dict(file)
