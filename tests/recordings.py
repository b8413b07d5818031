"""Recordings of nobody, on purpose awkward: pictures that are not square, a principal point off the centre, fx != fy,
turns about three axes, a shape, 30000/1001 frames a second, gaps in the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.geometry import make_rigid, project_points, rotvec_to_matrix, transform_points
from pipeline.interchange.recording import FlameTrack, Recording

SIZE = (96, 64)
NUMBERS = (3, 4, 9)
FPS = Fraction(30000, 1001)
K = np.array([[118.0, 0.0, 41.5], [0.0, 109.0, 35.25], [0.0, 0.0, 1.0]])


def camera_poses(count: int, distance: float = 0.6, seed: int = 0) -> np.ndarray:
    """Poses [T,4,4] of a head that turns about three axes before a camera (OpenCV axes, the head upright)."""
    rng = np.random.default_rng(seed)
    upright = np.diag([1.0, -1.0, -1.0])
    turns = rotvec_to_matrix(rng.uniform(-0.35, 0.35, (count, 3)))
    return make_rigid(turns @ upright, rng.uniform(-0.03, 0.03, (count, 3)) + np.array([0, 0, distance]))


def flame_track(version: str, count: int, *, moving: bool, seed: int = 0, expressions: int = 100) -> FlameTrack:
    """FLAME parameters of an awkward head; `moving` turns its root too."""
    rng = np.random.default_rng(seed)

    def turns(size: float, *shape: int) -> np.ndarray:
        return rng.uniform(-size, size, (count, *shape))

    still = np.zeros((count, 3))
    return FlameTrack(
        version=version,
        shape=rng.normal(0, 0.8, 300),
        expression=rng.normal(0, 0.5, (count, expressions)),
        rotation=turns(0.4, 3) if moving else still,
        translation=turns(0.05, 3) if moving else still.copy(),
        neck=turns(0.1, 3),
        jaw=np.abs(turns(0.2, 3)) * [1, 0.1, 0.1],
        eyes=turns(0.2, 2, 3),
    )


def recording(
    format_name: str,
    *,
    flame: FlameTrack | None = None,
    numbers: Sequence[int] = NUMBERS,
    size: tuple[int, int] = SIZE,
    intrinsics: np.ndarray = K,
    names: Sequence[str] = (),
    **changes: Any,
) -> Recording:
    """A recording; file names are left to the writer. `names`: of the coefficients where there is no FLAME."""
    count = len(numbers)
    rng = np.random.default_rng(1)
    if flame is not None:
        basis = f"{flame.version}-expression-{flame.expression.shape[1]}"
        names = [f"{basis}/{index:03d}" for index in range(flame.expression.shape[1])]
        values = flame.expression
    else:
        basis = names[0].partition("/")[0]
        values = rng.normal(0, 0.4, (count, len(names)))
    fields: dict[str, Any] = {
        "format": format_name,
        "size": size,
        "fps": FPS,
        "numbers": np.array(numbers),
        "Ks": np.repeat(intrinsics[None], count, 0),
        "Ts_cam_world": camera_poses(count),
        "images": (),
        "alpha": "none",
        "masks": (),
        "basis": basis,
        "coefficient_names": tuple(names),
        "coefficients": values,
        "flame": flame,
    }
    return Recording(**(fields | changes))


def picture(row: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """RGB and alpha of a frame: a gradient that tells its row, and an ellipse."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * x / width, 255 * y / height, np.full(x.shape, 40.0 * (row + 1))], -1).astype(np.uint8)
    inside = ((x - width / 2) / (width / 3)) ** 2 + ((y - height / 2) / (height / 3)) ** 2 < 1
    return rgb, np.where(inside, 255, 0).astype(np.uint8)


def pixels(recording: Recording, points: np.ndarray, root_joint: np.ndarray | None = None) -> np.ndarray:
    """Where points [N,3] or [T,N,3] of the head frame lie in the pictures: [T,N,2]."""
    return project_points(transform_points(recording.Ts_cam_head(root_joint), points), recording.Ks)


def files_of(folder: Path) -> list[str]:
    """Every file in a folder, relative, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flame_file(folder: Path, name: str) -> Path:
    """A synthetic FLAME under the publisher's file name; point `HEADCAST_HEADS` at the folder."""
    from synthetic_heads import flame_arrays, write_flame2020, write_flame2023

    from pipeline.heads import head_file, load_head

    folder.mkdir(parents=True, exist_ok=True)
    arrays = flame_arrays(load_head("anny"))
    write = write_flame2020 if name == "flame2020" else write_flame2023
    return write(folder / head_file(name).file, arrays)
