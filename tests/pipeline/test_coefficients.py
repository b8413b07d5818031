"""Tables of coefficients: both layouts are read to the digit, and what is wrong is told with its line and column."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.coefficients import Coefficients, read_coefficients
from pipeline.errors import UserError
from pipeline.exports.csv_table import write_live_link
from pipeline.heads import EXPRESSIONS
from pipeline.retarget import EYES, TURN, Performance

NAMES = (*EXPRESSIONS, *EYES, *TURN)


def performance(rows: int = 120) -> np.ndarray:
    """[T,59] a talking head whose eyeLook* coefficients say the same as its eyes."""
    rng = np.random.default_rng(3)
    values = np.zeros((rows, len(NAMES)))
    values[:, NAMES.index("jawOpen")] = rng.uniform(0, 0.8, rows)
    values[:, NAMES.index("mouthSmileLeft")] = rng.uniform(0, 0.5, rows)
    values[:, NAMES.index("headPitch") :] = rng.uniform(-0.4, 0.4, (rows, 3))
    pitch, yaw = rng.uniform(-0.2, 0.2, (2, rows))
    for side, outwards in (("Left", 1), ("Right", -1)):
        values[:, NAMES.index(f"eyePitch{side}")], values[:, NAMES.index(f"eyeYaw{side}")] = pitch, yaw
        values[:, NAMES.index(f"eyeLookOut{side}")] = np.maximum(outwards * yaw, 0) / 0.6
        values[:, NAMES.index(f"eyeLookIn{side}")] = np.maximum(-outwards * yaw, 0) / 0.6
    return values


def in_order(table: Coefficients) -> np.ndarray:
    return table.values[:, [table.names.index(name) for name in NAMES]]


def text_file(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("sense", [1.0, -1.0])
def test_recordings_of_either_sense_of_yaw_and_roll_read_alike(tmp_path: Path, sense: float) -> None:
    values = performance()
    table = read_coefficients(write_live_link(tmp_path / "take.csv", NAMES, values, sense=sense))
    np.testing.assert_allclose(in_order(table), values, atol=1e-8)
    assert table.notes == ()


def test_a_row_of_the_app_itself_is_understood(tmp_path: Path) -> None:
    """From a recording: the left eye looks in, the right one out, both up; the yaws are positive: to the right."""
    columns = "EyeLookInLeft,EyeLookUpLeft,EyeLookOutRight,EyeLookUpRight,HeadYaw,HeadPitch,HeadRoll"
    eyes = "LeftEyeYaw,LeftEyePitch,LeftEyeRoll,RightEyeYaw,RightEyePitch,RightEyeRoll"
    row = "0.29,0.28,0.24,0.28,0.1,0.2,0,0.171,-0.116,-0.022,0.158,-0.116,-0.031"
    text = f"Timecode,BlendshapeCount,{columns},{eyes}\n18:44:00:12.840,61,{row}\n18:44:00:13.841,61,{row}\n"
    table = read_coefficients(text_file(tmp_path / "take.csv", text))
    first = dict(zip(table.names, table.values[0], strict=True))
    assert [first[name] for name in EYES] == [-0.116, -0.171, -0.116, -0.158]
    assert first["headYaw"] < 0 < first["headPitch"]
    assert table.fps == Fraction(60000, 1001)
    assert "60, as the app does" in " ".join(table.notes)


@pytest.mark.parametrize(
    ("fps", "base", "rate"),
    [
        (60000 / 1001, 60, Fraction(60000, 1001)),
        (60.0, 60, Fraction(60)),
        (30000 / 1001, 30, Fraction(30000, 1001)),
        (25.0, 25, Fraction(25)),
        (24.0, 24, Fraction(24)),
    ],
)
def test_timecodes_tell_rate_and_time_past_midnight(tmp_path: Path, fps: float, base: int, rate: Fraction) -> None:
    path = write_live_link(tmp_path / "take.csv", NAMES, performance(200), fps=fps, base=base, start=86400 - 1.5)
    table = read_coefficients(path)
    assert table.fps == rate
    np.testing.assert_allclose(table.times, np.arange(200) / fps, atol=1e-4)


def test_dropped_numbers_are_no_gaps(tmp_path: Path) -> None:
    """Drop-frame timecode leaves out 00 and 01 of most minutes; the clock runs on, but for the tenth."""
    stamps = [f"00:00:58;{n:02}" for n in range(30)] + [f"00:00:59;{n:02}" for n in range(30)]
    stamps += [f"00:01:00;{n:02}" for n in range(2, 30)]
    table = read_coefficients(
        text_file(tmp_path / "t.csv", "Timecode,JawOpen\n" + "".join(f"{s},0.5\n" for s in stamps))
    )
    assert table.fps == Fraction(30000, 1001)
    np.testing.assert_allclose(np.diff(table.times), 1001 / 30000, atol=1e-9)


def test_rows_without_a_face_are_not_used(tmp_path: Path) -> None:
    values = performance(90)
    table = read_coefficients(write_live_link(tmp_path / "take.csv", NAMES, values, faceless=(4, 5)))
    assert np.flatnonzero(~table.usable).tolist() == [4, 5]
    np.testing.assert_allclose(in_order(table)[6:], values[6:], atol=1e-8)


@pytest.mark.parametrize(
    "text",
    [
        "time,jawOpen,headYaw\n0,0.1,0.2\n0.04,0.5,-0.1\n",
        "\ufefftime;jawOpen;headYaw\r\n0;0,1;0,2\r\n0,04;0,5;-0,1\r\n",
        "time\tjawOpen\theadYaw\t_neutral\n0\t0.1\t0.2\t0\n\n0.04\t0.5\t-0.1\t0\n",
        "TIME,JawOpen,HEADYAW,\n0,0.1,0.2,\n0.04,0.5,-0.1,\n",
    ],
    ids=["plain", "spreadsheet", "tabs", "capitals"],
)
def test_a_plain_table_in_any_dress(tmp_path: Path, text: str) -> None:
    table = read_coefficients(text_file(tmp_path / "t.csv", text))
    assert (table.names, table.fps) == (("jawOpen", "headYaw"), Fraction(25))
    np.testing.assert_array_equal(table.values, [[0.1, 0.2], [0.5, -0.1]])
    assert "stay at rest" in table.notes[0]


def test_a_rate_that_is_given_counts_alone(tmp_path: Path) -> None:
    path = text_file(tmp_path / "t.csv", "frame,jawOpen\n".replace("frame,", "time,") + "5,0.1\n5,0.2\n4,0.3\n")
    table = read_coefficients(path, fps=29.97)
    assert table.fps == Fraction(30000, 1001)
    np.testing.assert_allclose(table.times, np.arange(3) * 1001 / 30000)


def test_what_a_table_leaves_out_stays_at_rest_and_gaze_follows_its_coefficients(tmp_path: Path) -> None:
    text = "time,jawOpen,eyeLookOutLeft,headYaw,headZ\n0,0,0,0.3,0\n0.04,0.8,1,0.3,0.1\n0.08,0,0,0.6,0.2\n"
    table = read_coefficients(text_file(tmp_path / "t.csv", text))
    driver = Performance.of_table(table, EXPRESSIONS)
    departures = driver.values - driver.neutral
    moved = {name for name, column in zip(driver.names, departures.T, strict=True) if np.abs(column).max() > 1e-9}
    assert moved == {"jawOpen", "eyeLookOutLeft", "eyeYawLeft", "headYaw", "headZ"}
    np.testing.assert_allclose(departures[:, driver.names.index("headYaw")], [-0.1, -0.1, 0.2], atol=1e-3)
    assert departures[1, driver.names.index("eyeYawLeft")] == pytest.approx(0.37, abs=1e-6)
    resting = driver.resting_at(1)
    np.testing.assert_allclose((resting.values - resting.neutral)[1], 0, atol=1e-12)
    np.testing.assert_allclose(resting.values[2, [-5, -1]], [0.3, 0.1], atol=1e-9)


GOOD = "time,jawOpen,headYaw\n0,0.1,0\n0.04,0.2,0\n0.08,0.3,0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header of several columns"),
        ("just words\n", "has no header of several columns"),
        ("0,0.1,0\n0.04,0.2,0\n", "has no header: its first line holds numbers"),
        ("time,jawOpen\n", "a header and no rows"),
        ("time,jawOpen,jawopen\n0,0,0\n", "names the column 'jaw.pen' twice"),
        ("time,,jawOpen\n0,0,0\n", "a column without a name"),
        ("time,time2\n0,0\n", "unknown column 'time2'"),
        ("time,_neutral\n0,0\n", "has no column of coefficients"),
        (GOOD.replace("jawOpen", "jawOpn"), "unknown column 'jawOpn'"),
        (GOOD.replace("0.2", "nan"), r"line 3, column 'jawOpen': 'nan' is no finite number"),
        (GOOD.replace("0.2", "1e999"), r"line 3, column 'jawOpen': '1e999' is no finite number"),
        (GOOD.replace("0.2", ""), "line 3, column 'jawOpen': the cell is empty"),
        (GOOD.replace("0.2", "open"), "line 3, column 'jawOpen': 'open' is no finite number"),
        (GOOD.replace("0.2", "20"), "line 3, column 'jawOpen': 20 cannot be"),
        (GOOD.replace("0.3,0", "0.3,12"), "line 4, column 'headYaw': 12 cannot be"),
        (GOOD.replace("0.2,0\n", "0.2\n"), "line 3, has 2 cells, its header 3"),
        (GOOD.replace("0.2,0\n", "0.2,0,7\n"), "line 3, has 4 cells, its header 3"),
        (GOOD.replace("0.08", "0.04"), "line 4, column 'time': the times do not rise"),
        (GOOD.replace("0.04", "40").replace("0.08", "80"), "lasts 80 s at 0.025 rows a second"),
        ("time,jawOpen\n0,0.1\n0.04,0\n0.08,0\n9e9,0\n", "lasts 9e[+]09 s"),
        ("time,jawOpen\n0,0.1\n", "one row has no rate"),
        ("jawOpen,headYaw\n0,0\n", "does not tell its times"),
        ("Timecode,JawOpen\n00:00:00,0.1\n", "'00:00:00' is no timecode"),
        ("Timecode,JawOpen\n00:00:00:400,0.1\n", "no rate has a frame 400"),
        ("Timecode,BlendShapeCount,JawOpen\n00:00:00:00.1,0\n00:00:00:01.1,0\n", "shows a face in no row"),
        ("Timecode,HeadYow\n00:00:00:00,0.1\n", "unknown column 'HeadYow'"),
    ],
)
def test_bad_tables_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_coefficients(text_file(tmp_path / "t.csv", text))
    assert caught.value.fix


def test_a_wrong_name_is_told_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_coefficients(text_file(tmp_path / "t.csv", GOOD.replace("jawOpen", "jaw_open")))
    assert "did you mean jawOpen" in caught.value.fix


def test_files_that_are_no_text_or_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfet\x00i\x00m\x00e\x00")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        read_coefficients(tmp_path / "t.csv")
    with pytest.raises(UserError, match="There is no file"):
        read_coefficients(tmp_path / "none.csv")
    monkeypatch.setattr("pipeline.coefficients.MAX_ROWS", 2)
    with pytest.raises(UserError, match="more than 2 rows"):
        read_coefficients(text_file(tmp_path / "t.csv", GOOD))
    monkeypatch.setattr("pipeline.coefficients.MAX_BYTES", 10)
    with pytest.raises(UserError, match="are read at most"):
        read_coefficients(tmp_path / "t.csv")


def test_rows_that_are_told_to_be_unusable_are_not_read(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.csv", "time,usable,jawOpen\n0,1,0.5\n0.1,0,nan\n0.2,1,0.25\n")
    table = read_coefficients(path)
    assert table.usable.tolist() == [True, False, True] and table.values[:, 0].tolist() == [0.5, 0, 0.25]
    with pytest.raises(UserError, match=r"line 3, column 'usable': 'no' is neither 0 nor 1"):
        read_coefficients(text_file(tmp_path / "b.csv", "time,usable,jawOpen\n0,1,0.5\n0.1,no,0.5\n"))
