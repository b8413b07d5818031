"""The perceptual loss of VGG16's features (Johnson et al. 2016), in plain torch. Its weights are an asset."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.lpips import load_weights, take_weight

ASSET = "vgg16"

# By block, (number in torchvision's `features`, output channels, input channels); a block's end is compared and pooled.
_BLOCKS = (
    ((0, 64, 3), (2, 64, 64)),
    ((5, 128, 64), (7, 128, 128)),
    ((10, 256, 128), (12, 256, 256), (14, 256, 256)),
    ((17, 512, 256), (19, 512, 512), (21, 512, 512)),
)
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualLoss:
    """Mean square difference of the features at the ends of four blocks (relu1_2, 2_2, 3_3, 4_3), added up."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Take the weights as torchvision names them.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        self._blocks = []
        for block in _BLOCKS:
            shapes = [(f"features.{number}", (out, into, 3, 3)) for number, out, into in block]
            self._blocks.append(
                [
                    (
                        take_weight(weights, f"{name}.weight", shape).to(device),
                        take_weight(weights, f"{name}.bias", shape[:1]).to(device),
                    )
                    for name, shape in shapes
                ]
            )

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """A scalar for a render and its truth [H,W,3] in [0,1]; the truth gets no gradient."""
        both = torch.stack([image, target.detach()]).permute(0, 3, 1, 2)
        x = (both - both.new_tensor(_MEAN)[:, None, None]) / both.new_tensor(_DEVIATION)[:, None, None]
        loss = x.new_zeros(())
        for i, block in enumerate(self._blocks):
            x = x if i == 0 else F.max_pool2d(x, 2)
            for weight, bias in block:
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            loss = loss + F.mse_loss(x[0], x[1])
        return loss


def load_perceptual(device: torch.device | str = "cpu") -> PerceptualLoss:
    """The loss with the weights of the asset cache; nothing is fetched here.

    Raises:
        StageError: the weights are not on this machine.
        UserError: they are not what they should be.
    """
    from pipeline.assets import asset_path

    path = asset_path(ASSET, fetch=False)
    try:
        return PerceptualLoss(load_weights(path), device)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The weights of VGG16 cannot be read: {error}.", f"fetch them again: headcast assets fetch {ASSET}"
        ) from None
