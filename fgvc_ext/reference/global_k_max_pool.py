"""Global k-max pooling (Hanselmann and Ney, "ELoPE", eq. 2–4)."""

from torch import Tensor

from .accumulation import accumulation_dtype


def global_k_max_pool(features: Tensor, k: int = 4, weight: Tensor | None = None) -> Tensor:
    dtype = accumulation_dtype(features.dtype)
    # A stable sort, because topk promises no order among equals: the lowest index wins.
    largest = features.flatten(2).sort(dim=2, descending=True, stable=True).values[:, :, :k].to(dtype)
    if weight is not None:
        largest = largest * weight.to(dtype)
    return (largest.sum(dim=2) / k).to(features.dtype)
