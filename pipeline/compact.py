"""Which of an avatar's weights may be kept in 8 bits, by what that costs in its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.avatars import AvatarModel
from pipeline.quantise import pack, unpack

LEAST_VALUES = 2048
"""Smaller weights are left as they are: nothing is won by them."""


@dataclass(frozen=True)
class Choice:
    """Attributes:
    avatar: the avatar with these weights as they come back from 8 bits.
    names: the weights in 8 bits.
    refused: those that would have cost too much.
    loss_db: what it costs, as measured.
    """

    avatar: AvatarModel
    names: tuple[str, ...]
    refused: tuple[str, ...]
    loss_db: float


def quantised(avatar: AvatarModel, names: tuple[str, ...]) -> AvatarModel:
    """The avatar with these weights as they come back from 8 bits."""
    weights = {name: value.detach().cpu() for name, value in avatar.compact_weights().items()}
    device = next(avatar.buffers()).device
    found = type(avatar).restore(avatar.settings(), unpack(pack(weights, names), names))
    return found.to(device).requires_grad_(False).eval()


def choose_quantised(avatar: AvatarModel, loss_db: Callable[[AvatarModel], float], limit_db: float) -> Choice:
    """As many weights in 8 bits as cost no more than a limit together, the dearest left out one after another.

    Args:
        avatar: as saved.
        loss_db: what the pictures of such an avatar lose to the given one's; measured for every choice that is tried.
        limit_db: what they may lose.
    """
    names = [
        name for name, value in avatar.compact_weights().items()
        if value.is_floating_point() and value.numel() >= LEAST_VALUES
    ]  # fmt: skip
    refused: list[str] = []
    while True:
        candidate = quantised(avatar, tuple(names)) if names else avatar
        loss = loss_db(candidate) if names else 0.0
        if loss <= limit_db:
            return Choice(candidate, tuple(names), tuple(refused), loss)
        if not refused:
            alone = {name: loss_db(quantised(avatar, (name,))) for name in names}
            names.sort(key=lambda name: alone[name])
        refused.append(names.pop())
