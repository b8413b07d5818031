"""Avatars from damaged or hostile files: refused with words, or whole; nothing else comes out of `load_avatar`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avatar_data import training_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from pipeline.avatars import DESCRIPTION, WEIGHTS, avatar_class, load_avatar, save_avatar
from pipeline.config import AVATARS, GaussianHeadConfig, TrainConfig
from pipeline.errors import UserError

FUZZ = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


SMALL = GaussianHeadConfig(plane_size=8, field_layers=2, field_width=8, hash_finest=20, hash_entries=64)


@pytest.fixture(scope="module", params=AVATARS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sound avatar's files, of each model."""
    folder = tmp_path_factory.mktemp("avatar")
    config = TrainConfig(gaussians=60, basis=2, hidden=4, gaussianhead=SMALL)
    save_avatar(avatar_class(request.param).start(training_data(), config, np.random.default_rng(0)), folder)
    return {name: (folder / name).read_bytes() for name in (DESCRIPTION, WEIGHTS)}


def refused_or_whole(folder: Path, files: dict[str, bytes]) -> str:
    """Write and load an avatar: the words it is refused with, or nothing after a look at it."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        avatar = load_avatar(folder)
    except UserError as error:
        assert error.fix
        return error.what
    K = torch.tensor([[80.0, 0, 32], [0, 80, 32], [0, 0, 1]])
    assert torch.isfinite(avatar.render(avatar.neutral, K, 64, 64, torch.ones(3)).image).all()
    return ""


def with_weights(files: dict[str, bytes], change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, bytes]:
    weights = load(files[WEIGHTS])
    change(weights)
    return {**files, WEIGHTS: save({name: value.contiguous() for name, value in weights.items()})}


def test_a_sound_avatar_is_taken(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert refused_or_whole(tmp_path, files) == ""


@FUZZ
@given(data=st.data())
def test_any_description(data: st.DataObject, tmp_path: Path, files: dict[str, bytes]) -> None:
    description = json.loads(files[DESCRIPTION])
    own = description["settings"]
    places = [description, own, *(value for value in own.values() if isinstance(value, dict))]
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(VALUES)
    else:
        del place[key]
    refused_or_whole(tmp_path, {**files, DESCRIPTION: json.dumps(description).encode()})


@FUZZ
@given(data=st.data())
def test_any_weights(data: st.DataObject, tmp_path: Path, files: dict[str, bytes]) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        name = data.draw(st.sampled_from(sorted(weights)))
        value = weights[name]
        kind = data.draw(st.sampled_from(["drop", "dtype", "shape", "fill", "copy"]))
        if kind == "drop":
            del weights[name]
        elif kind == "dtype":
            types = [torch.float64, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]
            weights[name] = value.to(data.draw(st.sampled_from(types)))
        elif kind == "shape":
            shape = data.draw(st.lists(st.integers(0, 70), max_size=4))
            weights[name] = torch.zeros(shape, dtype=value.dtype)
        elif kind == "fill" and value.is_floating_point():
            weights[name] = torch.full_like(value, data.draw(st.floats(width=16)))
        elif kind == "fill":
            weights[name] = torch.full_like(value, data.draw(st.integers(-(2**31), 2**31 - 1)))
        else:
            weights["more" + name] = value.clone()

    refused_or_whole(tmp_path, with_weights(files, change))


@FUZZ
@given(data=st.data())
def test_any_bytes(data: st.DataObject, tmp_path: Path, files: dict[str, bytes]) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    damaged = bytearray(files[name])
    start = data.draw(st.integers(0, min(len(damaged), data.draw(st.sampled_from([64, 4000, len(damaged)])))))
    damaged[start : start + data.draw(st.integers(0, 16))] = data.draw(st.binary(max_size=16))
    refused_or_whole(tmp_path, {**files, name: bytes(damaged[: data.draw(st.sampled_from([start, len(damaged)]))])})


def test_every_number_that_is_none_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    floating = [name for name, value in load(files[WEIGHTS]).items() if value.is_floating_point() and value.numel()]
    assert len(floating) > 15
    for name in floating:
        for bad in (torch.nan, torch.inf):
            poisoned = with_weights(files, lambda weights, n=name, b=bad: weights[n].view(-1)[-1:].fill_(b))  # type: ignore[misc]
            assert f"'{name}' holds values that are not finite" in refused_or_whole(tmp_path, poisoned)


def test_what_would_burst_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    huge = with_weights(files, lambda weights: weights["means"].fill_(3e38))
    assert "expected finite values" in refused_or_whole(tmp_path, huge)
    sizes = [name for name, value in json.loads(files[DESCRIPTION])["settings"].items() if isinstance(value, int)]
    assert {"features", "shape"} <= set(sizes)
    for name in sizes:
        description = json.loads(files[DESCRIPTION])
        description["settings"][name] = 10**11
        said = refused_or_whole(tmp_path, {**files, DESCRIPTION: json.dumps(description).encode()})
        assert f"{name} is 100000000000" in said

    def bomb(weights: dict[str, torch.Tensor]) -> None:
        weights["rig_expression"] = torch.zeros(200_000, 0, 3)

    description = json.loads(files[DESCRIPTION])
    description["settings"]["expression_names"] = [f"e{i}" for i in range(200_000)]
    said = refused_or_whole(tmp_path, {**with_weights(files, bomb), DESCRIPTION: json.dumps(description).encode()})
    assert "rig_expression has shape" in said


def test_triangles_beyond_the_vertices_are_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    for number in (-1, 10**6):
        said = refused_or_whole(tmp_path, with_weights(files, lambda w, n=number: w["rig_corners"][0].fill_(n)))  # type: ignore[misc]
        assert "rig_corners" in said


def test_nested_without_end_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert "no readable avatar" in refused_or_whole(tmp_path, {**files, DESCRIPTION: b"[" * 200_000})
