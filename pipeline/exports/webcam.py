"""What lets an exported player be driven from the viewer's webcam: MediaPipe for browsers and the avatar's limits.

One file, `webcam.bin`, which the page reads when the webcam is started: gzip around safetensors, as the packed avatar
is, whose tensors are the bytes of files.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.assets import FACE_LANDMARKER, VISION_BUNDLE, VISION_LOADER, VISION_WASM, asset_path
from pipeline.clip import Clip
from pipeline.errors import StageError
from pipeline.gaze import GAZE_RANGE_RAD
from pipeline.progress import Reporter
from pipeline.retarget import Performance, allowed_overshoot

FILE = "webcam.bin"
WORKER = Path(__file__).parent.parent / "player" / "webcam_worker.js"
_PARTS = {"bundle": VISION_BUNDLE, "loader": VISION_LOADER, "wasm": VISION_WASM, "model": FACE_LANDMARKER}


def limits(own: Performance, camera: int) -> dict[str, Any]:
    """What `pipeline/player/retarget.js` has to know of an avatar, as plain data; D columns as in `Performance`.

    Args:
        own: the performance of the avatar's own clip.
        camera: number of the clip's camera before which the avatar performs.
    """
    return {
        "names": list(own.names),
        "neutral": own.neutral.tolist(),
        "low": own.low.tolist(),
        "high": own.high.tolist(),
        "room": allowed_overshoot(own.names).tolist(),
        "T_cam_rest": own.Ts_cam_rest[camera].ravel().tolist(),
        "gaze_range": GAZE_RANGE_RAD,
    }


def pack(clip: Clip, reporter: Reporter | None = None) -> bytes:
    """The bytes of `webcam.bin` for the avatar that was made from a clip; its metadata is what `limits` gives.

    Raises:
        UserError: none of the clip's frames can be used, or an asset in the cache has other bytes.
        StageError: an asset is not on this machine and cannot be fetched.
    """
    from safetensors.numpy import save

    told = limits(Performance.of(clip), clip.main_camera)
    try:
        files = {part: asset_path(asset, reporter=reporter) for part, asset in _PARTS.items()}
    except StageError as error:
        raise type(error)(error.what, f"{error.fix}, or leave the webcam out with --set webcam=false") from error
    files["worker"] = WORKER
    tensors = {part: np.frombuffer(path.read_bytes(), np.uint8) for part, path in files.items()}
    return gzip.compress(save(tensors, {"headcast": json.dumps(told)}), mtime=0)
