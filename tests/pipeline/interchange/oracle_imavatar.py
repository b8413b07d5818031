"""IMavatar's, PointAvatar's, SplattingAvatar's and FateAvatar's readers restated: a folder's files -> pixels of FLAME.

Each is written from what the public loader does with the numbers, in its own conventions, and insists on what that
loader insists on. FLAME is restated too, at four times its size, in the order of IMavatar's own module.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation


def vertices(flame, data: dict, frame: dict, scale: float = 4.0) -> np.ndarray:
    """FLAME's vertices [V,3] of a frame, scaled before anything is posed."""
    shape, expression = np.array(data["shape_params"]), np.array(frame["expression"])
    assert shape.shape == (100,)
    assert expression.shape == (50,)
    shaped = flame.template.numpy() * scale
    shaped = shaped + np.tensordot(shape, flame.shapes.numpy()[:100] * scale, 1)
    shaped = shaped + np.tensordot(expression, flame.expressions.numpy()[:50] * scale, 1)
    joints = flame.regressor.numpy() @ shaped
    turns = Rotation.from_rotvec(np.array(frame["pose"]).reshape(5, 3)).as_matrix()
    feature = (turns[1:] - np.eye(3)).reshape(36)
    posed = shaped + np.tensordot(feature, flame.pose_directions.numpy() * scale, 1)
    chain: list[np.ndarray] = []
    for joint, parent in enumerate((-1, 0, 1, 1, 1)):
        local = np.eye(4)
        local[:3, :3] = turns[joint]
        local[:3, 3] = joints[joint] - (joints[parent] if parent >= 0 else 0)
        chain.append(chain[parent] @ local if parent >= 0 else local)
    found = np.zeros_like(posed)
    for joint, transform in enumerate(chain):
        moved = (posed - joints[joint]) @ transform[:3, :3].T + transform[:3, 3]
        found += flame.weights.numpy()[:, joint, None] * moved
    return found


def load(video: Path) -> dict:
    """What every loader reads of a video's folder, and the files that it opens for each frame."""
    data = json.loads((video / "flame_params.json").read_text())
    for frame in data["frames"]:
        int(frame["file_path"].split("/")[-1])
        path = f"{video}/{frame['file_path']}.png"
        with Image.open(path) as image, Image.open(path.replace("image", "mask")) as mask:
            assert image.size[0] == image.size[1], "img_res is one number twice in practice"
            assert np.asarray(image).shape[2] == 3, "three colours are reshaped into three rows"
            assert mask.size == image.size
            frame["side"] = image.size[0]
            frame["mask"] = np.asarray(mask.convert("F")) > 127.5
        corners = (np.array(frame["bbox"]) + 1) * frame["side"] / 2
        assert (corners[:2] < corners[2:]).all(), "half of a training step's pixels come from within"
    return data


def imavatar(data: dict, frame: dict, points: np.ndarray) -> np.ndarray:
    """IMavatar: rays `R_c2w (x, y, 1) (-1)` of `(u - cx) / fx`; here the pixel whose ray goes through each point."""
    side, k = frame["side"], np.array(data["intrinsics"], float)
    fx, fy, cx, cy = k * side / 512 if k[3] > 1 else k * side
    world_mat = np.array(frame["world_mat"])
    camera_to_world = np.linalg.inv(np.vstack([world_mat, [0, 0, 0, 1]]))
    rays = points - camera_to_world[:3, 3]
    directions = rays @ camera_to_world[:3, :3]  # in the camera
    assert (directions[:, 2] < 0).all(), "rays go along -z"
    directions = directions / -directions[:, 2:]
    return np.stack([cx - fx * directions[:, 0], cy - fy * directions[:, 1]], 1)


def pointavatar(data: dict, frame: dict, points: np.ndarray) -> np.ndarray:
    """PointAvatar: PyTorch3D's row vectors `X R + T` and normalised coordinates with +1 left and up."""
    k = data["intrinsics"]
    focal, centre = np.array([2 * k[0], 2 * k[1]]), np.array([1 - 2 * k[2], 1 - 2 * k[3]])
    extrinsic = np.array(frame["world_mat"], float)
    if focal[0] < 0:
        focal[0] = -focal[0]
        extrinsic[0] = -extrinsic[0]
    extrinsic[:, 2] = -extrinsic[:, 2]
    extrinsic[2, 3] = -extrinsic[2, 3]
    view = points @ extrinsic[:, :3] + extrinsic[:, 3]
    assert (view[:, 2] > 0).all(), "PyTorch3D looks along +z"
    ndc = focal * view[:, :2] / view[:, 2:] + centre
    return (1 - ndc) / 2 * frame["side"]


def splattingavatar(data: dict, frame: dict, points: np.ndarray) -> np.ndarray:
    """SplattingAvatar: rows 1 and 2 turned round, absolute intrinsics."""
    k = np.abs(data["intrinsics"]) * frame["side"]
    extrinsic = np.array(frame["world_mat"], float)
    extrinsic[1:] = -extrinsic[1:]
    view = points @ extrinsic[:, :3].T + extrinsic[:, 3]
    return k[:2] * view[:, :2] / view[:, 2:] + k[2:]


def fateavatar(data: dict, frame: dict, points: np.ndarray) -> np.ndarray:
    """FateAvatar: metres, fields of view for which the centre is the middle; points are FLAME's at their own size."""
    k = data["intrinsics"]
    assert np.allclose(k[2:], 0.5), "it draws with fields of view"
    tangent = np.array([k[2] / -k[0], k[3] / k[1]])
    extrinsic = np.array(frame["world_mat"], float)
    extrinsic[:, 3] /= 4
    extrinsic[0] = -extrinsic[0]
    extrinsic[:, 2] = -extrinsic[:, 2]
    extrinsic[2, 3] = -extrinsic[2, 3]
    extrinsic[:2] = -extrinsic[:2]
    view = points @ extrinsic[:, :3] + extrinsic[:, 3]
    return (view[:, :2] / view[:, 2:] / tangent + 1) / 2 * frame["side"]
