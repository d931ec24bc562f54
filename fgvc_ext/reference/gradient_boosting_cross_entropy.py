"""Gradient-boosting cross-entropy (Sun et al., "Accounting for Subtle Differences between Similar Classes", 2020)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype
from .labels import look_at_labels_on_cpu, wrong_labels


def gradient_boosting_cross_entropy(
    scores: Tensor, target: Tensor, *, k: int = 15, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    classes = scores.shape[1]
    look_at_labels_on_cpu("gradient_boosting_cross_entropy", "target", target, classes, ignore_index)
    used = target != ignore_index
    wrong = wrong_labels(target, classes, ignore_index)
    labelled = used & ~wrong

    label = torch.where(labelled, target, 0)[:, None]
    own = torch.zeros_like(scores, dtype=torch.bool).scatter(1, label, True)
    values = scores.to(accumulation_dtype(scores.dtype))
    values = torch.where(used[:, None], values, 0.0)  # what is ignored must not reach the loss, NaN included
    values = values + torch.where(wrong, float("nan"), 0.0)[:, None].to(
        values.dtype
    )  # loss and gradient row become NaN
    kept = torch.ones_like(own)
    if k < classes - 1:
        negatives = values.detach().masked_fill(own, float("-inf"))
        threshold = negatives.topk(k, dim=1).values[:, -1:]  # t_k, eq. 10
        # Ties at t_k stay. A row with a NaN is kept whole, so that its loss and its gradients are NaN.
        kept = own | (negatives >= threshold) | values.isnan().any(dim=1, keepdim=True)
    losses = -values.masked_fill(~kept, float("-inf")).log_softmax(1).gather(1, label)[:, 0]  # eq. 12
    losses = torch.where(used, losses, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / used.sum()
