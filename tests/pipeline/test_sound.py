"""Sound stays in step with its pictures: read to the sample, silent where there is none, written in the same place."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from tones import LOUD, onset, write_tone

from pipeline.errors import UserError
from pipeline.sound import has_sound, read_sound
from pipeline.video import SOUND_RATE, write_video

FPS = Fraction(30000, 1001)


def heard(path: Path, start: float, seconds: float) -> NDArray[np.int16]:
    return np.concatenate([*read_sound(path, start, seconds), np.zeros((0, 2), np.int16)])


@pytest.mark.parametrize("rate", [44100, 48000, 16000])
@pytest.mark.parametrize("start", [-0.25, 0.0, 0.3])
def test_a_span_begins_at_its_time_and_is_exactly_as_long(tmp_path: Path, rate: int, start: float) -> None:
    path = write_tone(tmp_path / "clip.mp4", begins=0.5, seconds=2.0, rate=rate)
    sound = heard(path, start, 1.2345)
    assert sound.shape == (round(1.2345 * SOUND_RATE), 2)
    assert onset(sound) == pytest.approx(0.5 - start, abs=0.005)


def test_before_between_and_after_the_track_is_silence(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "clip.mkv", begins=0.0, seconds=0.5, late=1.0)
    sound = heard(path, 0.0, 3.0)
    assert len(sound) == 3 * SOUND_RATE
    assert onset(sound) == pytest.approx(1.0, abs=0.03)  # Matroska is stamped in whole milliseconds
    assert not np.abs(sound[: int(0.9 * SOUND_RATE)]).any()
    assert not np.abs(sound[int(1.7 * SOUND_RATE) :]).any()
    assert not heard(path, 10.0, 0.5).any()
    assert not len(heard(path, 0.0, 0.0))


def test_pictures_that_begin_late_take_their_sound_along(tmp_path: Path) -> None:
    """Times count from the first picture, as those of `read_frames` do, not from the start of the file."""
    path = write_tone(tmp_path / "clip.mp4", begins=0.75, seconds=2.0, first_picture=0.4)
    assert onset(heard(path, 0.0, 1.0)) == pytest.approx(0.35, abs=0.005)


def test_written_sound_is_read_back_in_its_place(tmp_path: Path) -> None:
    source = write_tone(tmp_path / "clip.mp4", begins=0.5, seconds=2.0)
    pictures = [np.full((64, 64, 3), 200, np.uint8)] * 45
    write_video(tmp_path / "copy.mp4", pictures, FPS, sound=read_sound(source, 0.0, float(45 / FPS)))
    assert has_sound(tmp_path / "copy.mp4")
    assert onset(heard(tmp_path / "copy.mp4", 0.0, 1.5)) == pytest.approx(0.5, abs=0.005)
    with av.open(str(tmp_path / "copy.mp4")) as file:
        assert float(file.streams.audio[0].duration / SOUND_RATE) == pytest.approx(float(45 / FPS), abs=0.03)
        assert (file.streams.video[0].frames, file.streams.video[0].average_rate) == (45, FPS)


def test_a_damaged_track_gives_what_decodes(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "clip.mp4", begins=0.0, seconds=2.0)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + 4
    # Among the pictures and the sound, not in the index after them.
    for place in np.random.default_rng(1).integers(middle + 2000, data.index(b"moov") - 200, 30):
        data[place] ^= 0xFF
    (tmp_path / "hurt.mp4").write_bytes(bytes(data))
    sound = heard(tmp_path / "hurt.mp4", 0.0, 2.0)
    assert sound.shape == (2 * SOUND_RATE, 2)
    assert np.abs(sound).max() > LOUD


def test_a_folder_and_a_silent_video_have_none(tmp_path: Path) -> None:
    write_video(tmp_path / "silent.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3, 25)
    assert not has_sound(tmp_path / "silent.mp4")
    assert not has_sound(tmp_path)
    assert not heard(tmp_path, 0.0, 0.1).any()
    with pytest.raises(UserError, match="no file"):
        has_sound(tmp_path / "none.mp4")
