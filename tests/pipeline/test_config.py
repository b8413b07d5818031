"""Settings: overrides, their errors, and what differs from the preset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import PRESETS, Config, describe, differences, override, preset_config
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_and_differ_from_nothing(preset: str) -> None:
    config = preset_config(preset)
    assert differences(config) == {}
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_override_reads_values_by_type() -> None:
    config = override(
        preset_config("quick"), ["train.steps=500", "decode.end_seconds=2.5", "decode.drop_repeated=false"]
    )
    assert (config.train.steps, config.decode.end_seconds, config.decode.drop_repeated) == (500, 2.5, False)
    assert set(differences(config)) == {"train.steps", "decode.end_seconds", "decode.drop_repeated"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "not of the form"),
        ("steps=5", "not of the form"),
        ("preset.x=5", "no section 'preset'"),
        ("trian.steps=5", "no section 'trian'"),
        ("train.stpes=5", "no field 'stpes'"),
        ("train.steps=-5", "train.steps=-5 does not fit"),
        ("train.steps=many", "train.steps='many' does not fit"),
        ("decode.max_fps=NaN", "decode.max_fps"),
        ("matte.model=../../x", "matte.model"),
    ],
)
def test_bad_overrides_say_what_is_wrong(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(preset_config("quick"), [setting])


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="no preset 'fast'") as caught:
        preset_config("fast")
    assert "quick, standard, best" in caught.value.fix


def test_settings_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tools.write_settings_doc import *; print(settings_page(), end='')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "docs" / "settings.md").read_text() == done.stdout, "run: python -m tools.write_settings_doc"


def test_every_setting_is_explained() -> None:
    rows = describe()
    assert rows
    assert [name for name, _, text in rows if len(text) < 10] == []
