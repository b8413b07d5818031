"""The avatar at rest as one GLB with KHR_gaussian_splatting, the Khronos extension for Gaussians, ratified in 2026.

A primitive of points whose attributes are positions, rotations (xyzw), scales (linear), opacities and harmonics, all
float32; `COLOR_0` lets programs without the extension show a cloud of coloured points.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.exports import Export
from pipeline.glb import POINTS, Glb, refusal
from pipeline.splats import SH_C0, Splats

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
OPTIONS: dict[str, str] = {}
EXTENSION = "KHR_gaussian_splatting"
COLOR_SPACE = "srgb_rec709_display"
ABOUT = (
    "KHR_gaussian_splatting has no blendshapes and no skinning: this is the face at rest. "
    "To have it move: --to rig, arkit, ply-sequence or web."
)


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `avatar.glb`.

    Raises:
        UserError: the avatar cannot be read.
    """
    from pipeline.exports.rest import write_rest

    return write_rest(export, folder / "avatar.glb", write_splats, read_splats, ABOUT)


def write_splats(path: Path, splats: Splats) -> None:
    """Write Gaussians.

    Raises:
        ValueError: there are none, the arrays do not fit each other, or hold values that are not finite.
    """
    if not len(splats.checked()):
        raise ValueError("glTF has no arrays without entries")
    attributes: dict[str, int] = {}
    primitive = {
        "mode": POINTS,
        "attributes": attributes,
        "extensions": {
            EXTENSION: {
                "kernel": "ellipse",
                "colorSpace": COLOR_SPACE,
                "projection": "perspective",
                "sortingMethod": "cameraDistance",
            }
        },
    }
    glb = Glb.of_one_mesh(primitive, "avatar")
    glb.document["extensionsUsed"] = [EXTENSION]
    colors = np.concatenate([linear_of(splats.sh[:, 0] * SH_C0 + 0.5), splats.opacities[:, None]], 1)
    attributes["POSITION"] = glb.add(splats.means, bounds=True)
    attributes["COLOR_0"] = glb.add(np.round(65535 * colors.clip(0, 1)).astype(np.uint16), normalized=True)
    attributes[f"{EXTENSION}:ROTATION"] = glb.add(splats.quats[:, [1, 2, 3, 0]])
    attributes[f"{EXTENSION}:SCALE"] = glb.add(splats.scales)
    attributes[f"{EXTENSION}:OPACITY"] = glb.add(splats.opacities.clip(0, 1))
    for column, name in enumerate(_harmonics(splats.degree())):
        attributes[name] = glb.add(np.ascontiguousarray(splats.sh[:, column]))
    glb.write(path)


def read_splats(path: Path) -> Splats:
    """Read the Gaussians of the first primitive with the extension.

    Raises:
        UserError: the file cannot be read, is no GLB, or holds no Gaussians that make sense.
    """
    glb = Glb.read(path)
    try:
        attributes = _attributes(glb.document)
        degree = max((d for d in range(4) if f"{EXTENSION}:SH_DEGREE_{d}_COEF_0" in attributes), default=0)
        names = ("ROTATION", "SCALE", "OPACITY")
        wanted = ["POSITION", *(f"{EXTENSION}:{name}" for name in names), *_harmonics(degree)]
        missing = [name for name in wanted if name not in attributes]
        if missing:
            raise ValueError(f"it has no attribute '{missing[0]}'")
        means, xyzw, scales, opacities, *harmonics = (glb.array(attributes[name]) for name in wanted)
        count = len(means)
        shapes = {"POSITION": (means, 3), "ROTATION": (xyzw, 4), "SCALE": (scales, 3)}
        shapes |= {f"SH {i}": (array, 3) for i, array in enumerate(harmonics)}
        for name, (array, width) in shapes.items():
            if array.shape != (count, width):
                raise ValueError(f"its {name} has shape {list(array.shape)}, not {[count, width]}")
        if opacities.shape != (count,) or not ((opacities >= 0) & (opacities <= 1)).all() or (scales < 0).any():
            raise ValueError("an opacity lies outside 0 to 1, or a scale below 0")
        lengths = np.linalg.norm(xyzw.astype(np.float64), axis=1, keepdims=True)
        if not (lengths > 1e-6).all():
            raise ValueError("a rotation makes no sense")
    except (ValueError, AttributeError, TypeError) as error:
        raise refusal(path, error) from None
    sh = np.zeros((count, 16, 3), np.float32)
    for column, array in enumerate(harmonics):
        sh[:, column] = array
    quats = (xyzw / lengths)[:, [3, 0, 1, 2]]
    plain = (np.asarray(array, np.float32) for array in (means, quats, scales, opacities, sh))
    return Splats(*plain)


def linear_of(srgb: NDArray[Any]) -> NDArray[Any]:
    """Linear light in [0, 1] of sRGB values: what glTF's `COLOR_0` holds."""
    srgb = srgb.clip(0, 1)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _harmonics(degree: int) -> list[str]:
    """Attributes of harmonics, in 3DGS's order, which is glTF's."""
    return [f"{EXTENSION}:SH_DEGREE_{d}_COEF_{n}" for d in range(degree + 1) for n in range(2 * d + 1)]


def _attributes(document: dict[str, Any]) -> dict[str, Any]:
    """Of the first primitive of Gaussians.

    Raises:
        ValueError: there is none, its kernel or colours are others, or its node is moved.
    """
    for number, mesh in enumerate(document.get("meshes", [])):
        for primitive in mesh.get("primitives", []):
            if EXTENSION not in primitive.get("extensions", {}):
                continue
            about = primitive["extensions"][EXTENSION]
            if about.get("kernel") != "ellipse" or about.get("colorSpace") != COLOR_SPACE or "extensions" in about:
                raise ValueError("its Gaussians have another kernel, other colours or a compression")
            for node in document.get("nodes", []):
                if node.get("mesh") == number and {"matrix", "translation", "rotation", "scale"} & set(node):
                    raise ValueError("its Gaussians lie in a node that moves them")
            return dict(primitive["attributes"])
    raise ValueError(f"it has no primitive with {EXTENSION}")
