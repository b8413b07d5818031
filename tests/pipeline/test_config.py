"""Settings: overrides, their errors, and what differs from the preset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pipeline import cli
from pipeline.avatars import MODELS
from pipeline.config import AVATARS, PRESETS, Config, Head, configure, describe, differences, override, preset_config
from pipeline.errors import UserError
from pipeline.heads import head_names

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
        ("train.density=5", "section 'train' has no field 'density'"),
        ("train.density.evry=5", "section 'train.density' has no field 'evry'"),
        ("train.densiti.every=5", "section 'train' has no section 'densiti'"),
        ("train.density.every=-1", "train.density.every=-1 does not fit"),
        ("train.steps=-5", "train.steps=-5 does not fit"),
        ("train.steps=many", "train.steps='many' does not fit"),
        ("decode.max_fps=NaN", "decode.max_fps"),
        ("matte.model=../../x", "matte.model"),
    ],
)
def test_bad_overrides_say_what_is_wrong(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(preset_config("quick"), [setting])


def test_a_setting_of_a_part_is_found_and_shown() -> None:
    config = configure("quick", ["train.density.every=100", "train.avatar=rigged"])
    assert config.train.density.every == 100
    assert differences(config) == {"train.density.every": (0, 100)}


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


def test_avatar_models_are_the_ones_there_are() -> None:
    # As the head models: written out where loading them would cost a second.
    assert set(AVATARS) <= set(MODELS)
    assert get_args(get_args(get_type_hints(cli.Run, include_extras=False)["avatar"])[0]) == AVATARS


def test_head_models_are_the_ones_there_are() -> None:
    # Written out in three places, because the command line and the settings must not load the head models to name them.
    names = {"flame", *head_names()}
    assert set(get_args(Head)) == names
    assert set(get_args(get_args(get_type_hints(cli.Run, include_extras=False)["head"])[0])) == names
