"""The two attention maps of "dual attention fusion" as masks: what is object, what lies in the boxes of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc_ext.reference.accumulation import accumulation_dtype

PartAttention = Literal["pooled", "learnable", "off"]
"""The part attention filter: the mean of the saliency mask over a cell, a learnt function of that mean, or none."""


class Foreground(NamedTuple):
    """What of an image is object."""

    mask: Tensor
    """bool [N,H,W]."""
    area: Tensor
    """S, its number of pixels: [N], float32 or, of a float64 heat map, float64."""
    fallback: Tensor
    """bool [N]: the heat map never reached the threshold, so that a lower one was taken."""


@torch.no_grad()
def foreground(heat: Tensor, threshold: float = 0.5) -> Foreground:
    """Where a location heat map [N,1,H,W] is at least the threshold: two of three levels agree at 0.5.

    Where it is so nowhere, all of it that is above 0; where that is nowhere too, the whole image. NaN is background.
    """
    levels = heat[:, 0]
    mask, some = levels >= threshold, levels > 0
    fallback, nothing = ~mask.any(dim=(1, 2)), ~some.any(dim=(1, 2))
    mask = torch.where(fallback[:, None, None], some | nothing[:, None, None], mask)
    return Foreground(mask, mask.sum(dim=(1, 2)).to(accumulation_dtype(heat.dtype)), fallback)


@torch.no_grad()
def box_union(boxes: Tensor, image_size: Sequence[int]) -> Tensor:
    """The pixels whose centre lies in one of the boxes [N,M,4]: 1 there and 0 elsewhere, float32 [N,1,H,W]."""
    low_x, low_y, high_x, high_y = boxes[..., None].unbind(2)
    y = torch.arange(image_size[0], device=boxes.device) + 0.5
    x = torch.arange(image_size[1], device=boxes.device) + 0.5
    rows, columns = (low_y <= y) & (y < high_y), (low_x <= x) & (x < high_x)
    return (rows[..., None] & columns[:, :, None]).any(dim=1, keepdim=True).float()


class PartAttentionFilter(nn.Module):
    """Weakens feature maps outside the parts: F · P, P being the share of a cell that lies in a box.

    After a convolution 1×1 without a bias and before its BatchNorm this is the same as before the convolution.

    Args:
        kind: "pooled": P itself. "learnable": sigmoid(w · P + b). "off": features are left as they are.
        floor: what is left of features outside the parts: F · (floor + (1 − floor) · P).

    Raises:
        ValueError: another kind, or a floor outside [0,1].
    """

    def __init__(self, kind: PartAttention = "pooled", floor: float = 0.0) -> None:
        super().__init__()
        if kind not in get_args(PartAttention) or not 0 <= floor <= 1:
            raise ValueError(
                f"PartAttentionFilter: expected one of {', '.join(get_args(PartAttention))} and a floor from 0 to 1, "
                f"got {kind!r} and {floor}"
            )
        self.kind, self.floor = kind, floor
        self.learnt: nn.Conv2d | None = None
        if kind == "learnable":  # it starts near the share itself: 0.02 outside the parts, 0.98 within
            self.learnt = nn.Conv2d(1, 1, 1)
            nn.init.constant_(self.learnt.weight, 8.0)
            nn.init.constant_(self.learnt.bias, -4.0)  # type: ignore[arg-type]

    def share(self, saliency: Tensor, size: Sequence[int]) -> Tensor:
        """What features of this height and width are multiplied by: [N,1,h,w], of a mask [N,1,H,W]."""
        pooled = F.adaptive_avg_pool2d(saliency, (size[0], size[1]))
        if self.learnt is not None:
            pooled = self.learnt(pooled.to(self.learnt.weight.dtype)).sigmoid()
        return self.floor + (1 - self.floor) * pooled

    def forward(self, features: Tensor, saliency: Tensor) -> Tensor:
        """features [N,C,h,w] and the mask [N,1,H,W] → [N,C,h,w] in the features' dtype."""
        if self.kind == "off":
            return features
        return features * self.share(saliency, features.shape[-2:]).to(features.dtype)
