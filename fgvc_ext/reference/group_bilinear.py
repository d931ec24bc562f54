"""Group bilinear pooling per position (deep bilinear transformation, used by dual attention fusion)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype, without_autocast


def group_bilinear(
    features: Tensor,
    groups: int,
    *,
    position: Tensor | None = None,
    out_channels: int | None = None,
    scale: float = 1 / 32,
) -> Tensor:
    values = features.to(accumulation_dtype(features.dtype))
    if position is not None:
        values = values + position.detach().to(values.dtype)[:, None, None]
    grouped = values.unflatten(1, (groups, features.shape[1] // groups))  # a_g: [N,G,p,H,W]
    with without_autocast(features):
        products = torch.einsum("ngihw,ngkhw->nikhw", grouped, grouped)  # Y = Σ_g a_g a_gᵀ
    responses = (products * scale).tanh().flatten(1, 2)
    resized = resize_channels(responses, features.shape[1] if out_channels is None else out_channels)
    return empty_maps(features, resized.shape[1]).copy_(resized)


def resize_channels(maps: Tensor, channels: int) -> Tensor:
    """Linear interpolation along the channels of [N,P,H,W], the first and the last one kept (align_corners)."""
    last = maps.shape[1] - 1
    # Output j lies at j · last / (channels − 1): counted in integers, no position is rounded.
    places = torch.arange(channels, device=maps.device) * last
    steps = max(1, channels - 1)
    lower, rest = places // steps, (places % steps)[:, None, None]
    below = maps[:, lower]
    weight = rest.to(maps.dtype) / steps
    between = below * (1 - weight) + maps[:, (lower + 1).clamp(max=last)] * weight
    return torch.where(rest == 0, below, between)  # a channel that is met takes nothing of its neighbour, NaN neither


def empty_maps(features: Tensor, channels: int) -> Tensor:
    """[N,channels,H,W] in the layout of ``features``: dense, with channels side by side where theirs are."""
    samples, own, height, width = features.shape
    if channels == own:
        return torch.empty_like(features)
    if features.stride(1) == 1 and own > 1:
        stride = (height * width * channels, 1, width * channels, channels)
    else:
        stride = (channels * height * width, height * width, width, 1)
    return features.new_empty_strided((samples, channels, height, width), stride)
