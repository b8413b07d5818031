"""Read a pickle that holds nothing but plain data and arrays; nothing in the file ever runs.

Head models are handed out as pickles, and a pickle is a program that Python's own reader obeys. This reader interprets
the pickle language itself (the instructions as `pickletools` documents them) and knows no way to import or call what a
file names: each of the few names it accepts stands for one fixed action below. It accepts what NumPy, scipy.sparse and
chumpy write for arrays, from Python 2 as well (text and bytes are Latin-1 there), and refuses the rest by name. What a
file may make the machine do is bounded: its size, the count of its instructions, the bytes that its arrays declare, the
depth of its nesting and the count of its values, references to the same value counted each time.
"""

from __future__ import annotations

import codecs
import io
import math
import pickletools
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MAX_FILE_BYTES = 512 << 20
MAX_ARRAY_BYTES = 1 << 30
MAX_INSTRUCTIONS = 100_000
MAX_DEPTH = 16
MAX_VALUES = 1_000_000
# Integers from here on can be made to collide in a dict, which then takes quadratic time.
MAX_KEY = 1 << 60

_NUMPY = ("numpy.core", "numpy._core")
_SPARSE = {
    (f"scipy.sparse.{module}", f"{kind}_matrix"): kind
    for kind in ("csc", "csr", "coo")
    for module in (kind, f"_{kind}")
}
_GLOBALS: dict[tuple[str, str], str] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{(f"{core}.multiarray", "_reconstruct"): "reconstruct" for core in _NUMPY},
    **{(f"{core}.multiarray", "scalar"): "scalar" for core in _NUMPY},
    **{(f"{core}.numeric", "_frombuffer"): "frombuffer" for core in _NUMPY},
    **_SPARSE,
    ("chumpy.ch", "Ch"): "chumpy",
    ("chumpy.reordering", "Select"): "chumpy",
    **{(module, "_reconstructor"): "reconstructor" for module in ("copy_reg", "copyreg")},
    **{(module, "object"): "object" for module in ("__builtin__", "builtins")},
    **{(module, "set"): "set" for module in ("__builtin__", "builtins")},
    **{(module, "bytes"): "bytes" for module in ("__builtin__", "builtins")},
    ("_codecs", "encode"): "encode",
}
_OBJECTS = ("csc", "csr", "coo", "chumpy")

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|[SU][0-9]{1,6}|O[48]?)")
_UNREADABLE = (ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error)


class RefusedPickle(UserError):
    """The file holds something other than plain data and arrays, or more of it than any honest file."""


@dataclass(frozen=True)
class _Token:
    """An accepted global: a name for one fixed action, never the thing itself."""

    action: str
    name: str


@dataclass(eq=False)
class _Holder:
    """An array, dtype, sparse matrix or chumpy array; most get their value from a state that comes later."""

    kind: str
    value: Any = None


@dataclass(frozen=True, eq=False)
class _ObjectArray:
    """An object array's shape, order and items, before the items are final."""

    shape: tuple[int, ...]
    order: str
    items: list[Any]


def load_plain(path: Path) -> Any:
    """The plain data in a pickle: dict, list, tuple, set, str, bytes, int, float, bool, None, and arrays.

    NumPy arrays and scalars come as they are (arrays read-only), scipy.sparse csc, csr and coo matrices as such, chumpy
    arrays as the NumPy array they hold.

    Raises:
        RefusedPickle: the file names any other global, or is damaged, or beyond a limit of this module.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise _refused(path, f"has {size / 2**20:.0f} MB, more than the {MAX_FILE_BYTES >> 20} MB that are read")
    return plain_data(path.read_bytes(), path)


def plain_data(pickled: bytes, path: Path) -> Any:
    """The plain data in a pickle that lies within another file, such as a zip of torch's; see `load_plain`.

    Args:
        pickled: its bytes, whose number is the caller's to limit.
        path: the file, for messages.

    Raises:
        RefusedPickle: as `load_plain`.
    """
    return _Reader(path, pickled).load()


def _refused(path: Path, why: str) -> RefusedPickle:
    return RefusedPickle(
        f"'{path}' is refused: it {why}.",
        "get the file again from its publisher; only plain data and arrays are read, and nothing in it was run",
    )


class _Reader:
    """One pass over a pickle's instructions."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.file = io.BytesIO(data)
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.array_bytes = 0

    def refused(self, why: str) -> RefusedPickle:
        return _refused(self.path, why)

    def load(self) -> Any:
        """Interpret the whole file."""
        try:
            for _ in range(MAX_INSTRUCTIONS):
                name, argument = self.instruction()
                if name == "STOP":
                    value = self.stack.pop()
                    if self.stack or self.marked:
                        raise self.refused("is damaged: it leaves values behind")
                    return _Resolver(self).resolve(value)
                self.step(name, argument)
        except _UNREADABLE as error:
            raise self.refused(f"is damaged or no pickle (byte {self.file.tell()}: {error})") from error
        raise self.refused(f"has more than {MAX_INSTRUCTIONS} instructions")

    def instruction(self) -> tuple[str, Any]:
        """The next instruction's name and argument."""
        code = self.file.read(1)
        opcode = _INSTRUCTIONS.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"no instruction {code!r}" if code else "the end is missing")
        if opcode.name == "STRING":
            # pickletools expects ASCII here; Python 2 wrote the bytes of arrays.
            line = self.file.readline().strip()
            if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
                raise ValueError("a string without quotes")
            return "STRING", codecs.escape_decode(line[1:-1])[0].decode("latin-1")
        return opcode.name, opcode.arg.reader(self.file) if opcode.arg else None

    def step(self, name: str, argument: Any) -> None:
        """Do one instruction."""
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name]())
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in ("POP_MARK", "LIST", "TUPLE", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS"):
            self.stack = self.marked.pop()
            self.gather(name, stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError("values are missing")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items = [stack.pop() for _ in range(count)][::-1]
            self.gather(name + "S", items)
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                self.stack = self.marked.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(self.token(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self.token(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif name == "NEWOBJ":
            arguments, kind = stack.pop(), stack.pop()
            stack.append(self.new(kind, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        elif name == "INST":
            raise self.refused(f"would make an object of {argument.replace(' ', '.')}")
        elif name in ("PERSID", "BINPERSID"):
            raise self.refused("refers to something outside itself (a persistent id)")
        elif name not in ("PROTO", "FRAME"):
            raise self.refused(f"uses {name}, which plain data does not need")

    def gather(self, name: str, items: list[Any]) -> None:
        """Put items into a new container, or into the one on top of the stack."""
        stack = self.stack
        if name == "LIST":
            stack.append(items)
        elif name == "TUPLE":
            stack.append(tuple(items))
        elif name == "FROZENSET":
            stack.append({self.key(item) for item in items})
        elif name == "DICT":
            stack.append({})
            self.gather("SETITEMS", items)
        elif name == "APPENDS":
            if type(stack[-1]) is not list:
                raise self.refused("appends to something that is no list")
            stack[-1].extend(items)
        elif name == "ADDITEMS":
            if type(stack[-1]) is not set:
                raise self.refused("adds to something that is no set")
            stack[-1].update(self.key(item) for item in items)
        elif name == "SETITEMS":
            if type(stack[-1]) is not dict:
                raise self.refused("sets items of something that is no dict")
            for key, value in zip(items[::2], items[1::2], strict=True):
                stack[-1][self.key(key)] = value

    def key(self, value: Any) -> Any:
        """A value that may be a key."""
        if value is not None and type(value) not in (str, bytes, bool, int, float):
            raise self.refused(f"has a {type(value).__name__.strip('_')} as a key")
        if type(value) in (int, float) and not abs(value) < MAX_KEY:
            raise self.refused("has a number as a key that is too large")
        return value

    def token(self, module: Any, name: Any) -> _Token:
        """The action that a global stands for."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name that is no text")
        action = _GLOBALS.get((module, name))
        if action is None:
            raise self.refused(f"names {module}.{name}, which is neither plain data nor an array")
        return _Token(action, f"{module}.{name}")

    def call(self, function: Any, arguments: Any) -> Any:
        """What a REDUCE of an accepted global gives; its arguments must be those that the writers write."""
        if not isinstance(function, _Token):
            raise self.refused(f"calls a {type(function).__name__.strip('_')}")
        match function.action, arguments:
            case "reconstruct", (_Token(action="ndarray"), (0,), "b" | b"b"):
                return _Holder("array")
            case "dtype", (str(code), bool() | 0 | 1, bool() | 0 | 1) if _DTYPE.fullmatch(code):
                return _Holder("dtype", np.dtype(code.replace("O8", "O").replace("O4", "O")))
            case "scalar", (_Holder(kind="dtype"), bytes() | str()):
                return self.array((), arguments[0], arguments[1], "C")[()]
            case "frombuffer", (bytes(), _Holder(kind="dtype"), tuple(shape), "C" | "F" | "A" as order):
                return _Holder("array", self.array(shape, arguments[1], arguments[0], "F" if order == "F" else "C"))
            case "frombuffer", (bytes(), _Holder(kind="dtype"), tuple(), str(), None):
                return self.call(function, arguments[:4])
            case "frombuffer", (bytes(), _Holder(kind="dtype"), tuple(shape), "K", tuple(axes)):
                return _Holder("array", self.array(shape, arguments[1], arguments[0], "C").transpose(axes))
            case "encode", (str(text), "latin1"):
                self.charge(len(text))
                return text.encode("latin-1")
            case "bytes", ():
                return b""
            case "set", (list(items),):
                return {self.key(item) for item in items}
            case "reconstructor", (_Token(action=action), _Token(action="object"), None) if action in _OBJECTS:
                return _Holder(action)
        raise self.refused(f"calls {function.name} in a way that arrays are not written")

    def new(self, kind: Any, arguments: Any) -> _Holder:
        """An empty sparse matrix or chumpy array."""
        if not (isinstance(kind, _Token) and kind.action in _OBJECTS and arguments == ()):
            raise self.refused(
                f"would make an object of {kind.name if isinstance(kind, _Token) else type(kind).__name__}"
            )
        return _Holder(kind.action)

    def build(self, holder: Any, state: Any) -> None:
        """Give an array, dtype, sparse matrix or chumpy array its state."""
        match holder, state:
            case _Holder(kind="array", value=None), (1, tuple(shape), _Holder(kind="dtype") as dtype, fortran, data):
                order = "F" if fortran else "C"
                if dtype.value.hasobject:
                    if type(data) is not list or len(data) != self.count(shape):
                        raise self.refused("has an object array whose items do not fill it")
                    holder.value = _ObjectArray(shape, order, data)
                else:
                    holder.value = self.array(shape, dtype, data, order)
            case _Holder(kind="dtype"), (3 | 4, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                if order in "<>":
                    holder.value = holder.value.newbyteorder(order)
            case _Holder(kind="csc" | "csr" | "coo", value=None), dict():
                holder.value = self.sparse(holder.kind, state)
            case _Holder(kind="chumpy", value=None), dict():
                holder.value = self.chumpy(state)
            case _:
                what = holder.kind if isinstance(holder, _Holder) else type(holder).__name__
                raise self.refused(f"sets the state of a {what.strip('_')} in a way that arrays are not written")

    def charge(self, size: int) -> None:
        """Count bytes that the file makes the machine hold."""
        self.array_bytes += size
        if self.array_bytes > MAX_ARRAY_BYTES:
            raise self.refused(f"declares arrays of more than {MAX_ARRAY_BYTES >> 20} MB")

    def count(self, shape: Sequence[Any]) -> int:
        """How many items a shape holds."""
        if len(shape) > 32 or not all(type(side) is int and 0 <= side < MAX_KEY for side in shape):
            raise self.refused("has an array of an impossible shape")
        return math.prod(shape)

    def array(self, shape: tuple[Any, ...], dtype: _Holder, data: Any, order: str) -> NDArray[Any]:
        """An array over the file's bytes."""
        if dtype.value.hasobject or not isinstance(data, (bytes, str)):
            raise self.refused("has an array without bytes of its own")
        size = self.count(shape) * dtype.value.itemsize
        self.charge(size)
        if len(data) != size:
            raise self.refused(f"has an array of shape {shape} that needs {size} bytes and has {len(data)}")
        content = data.encode("latin-1") if isinstance(data, str) else data
        values = np.frombuffer(content, dtype.value) if size else np.empty(shape, dtype.value)
        return values.reshape(shape, order="F" if order == "F" else "C")

    def values(self, item: Any) -> NDArray[Any]:
        """The array that an item of some state holds."""
        if isinstance(item, _Holder) and isinstance(item.value, np.ndarray):
            return item.value
        raise self.refused("has a matrix or chumpy array without arrays in it")

    def sparse(self, kind: str, state: dict[Any, Any]) -> Any:
        """A sparse matrix of its state."""
        from scipy import sparse

        shape = state.get("_shape", state.get("shape"))
        if type(shape) is not tuple or len(shape) != 2:
            raise self.refused("has a sparse matrix of an impossible shape")
        # Whoever reads it may ask for it dense.
        self.charge(self.count(shape) * 8)
        data = self.values(state["data"])
        if kind == "coo":
            places = state.get("coords") or (state.get("row"), state.get("col"))
            return sparse.coo_matrix((data, tuple(self.values(place) for place in places)), shape=shape)
        build: Callable[..., Any] = sparse.csc_matrix if kind == "csc" else sparse.csr_matrix
        matrix = build((data, self.values(state["indices"]), self.values(state["indptr"])), shape=shape)
        matrix.check_format(full_check=True)
        return matrix

    def chumpy(self, state: dict[Any, Any]) -> NDArray[Any]:
        """The array of a chumpy array, or what it selects of another by flat index."""
        if "x" in state:
            return self.values(state["x"])
        if "a" not in state or "idxs" not in state:
            raise self.refused("has a chumpy array that is neither an array nor a selection of one")
        indices = self.values(state["idxs"]).astype(np.int64)
        self.charge(indices.size * 8)
        chosen = self.values(state["a"]).ravel()[indices.ravel()]
        shape = state.get("preferred_shape")
        return chosen if shape is None else chosen.reshape(tuple(shape))


class _Resolver:
    """Turns what the instructions left into plain data, each value once; counts depth and values."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.done: dict[int, tuple[Any, int, int]] = {}
        """id -> what it becomes, how deep it nests, how many values it counts."""
        self.kept: list[Any] = []
        """Keeps the values alive, as their ids are in use."""

    def resolve(self, value: Any) -> Any:
        return self.visit(value, 0)[0]

    def visit(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, _Token):
            raise self.reader.refused(f"keeps {value.name} as if it were data")
        if not isinstance(value, (list, tuple, dict, set, _Holder)):
            return value, 0, 1
        found = self.done.get(id(value))
        # What is still being visited has infinite depth: a value that contains itself is too deep as well.
        below = found[1] if found else 0
        if depth + below >= MAX_DEPTH:
            raise self.reader.refused(f"nests values more than {MAX_DEPTH} deep")
        if found:
            return found
        self.kept.append(value)
        self.done[id(value)] = (None, MAX_DEPTH, 0)
        result = self.done[id(value)] = self.convert(value, depth)
        return result

    def convert(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, _Holder) and not isinstance(value.value, _ObjectArray):
            if value.kind == "dtype" or value.value is None:
                raise self.reader.refused(f"keeps an unfinished {value.kind} as if it were data")
            return value.value, 1, 1
        if isinstance(value, _Holder):
            children = value.value.items
        else:
            children = list(value.values()) if isinstance(value, dict) else list(value)
        visited = [self.visit(child, depth + 1) for child in children]
        height = 1 + max((below for _, below, _ in visited), default=0)
        count = 1 + sum(values for _, _, values in visited)
        if count > MAX_VALUES:
            raise self.reader.refused(f"holds more than {MAX_VALUES} values")
        items = [item for item, _, _ in visited]
        if isinstance(value, _Holder):
            array = np.empty(len(items), dtype=object)
            for index, item in enumerate(items):
                array[index] = item
            return array.reshape(value.value.shape, order=value.value.order), height, count
        if isinstance(value, dict):
            return dict(zip(value, items, strict=True)), height, count
        return type(value)(items), height, count


_INSTRUCTIONS = {opcode.code: opcode for opcode in pickletools.opcodes}
_PUSH_ARGUMENT = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_PUSH_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
