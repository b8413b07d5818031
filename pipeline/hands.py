"""Hands near the face: MediaPipe's hand landmarks on a crop around it, carried over the frames between.

The palm detector needs to see a palm of some size with something below it: the crop is a few faces wide, and where it
leaves the picture the border is repeated. It still misses a hand now and then, and now and then takes a chin for one: a
hand has to be seen twice within a moment, and is taken to have been there between.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StageError
from pipeline.faces import silent_stderr

Hand = NDArray[np.float32]
"""[21, 2] MediaPipe's hand landmarks in pixels: the wrist, then each finger from its root to its tip, thumb first."""

HAND_LANDMARKS = 21
CROP_SIZE, CROP_DOWN = 3.4, 0.6
"""Side of the crop in faces, and how far below the face's middle it lies."""
CROP_SIDE_PX = 384
MIN_DETECTION, MIN_PRESENCE = 0.3, 0.5
MOST_HANDS = 2
LOOK_EVERY = 3
"""Frames from one look for hands to the next."""
BRIDGE_SECONDS = 0.7
"""Two looks this near each other that show a hand make it sure, and it was there between them."""


class HandFinder:
    """MediaPipe's HandLandmarker on single images; a context manager, for its native part must be closed."""

    def __init__(self, palm_model: Path, landmark_model: Path) -> None:
        """Start it with the networks that find palms and the landmarks of a hand.

        Raises:
            StageError: it cannot start, for instance for want of a system library.
        """
        bundle = io.BytesIO()
        with zipfile.ZipFile(bundle, "w") as file:
            file.write(palm_model, "hand_detector.tflite")
            file.write(landmark_model, "hand_landmarks_detector.tflite")
        try:
            with silent_stderr():
                from mediapipe import Image, ImageFormat
                from mediapipe.tasks import python as tasks
                from mediapipe.tasks.python import vision

                options = vision.HandLandmarkerOptions(
                    base_options=tasks.BaseOptions(model_asset_buffer=bundle.getvalue()),
                    num_hands=MOST_HANDS,
                    min_hand_detection_confidence=MIN_DETECTION,
                    min_hand_presence_confidence=MIN_PRESENCE,
                )
                self._landmarker = vision.HandLandmarker.create_from_options(options)
                # The network's own chatter comes with the first image.
                self._landmarker.detect(Image(image_format=ImageFormat.SRGB, data=np.zeros((64, 64, 3), np.uint8)))
        except (OSError, ImportError, RuntimeError, ValueError) as error:
            raise StageError(
                f"The hand tracker cannot start: {error}.",
                "it needs two system libraries, run: apt-get install libegl1 libgles2",
            ) from error
        self._image, self._format = Image, ImageFormat.SRGB

    def __enter__(self) -> HandFinder:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop it."""
        self._landmarker.close()

    def find(self, image: NDArray[np.uint8], face: NDArray[np.floating]) -> list[Hand]:
        """The hands [21, 2] around a face with box x0, y0, x1, y1 in an image [H, W, 3]."""
        import cv2

        height, width = image.shape[:2]
        size = float((face[2:] - face[:2]).max())
        side = max(8, round(CROP_SIZE * size))
        middle = (face[:2] + face[2:]) / 2 + (0, CROP_DOWN * (face[3] - face[1]))
        left, top = np.round(middle - side / 2).astype(int)
        columns = np.arange(left, left + side).clip(0, width - 1)
        rows = np.arange(top, top + side).clip(0, height - 1)
        crop = image[rows[:, None], columns]
        if side > CROP_SIDE_PX:
            crop = cv2.resize(crop, (CROP_SIDE_PX, CROP_SIDE_PX), interpolation=cv2.INTER_AREA)
        found = self._landmarker.detect(self._image(image_format=self._format, data=np.ascontiguousarray(crop)))
        return [
            np.array([(point.x * side + left, point.y * side + top) for point in hand], np.float32)
            for hand in found.hand_landmarks
        ]


def bridge_hands(
    looks: dict[int, list[Hand]], times: NDArray[np.float64], present: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Hands of every frame [T, N, 21, 2], N the most at once, from some frames' [21, 2] each; NaN where there is none.

    A hand moves evenly from one look to the next that shows it, and is held a look's distance before and after.

    Args:
        looks: the hands of the frames that were looked at, all of one shot.
        times: [T] seconds.
        present: [T] frames that may show hands; all others get none.
    """
    order = sorted(looks)

    def near(index: int) -> list[int]:
        return [other for other in order if other != index and abs(times[other] - times[index]) <= BRIDGE_SECONDS]

    # What is seen in one look only is no hand: a chin passes for one now and then.
    sure = {
        index: [
            hand for hand in looks[index] if any(_same_hand(hand, looks[other]) is not None for other in near(index))
        ]
        for index in order
    }
    frames: list[list[Hand]] = [[] for _ in times]
    for index in order:
        frames[index] += sure[index]
        for hand in sure[index]:
            linked = [(other, to) for other in near(index) if (to := _same_hand(hand, sure[other])) is not None]
            after = next(((other, to) for other, to in linked if other > index), None)
            end, goal = after or (min(index + LOOK_EVERY, len(times)), hand)
            for between in range(index + 1, end):
                share = (times[between] - times[index]) / (times[min(end, len(times) - 1)] - times[index])
                frames[between].append(((1 - share) * hand + share * goal).astype(np.float32))
            if not any(other < index for other, _ in linked):
                for between in range(max(0, index - LOOK_EVERY + 1), index):
                    frames[between].append(hand)
    frames = [hands if there else [] for hands, there in zip(frames, present, strict=True)]
    most = max(map(len, frames), default=0)
    result = np.full((len(times), most, HAND_LANDMARKS, 2), np.nan, np.float32)
    for index, hands in enumerate(frames):
        for number, hand in enumerate(hands):
            result[index, number] = hand
    return result


def joined(shots: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The hands of successive shots as one array [T, N, 21, 2], N the most at once in any of them."""
    most = max(part.shape[1] for part in shots)
    rooms = [((0, 0), (0, most - part.shape[1]), (0, 0), (0, 0)) for part in shots]
    return np.concatenate([np.pad(part, room, constant_values=np.nan) for part, room in zip(shots, rooms, strict=True)])


def _same_hand(hand: Hand, others: list[Hand]) -> Hand | None:
    """The nearest of other hands if it is no farther away than the hand is long."""
    if not others:
        return None
    apart = [float(np.linalg.norm(other.mean(axis=0) - hand.mean(axis=0))) for other in others]
    nearest = int(np.argmin(apart))
    return others[nearest] if apart[nearest] <= float(np.ptp(hand, axis=0).max()) else None
