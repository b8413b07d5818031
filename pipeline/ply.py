"""3D Gaussians in the PLY layout that Inria's 3DGS introduced and every splat viewer reads.

62 float columns: `x y z nx ny nz f_dc_0..2 f_rest_0..44 opacity scale_0..2 rot_0..3`, binary little endian. Opacity is
a logit, scales are logarithms, rotations wxyz; `f_rest` runs over a channel's 15 coefficients first. The axes of such
files are those of a camera, y down; ours are the head's, y up: `Splats.turned` lies between them.

A file to read may come from anywhere: its header, sizes and values are checked before they are used.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.errors import UserError
from pipeline.splats import MIN_SCALE, Splats, logits

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *(f"f_dc_{i}" for i in range(3)),
    *(f"f_rest_{i}" for i in range(45)),
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)
MAX_HEADER_BYTES = 65_536
MAX_GAUSSIANS = 50_000_000

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("int", "int32"), "<i4"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
}


def write_ply(path: Path, splats: Splats, degree: int = 3) -> None:
    """Write Gaussians by temporary file and rename. Equal Gaussians give equal bytes.

    Args:
        path: of the file.
        splats: what to write.
        degree: of the harmonics that get columns; with 3, as the standard has it, there are 62 columns, with 0 there
            are 17.

    Raises:
        ValueError: the arrays do not fit each other, or hold values that are not finite.
    """
    count, turned = len(splats), splats.checked().turned()
    table = np.zeros((count, len(COLUMNS)), "<f4")
    table[:, 0:3] = turned.means
    table[:, 6:9] = turned.sh[:, 0]
    table[:, 9:54] = turned.sh[:, 1:].transpose(0, 2, 1).reshape(count, 45)
    table[:, 54] = logits(turned.opacities)
    table[:, 55:58] = np.log(np.maximum(turned.scales, MIN_SCALE))
    table[:, 58:62] = turned.quats
    rest = (degree + 1) ** 2 - 1
    left_out = [f"f_rest_{i}" for i in range(3 * rest, 45)]
    names = [name for name in COLUMNS if name not in left_out]
    if left_out:
        harmonics = table[:, 9:54].reshape(count, 3, 15)[..., :rest].reshape(count, 3 * rest)
        table = np.concatenate([table[:, :9], harmonics, table[:, 54:]], 1)
    header = ["ply", "format binary_little_endian 1.0", "comment headcast; axes x right, y down, z forward; metres"]
    header += [f"element vertex {count}", *(f"property float {name}" for name in names), "end_header", ""]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write("\n".join(header).encode())
            file.write(table.tobytes())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_ply(path: Path) -> Splats:
    """Read Gaussians of SH degree 0 to 3; columns may stand in any order, unknown ones are passed over.

    Raises:
        UserError: the file cannot be read, is no 3DGS PLY, is cut short or padded, or holds values that make no sense.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            count, layout = _read_header(file)
            expected = file.tell() + count * layout.itemsize
            if size != expected:
                raise ValueError(f"it has {size} bytes where its header promises {expected}")
            table = np.frombuffer(file.read(count * layout.itemsize), layout)
        if len(table) != count:
            raise ValueError("it ends early")
        return _splats(table)
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or error}.", "check the path") from None
    except ValueError as error:
        raise UserError(
            f"'{path}' is not a 3DGS PLY that can be read: {error}.",
            "export it again; headcast reads binary little-endian files of 3D Gaussians",
        ) from None


def _read_header(file: BinaryIO) -> tuple[int, np.dtype[Any]]:
    """Number of rows, and the layout of one. Leaves the file at the first row."""
    lines: list[str] = []
    left = MAX_HEADER_BYTES
    while not lines or lines[-1] != "end_header":
        raw = file.readline(left)
        left -= len(raw)
        if not raw.endswith(b"\n"):
            raise ValueError("its header has no end" if lines else "it does not begin with 'ply'")
        lines.append(raw.decode("ascii", "strict").rstrip("\r\n") if raw.isascii() else "")
        if lines[0] != "ply":
            raise ValueError("it does not begin with 'ply'")
    statements = [line.split() for line in lines[1:-1] if line.split()[:1] not in (["comment"], ["obj_info"])]
    if statements[:1] != [["format", "binary_little_endian", "1.0"]]:
        raise ValueError("its format is not 'binary_little_endian 1.0'")
    if len(statements) < 2 or statements[1][:2] != ["element", "vertex"] or len(statements[1]) != 3:
        raise ValueError("its first element is not 'vertex'")
    number = statements[1][2]
    if not re.fullmatch(r"[0-9]{1,10}", number) or int(number) > MAX_GAUSSIANS:
        raise ValueError(f"its number of Gaussians, '{number[:20]}', is not one from 0 to {MAX_GAUSSIANS}")
    fields: dict[str, str] = {}
    for words in statements[2:]:
        if len(words) != 3 or words[0] != "property" or words[1] not in _TYPES:
            raise ValueError(f"its header has '{' '.join(words)[:60]}' where a plain property belongs")
        if words[2] in fields:
            raise ValueError(f"its column '{words[2][:40]}' stands there twice")
        fields[words[2]] = _TYPES[words[1]]
    return int(number), np.dtype(list(fields.items()))


def _splats(table: NDArray[Any]) -> Splats:
    """Check the values and turn them into ours."""
    names = set(table.dtype.names or ())
    rest = sum(f"f_rest_{i}" in names for i in range(45))
    wanted = [name for name in COLUMNS if name not in ("nx", "ny", "nz") and not name.startswith("f_rest_")]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"it has no column '{missing[0]}'")
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in names for i in range(rest)):
        raise ValueError(f"its {rest} 'f_rest' columns are not those of SH degree 0, 1, 2 or 3")

    def take(*columns: str) -> NDArray[np.float32]:
        values = np.stack([table[name].astype(np.float32) for name in columns], -1)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"column '{columns[bad[0][1]]}' of Gaussian {bad[0][0]} is not finite")
        return values

    with np.errstate(over="ignore"):
        scales = np.exp(take("scale_0", "scale_1", "scale_2"))
        opacities = np.asarray(1 / (1 + np.exp(-take("opacity")[:, 0])), np.float32)
    quats = take("rot_0", "rot_1", "rot_2", "rot_3")
    lengths = np.linalg.norm(quats, axis=-1, keepdims=True)
    for name, fine in (("scale", np.isfinite(scales)), ("rotation", (lengths > 1e-12) & np.isfinite(lengths))):
        bad = np.flatnonzero(~fine.all(-1))
        if len(bad):
            raise ValueError(f"the {name} of Gaussian {bad[0]} makes no sense")
    sh = np.zeros((len(table), 16, 3), np.float32)
    sh[:, 0] = take("f_dc_0", "f_dc_1", "f_dc_2")
    if rest:
        values = take(*(f"f_rest_{i}" for i in range(rest)))
        sh[:, 1 : 1 + rest // 3] = values.reshape(len(table), 3, rest // 3).transpose(0, 2, 1)
    return Splats(
        take("x", "y", "z"), np.asarray(quats / lengths, np.float32), np.asarray(scales, np.float32), opacities, sh
    ).turned()
