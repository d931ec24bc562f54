"""Global k-max pooling (Hanselmann and Ney, "ELoPE", eq. 2–4)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ._checks import check_beside, check_int, check_positions, check_tensor
from ._operator import Operator, backward_operator, dense_strides, fold_samples, wants_gradient

OP = "global_k_max_pool"
LARGEST_INT16_MAP = 32768  # positions that an int16 index can name


def global_k_max_pool(features: Tensor, k: int = 4, weight: Tensor | None = None) -> Tensor:
    """Mean of the ``k`` largest values of every map, optionally weighted by rank.

    With S₁ ≥ S₂ ≥ … the values of map (n, c): ``out[n, c] = (1/k) Σ_{r ≤ k} weight[r] · S_r``; without ``weight`` all
    weights are 1. k = 1 is max pooling, k = H·W average pooling. ELoPE (Hanselmann and Ney, 2020), eq. 2–4.

    Args:
        features: [N,C,H,W], H·W < 2³¹; float32, float64, bfloat16 or float16; contiguous, channels_last or any strides.
        k: how many values, 1 ≤ k ≤ H·W. The paper uses 4.
        weight: [k], dtype of ``features`` or float32, one weight per rank (largest first).

    Returns:
        [N,C] in the dtype of ``features``; sums in float32 (float64 for float64).

    Gradient:
        to ``features`` (in its dense layout) and to ``weight``. Saved for backward: k indices per map (int16, int32 for
        maps of more than 32,768 positions or, compiled, of unknown size), and the k values where ``weight`` needs a
        gradient. No second backward.

    Ties go to the lowest index y·W + x; −0 and +0 tie. A NaN counts as the largest value: NaN in, NaN out. N = 0 gives
    an empty output. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or k outside [1, H·W].
    """
    check_tensor(OP, "features", features, "[N,C,H,W]")
    k = check_int(OP, "k", k, least=1)
    positions = check_positions(OP, "features", features)
    if k > positions:
        height, width = features.shape[2:]
        raise ValueError(f"{OP}: k must be at most H*W = {height}*{width} = {positions}, got {k}")
    if weight is not None:
        check_tensor(OP, "weight", weight, "[k]")
        check_beside(OP, "weight", weight, "features", features)
        if weight.shape[0] != k:
            raise ValueError(
                f"{OP}: weight must have shape [{k}], one weight for each of the k values, got {list(weight.shape)}"
            )
    if not use_kernel(OP, features):
        return reference.global_k_max_pool(features, k, weight)
    keep_values = weight is not None and wants_gradient(weight)
    return _global_k_max_pool(features, k, weight, keep_values, _needs_wide_indices(positions))[0]


def _needs_wide_indices(positions: int) -> bool:
    if not torch.compiler.is_compiling():
        return positions > LARGEST_INT16_MAP
    # No guard on a symbolic size: a graph for many sizes has int32 indices, unless none of them needs it.
    return not torch.fx.experimental.symbolic_shapes.statically_known_true(positions <= LARGEST_INT16_MAP)


def _fake(
    features: Tensor, k: int, weight: Tensor | None, keep_values: bool, wide_indices: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    samples, channels = features.shape[:2]
    output = features.new_empty((samples, channels))
    indices = features.new_empty((samples, channels, k), dtype=torch.int32 if wide_indices else torch.int16)
    accumulation = torch.float64 if features.dtype == torch.float64 else torch.float32
    values = features.new_empty((samples, channels, k if keep_values else 0), dtype=accumulation)
    return output, indices, values


def _fake_backward(
    grad: Tensor,
    indices: Tensor,
    values: Tensor | None,
    weight: Tensor | None,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    grad_features: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    features = (
        torch.empty_strided(size, stride, dtype=grad.dtype, device=grad.device) if grad_features else grad.new_empty(0)
    )
    weights = weight.new_empty(weight.shape) if weight is not None and grad_weight else grad.new_empty(0)
    return features, weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, _, weight, keep_values, _ = inputs
    _, indices, values = output
    ctx.mark_non_differentiable(indices, values)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices, values if keep_values else None, weight)
    ctx.size, ctx.stride = features.shape, dense_strides(features)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    indices, values, weight = ctx.saved_tensors
    features_wanted, _, weight_wanted, *_ = ctx.needs_input_grad
    if grad is None:
        return None, None, None, None, None
    features, weights = _global_k_max_pool_backward(
        grad, indices, values, weight, ctx.size, ctx.stride, features_wanted, weight_wanted
    )
    return features if features_wanted else None, None, weights if weight_wanted else None, None, None


def _weight_needs_no_gradient(*arguments: Any) -> bool:
    return not arguments[-1]


_global_k_max_pool = Operator(OP, _fake, _setup_context, _backward, vmap=fold_samples(OP, (0,)))
_global_k_max_pool_backward = backward_operator(
    OP, _fake_backward, vmap=fold_samples(f"{OP}_backward", (0, 1, 2), folds=_weight_needs_no_gradient)
)
