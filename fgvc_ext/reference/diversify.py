"""Diversification block (Sun et al., "Fine-grained Recognition: Accounting for Subtle Differences…", eq. 1–8)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype
from .philox import draws

OPERATOR_ID = 1


def hide_threshold(probability: float) -> int:
    """A 32-bit word below this hides: 0 never, 2**32 always."""
    return round(probability * 2**32)


def suppression_mask(
    maps: Tensor, *, p_peak: float = 0.5, p_patch: float = 0.5, patch_size: int = 3, seed: Tensor
) -> Tensor:
    samples, classes, height, width = maps.shape
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    words = draws(seed, samples, classes, 1 + rows * columns, OPERATOR_ID)

    if maps.numel() == 0:
        return torch.zeros_like(maps, dtype=torch.bool)
    peaks = maps == maps.amax(dim=(2, 3), keepdim=True)  # eq. 1; a map with a NaN has no peaks
    hide_peaks = words[:, :, 0, None, None] < hide_threshold(p_peak)  # eq. 2: one draw for all peaks of a map

    hide_patch = (words[:, :, 1:] < hide_threshold(p_patch)).unflatten(2, (rows, columns))  # eq. 4
    row = torch.arange(height, device=maps.device) // patch_size
    column = torch.arange(width, device=maps.device) // patch_size
    patches = hide_patch[:, :, row][:, :, :, column]

    mask = torch.where(peaks, hide_peaks, patches)  # eq. 5, 6
    return torch.empty_like(maps, dtype=torch.bool).copy_(mask)


def diversify(
    maps: Tensor,
    *,
    p_peak: float = 0.5,
    p_patch: float = 0.5,
    patch_size: int = 3,
    alpha: float = 0.1,
    seed: Tensor,
) -> Tensor:
    mask = suppression_mask(maps.detach(), p_peak=p_peak, p_patch=p_patch, patch_size=patch_size, seed=seed)
    values = maps.to(accumulation_dtype(maps.dtype))
    return torch.where(mask, alpha * values, values).mean(dim=(2, 3)).to(maps.dtype)  # eq. 7, 8
