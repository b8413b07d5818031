"""Telling people apart: who of several faces is the subject, and is it the same one after a cut.

With a face recognition model of the user's (InsightFace's ArcFace networks), faces are compared by its embedding. None
is fetched: the weights may be used for non-commercial research only. Without one a plain rule ranks faces: the colours
of skin, hair and clothes, and the proportions of the face. Within one recording the colours tell people apart well;
between recordings neither they nor the proportions of MediaPipe's mesh are proof, so a photograph is compared with a
model only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.errors import StageError, UserError
from pipeline.faces import FACE_OVAL, Detector, Face
from pipeline.source import read_photo_bytes

MODELS = {
    "buffalo_l": "w600k_r50.onnx",
    "antelopev2": "glintr100.onnx",
    "buffalo_m": "w600k_r50.onnx",
    "buffalo_s": "w600k_mbf.onnx",
    "buffalo_sc": "w600k_mbf.onnx",
}
"""InsightFace's packs and the recognition network in each, the one to be preferred first."""
SAME_EMBEDDING = 0.2
"""Cosine below which two faces are not of one person, by InsightFace's own comparison of two images."""
SAME_COLOURS, SAME_SHAPE = 0.7, 0.009
"""Where the colours agree less and the proportions differ more than this, two faces are taken for different people's.

Seen on six clips of six people: colours agree to 0.97 and more within a recording, between people to 0.64 at most;
proportions differ by 0.002 to 0.010 within a recording, by 0.005 to 0.017 between people."""
OTHER_COLOURS, SAME_RECORDING = 0.6, 0.85
"""Agreement of the colours below which two faces of one clip are different people's, and from which one person's.

A person who comes back in other clothes and light falls under the first; the avatar is better off without."""
ARCFACE_POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
ARCFACE_SIDE = 112
"""Where ArcFace wants the eyes, the tip of the nose and the corners of the mouth, in a picture of this side."""
ARCFACE_LANDMARKS = (468, 473, 4, 61, 291)
STILL_LANDMARKS = (
    *(33, 133, 362, 263, 168, 6, 197, 195, 5, 4, 1, 2, 98, 327, 10, 151, 9, 234, 454, 127, 356, 93, 323, 58, 288),
    *(132, 361, 70, 300, 105, 334, 50, 280, 117, 346, 48, 278),
)
"""Corners of the eyes, nose, forehead, cheeks and the sides: what expressions move least."""


@dataclass(frozen=True)
class Portrait:
    """What some frames of one face say about whose it is."""

    shape: NDArray[np.float64]
    """[P, 3] typical places of the still landmarks about their centre, brought to one size, turned anyhow."""
    colours: tuple[NDArray[np.float64] | None, ...]
    """Histograms of face, hair and clothes, each summing to 1; None for what the frames do not show."""
    embedding: NDArray[np.float64] | None
    """[D] mean embedding of unit length; None without a recognition model."""


class Recognizer:
    """An ArcFace network of the user's."""

    def __init__(self, model: Path) -> None:
        """Load it; runs on the CPU.

        Raises:
            StageError: the file is no such network.
        """
        from insightface.model_zoo import get_model

        try:
            self._network: Any = get_model(str(model), providers=["CPUExecutionProvider"])
            self.name = f"{model.parent.name}/{model.name}"
        except Exception as error:  # ONNX Runtime and protobuf have exceptions of their own
            raise _bad_model(model, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        if not hasattr(self._network, "get_feat"):
            raise _bad_model(model, "it is not a recognition network")

    def embed(self, image: NDArray[np.uint8], face: Face) -> NDArray[np.float64]:
        """Embedding [D] of unit length of a face in an sRGB image [H, W, 3]."""
        import cv2

        points = face.landmarks[list(ARCFACE_LANDMARKS), :2].astype(np.float64)
        aligned = cv2.warpAffine(image, _similarity(points, np.array(ARCFACE_POINTS)), (ARCFACE_SIDE, ARCFACE_SIDE))
        features = self._network.get_feat(cv2.cvtColor(aligned, cv2.COLOR_RGB2BGR))
        return _unit(np.asarray(features, np.float64).ravel())


def models_folder() -> Path:
    """Where InsightFace's models lie: `models` in `INSIGHTFACE_HOME`, else in the home folder's `.insightface`."""
    home = os.environ.get("INSIGHTFACE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".insightface") / "models"


def find_recognizer() -> Recognizer | None:
    """The best recognition network that the user has; None without one.

    Raises:
        StageError: the file that is there cannot be used.
    """
    for pack, file in MODELS.items():
        path = models_folder() / pack / file
        if path.is_file():
            return Recognizer(path)
    return None


def need_recognizer() -> Recognizer:
    """The best recognition network that the user has.

    Raises:
        UserError: there is none; which files are looked for, their licence, and where to put them.
        StageError: the file that is there cannot be used.
    """
    recognizer = find_recognizer()
    if recognizer is None:
        files = ", ".join(f"{pack}/{file}" for pack, file in MODELS.items())
        raise UserError(
            f"To tell a person by a photograph, a face recognition model of InsightFace is needed; "
            f"'{models_folder()}' has none of: {files}.",
            "choose with --person N; or fetch the pack buffalo_l from InsightFace's model zoo yourself if you may: the "
            f"weights are for non-commercial research only; unpack it to '{models_folder() / 'buffalo_l'}', or to "
            "models/buffalo_l in a folder that INSIGHTFACE_HOME names",
        )
    return recognizer


def check_photo(path: Path) -> None:
    """Refuse a photograph that cannot tell who is meant.

    Raises:
        UserError: it cannot be read, shows no face or several, or there is no recognition model to compare it with.
        StageError: the face tracker cannot start.
    """
    data = read_photo_bytes(path)
    need_recognizer()
    _one_face(path, data)


def photo_embedding(path: Path, recognizer: Recognizer) -> NDArray[np.float64]:
    """Embedding [D] of the face on a photograph.

    Raises:
        UserError: it cannot be read, shows no face or several.
    """
    return recognizer.embed(*_one_face(path, read_photo_bytes(path)))


def portrait(samples: Sequence[tuple[NDArray[np.uint8], Face]], recognizer: Recognizer | None) -> Portrait:
    """Describe a face by some frames of it, each an sRGB image [H, W, 3] and the face in it; at least one."""
    shapes = [_still_shape(face) for _, face in samples]
    shape = np.median([_turned_to(shapes[0], each) for each in shapes], axis=0)
    each = [_colours(image, face) for image, face in samples]
    colours = []
    for part in zip(*each, strict=True):
        there = [histogram for histogram in part if histogram is not None]
        colours.append(np.mean(there, axis=0) if there else None)
    embedding = None
    if recognizer is not None:
        embedding = _unit(np.mean([recognizer.embed(image, face) for image, face in samples], axis=0))
    return Portrait(shape, tuple(colours), embedding)


def likeness(a: Portrait, b: Portrait) -> float:
    """How alike two faces are, for ranking: the embeddings' cosine, or colours and proportions without embeddings."""
    if a.embedding is not None and b.embedding is not None:
        return float(a.embedding @ b.embedding)
    return colours_agree(a, b) - 0.25 * shapes_apart(a, b) / SAME_SHAPE


def different(a: Portrait, b: Portrait, *, one_clip: bool) -> bool:
    """Whether two faces are of different people for all that can be told; without embeddings that is often not much.

    Args:
        a, b: the faces.
        one_clip: they are seen in one clip, where light and clothes are supposed to stay.
    """
    if a.embedding is not None and b.embedding is not None:
        return float(a.embedding @ b.embedding) < SAME_EMBEDDING
    colours = colours_agree(a, b)
    return (one_clip and colours < OTHER_COLOURS) or (colours < SAME_COLOURS and shapes_apart(a, b) > SAME_SHAPE)


def surely_same(a: Portrait, b: Portrait) -> bool:
    """Whether two faces of one clip are the same person's beyond doubt; without embeddings, light and clothes count."""
    if a.embedding is not None and b.embedding is not None:
        return not different(a, b, one_clip=True)
    return colours_agree(a, b) >= SAME_RECORDING


def colours_agree(a: Portrait, b: Portrait) -> float:
    """Mean Bhattacharyya coefficient of the histograms that both have: 1 for equal colours, 0 for disjoint ones."""
    both = [(x, y) for x, y in zip(a.colours, b.colours, strict=True) if x is not None and y is not None]
    return float(np.mean([np.sqrt(x * y).sum() for x, y in both])) if both else 0.0


def shapes_apart(a: Portrait, b: Portrait) -> float:
    """Root mean square distance of the still landmarks, in units of their root summed square distance to the centre."""
    return float(np.sqrt(((_turned_to(a.shape, b.shape) - a.shape) ** 2).sum(axis=1).mean()))


def _one_face(path: Path, data: bytes) -> tuple[NDArray[np.uint8], Face]:
    """The photograph as sRGB [H, W, 3] and the only face in it."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise UserError(f"'{path}' is not a photograph that can be read.", "give a JPEG or PNG file with --like")
    image = np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)
    with Detector(asset_path(FACE_LANDMARKER), max_faces=8) as detector:
        faces = detector.detect(image)
        if not faces:
            # A face that fills the picture is missed; with a border around it, it is found.
            border = max(image.shape[:2]) // 2
            wide = np.asarray(cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_CONSTANT), np.uint8)
            faces = detector.detect(wide, (-border, -border))
    if len(faces) != 1:
        what = "shows no face" if not faces else f"shows {len(faces)} faces"
        raise UserError(
            f"The photograph '{path}' {what}.", "give one that shows the face of the person who is meant, and no other"
        )
    return image, faces[0]


def _still_shape(face: Face) -> NDArray[np.float64]:
    """[P, 3] the still landmarks, centred, of unit norm."""
    points = face.landmarks[list(STILL_LANDMARKS)].astype(np.float64)
    points -= points.mean(axis=0)
    return np.asarray(points / max(float(np.linalg.norm(points)), 1e-9), np.float64)


def _turned_to(target: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [P, 3] rotated about the origin to lie nearest to others (Kabsch 1976).

    The detector's pose would not do: it supposes a camera, and is turned where a face is off the picture's middle.
    """
    u, _, vt = np.linalg.svd(points.T @ target)
    return np.asarray(points @ (u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt), np.float64)


def _colours(image: NDArray[np.uint8], face: Face) -> tuple[NDArray[np.float64] | None, ...]:
    """Histograms of the face, of a strip over it, and of a field below the chin; None where the picture ends."""
    import cv2

    height, width = image.shape[:2]
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    x0, y0, x1, y1 = face.box
    w, h = x1 - x0, y1 - y0
    masks = np.zeros((3, height, width), np.uint8)
    cv2.fillConvexPoly(masks[0], cv2.convexHull(face.landmarks[list(FACE_OVAL), :2].astype(np.int32)), 1)
    for mask, field in (
        (masks[1], (x0 - 0.25 * w, y0 - 0.45 * h, x1 + 0.25 * w, y0)),
        (masks[2], (x0 - 0.5 * w, y1 + 0.25 * h, x1 + 0.5 * w, y1 + 0.9 * h)),
    ):
        left, top, right, bottom = (max(0, round(float(edge))) for edge in field)
        mask[top:bottom, left:right] = 1
    least = 0.02 * w * h
    return tuple(_histogram(lab, mask) if mask.sum() > least else None for mask in masks)


def _histogram(lab: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    import cv2

    counts = cv2.calcHist([lab], [0, 1, 2], mask, [6, 16, 16], [0, 256, 64, 192, 64, 192]).ravel()
    return np.asarray(counts / max(float(counts.sum()), 1.0), np.float64)


def _similarity(points: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2, 3] turn, scale and shift that takes `points` [N, 2] nearest to `targets` [N, 2] in least squares."""
    x, y = points.T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], axis=1), np.stack([y, x, zero, one], axis=1)])
    a, b, shift_x, shift_y = np.linalg.lstsq(rows, targets.T.ravel(), rcond=None)[0]
    return np.array([[a, -b, shift_x], [b, a, shift_y]])


def _unit(vector: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float64)


def _bad_model(model: Path, why: str) -> StageError:
    return StageError(
        f"The face recognition model '{model}' cannot be used: {why}.", "put the right file there, or remove it"
    )
