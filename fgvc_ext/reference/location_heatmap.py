"""Location heat map of dual attention fusion (section 3.2): where several levels of features respond most."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .accumulation import accumulation_dtype


def location_heatmap(features: Sequence[Tensor], image_size: int | tuple[int, int]) -> Tensor:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    dtype = accumulation_dtype(features[0].dtype)
    masks = [_resized(_mask(level.detach().to(dtype)), height, width) for level in features]
    return _divided(torch.stack(masks).sum(dim=0), len(masks))[:, None].to(features[0].dtype)


def _mask(values: Tensor) -> Tensor:
    """[N,C,h,w] → [N,h,w]: one where the sum over the channels exceeds its mean, zero elsewhere."""
    # Each position's channels side by side: else torch adds them up in another order at the end of a map, and the sums
    # of a constant map differ by a rounding.
    aggregation = values.movedim(1, 3).contiguous().sum(dim=3)
    threshold = _divided(aggregation.sum(dim=(1, 2), keepdim=True), values.shape[2] * values.shape[3])
    above = aggregation > threshold
    nothing = ~above.any(dim=2, keepdim=True).any(dim=1, keepdim=True)  # a constant map
    return torch.where(threshold.isnan(), threshold, (above | nothing).to(values.dtype))


def _divided(values: Tensor, count: int) -> Tensor:
    """By a tensor, because on CUDA dividing by a number multiplies by its reciprocal: three thirds would not be one."""
    return values / torch.full((), count, dtype=values.dtype, device=values.device)


def _resized(mask: Tensor, height: int, width: int) -> Tensor:
    _, mask_height, mask_width = mask.shape
    rows = nearest(height, mask_height, mask.device)
    return mask[:, rows][:, :, nearest(width, mask_width, mask.device)]


def nearest(count: int, source_count: int, device: torch.device) -> Tensor:
    """The source under the middle of each of ``count`` positions, floor((i + 0.5) · source_count / count), exactly."""
    return (2 * torch.arange(count, device=device) + 1) * source_count // (2 * count)
