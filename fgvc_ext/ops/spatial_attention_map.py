"""Spatial attention map ("Knowledge Transfer Based Fine-grained Visual Classification", eq. 1)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ._checks import check_positions, check_tensor
from ._operator import Operator, backward_operator, fold_samples

OP = "spatial_attention_map"


def spatial_attention_map(features: Tensor) -> Tensor:
    """Where a network looks: the mean over its channels, each weighted by its own spatial mean.

    With g_c the mean of channel c over all positions: ``out[n, y, x] = (1/C) Σ_c g_c · features[n, c, y, x]``.
    "Knowledge Transfer Based Fine-grained Visual Classification", eq. 1.

    Args:
        features: [N,C,H,W], float32, float64, bfloat16 or float16; contiguous, channels_last or any strides.

    Returns:
        [N,H,W], contiguous, in the dtype of ``features``; sums in float32 (float64 for float64). Values are of the
        order of the features' squares: in float16 they are infinite above 65,504.

    Gradient:
        to ``features`` (in its dense layout): at position p of channel c it is
        ``(1/C) · (g_c · grad[p] + (1/(H·W)) Σ_q grad[q] · features[c, q])``. Saved for backward: ``features``. No
        second backward.

    A NaN in a channel makes the whole map of its sample NaN, because the channel's mean weights every position. N = 0
    gives an empty output. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape, or C, H or W of 0.
    """
    check_tensor(OP, "features", features, "[N,C,H,W]")
    if 0 in features.shape[1:]:
        raise ValueError(f"{OP}: features must have C, H and W of at least 1, got {list(features.shape)}")
    check_positions(OP, "features", features)
    if not use_kernel(OP, features):
        return reference.spatial_attention_map(features)
    return _spatial_attention_map(features)


def _fake(features: Tensor) -> Tensor:
    samples, _, height, width = features.shape
    return features.new_empty((samples, height, width))


def _fake_backward(grad: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _spatial_attention_map_backward(grad, *ctx.saved_tensors)


_spatial_attention_map = Operator(OP, _fake, _setup_context, _backward, vmap=fold_samples(OP, (0,)))
_spatial_attention_map_backward = backward_operator(OP, _fake_backward, vmap=fold_samples(f"{OP}_backward", (0, 1)))
