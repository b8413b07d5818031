"""The border: another project's files read key by key, each with its shape, so that what is wrong is named.

A message says the file, the frame, the key, what is there and what was expected.
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads.flame import Flame
    from pipeline.interchange.recording import FlameTrack, Recording

    Floats = NDArray[np.float64]

MAX_JSON_BYTES = 512 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20
MAX_FRAMES = 100_000
NOT_RIGID = 1e-3
"""How far R'R of a rotation may be from the identity: files hold six digits and fewer."""
FIX = "mend the file, or make the dataset again with its own tools"


class Document:
    """An object of a file, taken from key by key; what nobody took is `rest`.

    Attributes:
        values: the object.
        where: the file, and the frame where it is one's, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._taken: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def wrong(self, what: str) -> UserError:
        """An error that says where."""
        return UserError(f"{self.where}: {what}.", FIX)

    def raw(self, key: str) -> Any:
        """A value as it stands.

        Raises:
            UserError: it is missing.
        """
        self._taken.add(key)
        if key not in self.values:
            near = did_you_mean(key, self.values)
            raise self.wrong(f"'{key}' is missing" + (f" ({near})" if near else ""))
        return self.values[key]

    def take(self, key: str, shape: tuple[int | None, ...] = ()) -> Floats:
        """Finite numbers of this shape (None: any length), as float64.

        Raises:
            UserError: missing, no numbers, another shape, or not finite.
        """
        return numbers(self.raw(key), shape, f"{self.where}: '{key}'")

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        """One finite number in [low, high].

        Raises:
            UserError: as `take`, or out of range.
        """
        value = float(self.take(key))
        if not low <= value <= high:
            raise self.wrong(f"'{key}' is {value:g}, not within {low:g} and {high:g}")
        return value

    def integer(self, key: str, low: int = 0, high: int = 2**31 - 1) -> int:
        """One whole number in [low, high].

        Raises:
            UserError: as `number`, or not whole.
        """
        value = self.number(key, low, high)
        if value != int(value):
            raise self.wrong(f"'{key}' is {value:g}, not a whole number")
        return int(value)

    def text(self, key: str) -> str:
        """A text.

        Raises:
            UserError: missing, or no text.
        """
        value = self.raw(key)
        if not isinstance(value, str):
            raise self.wrong(f"'{key}' is {_kind(value)}, not a text")
        return value

    def pose(self, key: str, rows: int = 4) -> Floats:
        """A rigid transform [4, 4] from a matrix of 3 or 4 rows.

        Raises:
            UserError: as `take`; its rotation is none, or mirrors; or its last row is not 0 0 0 1.
        """
        matrix = self.take(key, (rows, 4))
        where = f"{self.where}: '{key}'"
        if rows == 4 and np.abs(matrix[3] - (0, 0, 0, 1)).max() > 1e-6:
            raise UserError(f"{where} has the last row {matrix[3].tolist()}, expected [0, 0, 0, 1].", FIX)
        check_rotation(matrix[:3, :3], where)
        return np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]])

    def items(self, key: str) -> list[Document]:
        """A list of objects, such as the frames, each with its place in `where`.

        Raises:
            UserError: missing, no list, empty, too long, or an item is no object.
        """
        value = self.raw(key)
        if not isinstance(value, list) or not value:
            raise self.wrong(f"'{key}' is {_kind(value) if not isinstance(value, list) else 'empty'}, expected a list")
        if len(value) > MAX_FRAMES:
            raise self.wrong(f"'{key}' has {len(value):,} items; at most {MAX_FRAMES:,} are read")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise self.wrong(f"'{key}'[{index}] is {_kind(item)}, expected an object")
        return [Document(item, f"{self.where}, {key}[{index}]") for index, item in enumerate(value)]

    def rest(self) -> dict[str, Any]:
        """The keys that nobody asked for, as they stand.

        Raises:
            UserError: one holds a NaN or an infinity, which JSON has not: they could not be written back.
        """
        found = {key: value for key, value in self.values.items() if key not in self._taken}
        for key, value in found.items():
            if _holds_no_number(value):
                raise self.wrong(f"'{key}' holds values that are no numbers (NaN or infinite)")
        return found


class Folder:
    """A dataset's folder: files are named relative to it and never leave it.

    Attributes:
        root: the folder.
        used: paths, with '/', of every file that was asked for, in order.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = root.resolve()
        self.used: dict[str, None] = {}

    def has(self, name: str) -> bool:
        """Whether there is such a file inside."""
        path = self.root / name
        return path.is_file() and path.resolve().is_relative_to(self._real)

    def file(self, name: str, where: str = "") -> Path:
        """A file of the dataset.

        Args:
            name: relative, as the dataset has it.
            where: what names it, for messages.

        Raises:
            UserError: it climbs out of the folder, or is not there.
        """
        told = f"{where}: " if where else ""
        pure = PurePosixPath(name)
        climbs = pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive or "\\" in name or "\0" in name
        if climbs or not (self.root / name).resolve().is_relative_to(self._real):
            raise UserError(f"{told}'{name[:120]}' leads out of the dataset's folder.", "name files inside it")
        if not (self.root / name).is_file():
            raise UserError(f"{told}there is no file '{name[:120]}' in '{self.root}'.", "complete the dataset")
        self.used[str(pure)] = None
        return self.root / name

    def json(self, name: str) -> Document:
        """A JSON object.

        Raises:
            UserError: missing, too large, no JSON, or no object.
        """
        path = self.file(name)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"'{path}' has more than {MAX_JSON_BYTES >> 20} MB.", FIX)
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' is no JSON: {error}.", FIX) from None
        if not isinstance(values, dict):
            raise UserError(f"'{path}' holds {_kind(values)}, expected an object.", FIX)
        return Document(values, f"'{name}'")

    def npz(self, name: str, where: str = "") -> Document:
        """The arrays of an `.npz`; pickled ones are refused, as is more than can be meant.

        Raises:
            UserError: missing, damaged, too large, or not plain arrays.
        """
        path = self.file(name, where)
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_ARRAY_BYTES:
                    raise ValueError(f"its arrays have more than {MAX_ARRAY_BYTES >> 20} MB")
            with np.load(path, allow_pickle=False) as file:
                values = {key: file[key] for key in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError, NotImplementedError) as error:
            raise UserError(f"'{name}' cannot be read: {error}.", FIX) from None
        return Document(values, f"'{name}'")

    def picture_size(self, name: str, where: str) -> tuple[int, int]:
        """Width and height that a picture's header says.

        Raises:
            UserError: missing, or no picture.
        """
        from PIL import Image

        path = self.file(name, where)
        try:
            with Image.open(path) as image:
                return image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{where}: '{name}' is no picture: {error}.", "complete the dataset") from None


def numbers(value: Any, shape: tuple[int | None, ...], where: str) -> Floats:
    """A value as finite numbers of this shape (None: any length), float64.

    Raises:
        UserError: it is none of that.
    """
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{where} is ragged, expected numbers of shape {_shape(shape)}.", FIX) from None
    if array.dtype.kind not in "iuf":
        raise UserError(f"{where} is {_kind(value)}, expected numbers of shape {_shape(shape)}.", FIX)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits:
        raise UserError(f"{where} has shape {_shape(array.shape)}, expected {_shape(shape)}.", FIX)
    found = array.astype(np.float64)
    if not np.isfinite(found).all():
        raise UserError(f"{where} holds values that are no numbers (NaN or infinite).", FIX)
    return found


def check_rotation(matrix: Floats, where: str) -> None:
    """See that [3, 3] is a rotation.

    Raises:
        UserError: it mirrors, or is no rotation.
    """
    if np.linalg.det(matrix) < 0:
        raise UserError(
            f"{where} mirrors: the determinant of its rotation is {np.linalg.det(matrix):.3f}, not +1.",
            "its tool flipped one axis only; flip two, or none",
        )
    off = float(np.abs(matrix.T @ matrix - np.eye(3)).max())
    if off > NOT_RIGID:
        raise UserError(f"{where} is no rotation: its axes are off by {off:.2g} (unit length, right angles).", FIX)


def check_pictures(
    folder: Folder, names: Sequence[str], size: tuple[int, int], where: Sequence[str], what: str
) -> None:
    """See that pictures are there and have this size.

    Args:
        folder: the dataset.
        names: of the pictures.
        size: (width, height).
        where: what names each, for messages.
        what: what they are, such as "image" or "mask".

    Raises:
        UserError: the first that is missing, none, or of another size.
    """
    for name, place in zip(names, where, strict=True):
        found = folder.picture_size(name, place)
        if found != size:
            raise UserError(
                f"{place}: the {what} '{name}' is {found[0]}x{found[1]}, expected {size[0]}x{size[1]}.",
                "all pictures of a dataset have the size that its camera says",
            )


def flame_of(
    recording: Recording, flame: Flame | None, layout: str, version: str, shapes: int, expressions: int
) -> tuple[FlameTrack, Flame]:
    """FLAME's parameters and model where a layout can hold them.

    Args:
        recording: to be written.
        flame: the one that its numbers belong to.
        layout: whose, such as "VHAP".
        version: the FLAME that its programs read.
        shapes, expressions: how many coefficients it holds.

    Raises:
        UserError: there are none, of another version, or too many.
    """
    from pipeline.heads import head_file

    track = recording.flame
    if track is None or flame is None:
        what = f"{layout}'s layout holds FLAME's parameters, and there are none without FLAME."
        raise UserError(what, head_file(version).missing())
    if track.version != flame.name:
        raise UserError(f"The recording's numbers belong to {track.version}, not to {flame.name}.", "refit them first")
    if len(track.shape) > shapes or track.expression.shape[1] > expressions:
        raise UserError(
            f"{layout}'s layout holds {shapes} shape and {expressions} expression coefficients of FLAME, "
            f"not {len(track.shape)} and {track.expression.shape[1]}.",
            "refit them on the vertices: cut off they would show another face",
        )
    return track, flame


def rising(values: Sequence[int], where: str) -> Iterator[int]:
    """The order in which numbers rise.

    Raises:
        UserError: one comes twice.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    for before, after in itertools.pairwise(order):
        if values[before] == values[after]:
            raise UserError(f"{where}: frame {values[after]} comes twice.", FIX)
    return iter(order)


def _holds_no_number(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_no_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


def _shape(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if side is None else str(side) for side in shape) + "]" if shape else "[] (one number)"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
