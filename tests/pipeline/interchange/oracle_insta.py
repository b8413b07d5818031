"""INSTA's, INSTA-pytorch's and FateAvatar's readers restated: a folder's files -> pixels of the meshes in it.

Each is written from what the public loader does with the numbers, in its own conventions, and insists on what that
loader insists on.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def obj(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces, word by word."""
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    vertices = np.array([[float(word) for word in line[1:4]] for line in lines if line[:1] == ["v"]])
    faces = np.array([[int(word.split("/")[0]) for word in line[1:4]] for line in lines if line[:1] == ["f"]]) - 1
    assert faces.shape == (len(faces), 3)
    assert 0 <= faces.min() <= faces.max() < len(vertices)
    return vertices, faces


def insta_pytorch(folder: Path, split: str) -> dict[str, np.ndarray]:
    """INSTA-pytorch's `provider.py`: image path -> pixels of its mesh, found by the words in the image's path."""
    canonical = obj(folder / "canonical.obj")
    transform = json.loads((folder / f"transforms_{split}.json").read_text())
    height, width = int(transform["h"]), int(transform["w"])
    found = {}
    for frame in sorted(transform["frames"], key=lambda frame: frame["file_path"]):
        path = f"{folder}/{frame['file_path']}"
        image = np.asarray(Image.open(path))
        assert image.shape == (height, width, 4)
        vertices, faces = obj(path.replace("images", "meshes").replace("png", "obj"))
        assert len(faces) == len(canonical[1])
        depth = np.asarray(Image.open(path.replace("images", "depth")))
        assert depth.shape == (height, width)
        assert depth.dtype.kind in "iu"
        assert depth.max() > 255, "millimetres in 16 bits"
        parsing = np.asarray(Image.open(path.replace("images", "seg_mask")))
        assert parsing.shape == (height, width, 3), "the last of three channels in OpenCV's order"
        assert np.loadtxt(path.replace("images", "/flame/exp").replace("png", "txt"))[:16].shape == (16,)
        pose = np.array(frame["transform_matrix"])
        # Rays are directions @ R^T from the pose's last column; here back from the point to its pixel.
        directions = (vertices - pose[:3, 3]) @ pose[:3, :3]
        assert (directions[:, 2] > 0).all(), "zs are ones"
        rays = directions / directions[:, 2:]
        found[frame["file_path"]] = np.stack(
            [
                rays[:, 0] * transform["fl_x"] + transform["cx"],
                rays[:, 1] * transform["fl_y"] + transform["cy"],
            ],
            1,
        )
    return found


def insta(folder: Path, file: str) -> dict[str, np.ndarray]:
    """INSTA's `nerf_loader.cu`: the same, by the paths in the file, degrees before focal lengths, relative centre."""
    data = json.loads((folder / file).read_text())
    assert isinstance(data["frames"], list)
    width, height = data["w"], data["h"]
    found = {}
    for frame in sorted(data["frames"], key=lambda frame: frame["mesh_path"]):
        with Image.open(folder / frame["file_path"]) as image:
            size = np.array(image.size)
        for key in ("seg_mask_path", "depth_path"):
            with Image.open(folder / frame[key]) as picture:
                assert picture.size == tuple(size)
        assert len(np.loadtxt(folder / frame["exp_path"])) >= 16
        focal = []
        for axis, side in zip("xy", size, strict=True):
            if f"{axis}_fov" in data:
                focal.append(0.5 * side / np.tan(0.5 * data[f"{axis}_fov"] * np.pi / 180))
            else:
                focal.append(data[f"fl_{axis}"])
        principal = np.array([data["cx"] / width, data["cy"] / height])
        int(Path(frame["mesh_path"]).stem)
        vertices = obj(folder / frame["mesh_path"])[0]
        start = np.array(frame["transform_matrix"])[:3]
        local = np.linalg.solve(start[:, :3], (vertices - start[:, 3]).T).T
        assert (local[:, 2] > 0).all()
        found[frame["file_path"]] = (principal + local[:, :2] / local[:, 2:] * focal / size) * size
    return found


def fateavatar(folder: Path, split: str, flame) -> dict[str, np.ndarray]:
    """FateAvatar's `InstaDataset`: pixels of FLAME (root and neck at rest) by fields of view about the centre."""
    import torch
    from scipy.spatial.transform import Rotation

    def turn(six: np.ndarray) -> np.ndarray:
        first = six[:3] / np.linalg.norm(six[:3])
        second = six[3:] - first @ six[3:] * first
        second /= np.linalg.norm(second)
        return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)])).as_rotvec()

    transform = json.loads((folder / f"transforms_{split}.json").read_text())
    frames = sorted(transform["frames"], key=lambda frame: int(frame["file_path"].split("/")[-1].split(".")[0]))
    shape = np.loadtxt(folder / frames[0]["exp_path"].replace("exp", "shape"))
    assert shape.shape == (300,)
    found = {}
    for frame in frames:
        texts = {name: np.loadtxt(folder / frame["exp_path"].replace("exp", name)) for name in ("exp", "jaw", "eyes")}
        assert texts["exp"].shape == (100,)
        # Left is the last six here, and FLAME's joint 3.
        eyes = np.stack([turn(texts["eyes"][6:]), turn(texts["eyes"][:6])])
        rest = torch.zeros(1, 3, dtype=torch.float64)
        vertices = flame.vertices(
            torch.from_numpy(shape),
            torch.from_numpy(texts["exp"])[None],
            rest,
            rest,
            torch.from_numpy(turn(texts["jaw"]))[None],
            torch.from_numpy(eyes)[None],
            rest,
        )[0].numpy()
        with Image.open(folder / frame["file_path"].replace("images", "alpha")) as alpha:
            size = np.array(alpha.size)
        world_mat = np.linalg.inv(np.array(frame["transform_matrix"]))
        view = vertices @ world_mat[:3, :3].T + world_mat[:3, 3]
        focal = np.array([0.5 * transform[f"fl_{axis}"] / transform[f"c{axis}"] for axis in "xy"])
        centre = np.array([transform["cx"] / transform["w"], transform["cy"] / transform["h"]])
        tangent = np.tan(np.arctan2(centre, focal))
        found[frame["file_path"]] = (view[:, :2] / view[:, 2:] / tangent + 1) / 2 * size
    return found
