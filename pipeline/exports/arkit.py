"""The 52 ARKit coefficients as blendshapes of their own: of the fitted head's mesh, and of the Gaussians.

`mesh/`: `neutral.obj` and one OBJ for each coefficient at 1, and `head.glb`, one mesh with morph targets of those names
and the avatar's colours at its vertices. `gaussians/`: the baked avatar at rest as `neutral.ply`, and what each
coefficient at 1 adds to the columns of that file, `deltas.npz`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.exports import Export, choice
from pipeline.exports.licence import OPTION, check_licence
from pipeline.glb import TRIANGLES, Glb, refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.avatars import AvatarModel
    from pipeline.exports.loss import Loss
    from pipeline.splats import Splats

VERSION = 1
OPTIONS = OPTION | {"gaussians": "deltas: in one file; ply: beside it a PLY of each coefficient at 1"}
COLUMNS = (
    *("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
"""Of `neutral.ply`, in the order of the deltas."""
MIXED = {"jawOpen": 0.5, "mouthSmileLeft": 0.6, "mouthSmileRight": 0.6, "browInnerUp": 0.5}
"""Coefficients together: what adding deltas up costs is measured with them."""
NEIGHBOURS = 8
"""So many Gaussians colour a vertex."""
MAX_SHAPES = 1000


class Mesh(NamedTuple):
    """A head with blendshapes."""

    vertices: NDArray[np.float32]
    """[V,3] at rest."""
    faces: NDArray[np.int32]
    """[F,3]."""
    shapes: NDArray[np.float32]
    """[E,V,3] what each coefficient at 1 adds."""
    names: tuple[str, ...]
    """[E]."""
    colors: NDArray[np.float32]
    """[V,3] linear light."""


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write `mesh/` and `gaussians/`.

    Raises:
        UserError: the avatar cannot be read, its head may not be passed on, or an option is at fault.
    """
    from pipeline.api import LoadedSubject
    from pipeline.expressions import need_arkit
    from pipeline.obj import write_obj

    ply_too = choice(export, "gaussians", "deltas", "ply") == "ply"
    subject = LoadedSubject(export.subject)
    baked = subject.avatar(baked=True).model
    need_arkit(subject.clip.expression_names, "the export 'arkit'")
    licence = check_licence(export, subject.clip)
    meshes, gaussians = folder / "mesh", folder / "gaussians"
    meshes.mkdir()
    gaussians.mkdir()
    mesh = _mesh(subject, baked)
    write_obj(meshes / "neutral.obj", mesh.vertices, mesh.faces)
    for name, shape in zip(mesh.names, mesh.shapes, strict=True):
        write_obj(meshes / f"{name}.obj", mesh.vertices + shape, mesh.faces)
    write_mesh(meshes / "head.glb", mesh)
    error = float(np.abs(read_mesh(meshes / "head.glb").shapes - mesh.shapes).max())
    _write_gaussians(gaussians, baked, ply_too)
    alone, mixed = _losses(export, baked, gaussians)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    text = (
        f"mesh/: {len(mesh.vertices):,} vertices, {len(mesh.names)} shapes, as OBJ files and head.glb (read back: "
        f"{1e3 * error:.3g} mm off). gaussians/: {baked.count:,} Gaussians of the baked avatar, neutral.ply and "
        f"deltas.npz; {size / 1e6:.0f} MB. {alone} Four coefficients together, deltas added up: {mixed.psnr_db:.1f} "
        f"dB. {licence}"
    )
    told = {"vertices": len(mesh.vertices), "shapes": len(mesh.names), "gaussians": baked.count, "bytes": size}
    return {**told, "mesh_error_m": error, **alone.account(), "mixed_psnr_db": round(mixed.psnr_db, 2), "text": text}


def write_mesh(path: Path, mesh: Mesh) -> None:
    """Write a GLB with a morph target for each shape; their names are in the mesh's `extras.targetNames`."""
    from pipeline.mesh_render import vertex_normals

    attributes: dict[str, int] = {}
    targets: list[dict[str, int]] = []
    primitive: dict[str, Any] = {"mode": TRIANGLES, "attributes": attributes, "targets": targets, "material": 0}
    names = list(mesh.names)
    glb = Glb.of_one_mesh(primitive, "head", weights=[0.0] * len(names), extras={"targetNames": names})
    glb.document["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 0.9}}]
    colors = np.concatenate([mesh.colors, np.ones((len(mesh.colors), 1), np.float32)], 1)
    attributes["POSITION"] = glb.add(mesh.vertices, bounds=True)
    attributes["NORMAL"] = glb.add(vertex_normals(mesh.vertices, mesh.faces).astype(np.float32))
    attributes["COLOR_0"] = glb.add(np.round(65535 * colors.clip(0, 1)).astype(np.uint16), normalized=True)
    primitive["indices"] = glb.add(mesh.faces.astype(np.uint32).ravel(), indices=True)
    targets += [{"POSITION": glb.add(shape, bounds=True)} for shape in mesh.shapes]
    glb.write(path)


def read_mesh(path: Path) -> Mesh:
    """Read the first mesh of a file that `write_mesh` wrote.

    Raises:
        UserError: the file cannot be read, is no GLB, or holds no mesh with named morph targets that makes sense.
    """
    glb = Glb.read(path)
    try:
        mesh = glb.document["meshes"][0]
        primitive, names = mesh["primitives"][0], tuple(mesh["extras"]["targetNames"])
        vertices, colors = (glb.array(primitive["attributes"][name]) for name in ("POSITION", "COLOR_0"))
        faces = glb.array(primitive["indices"])
        shapes = [glb.array(target["POSITION"]) for target in primitive["targets"]]
        shape = (len(vertices), 3)
        if vertices.shape != shape or colors.shape[:1] != shape[:1] or any(array.shape != shape for array in shapes):
            raise ValueError("its arrays do not fit each other")
        if len(names) != len(shapes) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"its {len(shapes)} shapes have {len(names)} names")
        if faces.ndim != 1 or len(faces) % 3 or faces.dtype.kind != "u" or faces.max(initial=0) >= len(vertices):
            raise ValueError("its faces are no triples of vertices")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise refusal(path, error) from None
    triples = faces.reshape(-1, 3).astype(np.int32)
    return Mesh(vertices, triples, np.array(shapes, np.float32).reshape(-1, *shape), names, colors[:, :3])


def read_deltas(path: Path, count: int) -> dict[str, NDArray[np.float32]]:
    """What each coefficient at 1 adds to `COLUMNS` of `count` Gaussians, by name [count,14].

    Raises:
        UserError: the file cannot be read, or holds other arrays.
    """
    import zipfile

    from pipeline.sog import ZIP_DAMAGE

    try:
        most = 4 * MAX_SHAPES * len(COLUMNS) * count + 1_000_000
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > most:
                raise ValueError(f"it unpacks to more than {most} bytes")
        with np.load(path, allow_pickle=False) as file:
            names, deltas = [str(name) for name in file["names"]], file["deltas"].astype(np.float32)
        if deltas.shape != (len(names), count, len(COLUMNS)) or not np.isfinite(deltas).all():
            raise ValueError(f"its deltas have shape {list(deltas.shape)} or are not finite")
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or error}.", "check the path") from None
    except (ValueError, KeyError, TypeError, MemoryError, *ZIP_DAMAGE) as error:
        raise UserError(f"'{path}' holds no deltas that can be read: {error}.", "export it again") from None
    return dict(zip(names, deltas, strict=True))


def added(splats: Splats, deltas: NDArray[np.floating]) -> Splats:
    """Gaussians with deltas [N,14] of their PLY columns added."""
    from pipeline.splats import Splats

    values = _columns(splats) + deltas
    turned = splats.turned()
    quats, sh = values[:, 10:], turned.sh.copy()
    sh[:, 0] = values[:, 3:6]
    arrays = (
        values[:, :3],
        quats / np.linalg.norm(quats, axis=1, keepdims=True),
        np.exp(values[:, 7:10]),
        1 / (1 + np.exp(-values[:, 6])),
        sh,
    )
    return Splats(*(np.asarray(array, np.float32) for array in arrays)).turned()


def _columns(splats: Splats) -> NDArray[np.float64]:
    """[N,14] what a PLY holds in `COLUMNS`."""
    from pipeline.splats import MIN_SCALE, logits

    turned = splats.turned()
    scales = np.log(np.maximum(turned.scales, MIN_SCALE))
    return np.concatenate(
        [turned.means, turned.sh[:, 0], logits(turned.opacities)[:, None], scales, turned.quats], 1, dtype=np.float64
    )


def _mesh(subject: Any, baked: AvatarModel) -> Mesh:
    """The fitted head; eyeballs turn with the eyeLook* shapes."""
    import torch

    from pipeline.gaze import eyes_of

    clip = subject.clip
    head, names = clip.personal_head(), clip.expression_names
    count = len(names)
    expression = torch.cat([torch.zeros(1, count), torch.eye(count)])
    with torch.no_grad():
        posed = head.vertices(
            torch.from_numpy(clip.identity), expression, torch.zeros(1 + count, 3), eyes_of(expression, names)
        ).numpy()
    return Mesh(posed[0], head.faces, posed[1:] - posed[0], names, _colors(posed[0], baked))


def _colors(vertices: NDArray[np.float32], avatar: AvatarModel) -> NDArray[np.float32]:
    """[V,3] linear light at the vertices of the head at rest: of the Gaussians next to each, the opaque ones most."""
    import torch
    from scipy.spatial import cKDTree

    from pipeline.export import splats_of
    from pipeline.exports.gltf import linear_of
    from pipeline.geometry import invert_rigid
    from pipeline.splats import SH_C0

    head = avatar.neutral.T_cam_head
    straight = avatar.neutral._replace(T_cam_torso=head, T_cam_skull=head, neck=torch.zeros(3))
    with torch.no_grad():
        splats = splats_of(avatar.gaussians(straight), invert_rigid(head))
    distances, near = cKDTree(splats.means).query(vertices, min(NEIGHBOURS, len(splats)))
    weights = (splats.opacities[near] + 1e-3) / (distances**2 + 1e-6)
    seen = np.einsum("vk,vkc->vc", weights / weights.sum(1, keepdims=True), splats.sh[near, 0])
    return np.asarray(linear_of(seen * SH_C0 + 0.5), np.float32)


def _write_gaussians(folder: Path, baked: AvatarModel, ply_too: bool) -> None:
    import torch

    from pipeline.export import splats_of
    from pipeline.exports.rig import probes
    from pipeline.geometry import invert_rigid
    from pipeline.ply import write_ply

    T_head_cam = invert_rigid(baked.neutral.T_cam_head)
    with torch.no_grad():
        rest, *moved = (
            splats_of(baked.gaussians(condition), T_head_cam) for condition in probes(baked, baked.expression_names)
        )
    write_ply(folder / "neutral.ply", rest)
    start = _columns(rest)
    deltas = np.zeros((len(moved), len(rest), len(COLUMNS)), np.float16)
    for row, splats in enumerate(moved):
        values = _columns(splats)
        # Of the two quaternions of a rotation the one on the side of that at rest.
        values[:, 10:] *= np.where((values[:, 10:] * start[:, 10:]).sum(1, keepdims=True) < 0, -1, 1)
        deltas[row] = values - start
        if ply_too:
            write_ply(folder / f"{baked.expression_names[row]}.ply", splats, splats.degree())
    names = np.array(baked.expression_names)
    np.savez_compressed(folder / "deltas.npz", names=names, columns=np.array(COLUMNS), deltas=deltas)


def _losses(export: Export, baked: AvatarModel, folder: Path) -> tuple[Loss, Loss]:
    """Of rest and some coefficients alone, and of `MIXED`, read back, against the baked avatar."""
    import torch

    from pipeline.export import gaussians_of
    from pipeline.exports.loss import cameras_of, loss_of
    from pipeline.exports.rig import PROBES, probes
    from pipeline.ply import read_ply

    rest, T_cam_head = read_ply(folder / "neutral.ply"), baked.neutral.T_cam_head
    deltas = read_deltas(folder / "deltas.npz", len(rest))
    mixed = torch.tensor([MIXED.get(name, 0.0) for name in baked.expression_names])
    conditions = [*probes(baked), baked.neutral._replace(expression=mixed)]
    total = sum(weight * deltas[name] for name, weight in MIXED.items())
    read = [rest, *(added(rest, deltas[name]) for name in PROBES), added(rest, np.asarray(total))]
    with torch.no_grad():
        own = [baked.gaussians(condition) for condition in conditions]
    pairs = [(full, gaussians_of(splats, T_cam_head)) for full, splats in zip(own, read, strict=True)]
    cameras = cameras_of(baked)
    return loss_of(pairs[:-1], cameras, export.threads), loss_of(pairs[-1:], cameras, export.threads)
