"""Drive a rig bundle (`headcast export SUBJECT --to rig`) with NumPy alone; docs/exports.md has the same in formulas.

This file lies in every bundle. It needs nothing else of headcast:

    import drive
    rig = drive.load(".")
    gaussians = drive.drive(rig, {"jawOpen": 0.7}, drive.neutral(rig))

Axes of a camera: x right, y down, z forward, metres; quaternions wxyz; rotation vectors in radians.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def load(folder: str | Path) -> dict[str, Any]:
    """The arrays of `rig.npz` by name, and `about`, the JSON of `rig.json`."""
    with np.load(Path(folder) / "rig.npz", allow_pickle=False) as file:
        rig = {name: file[name].astype(np.float64) if file[name].dtype.kind == "f" else file[name] for name in file}
    rig["about"] = json.loads((Path(folder) / "rig.json").read_text())
    return rig


def neutral(rig: dict[str, Any]) -> dict[str, Any]:
    """The pose of rest: a dict of what `drive` takes; change what shall move."""
    return {name: np.array(value, np.float64) for name, value in rig["about"]["neutral"].items()}


def drive(rig: dict[str, Any], coefficients: Any, pose: dict[str, Any]) -> dict[str, Any]:
    """The Gaussians of an expression and a pose, in the camera's coordinates.

    Args:
        rig: from `load`.
        coefficients: by name, those that are not 0; or all of them [E] in the order of `expression_names`.
        pose: T_cam_head, T_cam_torso, T_cam_skull [4,4], eyes [2,3] (rotation vectors of the left and right eye in the
            head), torso_shape [M].

    Returns:
        means [N,3], quats [N,4] (unit), scales [N,3], opacities [N], colors [N,3] (sRGB).
    """
    names = rig["about"]["expression_names"]
    if isinstance(coefficients, dict):
        coefficients = [coefficients.get(name, 0.0) for name in names]
    e = np.asarray(coefficients, np.float64)
    head, torso, skull = pose["T_cam_head"], pose["T_cam_torso"], pose["T_cam_skull"]

    # 1. What the networks see, scaled by the training clip and held at 3 deviations of it.
    T_head_torso = np.linalg.inv(head) @ torso
    features = np.concatenate([e, head[:3].ravel(), T_head_torso[:3].ravel(), np.ravel(pose["eyes"])])
    f = np.clip((features - rig["feature_mean"]) / rig["feature_scale"], -3, 3)

    # 2. Joints: head, torso, left eye, right eye, skull; with the small twist that the fit's poses lack.
    left, right = (head @ _turn_about(pose["eyes"][eye], rig["eye_centres"][eye]) for eye in (0, 1))
    T = np.stack([head, torso, left, right, skull])
    twist = (rig["twist_weight"] @ f + rig["twist_bias"]) * rig["twist_units"]
    R = T[:, :3, :3] @ (np.eye(3) + _cross(twist[:, :3]))
    t = T[:, :3, 3] + np.einsum("jik,jk->ji", T[:, :3, :3], twist[:, 3:])
    q = np.stack([_quaternion(M) for M in T[:, :3, :3]])
    q *= np.where((q * q[:1]).sum(1, keepdims=True) < 0, -1, 1)
    q = _product(q, np.concatenate([np.ones((5, 1)), 0.5 * twist[:, :3]], 1))

    # 3. At rest: what the triangle does, what was learned on top, how the torso bends.
    ridden = np.einsum("e,enk->nk", e, rig["follow"])
    hidden = np.tanh(rig["driver_weight_0"] @ f + rig["driver_bias_0"])
    learned = np.einsum("k,kni->ni", rig["driver_weight_1"] @ hidden + rig["driver_bias_1"], rig["basis"])
    learned *= rig["units"]
    shape = 0.005 * np.clip(pose["torso_shape"] / rig["shape_scale"], -3, 3)
    bent = np.einsum("m,mni->ni", shape, rig["torso_basis"]) * rig["skinning"][:, 1:2]
    means = rig["means"] + ridden[:, :3] + learned[:, :3] + bent
    turn = np.concatenate([np.ones((len(means), 1)), 0.5 * (ridden[:, 3:6] + learned[:, 3:6])], 1)

    # 4. Skinned: means by blended transforms, rotations by blended quaternions.
    posed = np.einsum("nj,jik,nk->ni", rig["skinning"], R, means) + rig["skinning"] @ t
    quats = _product(rig["skinning"] @ q, _product(turn, rig["quats"]))
    return {
        "means": posed,
        "quats": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "scales": np.exp(rig["log_scales"] + ridden[:, 6:] + learned[:, 6:9]),
        "opacities": 1 / (1 + np.exp(-(rig["opacity_logits"] + learned[:, 12]))),
        "colors": rig["colors"] + learned[:, 9:12],
    }


def _cross(v: Any) -> Any:
    """[n,3,3] matrices of the cross product with [n,3]."""
    M = np.zeros((len(v), 3, 3))
    M[:, 2, 1], M[:, 0, 2], M[:, 1, 0] = v.T
    return M - M.swapaxes(1, 2)


def _turn_about(rotvec: Any, centre: Any) -> Any:
    """[4,4] a rotation about a point (Rodrigues)."""
    angle = np.linalg.norm(rotvec)
    K = _cross((np.asarray(rotvec) / max(angle, 1e-12))[None])[0]
    T = np.eye(4)
    T[:3, :3] += np.sin(angle) * K + (1 - np.cos(angle)) * K @ K
    T[:3, 3] = centre - T[:3, :3] @ centre
    return T


def _quaternion(R: Any) -> Any:
    """[4] of a rotation matrix: the eigenvector of the largest eigenvalue (Bar-Itzhack 2000)."""
    K = np.zeros((4, 4))
    K[0, 0] = np.trace(R)
    K[0, 1:] = K[1:, 0] = R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]
    K[1:, 1:] = R + R.T - np.trace(R) * np.eye(3)
    return np.linalg.eigh(K)[1][:, -1]


def _product(a: Any, b: Any) -> Any:
    """Quaternions [n,4] times quaternions [n,4]."""
    w = a[:, :1] * b[:, :1] - (a[:, 1:] * b[:, 1:]).sum(1, keepdims=True)
    return np.concatenate([w, a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:] + np.cross(a[:, 1:], b[:, 1:])], 1)
