"""A recording of what a viewer shows: pictures with their times, and the film that they make."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.video import write_video

if TYPE_CHECKING:
    from numpy.typing import NDArray

FPS = Fraction(30)
MOST_BYTES = 400_000_000
MOST_SECONDS = 600.0
_QUALITY = 95


class Recording:
    """Pictures of one size, kept compressed until they are written.

    Args:
        size: (width, height), made even as video wants it.
        begun: seconds of the clock that `add` is given the times of.
    """

    def __init__(self, size: tuple[int, int], begun: float) -> None:
        self.size = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self.begun = begun
        self._pictures: list[tuple[float, bytes]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, picture: NDArray[np.uint8], now: float) -> None:
        """A picture [H,W,3] of the recording's size, shown from now on."""
        import cv2

        encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
        self._pictures.append((now, encoded))
        self._bytes += len(encoded)

    def full(self, now: float) -> bool:
        """Whether it has grown as large or as long as it may."""
        return self._bytes > MOST_BYTES or now - self.begun > MOST_SECONDS

    def frames(self, ended: float) -> Iterator[NDArray[np.uint8]]:
        """Pictures [H,W,3] at `FPS`, each held until the next; at least one, none if nothing was added."""
        import cv2

        if not self._pictures:
            return
        count = max(1, round((ended - self.begun) * FPS))
        shown, decoded = -1, np.zeros(0, np.uint8)
        times = np.array([time for time, _ in self._pictures])
        for tick in range(count):
            now = max(0, int(np.searchsorted(times, self.begun + float(tick / FPS), side="right")) - 1)
            if now != shown:
                data = np.frombuffer(self._pictures[now][1], np.uint8)
                shown, decoded = now, np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))
            yield decoded

    def write(self, path: Path, ended: float) -> dict[str, float | int | list[int]]:
        """Write the film and return its account.

        Raises:
            ValueError: nothing was added.
        """
        write_video(path, self.frames(ended), FPS)
        return {
            "fps": float(FPS),
            "seconds": round(ended - self.begun, 2),
            "size": list(self.size),
            "pictures": len(self),
        }
