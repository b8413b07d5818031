"""Make `tests/golden/imavatar`: three synthetic frames in the files that IMavatar's preprocessing leaves.

    python tools/make_golden_imavatar.py

Numbers have float32's digits, as its `optimize.py` writes them; frames stand out of order; one key at the top and one
in a frame are nobody's. `imavatar-expected.json` says where points of the world lie, by `optimize.py`'s projection.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SIDE = 64
FX, FY, CX, CY = 197.1, 193.2, 33.5, 30.25
POINTS_M = [[0.0, 0.0, 0.0], [0.05, 0.07, 0.08], [-0.06, -0.03, 0.05]]


def main() -> None:
    """Write the files."""
    rng = np.random.default_rng(3)
    folder = GOLDEN / "imavatar"
    shutil.rmtree(folder, ignore_errors=True)
    video = folder / "anna" / "anna" / "MVI_1810"
    for name in ("image", "mask", "semantic"):
        (video / name).mkdir(parents=True)
    translation = _floats([0.11, -0.07, -4.2])
    world_mat = np.concatenate([np.eye(3), translation[:, None]], 1)
    frames, keypoints, irises, codes, expected = [], {}, {}, {}, {}
    for number in (3, 1, 2):
        landmarks = _floats(rng.uniform(-0.4, 0.4, (70, 2)))
        pose = _floats(rng.uniform(-0.3, 0.3, 15))
        expression = _floats(rng.normal(0, 0.6, 50))
        frames.append(
            {
                "file_path": f"./image/{number}",
                "world_mat": world_mat.tolist(),
                "expression": expression.tolist(),
                "pose": pose.tolist(),
                "bbox": [*landmarks.min(0).tolist(), *landmarks.max(0).tolist()],
                "flame_keypoints": landmarks.tolist(),
            }
        )
        at = 4 * np.array(POINTS_M) + translation
        scale = np.array([-FX / SIDE, FY / SIDE])
        seen = (scale * at[:, :2] / at[:, 2:] + np.array([CX, CY]) / SIDE) * SIDE
        expected[number] = {"pixels": seen.tolist(), "jaw": pose[6:9].tolist(), "expression": expression[:3].tolist()}
        keypoints[f"{number}.png"] = ((landmarks[:68] + 1) * SIDE / 2).tolist()
        irises[f"{number}.png"] = ((landmarks[68:] + 1) * SIDE / 2).ravel().tolist()
        codes[str(number)] = {"shape": [[0.0] * 100], "exp": [expression.tolist()], "pose": [pose[:6].tolist()]}
        y, x = np.mgrid[:SIDE, :SIDE]
        inside = ((x - 32) / 20) ** 2 + ((y - 30) / 26) ** 2 < 1
        image = np.stack([4 * x, 4 * y, np.full_like(x, 60 * number)], -1).astype(np.uint8)
        Image.fromarray(image).save(video / "image" / f"{number}.png")
        Image.fromarray(np.repeat(255 * inside[..., None], 3, 2).astype(np.uint8)).save(
            video / "mask" / f"{number}.png"
        )
        Image.fromarray(inside.astype(np.uint8)).save(video / "semantic" / f"{number}.png")
    frames[1]["sharpness"] = 0.75
    data = {
        "frames": frames,
        "intrinsics": [-1 * FX / SIDE, FY / SIDE, CX / SIDE, CY / SIDE],
        "shape_params": _floats(rng.normal(0, 0.7, 100)).tolist(),
        "made_by": {"tool": "optimize.py", "iterations": 1001},
    }
    beside = {"flame_params": data, "keypoint": keypoints, "iris": irises, "code": codes}
    for name, values in beside.items():
        (video / f"{name}.json").write_text(json.dumps(values))
    rows = {"points_m": POINTS_M, "frames": {str(number - 1): expected[number] for number in sorted(expected)}}
    (GOLDEN / "imavatar-expected.json").write_text(json.dumps(rows, indent=1) + "\n")


def _floats(values: object) -> np.ndarray:
    return np.asarray(values, np.float32).astype(np.float64)


if __name__ == "__main__":
    main()
