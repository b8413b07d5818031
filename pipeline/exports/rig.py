"""The rig bundle: all that a program of one's own needs to drive the avatar, as `rig.npz` and `rig.json`.

For the model `rigged` these are its Gaussians at rest, what binds them to the fitted head, and what it learned on top;
`drive.py` (`pipeline.exports.drive`), which lies beside them, computes the rest with NumPy alone. Other models are too
large to be written down in a page: their bundle has the baked avatar (docs/avatars.md) in `baked/`. Both have the mesh
of the fitted head. docs/exports.md describes every array.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.errors import StageError
from pipeline.exports import Export
from pipeline.exports.licence import OPTION, check_licence

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.avatars import AvatarModel, Condition
    from pipeline.avatars.rigged import RiggedAvatar
    from pipeline.clip import Clip
    from pipeline.exports.loss import Loss

    Arrays = dict[str, NDArray[Any]]

VERSION = 1
OPTIONS = OPTION
SCHEMA = 1
POSES = ("T_cam_head", "T_cam_torso", "T_cam_skull", "eyes", "torso_shape")
"""Fields of `Condition` that move a rig beside its coefficients."""
SAME_VERTEX_M = 5e-4
"""Saved avatars hold their vertices in half precision."""
PROBES = ("jawOpen", "eyeBlinkLeft", "mouthSmileLeft", "browInnerUp")
"""Beside rest the bundle is compared with each of these at 1."""


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `rig.npz`, `rig.json`, and `drive.py` or `baked/`.

    Raises:
        UserError: the avatar cannot be read, or its head may not be passed on.
        StageError: avatar and fit do not belong together.
    """
    from pipeline.api import LoadedSubject
    from pipeline.avatars.rigged import RiggedAvatar
    from pipeline.dataset import write_json

    subject = LoadedSubject(export.subject)
    avatar = subject.avatar().model
    licence = check_licence(export, subject.clip)
    rigged = isinstance(avatar, RiggedAvatar)
    arrays = head_arrays(subject.clip)
    if isinstance(avatar, RiggedAvatar):
        arrays |= _rigged_arrays(avatar, arrays)
        shutil.copyfile(Path(__file__).with_name("drive.py"), folder / "drive.py")
    else:
        shutil.copytree(export.subject.stage("export") / "baked", folder / "baked")
    size_px = subject.clip.resolution
    np.savez_compressed(folder / "rig.npz", **cast("dict[str, Any]", arrays))
    about = {
        "schema": SCHEMA,
        "model": avatar.name,
        "form": "rigged" if rigged else "baked",
        "licence": licence,
        "head": avatar.head,
        "axes": "x to the subject's left, y up, z out of the face, metres; T_cam_* lead from there to a camera's, "
        "x right, y down, z forward; quaternions wxyz",
        "expression_names": list(avatar.expression_names),
        "head_joints": ["head", "torso", "eye_left", "eye_right"],
        "skinning_joints": ["head", "torso", "eye_left", "eye_right", "skull"],
        "neutral": {name: getattr(avatar.neutral, name).double().tolist() for name in POSES},
        "camera": {"K": subject.clip.Ks[0].tolist(), "width": size_px, "height": size_px},
        "arrays": {name: {"shape": list(value.shape), "type": str(value.dtype)} for name, value in arrays.items()},
    }
    write_json(folder / "rig.json", about)
    loss = _loss(export, avatar, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    what = (
        f"{avatar.count:,} Gaussians bound to the head, {len(arrays)} arrays; drive.py drives them with NumPy"
        if rigged
        else f"the model '{avatar.name}' has no closed formula, so its baked form is in baked/, beside the head's mesh"
    )
    text = f"rig.npz, rig.json, {size / 1e6:.1f} MB: {what}. {loss} {licence}"
    return {"form": about["form"], "gaussians": avatar.count, "bytes": size, **loss.account(), "text": text}


def head_arrays(clip: Clip) -> Arrays:
    """The fitted head as `head_*`: its vertices at rest, faces, expression shapes, joints and skinning weights."""
    head = clip.personal_head()
    arrays: Arrays = {
        "head_vertices": head.template + np.einsum("s,svi->vi", clip.identity, head.identity_basis),
        "head_faces": head.faces,
        "head_expression": head.expression_basis,
        "head_joints": head.joints + np.einsum("s,sji->ji", clip.identity, head.joints_identity_basis),
        "head_skinning": head.skin_weights,
    }
    if head.uv is not None and head.uv_faces is not None:
        arrays |= {"head_uv": head.uv, "head_uv_faces": head.uv_faces}
    return {name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in arrays.items()}


def _rigged_arrays(avatar: RiggedAvatar, head: Arrays) -> Arrays:
    """What `drive.py` reads, and the triangles of the head that Gaussians hang on.

    Raises:
        StageError: the avatar hangs on vertices that the fitted head has not.
    """
    from scipy.spatial import cKDTree

    def moving(vertices: NDArray[Any], shapes: NDArray[Any]) -> NDArray[Any]:
        """[V,3+3E]: lips and lids that touch at rest are told apart by how they move."""
        return np.concatenate([vertices, np.moveaxis(shapes, 0, 1).reshape(len(vertices), -1)], 1)

    # The rig keeps only those vertices that something hangs on.
    weights = {name: value.float().numpy() for name, value in avatar.state_dict().items()}
    whole = cKDTree(moving(head["head_vertices"], head["head_expression"]))
    distance, vertex = whole.query(moving(weights["rig_vertices"], weights["rig_expression"]))
    corners = vertex[weights["rig_corners"].astype(np.int64)]
    numbers = {tuple(face): number for number, face in enumerate(head["head_faces"].tolist())}
    triangle = np.array([numbers.get(tuple(face), -1) for face in corners.tolist()], np.int32)
    if distance.max() > SAME_VERTEX_M or (triangle < 0).any():
        raise StageError(
            "The trained avatar hangs on another head than the fit's.", "bring both up to date with: headcast rerun"
        )
    return {
        **{name: weights[name] for name in ("means", "quats", "log_scales", "opacity_logits", "colors")},
        "triangle": triangle,
        "bary": weights["rig_bary"],
        "follow": avatar.follow.numpy(),
        "follow_share": weights["rig_follow"],
        "skinning": avatar.joint_weights().detach().numpy(),
        "eye_centres": weights["rig_eye_centres"],
        **{name: weights[name] for name in ("feature_mean", "feature_scale", "shape_scale", "basis", "torso_basis")},
        "units": avatar.units.numpy(),
        "twist_units": avatar.twist_units.numpy(),
        "twist_weight": weights["twist.weight"],
        "twist_bias": weights["twist.bias"],
        **{f"driver_weight_{i}": weights[f"driver.{2 * i}.weight"] for i in (0, 1)},
        **{f"driver_bias_{i}": weights[f"driver.{2 * i}.bias"] for i in (0, 1)},
    }


def probes(avatar: AvatarModel, names: tuple[str, ...] = PROBES) -> list[Condition]:
    """Rest, and rest with each of these coefficients at 1; eyes look where the coefficients say.

    Of an avatar that has none of them, the first of its own.
    """
    import torch

    from pipeline.gaze import eyes_of

    rest, known = avatar.neutral, avatar.expression_names
    names = tuple(name for name in names if name in known) or known[: len(names)]
    alone = torch.zeros(1 + len(names), len(known))
    for row, name in enumerate(names, 1):
        alone[row, known.index(name)] = 1
    eyes = rest.eyes + eyes_of(alone, known)
    return [rest._replace(expression=alone[row], eyes=eyes[row]) for row in range(len(alone))]


def _loss(export: Export, avatar: AvatarModel, folder: Path) -> Loss:
    """Of the bundle, loaded and driven, against the avatar at rest and with `PROBES`."""
    import torch

    from pipeline.avatars import Gaussians, load_avatar
    from pipeline.exports import drive
    from pipeline.exports.loss import cameras_of, loss_of

    def driven(condition: Condition) -> Gaussians:
        pose = {name: getattr(condition, name).double().numpy() for name in POSES}
        found = drive.drive(rig, condition.expression.double().numpy(), pose)
        means, quats, scales, opacities, colors = (torch.from_numpy(value).float() for value in found.values())
        return Gaussians(means, quats, scales, opacities, colors)

    if (folder / "baked").is_dir():
        read = load_avatar(folder / "baked").gaussians
    else:
        rig, read = drive.load(folder), driven
    with torch.no_grad():
        pairs = [(avatar.gaussians(condition), read(condition)) for condition in probes(avatar)]
    return loss_of(pairs, cameras_of(avatar), export.threads)
