"""Diversification block (Sun et al., "Fine-grained Recognition: Accounting for Subtle Differences…", eq. 1–8)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ..reference.diversify import hide_threshold
from ._checks import check_finite, check_int, check_positions, check_probability, check_tensor, seed_tensor
from ._operator import Operator, backward_operator, dense_strides

OP = "diversify"
MASK = "suppression_mask"


def diversify(
    maps: Tensor,
    *,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    patch_size: int = 3,
    alpha: float = 0.1,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Suppresses peaks and patches of class activation maps at random and pools what is left, in one pass.

    ``out[n, c]`` is the spatial mean of M', where M' = alpha·M on the suppressed positions and M elsewhere (eq. 7, 8).
    :func:`suppression_mask` describes which positions are suppressed.

    Args:
        maps: [N,C,H,W], H·W < 2³¹; float32, float64, bfloat16 or float16; contiguous, channels_last or any strides.
        p_peak: probability that a map's peaks are hidden (eq. 2). The paper gives no number: 0.5 is our choice.
        p_patch: probability that a patch is hidden (eq. 4). Likewise.
        patch_size: side G of the patches in positions; at the right and bottom edge they may be smaller. Likewise 3.
        alpha: factor of the suppressed positions (eq. 7), finite in the dtype of the sums. The paper uses 0.1.
        seed: None (drawn from torch's generator of the device), an int, or int64 [] or [N] on the device of ``maps``.

    Returns:
        [N,C] scores in the dtype of ``maps``; sums in float32 (float64 for float64).

    Gradient:
        to ``maps`` (in its dense layout): grad / (H·W), times alpha where suppressed. Saved for backward: one bit an
        element and no map. No second backward.

    A NaN in a map gives NaN. N = 0 gives an empty output. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
    """
    p_peak, p_patch, patch_size, seed = _checked(OP, maps, p_peak, p_patch, patch_size, seed)
    alpha = check_finite(OP, "alpha", alpha, maps)
    if not use_kernel(OP, maps):
        return reference.diversify(maps, p_peak=p_peak, p_patch=p_patch, patch_size=patch_size, alpha=alpha, seed=seed)
    peak, patch = hide_threshold(p_peak), hide_threshold(p_patch)
    return _diversify(maps, seed, peak, patch, patch_size, alpha)[0]


def suppression_mask(
    maps: Tensor,
    *,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    patch_size: int = 3,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The positions that :func:`diversify` suppresses for the same arguments: bool [N,C,H,W] in the layout of ``maps``.

    A position that equals its map's maximum is a peak, ties included (eq. 1); one draw a map decides for all its peaks
    together (eq. 2). The map is cut into patches of ``patch_size`` × ``patch_size``; one draw a patch decides for its
    positions, peaks excepted (eq. 4, 5). A map with a NaN has no peaks; in a constant map every position is one.

    The draws are words of Philox 4x32-10 with key = ``seed`` and counter = (draw // 4, class, sample, 1): draw 0 for
    the peaks, draw 1 + p for patch p in row-major order. A seed [] numbers the samples of the call; a seed [N] keys
    each sample on its own, whatever batch it stands in. The same bits on the CPU, on CUDA and in the reference.

    Arguments and errors: as :func:`diversify`. No gradient.
    """
    p_peak, p_patch, patch_size, seed = _checked(MASK, maps, p_peak, p_patch, patch_size, seed)
    maps = maps.detach()
    if not use_kernel(MASK, maps):
        return reference.suppression_mask(maps, p_peak=p_peak, p_patch=p_patch, patch_size=patch_size, seed=seed)
    return _suppression_mask(maps, seed, hide_threshold(p_peak), hide_threshold(p_patch), patch_size)


def _checked(
    op: str, maps: Tensor, p_peak: float, p_patch: float, patch_size: int, seed: int | Tensor | None
) -> tuple[float, float, int, Tensor]:
    check_tensor(op, "maps", maps, "[N,C,H,W]")
    if check_positions(op, "maps", maps) == 0:
        raise ValueError(f"{op}: maps must have H and W of at least 1, got {list(maps.shape)}")
    p_peak, p_patch = check_probability(op, "p_peak", p_peak), check_probability(op, "p_patch", p_patch)
    return p_peak, p_patch, check_int(op, "patch_size", patch_size, least=1), seed_tensor(op, seed, maps)


def _bytes_per_map(height: int, width: int) -> int:
    return (height * width + 7) // 8


def _fake(maps: Tensor, seed: Tensor, peak: int, patch: int, patch_size: int, alpha: float) -> tuple[Tensor, Tensor]:
    samples, classes, height, width = maps.shape
    bits = maps.new_empty((samples, classes, _bytes_per_map(height, width)), dtype=torch.uint8)
    return maps.new_empty((samples, classes)), bits


def _fake_backward(grad: Tensor, bits: Tensor, alpha: float, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(size, stride, dtype=grad.dtype, device=grad.device)


def _fake_mask(maps: Tensor, seed: Tensor, peak: int, patch: int, patch_size: int) -> Tensor:
    return torch.empty_like(maps, dtype=torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, *_, alpha = inputs
    _, bits = output
    ctx.mark_non_differentiable(bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits)
    ctx.alpha, ctx.size, ctx.stride = alpha, maps.shape, dense_strides(maps)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (bits,) = ctx.saved_tensors
    maps = None if grad is None else _diversify_backward(grad, bits, ctx.alpha, ctx.size, ctx.stride)
    return maps, None, None, None, None, None


_diversify = Operator(OP, _fake, _setup_context, _backward)
_diversify_backward = backward_operator(OP, _fake_backward)
_suppression_mask = Operator(MASK, _fake_mask)
