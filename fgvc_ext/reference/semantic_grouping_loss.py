"""Semantic grouping loss (deep bilinear transformation, used by dual attention fusion)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype, without_autocast

OFFSET = 1e-3  # added to every value: an all-zero channel has the constant direction
LENGTH_EPSILON = 1e-10  # added to the squared length of a channel


def loss_factor(channels: int) -> float:
    """k of the loss k · Σ_ij (co_ij − gt_ij)²."""
    return 1e-3 / (channels / 512) ** 2


def semantic_grouping_loss(features: Tensor, groups: int) -> Tensor:
    samples, channels = features.shape[:2]
    values = features.to(accumulation_dtype(features.dtype)).flatten(2) + OFFSET  # V
    squares = values.square().sum(2, keepdim=True) + LENGTH_EPSILON
    # A length that overflows has no direction: NaN, where dividing by infinity would give zeros.
    length = torch.where(squares.isinf(), torch.nan, squares).sqrt()
    directions = (values / length).transpose(0, 1).flatten(1)  # Z, [C,N·H·W]: the mean over samples is one product
    with without_autocast(features):
        correlation = directions @ directions.T / max(1, samples)
    group = torch.arange(channels, device=features.device) // (channels // groups)
    together = (group[:, None] == group).to(correlation.dtype)  # gt
    return loss_factor(channels) * (correlation - together).square().sum() * min(1, samples)
