"""Semantic grouping loss (deep bilinear transformation, used by dual attention fusion)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ..reference.accumulation import accumulation_dtype
from ._checks import check_positions, check_tensor
from ._operator import Operator, backward_operator
from .group_bilinear import check_groups

OP = "semantic_grouping_loss"


def semantic_grouping_loss(features: Tensor, groups: int) -> Tensor:
    """How far channels are from responding at the same places within their group and at others outside.

    With V = features + 1e-3 and ``Z[b, c] = V[b, c] / sqrt(Σ V[b, c]² + 1e-10)`` over the H·W positions of a map,
    ``co_ij = (1/N) Σ_b <Z[b, i], Z[b, j]>``, and gt_ij = 1 where i and j are in one of the ``groups`` of C/groups
    neighbouring channels, else 0: ``loss = 1e-3 / (C/512)² · Σ_ij (co_ij − gt_ij)²``. The loss of the deep bilinear
    transformation (Zheng et al., 2019), with the real number of samples. A perfect grouping has 0; the loss of maps
    that all are equal is near 250.

    Args:
        features: [N,C,H,W], H·W < 2³¹, after a ReLU; float32, float64, bfloat16 or float16; contiguous, channels_last
            or any strides.
        groups: a divisor of C.

    Returns:
        [] in float32 (float64 for float64).

    Gradient:
        to ``features`` (in its dense layout). With R = co − gt and k the factor above, dZ_b = (4k/N) · R Z_b, and that
        of V is ``(dZ − Z <Z, dZ>) / sqrt(Σ V² + 1e-10)`` for each map. Saved for backward: ``features`` and R, [C,C]
        in the dtype of the loss. No second backward.

    An all-zero map is a constant one, and its gradient is finite. A NaN, an infinity, or values so large that their
    squares overflow give a NaN loss. It is no mean over samples: the loss of a batch is not that of its parts. N = 0
    gives a loss of 0. The same bits on every run and, on the CPU, for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape, C, H or W of 0, or groups that do not divide C.
    """
    check_tensor(OP, "features", features, "[N,C,H,W]")
    check_groups(OP, features, groups)
    check_positions(OP, "features", features)
    if not use_kernel(OP, features):
        return reference.semantic_grouping_loss(features, groups)
    return _semantic_grouping_loss(features, groups)[0]


def _fake(features: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    channels, dtype = features.shape[1], accumulation_dtype(features.dtype)
    return features.new_empty((), dtype=dtype), features.new_empty((channels, channels), dtype=dtype)


def _fake_backward(grad: Tensor, features: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    features, _ = inputs
    _, residual = output
    # The residual stays differentiable, so that who differentiates it is refused: it depends on the features.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, residual)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    features, residual = ctx.saved_tensors
    return None if grad is None else _semantic_grouping_loss_backward(grad, features, residual), None


_semantic_grouping_loss = Operator(OP, _fake, _setup_context, _backward)
_semantic_grouping_loss_backward = backward_operator(OP, _fake_backward)
