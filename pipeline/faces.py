"""The face detector: MediaPipe's FaceLandmarker on single images, quiet and in our conventions."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StageError

FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176),
    *(149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
"""Landmarks of the face's outline, in order."""


@dataclass(frozen=True)
class Face:
    """One face that the detector saw in one frame."""

    landmarks: NDArray[np.float32]
    """[478, 3] pixels."""
    scores: NDArray[np.float32]
    """[52] expression scores in the order of `Detector.names`."""
    pose: NDArray[np.float32]
    """[4, 4] MediaPipe's matrix: canonical face (cm) to a camera with y up that looks along -z."""

    @property
    def box(self) -> NDArray[np.float64]:
        """x0, y0, x1, y1."""
        points = self.landmarks[:, :2].astype(np.float64)
        return np.concatenate([points.min(axis=0), points.max(axis=0)])


class Detector:
    """MediaPipe's FaceLandmarker on single images; a context manager, for its native part must be closed."""

    def __init__(self, model: Path, max_faces: int = 1, min_confidence: float = 0.5) -> None:
        """Start it with its model file.

        Raises:
            StageError: a system library that it needs is missing.
        """
        try:
            with silent_stderr():
                from mediapipe import Image, ImageFormat
                from mediapipe.tasks import python as tasks
                from mediapipe.tasks.python import vision

                options = vision.FaceLandmarkerOptions(
                    base_options=tasks.BaseOptions(model_asset_path=str(model)),
                    num_faces=max_faces,
                    min_face_detection_confidence=min_confidence,
                    min_face_presence_confidence=min_confidence,
                    output_face_blendshapes=True,
                    output_facial_transformation_matrixes=True,
                )
                self._landmarker = vision.FaceLandmarker.create_from_options(options)
                # The network's own chatter comes with the first image.
                self._landmarker.detect(Image(image_format=ImageFormat.SRGB, data=np.zeros((64, 64, 3), np.uint8)))
        except (OSError, ImportError) as error:
            raise StageError(
                f"The face tracker cannot start: {error}.",
                "it needs two system libraries, run: apt-get install libegl1 libgles2",
            ) from error
        self._image, self._format = Image, ImageFormat.SRGB
        self.names: tuple[str, ...] = ()
        """Names of the scores: the 52 ARKit expressions; MediaPipe does not score the last, tongueOut."""

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop it."""
        self._landmarker.close()

    def detect(self, image: NDArray[np.uint8], corner: tuple[int, int] = (0, 0)) -> list[Face]:
        """The faces in an image [H, W, 3]; landmarks are moved by `corner`, the image's place in its frame."""
        height, width = image.shape[:2]
        found = self._landmarker.detect(self._image(image_format=self._format, data=np.ascontiguousarray(image)))
        faces = []
        for points, scores, pose in zip(
            found.face_landmarks, found.face_blendshapes, found.facial_transformation_matrixes, strict=True
        ):
            scored = [score for score in scores if score.category_name != "_neutral"]
            self.names = (*(score.category_name for score in scored), "tongueOut")
            landmarks = np.array([(p.x * width + corner[0], p.y * height + corner[1], p.z * width) for p in points])
            faces.append(
                Face(
                    landmarks.astype(np.float32),
                    np.array([*(score.score for score in scored), 0.0], np.float32),
                    np.asarray(pose, np.float32),
                )
            )
        return faces


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what native code writes to file descriptor 2; MediaPipe's logging heeds no setting."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
