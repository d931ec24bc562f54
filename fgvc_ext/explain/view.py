"""What a report shows of a trained model, as functions of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc_ext.models import Backbone, Ensemble, Model


@dataclass(frozen=True)
class ModelView:
    """A trained model in evaluation mode, as functions of prepared images [n,3,crop,crop] on the CPU."""

    look: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Images and labels int64 [n] → scores [n,C], and maps [n,h,w] in the frame of the images: what the model looks at,
    where it has a map for each class at that of the label."""
    features: Callable[[Tensor], Tensor] | None = None
    """Images → pooled features [n,D], for the scatter of confusable classes."""
    masks: Callable[[Tensor, Tensor], Tensor] | None = None
    """Images and seeds int64 [n] → the mask bool [n,C,h,w] that the block would draw for them in a training step."""


def view_of(model: Model) -> ModelView | None:
    """A model as its own `explain` shows it; None for one that is no classifier.

    Shown is the first map: of one for each class that of the label's class, of a single one this one. Of an ensemble it
    is the mean of what its members look at. The features are the backbone's, averaged over the positions; of a model of
    several backbones the first one's.

    Raises (when it looks):
        ValueError: a first map that is neither one map nor one for each class.
    """
    if not model.is_classifier:
        return None
    device = next(model.parameters()).device
    backbone = getattr(model, "backbone", next(iter(model.networks().values()), None))

    def look(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _look(model, images.to(device), labels.to(device))

    def features(images: Tensor) -> Tensor:
        assert isinstance(backbone, Backbone)
        return backbone(images.to(device)).mean((2, 3))

    return ModelView(look, features if isinstance(backbone, Backbone) else None)


def as_shares(maps: Tensor) -> Tensor:
    """Maps [...,h,w] from their minimum on, each divided by its sum: how the attention is spread. Constant: evenly.

    A map with NaN is NaN.
    """
    above = maps - maps.amin((-2, -1), keepdim=True)
    total = above.sum((-2, -1), keepdim=True)
    even = torch.full_like(above, 1 / (maps.shape[-2] * maps.shape[-1]))
    return torch.where(total == 0, even, above / total)


def _look(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    found = model.explain(images)
    scores = model(images) if found.scores is None else found.scores
    maps = [shown_map(each, labels, scores.shape[1]) for each in found.maps.values()]
    if not maps:
        raise ValueError(f"view_of: {type(model).__name__}.explain: expected at least one map, got none")
    return scores, _mean_of(maps) if isinstance(model, Ensemble) else maps[0]


def shown_map(maps: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Of maps [n,K,h,w] the one [n,h,w] that is shown: the label's of K = classes, or the only one.

    Raises:
        ValueError: any other number of maps.
    """
    if maps.ndim != 4 or maps.shape[1] not in (1, classes):
        raise ValueError(f"view_of: expected maps [n,1,h,w] or [n,{classes},h,w], got {list(maps.shape)}")
    return maps[:, 0] if maps.shape[1] == 1 else maps[torch.arange(len(maps), device=maps.device), labels]


def _mean_of(maps: list[Tensor]) -> Tensor:
    """The mean of several models' maps, every map with the same total, on the finest of their grids."""
    size = [max(each.shape[side] for each in maps) for side in (1, 2)]
    fine = [F.interpolate(each[:, None].float(), size=size, mode="bilinear", align_corners=False) for each in maps]
    return torch.stack([as_shares(each[:, 0]) for each in fine]).mean(0)
