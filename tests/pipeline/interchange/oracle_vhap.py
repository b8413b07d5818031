"""GaussianAvatars', VHAP's and LAM's readers restated: a folder's files -> pixels of FLAME's vertices.

Each is written from what the public loader does with the numbers, in its own conventions, and insists on what that
loader insists on. All three have FLAME with teeth; its 5,023 vertices are given back. Their single precision is left
out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

POSES = ("rotation", "neck_pose", "jaw_pose", "eyes_pose")


def vertices(flame, shape, expr, poses, translation, static_offset, dynamic_offset) -> np.ndarray:
    """FLAME's vertices [5023,3]: offsets are added to the shaped template before its joints are taken."""
    assert shape.shape == (300,)
    assert expr.shape == (1, 100)
    shaped = flame.template.numpy() + np.tensordot(shape, flame.shapes.numpy(), 1)
    shaped = shaped + np.tensordot(expr[0], flame.expressions.numpy(), 1)
    for offset in (static_offset, dynamic_offset):
        assert offset.shape == (1, 5143, 3)
        shaped = shaped + offset[0, :5023]
    joints = flame.regressor.numpy() @ shaped
    turns = Rotation.from_rotvec(np.concatenate(poses, 1).reshape(5, 3)).as_matrix()
    feature = (turns[1:] - np.eye(3)).reshape(36)
    posed = shaped + np.tensordot(feature, flame.pose_directions.numpy(), 1)
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
    return found + translation


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, all of single precision: GaussianAvatars' `--motion_path` keeps no others."""
    with np.load(folder / name) as file:
        found = {key: file[key] for key in file.files}
    assert all(value.dtype == np.float32 for value in found.values())
    return {key: value.astype(np.float64) for key, value in found.items()}


def picture_of(folder: Path, frame: dict) -> None:
    with Image.open(folder / frame["file_path"]) as image, Image.open(folder / frame["fg_mask_path"]) as mask:
        assert (image.size, image.mode) == ((frame["w"], frame["h"]), "RGB")
        assert (mask.size, mask.mode) == (image.size, "L")


def gaussian_avatars(folder: Path, flame) -> dict[int, np.ndarray]:
    """GaussianAvatars: time step -> pixels. It takes shape and static offset of time step 0 and leaves dynamic ones."""
    assert not (folder / "sparse").exists(), "that would be COLMAP's"
    assert (folder / "canonical_flame_param.npz").exists(), "that would be Blender's"
    found, meshes = {}, {}
    splits = {name: json.loads((folder / f"transforms_{name}.json").read_text()) for name in ("train", "val", "test")}
    for name in ("train", "test"):
        for frame in splits[name]["frames"]:
            meshes.setdefault(frame["timestep_index"], arrays_of(folder, frame["flame_param_path"]))
    assert 0 in {frame["timestep_index"] for frame in splits["train"]["frames"]}
    for split in splits.values():
        for frame in split["frames"]:
            assert ".png" in frame["file_path"], "it would be appended"
            picture_of(folder, frame)
            step, width, height = frame["timestep_index"], frame["w"], frame["h"]
            mesh = meshes[step]
            static = meshes[0]["static_offset"]
            points = vertices(
                flame,
                meshes[0]["shape"],
                mesh["expr"],
                [mesh[key] for key in POSES],
                mesh["translation"],
                static,
                np.zeros_like(static),
            )
            c2w = np.array(frame["transform_matrix"])
            c2w[:3, 1:3] *= -1
            w2c = np.linalg.inv(c2w)
            view = points @ w2c[:3, :3].T + w2c[:3, 3]
            fov_x = frame["camera_angle_x"]
            fov_y = 2 * math.atan(height / (2 * (width / (2 * math.tan(fov_x / 2)))))
            ndc = view[:, :2] / view[:, 2:] / np.tan([fov_x / 2, fov_y / 2])
            # Pixels are counted from the centre of the first: `((v + 1) S - 1) / 2`.
            found[step] = ((ndc + 1) * (width, height) - 1) / 2 + 0.5
    return found


def vhap(folder: Path, flame) -> dict[int, np.ndarray]:
    """VHAP's own dataset and renderer: time step -> pixels, `cy` counted from the bottom, z positive behind."""
    data = json.loads((folder / "transforms.json").read_text())
    assert len(data["timestep_indices"]) == max(data["timestep_indices"]) + 1
    assert len(data["camera_indices"]) == 1
    found = {}
    for frame in data["frames"]:
        for key in ("timestep_index_original", "timestep_id", "camera_index", "camera_id", "camera_angle_y"):
            assert key in frame
        picture_of(folder, frame)
        own = arrays_of(folder, frame["flame_param_path"])
        points = vertices(
            flame,
            own["shape"],
            own["expr"],
            [own[key] for key in POSES],
            own["translation"],
            own["static_offset"],
            own["dynamic_offset"],
        )
        w2c = np.linalg.inv(np.array(frame["transform_matrix"]))
        width, height = frame["w"], frame["h"]
        projection = np.zeros((4, 4))
        projection[0, 0], projection[0, 2] = 2 * frame["fl_x"] / width, (width - 2 * frame["cx"]) / width
        projection[1, 1], projection[1, 2] = 2 * frame["fl_y"] / height, (height - 2 * frame["cy"]) / height
        projection[3, 2] = -1
        clip = np.c_[points, np.ones(len(points))] @ (projection @ w2c).T
        ndc = clip[:, :2] / clip[:, 3:] * (1, -1)
        found[frame["timestep_index"]] = (ndc * 0.5 + 0.5) * (width, height)
    return found


def lam(folder: Path, flame) -> dict[int, np.ndarray]:
    """LAM's motion sequences: time step -> pixels. No offsets; the transpose of a camera's rotation is taken for it."""
    data = json.loads((folder / "transforms.json").read_text())
    shape = arrays_of(folder, "canonical_flame_param.npz")["shape"]
    found = {}
    for frame in sorted(data["frames"], key=lambda frame: frame["flame_param_path"]):
        own = arrays_of(folder, frame["flame_param_path"])
        none = np.zeros((1, 5143, 3))
        points = vertices(flame, shape, own["expr"], [own[key] for key in POSES], own["translation"], none, none)
        c2w = np.array(frame["transform_matrix"])
        c2w[:3, 1:3] *= -1
        w2c = np.linalg.inv(c2w)
        view = points @ w2c[:3, :3] + w2c[:3, 3]
        centre = frame["cx"], frame["cy"]
        assert (int(2 * centre[0]), int(2 * centre[1])) == (frame["w"], frame["h"])
        found[frame["timestep_index"]] = view[:, :2] / view[:, 2:] * (frame["fl_x"], frame["fl_y"]) + centre
    return found
