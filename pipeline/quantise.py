"""Tensors in 8 bits a value: blocks along a column, each with a range of its own.

A tensor becomes bytes of its shape and, beside them, the range of every block of 128 values: `name:low` and
`name:step`, so that a value is `low + step * byte`. What a table's column means differs from the next, so blocks run
along the columns of tensors whose last axis is short.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

BLOCK = 128
LONGEST_TABLE = 16
"""Tensors of a last axis of at most so many are tables: a column is a thing of its own."""


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes in the tensor's shape, and the blocks' lowest values and steps, float32 [ceil(values / 128)].

    A value comes back within half a step; a block of equal values comes back as it was.
    """
    columns = _columns(tensor.float())
    blocks = torch.nn.functional.pad(columns.flatten(), (0, -columns.numel() % BLOCK)).view(-1, BLOCK)
    if columns.numel() % BLOCK:
        blocks[-1, columns.numel() % BLOCK :] = blocks[-1, 0]
    low = blocks.amin(1)
    step = (blocks.amax(1) - low) / 255
    values = ((blocks - low[:, None]) / step.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(0, 255)
    flat = values.to(torch.uint8).flatten()[: columns.numel()].view(columns.shape)
    return _rows(flat, tensor.shape), low, step


def dequantise(values: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """The float32 tensor that `quantise` got, as near as it comes back.

    Raises:
        ValueError: these do not belong together.
    """
    blocks = -(-values.numel() // BLOCK)
    if values.dtype != torch.uint8 or low.shape != (blocks,) or step.shape != (blocks,):
        raise ValueError(f"{values.numel()} {values.dtype} values with ranges {list(low.shape)}, {list(step.shape)}")
    columns = _columns(values)
    low, step = (
        range_.float().repeat_interleave(BLOCK)[: values.numel()].view(columns.shape) for range_ in (low, step)
    )
    return _rows(low + step * columns, values.shape)


def pack(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Weights with those of these names in 8 bits."""
    packed = {name: value for name, value in weights.items() if name not in names}
    for name in names:
        packed[name], packed[f"{name}:low"], packed[f"{name}:step"] = quantise(weights[name])
    return packed


def unpack(weights: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """What `pack` was given, as near as it comes back.

    Raises:
        KeyError: there is no such weight.
        ValueError: its parts do not belong together.
    """
    unpacked = dict(weights)
    for name in names:
        unpacked[name] = dequantise(*(unpacked.pop(key) for key in (name, f"{name}:low", f"{name}:step")))
    return unpacked


def _is_table(shape: torch.Size) -> bool:
    return len(shape) > 1 and shape[-1] <= LONGEST_TABLE


def _columns(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 0) if _is_table(tensor.shape) else tensor


def _rows(columns: Tensor, shape: torch.Size) -> Tensor:
    return columns.movedim(0, -1) if _is_table(shape) else columns
