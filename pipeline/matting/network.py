"""Networks that tell the subject from the background, each a function from an image to a coarse alpha.

`selfie_segmentation` (MediaPipe) knows people and is fast; u2netp and rembg's others find what is salient.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.assets import SELFIE_SEGMENTATION, U2NETP, asset_path, matting_asset, rembg_home

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Predict = Callable[[Image], Image]


@contextlib.contextmanager
def open_network(model: str) -> Iterator[Predict]:
    """The network of this name, from an image [H, W, 3] to its alpha [H, W], on one CPU thread; safe from any thread.

    u2netp runs without rembg, whose import alone takes seconds; the others are rembg's by name.

    Raises:
        UserError: there is no such model, or its file has wrong bytes.
        StageError: the model's file is not on this machine.
    """
    if model == SELFIE_SEGMENTATION:
        with contextlib.closing(SelfieSegmentation()) as network:
            yield network
        return
    file = asset_path(matting_asset(model), fetch=False)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if model == U2NETP:
        yield partial(_u2net, onnxruntime.InferenceSession(str(file), options, providers=providers))
        return
    import rembg
    from PIL import Image as Pillow

    with rembg_home():
        session = rembg.new_session(model, sess_opts=options, providers=providers)
    yield lambda image: np.asarray(session.predict(Pillow.fromarray(image))[0].convert("L"), np.uint8)


def _u2net(session: Any, image: Image) -> Image:
    """U2-Net as rembg runs it: 320 x 320, ImageNet's mean and deviation, the answer stretched to [0, 1]."""
    import cv2

    small = cv2.resize(image, (320, 320), interpolation=cv2.INTER_AREA).astype(np.float32)
    even = (small / max(float(small.max()), 1e-6) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    tensor = even.transpose(2, 0, 1)[None].astype(np.float32)
    answer = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: tensor})[0][0, 0]
    answer = (answer - answer.min()) / max(float(answer.max() - answer.min()), 1e-6)
    size = (image.shape[1], image.shape[0])
    return np.asarray(np.clip(cv2.resize(answer, size, interpolation=cv2.INTER_CUBIC), 0, 1) * 255 + 0.5, np.uint8)


class SelfieSegmentation:
    """MediaPipe's selfie segmentation, 256 x 256: whether a pixel shows a person. One interpreter for each thread."""

    def __init__(self) -> None:
        self._file = asset_path(SELFIE_SEGMENTATION, fetch=False)
        self._mine = threading.local()
        self._opened: list[Any] = []
        self._opening = threading.Lock()

    def __call__(self, image: Image) -> Image:
        """Alpha [H, W] of an image [H, W, 3]."""
        import cv2
        import mediapipe

        small = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)
        shown = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=small)
        masks = self._segmenter().segment(shown).confidence_masks
        answer = masks[0].numpy_view().reshape(256, 256)
        # Cubic, for the network answers nearly yes or no and linear steps would show along the outline.
        grown = cv2.resize(answer, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        return np.asarray(np.clip(grown, 0, 1) * 255 + 0.5, np.uint8)

    def close(self) -> None:
        """End the interpreters; their native part does not survive the end of the program."""
        for segmenter in self._opened:
            segmenter.close()
        self._opened.clear()
        self._mine = threading.local()

    def _segmenter(self) -> Any:
        segmenter = getattr(self._mine, "segmenter", None)
        if segmenter is None:
            from mediapipe.tasks.python import BaseOptions, vision

            from pipeline.faces import silent_stderr

            options = vision.ImageSegmenterOptions(
                base_options=BaseOptions(model_asset_path=str(self._file)),
                output_confidence_masks=True,
                output_category_mask=False,
            )
            with self._opening, silent_stderr():
                segmenter = vision.ImageSegmenter.create_from_options(options)
                self._opened.append(segmenter)
            self._mine.segmenter = segmenter
        return segmenter
