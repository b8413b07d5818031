"""NeRFBlendShape's and gaussian-head's readers restated: a folder's files -> pixels of points of its world.

Each is written from what the public loader does with the numbers, and insists on what that loader insists on. As a
program it makes the miniature dataset of `tests/golden`, as the layout's own tools write one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation


def gaussian_head(folder: Path, points: np.ndarray) -> tuple[list[int], np.ndarray, list[np.ndarray]]:
    """Numbers, pixels [T,N,2] (centres at +0.5), and masks in [0,1], frames in the file's order."""
    data = json.loads((folder / "transforms.json").read_text())
    width, height = data["w"], data["h"]
    assert {"cx", "cy"} <= set(data), "they are read, and then not used"
    tangents = [
        np.tan(2 * np.arctan(side / (2 * focal)) / 2) for side, focal in ((width, data["fx"]), (height, data["fy"]))
    ]
    numbers, pixels, masks = [], [], []
    for frame in data["frames"]:
        numbers.append(frame["img_id"])
        assert np.array(frame["exp_ori"]).ndim == 1
        with Image.open(folder / "ori_imgs" / f"{frame['img_id']}.jpg") as image:
            assert image.size == (width, height)
        soft = np.asarray(Image.open(folder / "mask" / f"{frame['img_id'] + 1}.png").convert("L")) / 255
        parsing = np.asarray(Image.open(folder / "parsing" / f"{frame['img_id']}.png").convert("RGB"))
        assert ((parsing == (0, 0, 255)).all(-1) == (soft > 0.5)).all(), "--only_head takes the parsing's blue"
        masks.append(soft)
        camera = np.array(frame["transform_matrix"], np.float64)
        camera[:3, 1:3] *= -1
        seen = points @ np.linalg.inv(camera)[:3, :3].T + np.linalg.inv(camera)[:3, 3]
        ndc = seen[:, :2] / (seen[:, 2:] * tangents)
        # The rasteriser counts pixels from the first one's centre.
        pixels.append(((ndc + 1) * (width, height) - 1) / 2 + 0.5)
    return numbers, np.array(pixels), masks


def nerfblendshape(folder: Path, points: np.ndarray, basis_num: int = 46) -> tuple[list[int], np.ndarray]:
    """Numbers and pixels [T,N,2] (centres at +0.5), frames sorted: the pixel whose ray goes through each point."""
    data = json.loads((folder / "transforms.json").read_text())
    for end in ("max", "min"):
        assert np.loadtxt(folder / f"{end}_{basis_num}.txt").shape == (basis_num,)
    with Image.open(folder / "bc.jpg") as background:
        assert background.size == (int(data["w"]), int(data["h"]))
        assert background.mode == "RGB"
    numbers, pixels = [], []
    for frame in sorted(data["frames"], key=lambda frame: frame["img_id"]):
        numbers.append(frame["img_id"])
        assert len(frame["exp_ori"]) == basis_num, "clamped to max and min element by element"
        c2w = np.array(frame["transform_matrix"], np.float64)
        # instant-ngp's axes: rows y, z, x; columns 1 and 2 turned; lengths by 0.33.
        pose = c2w[[1, 2, 0]] * (1, -1, -1, 0.33)
        directions = (points[:, [1, 2, 0]] * 0.33 - pose[:, 3]) @ np.linalg.inv(pose[:, :3]).T
        assert (directions[:, 2] > 0).all(), "rays have z = 1"
        lifted = directions[:, :2] / directions[:, 2:]
        index = lifted * (data["fx"], data["fy"]) + (data["cx"], data["cy"])
        pixels.append(index + 0.5)
    return numbers, np.array(pixels)


def training_files(folder: Path) -> None:
    """What NeRFBlendShape's training opens beside."""
    for frame in json.loads((folder / "transforms.json").read_text())["frames"]:
        number = frame["img_id"]
        assert (folder / "head_imgs" / f"{number}.jpg").is_file(), "frames without are passed over"
        assert np.loadtxt(folder / "ori_imgs" / f"{number}.lms").shape == (478, 2)


POINTS = np.array([[0, 0, 0], [0.05, 0, 0], [0, 0.05, 0], [0, 0, 0.05], [-0.03, -0.04, 0.02]])
SIZE = (96, 64)
TOP = ("h", "w", "fx", "fy", "cx", "cy", "frames")


def make(folder: Path) -> None:
    """Write the miniature dataset and what is expected of it."""
    rng = np.random.default_rng(7)
    frames = []
    for name in ("ori_imgs", "mask", "parsing"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    for number in (2, 0, 5):
        turn = Rotation.from_rotvec(rng.uniform(-0.3, 0.3, 3)).as_matrix()
        place = turn @ [0.01, -0.008, 0.35] + rng.uniform(-0.01, 0.01, 3)
        pose = np.round(np.block([[turn, place[:, None]], [0, 0, 0, 1]]), 6)
        exp = np.round(rng.normal(0, 1, 46), 5)
        frames.append({"img_id": number, "aud_id": number, "exp_ori": exp.tolist(), "transform_matrix": pose.tolist()})
        inside = np.clip(1.5 - (((x - 48) / 22) ** 2 + ((y - 32) / 24) ** 2), 0, 1)
        rgb = np.stack([x * 2, y * 3, np.full(x.shape, 30 * number)], -1).astype(np.uint8)
        Image.fromarray(rgb).save(folder / "ori_imgs" / f"{number}.jpg", quality=90)
        Image.fromarray((255 * inside).astype(np.uint8)).save(folder / "mask" / f"{number + 1}.png")
        colours = np.where(inside[..., None] > 0.5, (0, 0, 255), np.where(y[..., None] > 44, (255, 0, 0), 255))
        Image.fromarray(colours.astype(np.uint8)).save(folder / "parsing" / f"{number}.png")
    Image.new("RGB", SIZE, (210, 220, 200)).save(folder / "bc.jpg")
    exps = np.array([frame["exp_ori"] for frame in frames], np.float32)
    np.savetxt(folder / "max_46.txt", exps.max(0))
    np.savetxt(folder / "min_46.txt", exps.min(0))
    camera = {"h": SIZE[1], "w": SIZE[0], "fx": 131.25, "fy": 131.25, "cx": 48.0, "cy": 32.0, "near": 0.2}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))
    numbers, pixels = nerfblendshape(folder, POINTS)
    expected = {"numbers": numbers, "points": POINTS.tolist(), "pixels": pixels.tolist()}
    (folder.parent / f"{folder.name}-expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
