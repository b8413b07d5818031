"""Training as TensorBoard shows it: event files, written here so that none of TensorBoard's slow imports is needed.

They hold times of day, so they lie beside the stages' files, not among them: `SUBJECT/tensorboard/TRAINING/`. A record
is its length, a checksum of that, a serialised `Event`, and a checksum of it (TensorFlow's TFRecord format).
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.dataset import Subject

FOLDER = "tensorboard"
KEPT = 8
"""Trainings of a subject whose event files stay, the newest."""
_CASTAGNOLI = 0x82F63B78
_PREFIX = "events.out.tfevents."


class EventLog:
    """The event file of one training, or of what is left of it.

    Writing is given up at the first error, which is told and stops nothing.

    Args:
        folder: of this training; what an earlier attempt left there goes if this one starts anew.
        step: that training stands at: what earlier files say of later steps was lost and does not count.
        report: is told when the log has to be given up.
    """

    def __init__(self, folder: Path, step: int, report: Callable[[str], None]) -> None:
        self._folder, self._report, self._file = folder, report, -1
        self.seconds = 0.0
        """What writing took."""
        self._guarded(self._open, step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures by their names."""
        self._guarded(lambda: self._add(step, [{"tag": tag, "simple_value": value} for tag, value in values.items()]))

    def image(self, step: int, name: str, path: Path, size: tuple[int, int]) -> None:
        """Add a picture that lies in a file.

        Args:
            step: of training.
            name: of the picture.
            path: of a JPEG or PNG.
            size: (width, height) in pixels.
        """

        def add() -> None:
            width, height = size
            picture = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": path.read_bytes()}
            self._add(step, [{"tag": name, "image": picture}])

        self._guarded(add)

    def close(self) -> None:
        """End the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        begun = time.monotonic()
        try:
            work(*arguments)
        except OSError as error:
            self.close()
            self._report(
                f"No more TensorBoard logs: '{self._folder}' cannot be written ({error.strerror or error}). "
                "Training goes on; log.json has the curves."
            )
        self.seconds += time.monotonic() - begun

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if step == 0:
            for path in self._folder.glob(f"{_PREFIX}*"):
                path.unlink()
        _forget_old(self._folder.parent)
        # Read in the order of their names.
        name = f"{_PREFIX}{time.time_ns() // 1000:017d}.{step:08d}"
        self._file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step + 1, session_log={"status": 1})  # START: later steps are void

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        if self._file >= 0:
            self._write(step=step, summary={"value": values})

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + struct.pack("<I", _masked_crc(length)) + data + struct.pack("<I", _masked_crc(data))
        # At once and whole: what a killed training has told stays.
        while record:
            record = record[os.write(self._file, record) :]


def open_log(subject: Subject, training: str, step: int, report: Callable[[str], None]) -> EventLog:
    """The log of one training of a subject, by a name that is its own."""
    return EventLog(subject.root / FOLDER / training, step, report)


def _forget_old(folder: Path) -> None:
    """Remove all but the newest trainings."""
    trainings = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    for path in sorted(trainings, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as the format has it, so that a checksum of checksums differs from them."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table
