"""The restricted pickle reader: honest files load exactly, everything else is refused and never runs."""

from __future__ import annotations

import importlib
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from synthetic_heads import python2_pickle, stub_chumpy

from pipeline import restricted_pickle
from pipeline.restricted_pickle import RefusedPickle, load_plain


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def same(a: Any, b: Any) -> bool:
    if sparse.issparse(a) or sparse.issparse(b):
        return type(a) is type(b) and a.dtype == b.dtype and same(a.toarray(), b.toarray())
    if isinstance(a, (np.ndarray, np.generic)) or isinstance(b, (np.ndarray, np.generic)):
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype == object:
            return all(same(x, y) for x, y in zip(a.ravel(), b.ravel(), strict=True))
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


HONEST: dict[str, Any] = {
    "plain": {"a": [1, -2, 1 << 70, 0.5, True, None], "b": ("x", "ü", b"\x00\xff", b""), 3: {"c": {"d", 4}}, "e": ()},
    "arrays": {
        "f8": np.arange(6.0).reshape(2, 3),
        "f4": np.linspace(0, 1, 5, dtype=np.float32),
        "big": np.arange(3, dtype=">u4"),
        "bool": np.array([True, False]),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(20.0).reshape(4, 5)[:, ::2],
        "turned": np.moveaxis(np.arange(24.0).reshape(2, 3, 4), 0, 1),
        "empty": np.zeros((0, 3)),
        "scalar": np.float64(2.5),
        "zero-dimensional": np.array(7),
        "text": np.array(["ab", "ç"]),
        "bytes": np.array([b"ab", b"c"]),
        "objects": np.array([[1, "a"], [None, np.arange(2)]], dtype=object),
    },
    "sparse": [build(np.diag([1.0, 0, 3])) for build in (sparse.csc_matrix, sparse.csr_matrix, sparse.coo_matrix)],
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", HONEST)
def test_honest_data_loads_exactly(tmp_path: Path, name: str, protocol: int) -> None:
    data = pickle.dumps(HONEST[name], protocol)
    assert same(load_plain(write(tmp_path / "honest.pkl", data)), HONEST[name])


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_pickles_load_as_latin_1(tmp_path: Path, protocol: int) -> None:
    value = {"name": b"caf\xe9", "array": np.arange(300.0), "matrix": sparse.csc_matrix(np.eye(3))}
    data = python2_pickle(value, protocol)
    assert b"numpy.core.multiarray" in data
    assert b"numpy._core" not in data
    loaded = load_plain(write(tmp_path / "python2.pkl", data))
    assert same(loaded, {**value, "name": "café"})


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_chumpy_arrays_become_arrays(tmp_path: Path, protocol: int) -> None:
    array = np.arange(12.0).reshape(4, 3)
    with stub_chumpy() as chumpy:
        value = {"x": chumpy.Ch(array), "part": chumpy.Select(chumpy.Ch(array), np.array([5, 0]), (2, 1))}
        data = pickle.dumps(value, protocol)
    loaded = load_plain(write(tmp_path / "chumpy.pkl", data))
    assert same(loaded, {"x": array, "part": np.array([[5.0], [0.0]])})


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def touch(marker: Path) -> str:
    return f"touch {marker}"


ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (lambda m: Call(os.system, touch(m)), "posix.system"),
    "eval": (lambda m: Call(eval, f"open({str(m)!r}, 'w')"), "builtins.eval"),
    "getattr": (lambda m: Call(getattr, "x", "join"), "builtins.getattr"),
    "numpy.load": (lambda m: Call(np.load, str(m)), "numpy.load"),
    "import": (lambda m: Call(importlib.import_module, "os"), "importlib.import_module"),
    "numpy's runner": (lambda m: Call(np.testing.rundocs, str(m)), "numpy.testing"),
    "ctypes": (lambda m: Call(importlib.import_module("ctypes").CDLL, "libc.so.6"), "ctypes.CDLL"),
    "memmap": (lambda m: Call(np.memmap, str(m), "u1", "w+", 0, (4,)), "numpy.memmap"),
    "codec": (lambda m: Call(importlib.import_module("_codecs").encode, "a", "zip"), "_codecs.encode"),
    "call of a type": (lambda m: Call(np.ndarray, (1 << 40,)), "numpy.ndarray"),
    "file": (lambda m: Call(open, str(m), "w"), "io.open"),
    "structured dtype": (lambda m: np.zeros(2, dtype=[("a", "f8")]), "numpy.dtype"),
    "dtype of a call": (lambda m: Call(np.dtype, "f8,i4", False, True), "numpy.dtype"),
    "state on a list": (lambda m: Call(list, state={"a": 1}), "builtins.list"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_does_not_run(tmp_path: Path, name: str, protocol: int) -> None:
    build, blamed = ATTACKS[name]
    marker = tmp_path / "ran"
    data = pickle.dumps({"v_template": np.zeros(3), "x": build(marker)}, protocol)
    with pytest.raises(RefusedPickle) as error:
        load_plain(write(tmp_path / "attack.pkl", data))
    assert blamed.split(".")[-1] in error.value.what
    assert "nothing in it was run" in error.value.fix
    assert not marker.exists()


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


NDARRAY = global_("numpy.core.multiarray", "_reconstruct") + global_("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
RAW_ATTACKS = {
    "state of an allowed class": (global_("scipy.sparse.csc", "csc_matrix") + b")\x81(K\x01K\x02tb.", "state of a csc"),
    "setstate with attributes": (NDARRAY + b"}X\x03\x00\x00\x00fooK\x01sb.", "state of a array"),
    "state twice": (global_("chumpy.ch", "Ch") + b")\x81}b.", "neither an array nor a selection"),
    "class made from bytes": (b"(S'touch x'\nios\nsystem\n.", "os.system"),
    "object of a mark": (b"(" + global_("os", "system") + b"S'x'\no.", "os.system"),
    "persistent id": (b"Px\n.", "persistent id"),
    "binary persistent id": (b"K\x01Q.", "persistent id"),
    "extension code": (b"\x82\x01.", "EXT1"),
    "buffer outside": (b"\x97.", "NEXT_BUFFER"),
    "class as data": (b"]" + global_("numpy", "ndarray") + b"a.", "numpy.ndarray as if it were data"),
    "dotted name": (b"\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "chumpy's function": (global_("chumpy.ch", "ChLambda") + b")\x81.", "chumpy.ch.ChLambda"),
    "new object with arguments": (global_("scipy.sparse.csc", "csc_matrix") + b"K\x01\x85\x81.", "csc_matrix"),
    "reducing data": (b"K\x01)R.", "calls a int"),
    "array that is not filled": (NDARRAY + b".", "unfinished array"),
    "empty": (b"", "end is missing"),
    "cut": (pickle.dumps({"a": np.zeros(100)})[:-40], "damaged"),
    "no pickle": (b"PK\x03\x04zip", "damaged"),
    "underflow": (b"0.", "damaged"),
    "missing memo": (b"h\x05.", "damaged"),
    "unhashable key": (b"}]K\x01s.", "list as a key"),
}


@pytest.mark.parametrize("name", RAW_ATTACKS)
def test_a_crafted_file_is_refused(tmp_path: Path, name: str) -> None:
    data, why = RAW_ATTACKS[name]
    with pytest.raises(RefusedPickle) as error:
        load_plain(write(tmp_path / "crafted.pkl", data))
    assert why in error.value.what


def laughs(depth: int, width: int = 10) -> bytes:
    """Tuples of ten times the tuple before: a few hundred bytes that stand for 10^depth values."""
    layers = b"".join(b"0(" + b"h%c" % index * width + b"t\x94" for index in range(depth))
    return b"\x80\x04X\x03\x00\x00\x00lol\x94" + layers + b"."


def declared(shape: tuple[int, ...]) -> bytes:
    """An array that declares a shape and has four bytes."""
    dtype = pickle.dumps(np.dtype("f8"), 2)[2:-1]
    return b"\x80\x02" + NDARRAY + b"(K\x01" + pickle.dumps(shape, 2)[2:-1] + dtype + b"\x89C\x04abcdtb."


BOMBS = {
    "billion laughs": (laughs(12), "more than 1000000 values"),
    "deep billion laughs": (laughs(200), "deep"),
    "laughs as a shape": (b"\x80\x04" + laughs(14)[2:-1] + b"0" + NDARRAY + b"(K\x01h\x0eNNNtb.", "state of a array"),
    "laughs as a persistent id": (laughs(14)[:-1] + b"Q.", "persistent id"),
    "deep lists": (b"]" * 5000 + b"a" * 4999 + b".", "deep"),
    "itself": (b"]\x94h\x00a.", "deep"),
    "huge array": (declared((1 << 40,)), "declares arrays of more"),
    "overflowing array": (declared((1 << 59, 1 << 59)), "declares arrays of more"),
    "many instructions": (b"N0" * 200_000 + b"N.", "instructions"),
    "long list": (b"]" + b"(" + b"N" * 200_000 + b"e.", "instructions"),
    "huge string": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.", "damaged"),
    "huge number": (b"L" + b"9" * 1_000_000 + b"L\n.", "damaged"),
    "huge memo": (b"Nr\xff\xff\xff\x7f0" + b"N0" * 10 + b"]" * 40 + b"a" * 39 + b".", "deep"),
    "huge sparse matrix": (
        pickle.dumps(
            sparse.coo_matrix((np.ones(1), (np.zeros(1, int), np.zeros(1, int))), shape=(1 << 30, 1 << 30)), 2
        ),
        "declares arrays of more",
    ),
    "colliding keys": (pickle.dumps({(2**61 - 1) * k: 0 for k in range(2000)}, 2), "too large"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_little_memory(tmp_path: Path, name: str) -> None:
    data, why = BOMBS[name]
    path = write(tmp_path / "bomb.pkl", data)
    tracemalloc.start()
    try:
        with pytest.raises(RefusedPickle) as error:
            load_plain(path)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()
    assert why in error.value.what
    assert len(str(error.value)) < 500 + len(str(path))


def test_the_same_bytes_in_many_arrays_count_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "MAX_ARRAY_BYTES", 1_000_000)
    raw = b"x" * 100_000
    single = pickle.dumps([np.frombuffer(raw, "u1")], 2)
    assert len(load_plain(write(tmp_path / "one.pkl", single))) == 1
    dtype = pickle.dumps(np.dtype("u1"), 2)[2:-1]
    one = NDARRAY + b"(K\x01J" + struct.pack("<i", len(raw)) + b"\x85" + dtype + b"\x89h\xfftb"
    many = b"\x80\x02B" + struct.pack("<I", len(raw)) + raw + b"q\xff0(" + one * 11 + b"l."
    with pytest.raises(RefusedPickle, match="declares arrays of more"):
        load_plain(write(tmp_path / "many.pkl", many))


def test_object_arrays_nest_only_so_deep(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(20):
        array = np.empty(1, dtype=object)
        array[0] = value
        value = array
    with pytest.raises(RefusedPickle, match="deep"):
        load_plain(write(tmp_path / "nested.pkl", pickle.dumps(value)))


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(RefusedPickle, match="more than the 1 MB that are read"):
        load_plain(path)


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    seeds = [pickle.dumps(value, protocol) for value in HONEST.values() for protocol in (0, 2, 5)]
    refused = 0
    for _ in range(600):
        data = bytearray(seeds[generator.integers(len(seeds))])
        for place in generator.integers(0, len(data) - 8, generator.integers(1, 6)):
            if generator.random() < 0.5:
                data[place] = generator.integers(256)
            else:
                del data[place : place + generator.integers(1, 8)]
        try:
            load_plain(write(tmp_path / "damaged.pkl", bytes(data)))
        except RefusedPickle:
            refused += 1
    assert refused > 500


def test_every_instruction_is_known() -> None:
    """Whatever pickletools lists is either carried out or refused by name, never ignored."""
    reader = restricted_pickle._Reader(Path("x"), b"")
    for opcode in pickletools.opcodes:
        if opcode.name in ("STOP", "PROTO", "FRAME"):
            continue
        before = ([], [], {})
        reader.stack, reader.marked, reader.memo = [], [], {}
        try:
            reader.step(opcode.name, "a b" if opcode.name == "GLOBAL" else 0)
        except (RefusedPickle, *restricted_pickle._UNREADABLE, AttributeError):
            continue
        assert (reader.stack, reader.marked, reader.memo) != before, opcode.name
