"""Greedy non-maximum suppression with a fixed number of results (dual attention fusion, section 3.3)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype

# What a box is: the best of the highest rank is selected next.
TAKEN, NO_CANDIDATE, SUPPRESSED, FREE = -1, 0, 1, 2


def select_boxes(
    scores: Tensor, boxes: Tensor, candidates: Tensor, *, iou_threshold: float = 0.25, top: int = 3
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(scores.dtype)
    scores, boxes = scores.detach().to(dtype), boxes.detach().to(dtype)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    numbers = torch.arange(scores.shape[1], device=scores.device)
    ranks = torch.where(candidates & (scores > -torch.inf), FREE, NO_CANDIDATE)

    indices, valid = [], []
    for _ in range(top):
        rank = ranks.amax(dim=1, keepdim=True)
        eligible = ranks == rank
        highest = torch.where(eligible, scores, -torch.inf).amax(dim=1, keepdim=True)
        # The lowest index among equals.
        index = torch.where(eligible & (scores == highest), numbers, scores.shape[1]).amin(dim=1, keepdim=True)
        indices.append(index)
        valid.append(rank == FREE)

        selected = boxes.gather(1, index[..., None].expand(-1, 1, 4))
        close = _intersection_over_union(selected, boxes) > iou_threshold
        ranks = torch.where(close & (ranks == FREE), SUPPRESSED, ranks)
        ranks = torch.where(numbers == index, TAKEN, ranks)
    return torch.cat(indices, dim=1), torch.cat(valid, dim=1)


def _intersection_over_union(one: Tensor, boxes: Tensor) -> Tensor:
    """Of a box [N,1,4] of every image with all its boxes [N,A,4]; 0 where the union is."""
    width, height = (torch.minimum(one, boxes)[..., 2:] - torch.maximum(one, boxes)[..., :2]).clamp(min=0).unbind(-1)
    intersection = width * height
    union = _areas(one) + _areas(boxes) - intersection
    return intersection / torch.where(union == 0, 1.0, union)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
