"""Google's GNM Head v3 (Apache-2.0), from the user's own file.

Its arrays are in metres, x towards the subject's left, y up, z out of the face; coefficients are in standard
deviations; the jaw is part of the expression basis, and version 3.0 has no pose correctives. Its neck joint carries
what is our torso, its head joint is our origin. The file's masks name eyes, lips, ears, teeth and tongue.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.heads.external import HeadFile, NativeHead, check_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERTICES, FACES, SHAPES, EXPRESSIONS = 17_821, 35_324, 253, 383
MAX_ITEM_BYTES = 1024
JOINT_NAMES = ("neck", "head", "left_eye", "right_eye")

_EXPECTED = {
    "template_vertex_positions": (VERTICES, 3),
    "triangles": (FACES, 3),
    "vertex_identity_basis": (SHAPES, VERTICES, 3),
    "expression_basis": (EXPRESSIONS, VERTICES, 3),
    "skinning_weights": (4, VERTICES),
    "template_joint_positions": (4, 3),
    "joint_identity_basis": (SHAPES, 4, 3),
    "joint_parent_indices": (4,),
    "joint_names": (4,),
    "identity_names": (SHAPES,),
    "expression_names": (EXPRESSIONS,),
}

# Our regions -> the file's vertex groups that make them up.
_GROUPS = {
    "lips": ("upper_lip", "lower_lip"),
    "ears": ("ears",),
    "teeth": ("upper_teeth_and_gums", "lower_teeth_and_gums"),
    "tongue": ("tongue",),
    "mouth_interior": ("mouth_sock",),
    "eye_sockets": ("eye_sockets",),
}


def read_gnm(path: Path) -> NativeHead:
    """GNM's arrays out of its `.npz`.

    Raises:
        UserError: the file holds pickles, or not GNM's arrays.
    """
    shapes = _declared_shapes(path)
    check_shapes(path, "GNM Head v3", shapes, _EXPECTED)
    groups = shapes.get("vertex_groups") or (0, 0)
    if len(groups) != 2 or groups[0] > 1000 or groups[1] not in (0, VERTICES):
        check_shapes(path, "GNM Head v3", shapes, {"vertex_groups": (groups[0], VERTICES)})
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in _EXPECTED}
        kind = [str(file[name]) for name in ("variant", "version") if name in file.files]
        regions = _regions(file["vertex_groups"], file["vertex_group_names"]) if groups[0] else {}
    if kind != ["head", "3.0"]:
        raise UserError(f"'{path}' is not GNM Head v3: it says {' '.join(kind) or 'nothing'}.", "get version 3.0")
    names = tuple(str(name) for name in arrays["joint_names"])
    parents = tuple(int(parent) for parent in arrays["joint_parent_indices"])
    if names != JOINT_NAMES or parents[1:] != (0, 1, 1):
        raise UserError(f"'{path}' is not GNM Head v3: its joints are {names} on {parents}.", "get version 3.0")

    neck, head, left, right = range(4)
    order = [head, head, left, right]
    joints = arrays["template_joint_positions"].astype(np.float64)
    joint_directions = arrays["joint_identity_basis"].astype(np.float64)
    weights = arrays["skinning_weights"].astype(np.float64).T
    return NativeHead(
        template=arrays["template_vertex_positions"].astype(np.float64) - joints[head],
        faces=arrays["triangles"].astype(np.int32),
        identity_basis=(arrays["vertex_identity_basis"] - joint_directions[:, [head]]).astype(np.float32),
        identity_names=tuple(str(name) for name in arrays["identity_names"]),
        controls=arrays["expression_basis"].astype(np.float32),
        control_names=tuple(str(name) for name in arrays["expression_names"]),
        skin_weights=weights[:, [head, neck, left, right]],
        joints=joints[order] - joints[head],
        joints_identity_basis=joint_directions[:, order] - joint_directions[:, [head]],
        regions=regions,
    )


def _declared_shapes(path: Path) -> dict[str, tuple[int, ...] | None]:
    """The shapes that the members of a `.npz` declare, read before any of them is: a few bytes may declare any size."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    version = np.lib.format.read_magic(member)
                    read = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        read = np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(member)
                if dtype.hasobject:
                    raise UserError(
                        f"'{path}' is refused: {name.removesuffix('.npy')} is a pickle, not an array.",
                        "get it again from its publisher; nothing in it was run",
                    )
                if dtype.itemsize > MAX_ITEM_BYTES:
                    raise ValueError(f"{name} declares items of {dtype.itemsize} bytes")
                shapes[name.removesuffix(".npy")] = shape
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"'{path}' is damaged or no .npz file: {error}.", "get it again from its publisher") from error
    return shapes


def _regions(groups: NDArray[Any], names: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Our regions of the file's vertex groups [G, V]; those it has."""
    masks = {str(name): group > 0.5 for name, group in zip(names, groups, strict=True)}
    return {
        region: np.any([masks[part] for part in parts], axis=0)
        for region, parts in _GROUPS.items()
        if all(part in masks for part in parts)
    }


GNM_FILE = HeadFile(
    name="gnm",
    title="GNM Head v3.0",
    file="gnm_head.npz",
    page="https://huggingface.co/google/gnm-v3",
    licence="Apache-2.0: free also for commercial use",
    read=read_gnm,
    how="run: body-models download gnm -o '{folder}', or download v3_0/gnm_head.npz from "
    "https://huggingface.co/google/gnm-v3",
    known={"61d78bbfb4ad8e0b38495804a4caef3214d3df00f8c3f68761e63b41ce3747eb": "GNM Head v3.0"},
)
