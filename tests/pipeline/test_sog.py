"""SOG: round trips within its steps, what `meta.json` says, and files that nobody should trust."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial import cKDTree
from splat_data import random_splats, same_turns

from pipeline.errors import UserError
from pipeline.sog import read_sog, write_sog


@pytest.mark.parametrize(("count", "degree"), [(1, 0), (300, 0), (300, 1), (70, 3)])
def test_round_trips_stay_within_the_formats_steps(tmp_path: Path, count: int, degree: int) -> None:
    splats = random_splats(count, degree=degree)
    write_sog(tmp_path / "a.sog", splats)
    again = read_sog(tmp_path / "a.sog")
    # Gaussians lie in another order.
    distance, here = cKDTree(again.means).query(splats.means)
    assert sorted(here) == list(range(count)) and distance.max() < 1e-5
    for name, atol in (("opacities", 1 / 510 + 1e-6), ("sh", 0.02)):
        np.testing.assert_allclose(getattr(again, name)[here], getattr(splats, name), atol=atol)
    np.testing.assert_allclose(np.log(again.scales[here]), np.log(splats.scales), atol=0.02)
    assert same_turns(again.quats[here], splats.quats).max() < 1
    assert again.degree() == degree


def test_equal_gaussians_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sog(tmp_path / name, random_splats(20))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_textures_are_lossless_and_named_by_the_document(tmp_path: Path) -> None:
    write_sog(tmp_path / "a.sog", random_splats(30, degree=1))
    with zipfile.ZipFile(tmp_path / "a.sog") as file:
        meta = json.loads(file.read("meta.json"))
        names = [name for part in meta.values() if isinstance(part, dict) for name in part.get("files", [])]
        assert meta["version"] == 2 and meta["count"] == 30 and meta["shN"]["bands"] == 1
        assert sorted(["meta.json", *names]) == sorted(file.namelist())
        for name in names:
            assert file.read(name)[12:16] in (b"VP8L", b"VP8X")


def changed(path: Path, entries: dict[str, bytes] | None = None, **fields: Any) -> None:
    """Rewrite a SOG with other entries, and `meta.json` with other fields: a__b=1 is a.b."""
    with zipfile.ZipFile(path) as file:
        held = {name: file.read(name) for name in file.namelist()}
    meta = json.loads(held["meta.json"])
    for name, value in fields.items():
        *outer, last = name.split("__")
        target = meta
        for key in outer:
            target = target[key]
        target[last] = value
    held |= {"meta.json": json.dumps(meta).encode()} | (entries or {})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in held.items():
            if data is not None:
                file.writestr(name, data)


def webp(width: int, height: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGBA", (width, height)).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 1}, "version is 1"),
        ({"count": 10**12}, "count 1000000000000"),
        ({"count": -1}, "count -1"),
        ({"count": 500}, "too small"),
        ({"means__files": ["../../etc/passwd", "x"]}, "no item named"),
        ({"means__files": "x"}, "no item named"),
        ({"means__mins": [float("nan"), 0, 0]}, "bounds make no sense"),
        ({"means__maxs": [1e30, 0, 0]}, "bounds make no sense"),
        ({"scales__codebook": [0.0]}, "has not 256 finite"),
        ({"scales__codebook": [300.0] * 256}, "a scale makes no sense"),
        ({"shN__count": 1}, "outside its palette"),
        ({"shN__bands": 9}, "makes no sense"),
        ({"entries": {"quats.webp": webp(8, 8)}}, "a rotation makes no sense"),
        ({"entries": {"quats.webp": webp(2000, 2000)}}, "2000 x 2000 pixels"),
        ({"entries": {"quats.webp": bytes(10**7)}}, "has 10000000 bytes"),
        ({"entries": {"quats.webp": b"GIF89a"}}, "cannot identify"),
        ({"entries": {"meta.json": b"[" * 100_000}}, "not a SOG"),
        ({"entries": {"meta.json": b"[]"}}, "not a SOG"),
        ({"entries": {"meta.json": bytes(2_000_000)}}, "has 2000000 bytes"),
    ],
)
def test_hostile_files_are_refused_in_words(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "bad.sog"
    write_sog(path, random_splats(60, degree=1))
    changed(path, **change)
    with pytest.raises(UserError, match=complaint) as error:
        read_sog(path)
    assert str(path) in error.value.what and error.value.fix


def test_damaged_bytes_never_get_past(tmp_path: Path) -> None:
    """A file with any bytes changed is read or refused in words, also one that is compressed."""
    path, rng = tmp_path / "a.sog", np.random.default_rng(0)
    write_sog(path, random_splats(20))
    changed(path)
    data, refused = path.read_bytes(), 0
    for _ in range(120):
        damaged = bytearray(data)
        for at in rng.integers(len(data), size=4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_sog(path)
        except UserError:
            refused += 1
    assert refused > 60


def test_no_zip_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sog").write_bytes(b"PK\x03\x04 and no more")
    for name, complaint in (("a.sog", "not a zip file"), ("none.sog", "No such file")):
        with pytest.raises(UserError, match=complaint):
            read_sog(tmp_path / name)
