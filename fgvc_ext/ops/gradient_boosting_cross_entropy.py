"""Gradient-boosting cross-entropy (Sun et al., "Accounting for Subtle Differences between Similar Classes", 2020)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import check_labels, use_kernel
from ..reference.labels import look_at_labels
from ._checks import check_int, check_labels_shape, check_tensor
from ._operator import Operator, backward_operator

OP = "gradient_boosting_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")  # their numbers in the operator's schema


def gradient_boosting_cross_entropy(
    scores: Tensor, target: Tensor, *, k: int = 15, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Cross-entropy over the true class and its ``k`` most confusing rivals.

    With t the k-th highest negative score of a sample and J' the negatives with score ≥ t (all ties count):
    ``loss = −s_l + log(exp(s_l) + Σ_{J'} exp(s_i))`` (eq. 10, 12). For k ≥ C − 1 it is exactly cross-entropy.

    Args:
        scores: [N,C], float32, float64, bfloat16 or float16, any strides.
        target: [N], int64 in [0, C), or ``ignore_index``.
        k: how many negatives, at least 1. The paper uses 15.
        reduction: "mean" over the samples that are not ignored, "sum" or "none".
        ignore_index: samples with this target have loss 0 and no gradient.

    Returns:
        [] (or [N] for "none"), float32 (float64 for float64). The mean of no sample is NaN, as in torch.

    Gradient:
        to ``scores`` (eq. 14): the softmax over {l} ∪ J', minus one at l, zero elsewhere. Saved for backward:
        ``scores``, ``target`` and four numbers per sample. No second backward.

    NaN in a row of scores gives a NaN loss. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
        IndexError: on the CPU, a target outside [0, C). On CUDA its loss and gradient row are NaN, and
            FGVC_EXT_CHECK=1 turns that into the error.
    """
    check_tensor(OP, "scores", scores, "[N,C]")
    check_labels_shape(OP, "target", target, "scores", scores)
    classes = scores.shape[1]
    if classes == 0:
        raise ValueError(f"{OP}: scores must have at least one class, got {list(scores.shape)}")
    k = check_int(OP, "k", k, least=1)
    ignore_index = check_int(OP, "ignore_index", ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if check_labels() and not scores.is_cpu and not torch.compiler.is_compiling():
        look_at_labels(OP, "target", target, classes, ignore_index)
    if not use_kernel(OP, scores):
        return reference.gradient_boosting_cross_entropy(
            scores, target, k=k, reduction=reduction, ignore_index=ignore_index
        )
    return _gradient_boosting(scores, target, k, REDUCTIONS.index(reduction), ignore_index)[0]


def _fake(scores: Tensor, target: Tensor, k: int, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    samples = scores.shape[0]
    loss = scores.new_empty((samples,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    return loss, scores.new_empty((4, samples), dtype=dtype)


def _fake_backward(grad: Tensor, scores: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, target, *_ = inputs
    _, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, target, rows)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    scores = None if grad is None else _gradient_boosting_backward(grad, *ctx.saved_tensors)
    return scores, None, None, None, None


_gradient_boosting = Operator(OP, _fake, _setup_context, _backward)
_gradient_boosting_backward = backward_operator(OP, _fake_backward)
