"""What a student of "dual attention fusion" learns from its parts and from its teacher (sections 3.4 to 3.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc_ext.reference.accumulation import accumulation_dtype


class Ranking(NamedTuple):
    """How well scores order the regions of an image."""

    loss: Tensor
    """[]."""
    active: Tensor
    """int64 []: the pairs that have a gradient."""
    comparable: Tensor
    """int64 []: the pairs of valid regions whose targets differ."""


def ranking_loss(scores: Tensor, targets: Tensor, valid: Tensor, margin: float = 1.0) -> Ranking:
    """Σ_i Σ_j [t_j > t_i] · max(0, margin − s_i + s_j), the mean over the images (NTS-Net's hinge).

    A region whose part is classified better than another's shall have a score higher by the margin.

    Args:
        scores: s [N,M].
        targets: t [N,M], the cross-entropy of each part image: constants, the smaller the better.
        valid: bool [N,M]; pairs with a region that is not valid do not count.
    """
    targets = targets.detach()
    pairs = (targets[:, None] > targets[:, :, None]) & valid[:, None] & valid[:, :, None]
    hinges = (margin - scores[:, :, None] + scores[:, None]).relu()
    # where, and not a product: a score of no region may be infinite
    loss = torch.where(pairs, hinges, 0.0).sum() / max(1, len(scores))
    return Ranking(loss, (pairs & (hinges > 0)).sum(), pairs.sum())


def part_targets(part_scores: Tensor, label: Tensor) -> Tensor:
    """The cross-entropy [N,M] of the scores [N,M,C] of part images with the labels [N], in float32; a constant."""
    repeated = label[:, None].expand(part_scores.shape[:2])
    return F.cross_entropy(_wide(part_scores.detach()).transpose(1, 2), repeated, reduction="none")


def mean_part_scores(part_scores: Tensor, valid: Tensor) -> Tensor:
    """F_logit [N,C]: the mean of the scores [N,M,C] over the valid parts; over all where none is."""
    weight = (valid | ~valid.any(dim=1, keepdim=True)).to(part_scores.dtype)[..., None]
    return (part_scores * weight).sum(1) / weight.sum(1)


class SoftTarget(NamedTuple):
    """Of a teacher's probabilities at a temperature T, times T²."""

    loss: Tensor
    """Cross-entropy: the gradient of the divergence, and never below the teacher's own entropy."""
    divergence: Tensor
    """The Kullback–Leibler divergence, which is 0 where student and teacher agree; a constant."""


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> SoftTarget:
    """−T² Σ_k softmax(z_t/T)_k · log softmax(z_s/T)_k of scores [N,C], the mean over the images, in float32.

    Only the student gets a gradient.
    """
    log_student = (_wide(student) / temperature).log_softmax(1)
    log_teacher = (_wide(teacher.detach()) / temperature).log_softmax(1)
    probabilities, scale = log_teacher.exp(), temperature**2 / max(1, len(student))
    loss = -scale * (probabilities * log_student).sum()
    entropy = -scale * (probabilities * log_teacher).sum()
    return SoftTarget(loss, (loss - entropy).detach())


class Hint(nn.Module):
    """FitNets' hint: ½ of the mean square between a student's map, brought to the teacher's width, and the teacher's.

    The regressor is a 1×1 convolution, BatchNorm and ReLU. The teacher gets no gradient.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Maps [N,C,h,w] of both → []."""
        difference = _wide(self.regressor(student)) - _wide(teacher.detach())
        return 0.5 * difference.square().sum() / max(1, difference.numel())


OCTAVES, BINS = 6, 96
"""The areas of boxes are counted in bins of log₂ of their ratio to the area that a part should have: so many, of the
same width, within so many octaves below and above 1."""


def area_counts(boxes: Tensor, valid: Tensor, target: Tensor) -> Tensor:
    """How many valid boxes [N,M,4] have an area of each bin (int64 [B]), relative to the target [N]: what adds up.

    The outer bins hold what lies beyond them too. A box without an area counts in the first, a NaN nowhere.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).detach().clamp(min=0)
    octaves = (sides[..., 0] * sides[..., 1] / target[:, None]).log2()
    bins = ((octaves + OCTAVES) * (BINS / (2 * OCTAVES))).clamp(0, BINS - 1).floor()
    numbers = torch.arange(BINS, device=boxes.device)
    return ((bins[..., None] == numbers) & valid[..., None]).sum(dim=(0, 1))


def area_quantiles(counts: Tensor, shares: Sequence[float]) -> list[float]:
    """The ratios of areas below which these shares of the counted boxes lie, by linear interpolation within a bin."""
    below = counts.double().cpu().cumsum(0) / counts.double().sum().cpu()
    below = torch.cat([torch.zeros(1, dtype=torch.float64), below])
    found = []
    for share in shares:
        number = max(0, int((below < share).sum()) - 1)
        within = (share - below[number]) / (below[number + 1] - below[number])
        found.append(float(2 ** ((number + within) * (2 * OCTAVES / BINS) - OCTAVES)))
    return found


def _wide(values: Tensor) -> Tensor:
    """In the dtype in which sums are computed: float32, of float64 that."""
    return values.to(accumulation_dtype(values.dtype))
