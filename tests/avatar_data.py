"""A small synthetic subject as training data, shared by the tests of avatars, training and the train stage."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.avatars import Condition, TrainingData
from pipeline.avatars.baked import ARRAYS, GAZE, POSE, BakedAvatar
from pipeline.dataset import Subject
from pipeline.geometry import invert_rigid, make_rigid, rotvec_to_matrix
from pipeline.heads import EXPRESSIONS
from pipeline.synthetic import SyntheticClip, make_clip

SIZE = 64

# More threads would only wait for each other on tensors this small.
torch.set_num_threads(1)


@functools.cache
def clip(frames: int = 24) -> SyntheticClip:
    """A talking head on a plain background."""
    return make_clip(frames, SIZE, SIZE, seed=3, background="plain")


def torso_poses(clip: SyntheticClip) -> np.ndarray:
    """Ts_cam_torso [T,4,4]: the torso turns against the head about their common pivot."""
    turns = rotvec_to_matrix(clip.neck.astype(np.float64)).swapaxes(-1, -2)
    return clip.Ts_cam_head @ make_rigid(turns, np.zeros((len(turns), 3)))


def conditions(clip: SyntheticClip) -> Condition:
    """The clip's true conditions."""
    bend = np.zeros((len(clip.neck), 0))
    arrays = (clip.expression, clip.Ts_cam_head, torso_poses(clip), clip.neck, clip.eyes, bend, clip.Ts_cam_head)
    return Condition(*(torch.as_tensor(array, dtype=torch.float32) for array in arrays))


def training_data(frames: int = 24) -> TrainingData:
    """All frames of the clip, over white."""
    made = clip(frames)
    alpha = made.alpha[..., None]
    white = made.images + (1 - alpha) * 255 * (1 - made.background)
    return TrainingData(
        images=white.round().clip(0, 255).astype(np.uint8),
        alphas=(made.alpha * 255).round().astype(np.uint8),
        conditions=conditions(made),
        Ks=made.K[None],
        head=made.head,
        identity=made.identity,
    )


def write_subject(root: Path, frames: int = 24) -> Subject:
    """The decode, matte and fit files of the clip, as far as training reads them."""
    made = clip(frames)
    for folder in ("decode", "matte/alpha", "matte/foreground", "matte/confidence", "fit"):
        (root / folder).mkdir(parents=True)
    entries = []
    for i, (image, alpha) in enumerate(zip(made.images, made.alpha, strict=True)):
        cv2.imwrite(str(root / f"matte/foreground/{i:06d}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        cv2.imwrite(str(root / f"matte/alpha/{i:06d}.png"), (alpha * 255).round().astype(np.uint8))
        cv2.imwrite(str(root / f"matte/confidence/{i:06d}.png"), np.full(alpha.shape, 255, np.uint8))
        entry = {"index": i, "file": f"frames/{i:06d}.jpg", "time": i / 25, "source_frame": i, "sharpness": 100.0}
        entries.append(entry)
    listing = {"schema": 1, "width": SIZE, "height": SIZE, "fps": "25/1", "count": frames, "frames": entries}
    (root / "decode/frames.json").write_text(json.dumps(listing))
    np.savez(
        root / "fit/fit.npz",
        Ks=np.tile(made.K, (frames, 1, 1)),
        image_size=np.array([SIZE, SIZE]),
        Ts_cam_head=made.Ts_cam_head,
        Ts_cam_skull=made.Ts_cam_head,
        Ts_cam_torso=torso_poses(made),
        neck=made.neck,
        eyes=made.eyes,
        identity=made.identity,
        expression=made.expression,
        expression_names=np.array(made.head.expression_names),
        landmark_offsets=np.zeros((478, 3), np.float32),
        expression_offsets=np.zeros((52, 478, 3), np.float32),
        usable=np.ones(frames, bool),
        head=np.array("anny"),
        crops=np.tile([0.0, 0.0, SIZE], (frames, 1)),
        clips=np.zeros(frames, np.int64),
        shots=np.zeros(frames, np.int64),
    )
    return Subject(root)


def linear_avatar() -> BakedAvatar:
    """A baked avatar that is made up: four shapes, no correctives."""
    random = torch.Generator().manual_seed(5)
    E, N, shapes = len(EXPRESSIONS), 300, 4
    sizes = {"E": E, "N": N, "G": shapes, "L": shapes, "K": 2 * shapes, "H": 2, "M": 0, "P": 6, "D": E + GAZE + POSE}
    sizes["I"] = E + GAZE + sizes["D"]
    weights: dict[str, Tensor] = {
        name: torch.zeros([sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes])
        for name, axes in ARRAYS.items()
    }
    driven = conditions(clip())
    middle = driven.frame(9)
    weights |= {f"neutral_{name}": value for name, value in middle._asdict().items()}
    weights |= {"neutral_expression": torch.zeros(E), "neutral_T_cam_skull": middle.T_cam_head}
    weights |= {"predictor_T_cam_head": middle.T_cam_head, "predictor_T_cam_torso": middle.T_cam_torso}
    weights["typical_head"] = middle.T_cam_head
    weights["typical_torso"] = invert_rigid(middle.T_cam_head) @ middle.T_cam_torso
    weights["drive_scale"] = torch.ones(sizes["D"])
    weights["means"] = 0.05 * torch.randn(3, N, generator=random) + torch.tensor([[0], [0.05], [0.05]])
    appearance = torch.rand(7, N, generator=random)
    appearance[:3] = appearance[:3] - 5
    weights["appearance"] = appearance.half().float()
    weights["quats"] = torch.nn.functional.normalize(torch.randn(N, 4, generator=random), dim=1).half().float()
    weights["joints"] = torch.randint(0, 120, (N, 2), generator=random, dtype=torch.uint8)
    units = {"motion": [0.002] * 3 + [0.05] * 3, "shading": [0.05] * 3 + [0.02] * 3 + [0.1]}
    for name, unit in units.items():
        weights[name] = torch.randint(-127, 128, (shapes, len(unit), N), generator=random, dtype=torch.int8)
        weights[f"{name}_steps"] = (torch.tensor(unit) / 127).expand(shapes, -1).half().float()
    weights["linear"] = torch.randn(2 * shapes, sizes["I"], generator=random)
    return BakedAvatar(weights, "anny", EXPRESSIONS)
