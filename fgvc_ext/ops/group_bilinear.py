"""Group bilinear pooling per position (deep bilinear transformation, used by dual attention fusion)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ..reference.group_bilinear import empty_maps
from ._checks import check_beside, check_finite, check_int, check_positions, check_tensor
from ._operator import Operator, backward_operator, constant, fold_samples

OP = "group_bilinear"
_MOST_GROUP_CHANNELS = 1024
_MOST_CHANNELS = 2**31 - 1


def group_bilinear(
    features: Tensor,
    groups: int,
    *,
    position: Tensor | None = None,
    out_channels: int | None = None,
    scale: float = 1 / 32,
) -> Tensor:
    """How the channels of a group respond together at every position, summed over the groups.

    At a position, ``a = features + position`` is read as G rows of p = C/G channels, row g the channels g·p … g·p+p−1.
    ``T = tanh(scale · Σ_g a_g a_gᵀ)`` is a symmetric p × p matrix; its rows one after the other are p² values, which
    are resized to ``out_channels`` by linear interpolation that keeps the first and the last value: output j lies at
    j · (p² − 1) / (out_channels − 1). For p² = out_channels that changes nothing. The deep bilinear transformation
    (Zheng et al., 2019) as the teacher of dual attention fusion uses it.

    Args:
        features: [N,C,H,W], H·W < 2³¹; float32, float64, bfloat16 or float16; contiguous, channels_last or any strides.
        groups: G ≥ 1, a divisor of C; at most 1,024 channels a group.
        position: [C], dtype of ``features`` or float32, a code that tells the groups apart, added to every position.
            It is a constant, even where it requires a gradient. None adds nothing.
        out_channels: C unless given.
        scale: factor of the products, finite in the dtype of the sums.

    Returns:
        [N,out_channels,H,W] in the dtype and dense layout of ``features`` (with another number of channels:
        channels_last where the channels of ``features`` lie side by side, else contiguous). Sums and tanh in float32
        (float64 for float64).

    Gradient:
        to ``features`` (in its dense layout). With D the gradient of T's values, taken back through the resize,
        S = scale · (D + Dᵀ)(1 − T²) and the gradient of row g is a_g S. T is computed anew. Saved for backward:
        ``features`` and ``position``. No second backward.

    A NaN or an infinity makes the products with its channel NaN or ±1 at its position, and nothing elsewhere. N = 0
    gives an empty output. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, C, H or W of 0, or groups that do not
            divide C.
    """
    check_tensor(OP, "features", features, "[N,C,H,W]")
    check_groups(OP, features, groups)
    check_positions(OP, "features", features)
    channels = features.shape[1]
    if channels // groups > _MOST_GROUP_CHANNELS:
        raise ValueError(
            f"{OP}: groups must leave at most {_MOST_GROUP_CHANNELS} channels in a group, got {groups} for {channels}"
        )
    if position is not None:
        check_tensor(OP, "position", position, "[C]")
        check_beside(OP, "position", position, "features", features)
        if position.shape[0] != channels:
            raise ValueError(
                f"{OP}: position must have shape [{channels}], one value a channel of features, got "
                f"{list(position.shape)}"
            )
        position = constant(position)
    out_channels = channels if out_channels is None else check_int(OP, "out_channels", out_channels, least=1)
    if out_channels > _MOST_CHANNELS:
        raise ValueError(f"{OP}: out_channels must be at most {_MOST_CHANNELS}, got {out_channels}")
    scale = check_finite(OP, "scale", scale, features)
    if not use_kernel(OP, features):
        return reference.group_bilinear(features, groups, position=position, out_channels=out_channels, scale=scale)
    return _group_bilinear(features, groups, position, out_channels, scale)


def check_groups(op: str, features: Tensor, groups: int) -> None:
    """C, H and W of at least 1, and a number of groups that divides C."""
    if 0 in features.shape[1:]:
        raise ValueError(f"{op}: features must have C, H and W of at least 1, got {list(features.shape)}")
    channels = features.shape[1]
    if channels % check_int(op, "groups", groups, least=1):
        raise ValueError(f"{op}: groups must divide the {channels} channels of features, got {groups}")


def _fake(features: Tensor, groups: int, position: Tensor | None, out_channels: int, scale: float) -> Tensor:
    return empty_maps(features, out_channels)


def _fake_backward(grad: Tensor, features: Tensor, groups: int, position: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.groups, position, _, ctx.scale = inputs
    ctx.save_for_backward(features, position)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, position = ctx.saved_tensors
    return _group_bilinear_backward(grad, features, ctx.groups, position, ctx.scale), None, None, None, None


_group_bilinear = Operator(OP, _fake, _setup_context, _backward, vmap=fold_samples(OP, (0,)))
_group_bilinear_backward = backward_operator(OP, _fake_backward, vmap=fold_samples(f"{OP}_backward", (0, 1)))
