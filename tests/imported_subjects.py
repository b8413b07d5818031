"""Imported subjects by hand: a synthetic talking head as decode and matte leave it, with a recording beside the frames.

MediaPipe is not asked: `seen` are the landmarks that it would find.
"""

from __future__ import annotations

import functools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from pipeline.dataset import Subject
from pipeline.faces import Face
from pipeline.geometry import make_rigid, rotvec_to_matrix
from pipeline.interchange.recording import FILE, Recording, save_recording
from pipeline.synthetic import SyntheticClip, make_clip

FRAMES, WIDTH, HEIGHT = 24, 176, 144
K = np.array([[1.45 * WIDTH, 0, WIDTH / 2 + 4], [0, 1.5 * WIDTH, HEIGHT / 2 - 3], [0, 0, 1]])
BASIS = "nerfblendshape-6"
UNIT = 2.5
"""Units of the dataset a metre."""


@functools.cache
def clip() -> SyntheticClip:
    return make_clip(FRAMES, WIDTH, HEIGHT, seed=5, K=K, supersample=1, background="plain")


@functools.cache
def meshes() -> tuple[np.ndarray, np.ndarray]:
    """The head of each frame [T,V,3] in its own frame, the torso straight, and its faces."""
    made = clip()
    parts = (torch.from_numpy(part) for part in (made.identity, made.expression, 0 * made.neck, made.eyes))
    with torch.no_grad():
        return made.head.vertices(*parts).numpy(), made.head.faces


def coefficients(count: int) -> np.ndarray:
    """[T,count] that tell the expression as far as so few can: its principal components."""
    expression = clip().expression.astype(np.float64)
    expression = expression - expression.mean(0)
    return expression @ np.linalg.svd(expression, full_matrices=False)[2][:count].T + 0.3


def nerfblendshape(**changes: Any) -> Recording:
    """A recording without geometry, in a world of its own axes and unit."""
    world = make_rigid(rotvec_to_matrix(np.array([0.2, 0.3, -0.1])), np.array([0.1, -0.2, 0.3]))
    Ts_cam_world = clip().Ts_cam_head @ world
    Ts_cam_world[:, :3, 3] *= UNIT
    names = tuple(f"{BASIS}/{index:02d}" for index in range(6))
    return _recording("nerfblendshape", BASIS, names, Ts_cam_world, **changes)


def insta(**changes: Any) -> Recording:
    """A recording with a mesh a frame; `meshes` are theirs."""
    names = tuple(f"insta-expression-2/{index:03d}" for index in range(2))
    paths = tuple(f"meshes/{index:05d}.obj" for index in range(FRAMES))
    return _recording("insta", "insta-expression-2", names, clip().Ts_cam_head, **{"meshes": paths, **changes})


def _recording(
    format_name: str, basis: str, names: tuple[str, ...], Ts_cam_world: np.ndarray, **changes: Any
) -> Recording:
    fields: dict[str, Any] = {
        "format": format_name,
        "size": (WIDTH, HEIGHT),
        "fps": Fraction(25),
        "numbers": np.arange(FRAMES),
        "Ks": np.repeat(K[None], FRAMES, 0),
        "Ts_cam_world": Ts_cam_world,
        "images": (),
        "alpha": "none",
        "masks": (),
        "basis": basis,
        "coefficient_names": names,
        "coefficients": coefficients(len(names)),
    }
    return Recording(**(fields | changes))


def seen(row: int, scale: float = 1.0) -> list[Face]:
    """What MediaPipe finds in a frame, to a tenth of a pixel."""
    noise = np.random.default_rng(row).normal(0, 0.1, (478, 3))
    landmarks = (scale * (clip().landmarks[row] + noise)).astype(np.float32)
    return [Face(landmarks, np.zeros(52, np.float32), np.eye(4, dtype=np.float32))]


def write_subject(root: Path, recording: Recording, scale: float = 1.0) -> Subject:
    """Decode's and matte's files; `scale`: of the decoded frames against the dataset's pictures."""
    made, size = clip(), (round(scale * WIDTH), round(scale * HEIGHT))
    for folder in ("decode/frames", "matte/alpha", "matte/foreground", "matte/confidence", "source/dataset"):
        (root / folder).mkdir(parents=True)
    entries = []
    for i, image in enumerate(made.images):
        alpha = cv2.resize((255 * made.alpha[i]).round().astype(np.uint8), size)
        picture = cv2.resize(np.ascontiguousarray(image[..., ::-1]), size)
        cv2.imwrite(str(root / f"matte/alpha/{i:06d}.png"), alpha)
        cv2.imwrite(str(root / f"matte/confidence/{i:06d}.png"), np.full_like(alpha, 255))
        for folder in ("decode/frames", "matte/foreground"):
            cv2.imwrite(str(root / f"{folder}/{i:06d}.jpg"), picture)
        entries.append(
            {"index": i, "file": f"frames/{i:06d}.jpg", "time": i / 25, "source_frame": i, "sharpness": 50.0}
        )
    about = {
        "name": "dataset",
        "scale": scale,
        "content": list(size),
        "source_size": [WIDTH, HEIGHT],
        "bars": [0, 0, 0, 0],
    }
    listing = {"schema": 1, "width": size[0], "height": size[1], "fps": "25/1", "count": FRAMES}
    (root / "decode/frames.json").write_text(json.dumps({**listing, "frames": entries, "clips": [about]}))
    save_recording(root / "decode" / FILE, recording)
    return Subject(root)
