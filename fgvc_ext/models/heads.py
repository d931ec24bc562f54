"""From a feature map to scores: the parts that several models put behind a backbone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fgvc_ext.models.norm import EmbeddingNorm
from fgvc_ext.nn import Diversification2d, GlobalKMaxPool2d

Pooling = Literal["gap", "gmp", "gkmp"]
"""Mean of a feature map, its maximum, or the mean of its k largest values."""


def pooling_layer(pooling: Pooling, k: int, *, weighted: bool = False) -> nn.Module:
    """Features [N,D,h,w] → [N,D]. ValueError for another pooling, or for weights that it does not have."""
    if pooling not in ("gap", "gmp", "gkmp"):
        raise ValueError(f"pooling: expected gap, gmp or gkmp, got {pooling!r}")
    if weighted and pooling != "gkmp":
        raise ValueError(f"weighted: expected pooling gkmp, which alone has weights, got {pooling}")
    if pooling == "gap":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return GlobalKMaxPool2d(1 if pooling == "gmp" else k, weighted)


def pooled_map(pooling: nn.Module, features: Tensor) -> Tensor:
    """What a `pooling_layer` takes from where, [N,1,h,w]: its sum is the mean of the pooled features."""
    if not isinstance(pooling, GlobalKMaxPool2d):
        return features.mean(1, keepdim=True) / features.shape[2:].numel()
    k, weight = pooling.k, pooling.weight
    values, places = features.flatten(2).sort(dim=2, descending=True, stable=True)
    share = values[..., :k] if weight is None else values[..., :k] * weight
    taken = torch.zeros_like(values).scatter_(2, places[..., :k], share / k)
    return taken.mean(1, keepdim=True).unflatten(2, features.shape[2:])


def embedding_layer(channels: int, embedding_dim: int) -> nn.Sequential:
    """Pooled features [N,D] → embeddings [N,E]: Linear, BatchNorm, PReLU. ValueError for a width below 1."""
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim: expected at least 1, got {embedding_dim}")
    return nn.Sequential(nn.Linear(channels, embedding_dim), EmbeddingNorm(embedding_dim), nn.PReLU())


def map_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Features [N,D,h,w] → class activation maps [N,C,h,w]: a 1×1 convolution."""
    layer = nn.Conv2d(channels, num_classes, kernel_size=1)
    # Small scores at the start, as for a linear layer after pooling: the mean over positions is that layer.
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]
    return layer


class EmbeddingHead(nn.Module):
    """Pooling → embedding layer → linear classifier: that of `models.ELoPE`, whose arguments it has."""

    def __init__(
        self, channels: int, num_classes: int, *, pooling: Pooling = "gkmp", k: int = 4, embedding_dim: int = 512
    ) -> None:
        super().__init__()
        self.pooling = pooling_layer(pooling, k)
        self.embedding = embedding_layer(channels, embedding_dim)
        self.classifier = nn.Linear(embedding_dim, num_classes)

    def embed(self, features: Tensor) -> Tensor:
        """Features [N,D,h,w] → embeddings [N,E]."""
        return self.embedding(self.pooling(features))

    def forward(self, features: Tensor) -> Tensor:
        """Features [N,D,h,w] → scores [N,C]."""
        return self.classifier(self.embed(features))


class MapHead(nn.Module):
    """1×1 convolution → diversification block: that of `models.SubtleDifferences`, whose arguments it has."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        diversification: bool = True,
        p_peak: float = 0.5,
        p_patch: float = 0.5,
        patch_size: int = 3,
        alpha: float = 0.1,
    ) -> None:
        super().__init__()
        self.classifier = map_classifier(channels, num_classes)
        block = Diversification2d(p_peak=p_peak, p_patch=p_patch, patch_size=patch_size, alpha=alpha)
        self.diversification = block if diversification else None

    def maps(self, features: Tensor) -> Tensor:
        """Features [N,D,h,w] → class activation maps [N,C,h,w], nothing suppressed."""
        return self.classifier(features)

    def forward(self, features: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """Features [N,D,h,w] → scores [N,C]; in training through the block, if there is one. `seed`: int64 [N] keys
        each sample's mask."""
        maps = self.maps(features)
        return maps.mean(dim=(2, 3)) if self.diversification is None else self.diversification(maps, seed)
