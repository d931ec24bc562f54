"""Losses of part proposals (dual attention fusion, section 3.7.2): how much they overlap, and how large they are."""

from typing import NamedTuple

import torch
from torch import Tensor

from .accumulation import accumulation_dtype


class BoxLosses(NamedTuple):
    """What :func:`part_box_losses` returns."""

    overlap: Tensor
    area: Tensor


def part_box_losses(
    boxes: Tensor,
    valid: Tensor,
    object_area: Tensor,
    *,
    iou_weight: float = 2.0,
    parts: int = 4,
    min_area: float = 1024.0,
    area_mode: str = "two_sided",
    detach_denominator: bool = False,
) -> BoxLosses:
    dtype = accumulation_dtype(boxes.dtype)
    boxes = boxes.to(dtype)
    overlaps = iou_weight * _overlaps(boxes, valid, detach_denominator)
    size = (object_area.detach().to(dtype) / parts).clamp(min=min_area)  # S/N
    return BoxLosses(overlaps.sum() / max(1, boxes.shape[0]), _area_loss(boxes, valid, size, area_mode))


def _overlaps(boxes: Tensor, valid: Tensor, detach_denominator: bool) -> Tensor:
    """|A ∩ B| / (|A| + |B|), the mean over an image's pairs of valid boxes; 0 where there is none: [B]."""
    order = torch.arange(boxes.shape[1], device=boxes.device)
    pairs = valid[:, :, None] & valid[:, None] & (order[:, None] < order)
    # A pair that does not count is one of two empty boxes: no NaN of it reaches a gradient.
    a, b = (torch.where(pairs[..., None], one, 0.0) for one in (boxes[:, :, None], boxes[:, None]))
    width, height = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).relu().unbind(-1)
    total = _areas(a) + _areas(b)
    if detach_denominator:
        total = total.detach()
    overlaps = width * height / torch.where(total == 0, 1.0, total)
    return overlaps.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def _area_loss(boxes: Tensor, valid: Tensor, size: Tensor, mode: str) -> Tensor:
    ratios = _areas(torch.where(valid[..., None], boxes, 0.0)) / size[:, None]  # r
    if mode == "two_sided":
        distances = (ratios - 1).abs()
    elif mode == "hinge":
        distances = (ratios - 1).relu()
    else:
        empty = ratios == 0
        # Not only the result but also the logarithm's argument: zero times its infinite derivative is NaN.
        distances = torch.where(empty, float("inf"), torch.where(empty, 1.0, ratios).log().abs())
    means = torch.where(valid, distances, 0.0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return means.sum() / max(1, boxes.shape[0])


def _areas(boxes: Tensor) -> Tensor:
    """|B|; a box whose sides cross has none."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).relu().unbind(-1)
    return width * height
