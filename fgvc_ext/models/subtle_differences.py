"""The network of "Fine-grained Recognition: Accounting for Subtle Differences between Similar Classes" (AAAI 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import build_backbone
from fgvc_ext.models.heads import map_classifier
from fgvc_ext.models.model import Explanation, Model, backbone_groups
from fgvc_ext.nn import Diversification2d
from fgvc_ext.ops import suppression_mask


def suppression_for(side: int) -> dict[str, float | int]:
    """What a training's block hides, by the size of the map: p_peak, p_patch and patch_size for `side` × `side` cells.

    A patch is at most a quarter of the side, and no larger than 3, and below 14 cells (a ResNet's map of 448 pixels)
    p is 0.2 and not 0.5: where few patches make up a map, those that are hidden can be all that a class is known by.
    """
    p = 0.5 if side >= 14 else 0.2
    return {"p_peak": p, "p_patch": p, "patch_size": min(3, max(1, side // 4))}


class SubtleDifferences(Model, method="subtle_differences"):
    """Backbone → 1×1 convolution with one map a class → diversification block → scores.

    In training the block hides peaks and patches of the maps; in evaluation the scores are the maps' plain means.

    Args:
        backbone: feature extractor; its `channels` is the width of its output.
        num_classes: C.
        diversification: False for the plain network, whose scores are always the plain means.
        p_peak, p_patch, patch_size, alpha: see `fgvc_ext.nn.Diversification2d` (equations 1–8).
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        diversification: bool = True,
        p_peak: float = 0.5,
        p_patch: float = 0.5,
        patch_size: int = 3,
        alpha: float = 0.1,
    ) -> None:
        super().__init__(Preprocessing(**backbone.preprocessing))
        if num_classes < 1:
            raise ValueError(f"SubtleDifferences: num_classes: expected at least 1, got {num_classes}")
        self.backbone = backbone
        self.classifier = map_classifier(backbone.channels, num_classes)
        block = Diversification2d(p_peak=p_peak, p_patch=p_patch, patch_size=patch_size, alpha=alpha)
        self.diversification = block if diversification else None
        self._options = {
            "num_classes": num_classes,
            "diversification": diversification,
            "p_peak": p_peak,
            "p_patch": p_patch,
            "patch_size": patch_size,
            "alpha": alpha,
        }

    def class_activation_maps(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → maps [N,C,h,w], nothing suppressed; their spatial means are the scores of evaluation."""
        return self.classifier(self.backbone(images))

    def forward(self, images: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """images [N,3,H,W] → scores [N,C]. `seed`: int64 [N] keys each sample's mask; only used in training."""
        maps = self.class_activation_maps(images)
        if self.diversification is None or not self.training:
            return maps.mean(dim=(2, 3))
        return self.diversification(maps, seed)

    def explain(self, images: Tensor) -> Explanation:
        """The class activation maps [N,C,h,w]; their spatial means are the scores."""
        maps = self.class_activation_maps(images)
        return Explanation(maps={"class activation": maps}, scores=maps.mean(dim=(2, 3)))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The backbone's groups, then "classifier"."""
        return {**backbone_groups(self.backbone), "classifier": list(self.classifier.parameters())}

    def settings(self) -> dict[str, Any]:
        return {"backbone": self.backbone.settings(), **self._options}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SubtleDifferences:
        options = dict(settings)
        return cls(build_backbone(**options.pop("backbone")), **options)

    @torch.no_grad()
    def suppression_mask(self, images: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """The mask bool [N,C,h,w] that a training step with these images and this seed draws.

        Raises:
            RuntimeError: the network was built without the block.
        """
        if self.diversification is None:
            raise RuntimeError("SubtleDifferences: this network was built without its diversification block")
        maps = self.class_activation_maps(images)
        return suppression_mask(maps, seed=seed, **self.diversification.mask_options())
