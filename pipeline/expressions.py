"""What an avatar's coefficients are: ARKit's 52, from 0 to 1, or a basis of an imported dataset's own, of any range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.heads import EXPRESSIONS

if TYPE_CHECKING:
    from torch import Tensor

ARKIT = "ARKit's 52 expressions"


def is_arkit(names: Sequence[str]) -> bool:
    """Whether all of ARKit's expressions are among these coefficients."""
    return set(EXPRESSIONS) <= set(names)


def basis_of(names: Sequence[str]) -> str:
    """In words what coefficients of these names are; a dataset's own have the basis before a slash."""
    bases = list(dict.fromkeys(name.partition("/")[0] for name in names if "/" in name))
    if bases:
        return " and ".join(bases)
    return ARKIT if is_arkit(names) else "coefficients of its own"


def need_arkit(names: Sequence[str], what: str) -> None:
    """Refuse what only ARKit's expressions can do.

    Args:
        names: of the avatar's coefficients.
        what: needs them; it begins a sentence's second half, such as "driving it from a webcam".

    Raises:
        UserError: the avatar has others.
    """
    if not is_arkit(names):
        raise UserError(
            f"The avatar is driven by {basis_of(names)}; {what} needs {ARKIT}.",
            "use an avatar of a filmed clip for that, made with: headcast run VIDEO",
        )


def ranges_of(names: Sequence[str], expression: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest plausible coefficients [E]: 0 and 1 of named expressions, of others what [T,E] shows."""
    import torch

    own = torch.tensor(["/" in name for name in names], device=expression.device)
    zeros = torch.zeros_like(expression[0])
    return torch.where(own, expression.amin(0), zeros), torch.where(own, expression.amax(0), zeros + 1)
