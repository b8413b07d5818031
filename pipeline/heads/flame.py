"""FLAME 2020, 2023 and 2023 Open, from the user's own file (Li et al. 2017, "Learning a model of facial shape and
expression from 4D scans").

Of FLAME are taken: the template, the first 100 shape components (one unit is one standard deviation), the 100
expression components, the jaw (its rotation linearised about `JAW_ANGLE_RAD`, pose correctives included, so that it is
exact there), and the neck's and the eyes' skinning. The neck's pose correctives and the expressions' small effect on
joints are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.heads.external import HeadFile, NativeHead, check_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERTICES, FACES, SHAPES, EXPRESSIONS = 5023, 9976, 300, 100
USED_SHAPES = 100
JAW_ANGLE_RAD = 0.2
PARENTS = (0, 1, 1, 1)  # of neck, jaw, left eye, right eye; the root has none
ROOT, NECK, JAW, *EYES = range(5)
CONTROL_NAMES = (*(f"expression_{index:03d}" for index in range(EXPRESSIONS)), "jaw_x", "jaw_y", "jaw_z")
"""The jaw's are components of its rotation vector, in radians."""

_EXPECTED = {
    "v_template": (VERTICES, 3),
    "f": (FACES, 3),
    "shapedirs": (VERTICES, 3, SHAPES + EXPRESSIONS),
    "posedirs": (VERTICES, 3, 36),
    "J_regressor": (5, VERTICES),
    "weights": (VERTICES, 5),
    "kintree_table": (2, 5),
}


def read_flame(path: Path) -> NativeHead:
    """FLAME's arrays out of its pickle, by the restricted reader.

    Raises:
        UserError: the file holds something else than plain arrays, or not FLAME's.
    """
    from scipy import sparse

    from pipeline.geometry import rotvec_to_matrix
    from pipeline.restricted_pickle import load_plain

    data = load_plain(path)
    if not isinstance(data, dict):
        raise UserError(f"'{path}' is not FLAME: it holds a {type(data).__name__}.", "get it again from its publisher")
    found = {name: tuple(data[name].shape) for name in _EXPECTED if hasattr(data.get(name), "shape")}
    check_shapes(path, "FLAME", found, _EXPECTED)

    def array(name: str) -> NDArray[Any]:
        value = data[name].toarray() if sparse.issparse(data[name]) else data[name]
        if value.dtype.kind not in "iuf":
            raise UserError(f"'{path}' is not FLAME: {name} holds no numbers.", "get it again from its publisher")
        return value.astype(np.float64)

    parents = tuple(int(parent) for parent in array("kintree_table")[0, 1:])
    if parents != PARENTS:
        raise UserError(
            f"'{path}' is not FLAME: its joints hang on {parents}, expected {PARENTS}.",
            "get it again from its publisher",
        )
    template, regressor = array("v_template"), array("J_regressor")
    directions = np.ascontiguousarray(np.moveaxis(array("shapedirs"), 2, 0))
    shapes, expressions = directions[:USED_SHAPES], directions[SHAPES:]
    weights = array("weights")
    joints = regressor @ template
    joint_directions = np.einsum("jv,svi->sji", regressor, shapes)

    jaw = []
    for axis in np.eye(3):
        rotation = rotvec_to_matrix(JAW_ANGLE_RAD * axis)
        # Pose correctives: 9 entries of R - I for each joint but the root, whose next is the neck.
        corrected = template + array("posedirs")[:, :, 9 * (JAW - 1) : 9 * JAW] @ (rotation - np.eye(3)).ravel()
        turned = (corrected - joints[JAW]) @ rotation.T + joints[JAW]
        jaw.append((corrected + weights[:, [JAW]] * (turned - corrected) - template) / JAW_ANGLE_RAD)

    # Our origin is the neck's joint, of every identity.
    left, right = sorted(EYES, key=lambda eye: -joints[eye, 0])
    order = [NECK, NECK, left, right]
    pivot, pivot_directions = joints[NECK], joint_directions[:, NECK]
    return NativeHead(
        template=template - pivot,
        faces=array("f").astype(np.int32),
        identity_basis=(shapes - pivot_directions[:, None]).astype(np.float32),
        identity_names=tuple(f"shape_{index:03d}" for index in range(USED_SHAPES)),
        controls=np.concatenate([expressions, jaw]).astype(np.float32),
        control_names=CONTROL_NAMES,
        skin_weights=np.stack(
            [weights[:, NECK] + weights[:, JAW], weights[:, ROOT], weights[:, left], weights[:, right]], axis=1
        ),
        joints=joints[order] - pivot,
        joints_identity_basis=joint_directions[:, order] - pivot_directions[:, None],
    )


_PAGE = "https://flame.is.tue.mpg.de/"
_LICENCE = "Max Planck's licence: non-commercial research only, not to be passed on"

FLAME_FILES = (
    HeadFile(
        name="flame2023open",
        title="FLAME 2023 Open",
        file="flame2023_Open.pkl",
        page=_PAGE,
        licence="CC-BY-4.0: free also for commercial use, with attribution",
        read=read_flame,
        how=f'register at {_PAGE}, download "FLAME 2023 Open", unzip it',
    ),
    HeadFile(
        name="flame2023",
        title="FLAME 2023",
        file="flame2023.pkl",
        page=_PAGE,
        licence=_LICENCE,
        may_be_passed_on=False,
        read=read_flame,
        how=f'register at {_PAGE}, download "FLAME 2023", unzip it',
    ),
    HeadFile(
        name="flame2020",
        title="FLAME 2020",
        file="generic_model.pkl",
        page=_PAGE,
        licence=_LICENCE,
        may_be_passed_on=False,
        read=read_flame,
        how=f'register at {_PAGE}, download "FLAME 2020", unzip it',
    ),
)
"""The most recent first."""
