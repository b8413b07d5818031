"""3D Gaussians as plain arrays, in the head's axes: what every splat file is written from and read into.

The head's axes are those of y-up formats (glTF's, SPZ's "RUB"): x towards the subject's left, y up, z out of the face,
metres. Files of the 3DGS family are y down instead; `turned` is the turn by 180 degrees about x between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SH_C0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""
MIN_OPACITY, MIN_SCALE = 1e-6, 1e-12
"""What has a finite logit and logarithm."""

# How each of the 16 real spherical harmonics up to degree 3, in 3DGS's order, changes under (x, y, z) -> (x, -y, -z).
_SH_TURN = np.array([1, -1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1], np.float32)


@dataclass(frozen=True)
class Splats:
    """N Gaussians as plain arrays, in the head's axes (y up).

    Attributes:
        means: [N,3] centres. quats: [N,4] unit, wxyz. scales: [N,3] standard deviations (linear).
        opacities: [N] in [0, 1]. sh: [N,16,3] spherical harmonics up to degree 3; colour is `SH + 0.5`.
    """

    means: NDArray[np.float32]
    quats: NDArray[np.float32]
    scales: NDArray[np.float32]
    opacities: NDArray[np.float32]
    sh: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.means)

    def checked(self) -> Splats:
        """These very Gaussians.

        Raises:
            ValueError: the arrays do not fit each other, or hold values that are not finite.
        """
        count = len(self)
        shapes = ((count, 3), (count, 4), (count, 3), (count,), (count, 16, 3))
        for field, shape in zip(fields(self), shapes, strict=True):
            array = getattr(self, field.name)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{field.name} has shape {array.shape} or is not finite; expected finite {shape}")
        return self

    def degree(self) -> int:
        """The least degree of harmonics that says the same."""
        used = np.flatnonzero((self.sh != 0).any((0, 2)))
        return int(np.sqrt(used[-1])) if len(used) else 0

    def turned(self) -> Splats:
        """The same Gaussians in axes turned by 180 degrees about x: y up becomes y down, and the other way."""
        w, x, y, z = np.moveaxis(np.asarray(self.quats, np.float64), -1, 0)
        # The product of (0, 1, 0, 0) and q; w is kept from going negative.
        quats = np.stack([-x, w, -z, y], -1)
        return Splats(
            np.asarray(self.means * np.array([1, -1, -1]), np.float32),
            np.asarray(quats * np.where(quats[:, :1] < 0, -1, 1), np.float32),
            self.scales,
            self.opacities,
            self.sh * _SH_TURN[:, None],
        )


def colors_to_sh(colors: NDArray[Any]) -> NDArray[np.float32]:
    """Colours [N,3] in [0, 1] as harmonics [N,16,3] of which only the constant one is not zero."""
    sh = np.zeros((len(colors), 16, 3), np.float32)
    sh[:, 0] = (colors - 0.5) / SH_C0
    return sh


def logits(opacities: NDArray[Any]) -> NDArray[np.float64]:
    """Of opacities in [0, 1], all finite."""
    inside = np.clip(opacities.astype(np.float64), MIN_OPACITY, 1 - MIN_OPACITY)
    return np.asarray(np.log(inside / (1 - inside)))
