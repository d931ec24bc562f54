"""Spatial attention map ("Knowledge Transfer Based Fine-grained Visual Classification", eq. 1)."""

from torch import Tensor

from .accumulation import accumulation_dtype


def spatial_attention_map(features: Tensor) -> Tensor:
    values = features.to(accumulation_dtype(features.dtype))
    weights = values.mean(dim=(2, 3), keepdim=True)  # g_c: the more a channel responds, the more it counts
    return (weights * values).mean(dim=1).contiguous().to(features.dtype)  # eq. 1
