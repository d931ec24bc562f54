"""Boxes around the high values of heat maps (Hanselmann and Ney, "ELoPE", section 5)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype


def heatmap_to_boxes(
    heatmaps: Tensor, *, threshold: float, image_size: int | tuple[int, int], min_size: float = 10
) -> Tensor:
    image_height, image_width = (image_size, image_size) if isinstance(image_size, int) else image_size
    values = heatmaps.detach().to(accumulation_dtype(heatmaps.dtype))
    lowest = values.amin(dim=(1, 2), keepdim=True)
    kept = values - lowest > threshold * (values.amax(dim=(1, 2), keepdim=True) - lowest)

    top, bottom = _sides(kept.any(dim=2), image_height, values.dtype)
    left, right = _sides(kept.any(dim=1), image_width, values.dtype)
    # Where nothing is kept, right < left, and the box is too small whatever min_size is.
    usable = values.isfinite().all(dim=2).all(dim=1) & (right > left)
    usable = usable & (right - left >= float(min_size)) & (bottom - top >= float(min_size))
    zero = torch.zeros_like(left)
    whole = torch.stack((zero, zero, zero + image_width, zero + image_height), dim=1)
    return torch.where(usable[:, None], torch.stack((left, top, right, bottom), dim=1), whole)


def _sides(kept: Tensor, image_side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and last edge, in pixels, of what is kept along a side of the map: bool [N,positions] → two of [N]."""
    positions = kept.shape[1]
    index = torch.arange(positions, dtype=dtype, device=kept.device)
    first = torch.where(kept, index, positions).amin(dim=1)
    behind = torch.where(kept, index + 1, 0).amax(dim=1)
    # A tensor, because on CUDA dividing by a number multiplies by its reciprocal, and a full map would miss the edge.
    divisor = torch.full((), positions, dtype=dtype, device=kept.device)
    return first * image_side / divisor, behind * image_side / divisor
