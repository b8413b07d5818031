"""Make `tests/golden/insta`: three synthetic frames in the files that INSTA's `generate.sh` leaves, and FateAvatar's.

    python tools/make_golden_insta.py

As INSTA's `transforms.py` writes them: keys sorted, frames out of order, text to 8 digits, the last frame in the file
for testing, all three for validation (it takes the last 20). Meshes are of a small topology, as its simplification
leaves them; one key at the top and one in a frame are nobody's. `insta-expected.json` says where vertices lie, by the
rays of INSTA-pytorch's `get_rays`.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
WIDTH, HEIGHT = 96, 64
FX, FY, CX, CY = 121.25, 117.5, 44.75, 35.5
NUMBERS = (7, 0, 2)
POINTS = 4


def main() -> None:
    """Write the files."""
    rng = np.random.default_rng(5)
    folder = GOLDEN / "insta"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "matted", "seg_mask", "depth", "meshes", "alpha"):
        (folder / name).mkdir(parents=True)
    ball = rng.normal(size=(40, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    ball *= (0.075, 0.11, 0.09)
    faces = ConvexHull(ball).simplices
    _write_mesh(folder / "canonical.obj", ball, faces)
    shape = rng.normal(0, 0.5, 300)
    frames, expected = [], {}
    for number in NUMBERS:
        name = f"{number:05d}"
        vertices = ball + rng.normal(0, 0.002, ball.shape)
        _write_mesh(folder / f"meshes/{name}.obj", vertices, faces)
        c2w = np.eye(4)
        c2w[:3, :3] = Rotation.from_rotvec(rng.uniform(-0.3, 0.3, 3)).as_matrix() @ np.diag([1, -1, -1])
        c2w[:3, 3] = c2w[:3, :3] @ [0.01, -0.005, -0.5]
        expression = rng.normal(0, 0.5, 100)
        jaw, left, right = (Rotation.from_rotvec(rng.uniform(-0.2, 0.2, 3)) for _ in range(3))
        texts = {
            "exp": expression,
            "shape": shape,
            "jaw": jaw.as_matrix()[:2],
            "eyes": np.stack([left.as_matrix()[:2], right.as_matrix()[:2]]),
            "eyelids": rng.uniform(0, 0.3, 2),
        }
        for text, values in texts.items():
            (folder / f"flame/{text}").mkdir(parents=True, exist_ok=True)
            np.savetxt(folder / f"flame/{text}/{name}.txt", values.ravel(), fmt="%.8f")
        _write_pictures(folder, name, number)
        frames.append(
            {
                "transform_matrix": c2w.tolist(),
                "file_path": f"images/{name}.png",
                "mesh_path": f"meshes/{name}.obj",
                "exp_path": f"flame/exp/{name}.txt",
                "depth_path": f"depth/{name}.png",
                "seg_mask_path": f"seg_mask/{name}.png",
                "sharpness": round(float(rng.uniform(20, 40)), 3),
            }
        )
        directions = (np.round(vertices[:POINTS], 8) - c2w[:3, 3]) @ c2w[:3, :3]
        expected[name] = {
            "pixels": (directions[:, :2] / directions[:, 2:] * (FX, FY) + (CX, CY)).tolist(),
            "expression": np.round(expression[:3], 8).tolist(),
            "jaw": jaw.as_rotvec().tolist(),
            "eyes": [left.as_rotvec().tolist(), right.as_rotvec().tolist()],
        }
    angles = [2 * math.atan(side / (2 * focal)) for side, focal in ((WIDTH, FX), (HEIGHT, FY))]
    data = {
        "w": float(WIDTH),
        "h": float(HEIGHT),
        "cx": CX,
        "cy": CY,
        "fl_x": FX,
        "fl_y": FY,
        "camera_angle_x": angles[0],
        "camera_angle_y": angles[1],
        "x_fov": angles[0] * 180 / math.pi,
        "y_fov": angles[1] * 180 / math.pi,
        "integer_depth_scale": 0.001,
        "aabb_scale": 1,
    }
    parts = {"": frames, "_train": frames[:-1], "_test": frames[-1:], "_val": frames[-20:]}
    for part, rows in parts.items():
        text = json.dumps({**data, "frames": rows}, indent=4, sort_keys=True)
        (folder / f"transforms{part}.json").write_text(text)
    (GOLDEN / "insta-expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def _write_mesh(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    lines = [f"v {x:.8f} {y:.8f} {z:.8f}" for x, y, z in vertices] + [f"f {a} {b} {c}" for a, b, c in faces + 1]
    path.write_text("# https://github.com/mikedh/trimesh\n" + "\n".join(lines))


def _write_pictures(folder: Path, name: str, number: int) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = ((x - 46) / 20) ** 2 + ((y - 32) / 26) ** 2 < 1
    alpha = np.where(inside, 255, 0)
    image = np.stack([2 * x, 4 * y, np.full_like(x, 30 * number), alpha], -1) * inside[..., None]
    rgba = Image.fromarray(image.astype(np.uint8))
    rgba.save(folder / f"images/{name}.png")
    rgba.save(folder / f"matted/{name}.png")
    Image.fromarray(alpha.astype(np.uint8)).save(folder / f"alpha/{name}.png")
    parsing = np.stack([np.where(inside, 250, 0), 0 * x, 0 * x], -1)
    Image.fromarray(parsing.astype(np.uint8)).save(folder / f"seg_mask/{name}.png")
    Image.fromarray(np.where(inside, 420, 0).astype(np.uint16)).save(folder / f"depth/{name}.png")


if __name__ == "__main__":
    main()
