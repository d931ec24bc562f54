"""A member of the ensemble of "Knowledge Transfer Based Fine-grained Visual Classification"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import build_backbone
from fgvc_ext.models.model import Explanation, Model, activation_maps, backbone_groups
from fgvc_ext.models.norm import EmbeddingNorm
from fgvc_ext.ops import spatial_attention_map

Head = Literal["linear", "official"]
"""From features to scores: the mean over the positions and one linear layer, or the authors' public code."""
HIDDEN = 512
"""Width of the public code's hidden layer."""


class KnowledgeTransfer(Model, method="knowledge_transfer"):
    """Backbone → pooling → classifier. Where it looks is the spatial attention map of the backbone's last stage.

    Args:
        backbone: feature extractor; its `channels` is the width of its output.
        num_classes: C.
        head: "linear": the mean over the positions, then one linear layer, so that the class activation maps are
            exact. "official": the largest value over the positions → BatchNorm → linear layer to 512 → BatchNorm → ELU
            → linear layer, as in the authors' public code.

    Raises:
        ValueError: no classes, or another head.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, head: Head = "linear") -> None:
        super().__init__(Preprocessing(**backbone.preprocessing))
        if num_classes < 1:
            raise ValueError(f"KnowledgeTransfer: num_classes: expected at least 1, got {num_classes}")
        if head not in get_args(Head):
            raise ValueError(f"KnowledgeTransfer: head: expected one of {', '.join(get_args(Head))}, got {head!r}")
        self.backbone = backbone
        self.classifier: nn.Module = (
            nn.Linear(backbone.channels, num_classes)
            if head == "linear"
            else nn.Sequential(
                EmbeddingNorm(backbone.channels),
                nn.Linear(backbone.channels, HIDDEN),
                EmbeddingNorm(HIDDEN),
                nn.ELU(inplace=True),
                nn.Linear(HIDDEN, num_classes),
            )
        )
        self._options: dict[str, Any] = {"num_classes": num_classes, "head": head}

    def attention(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → the spatial attention map [N,h,w] of the last stage (eq. 1), not normalised.

        What a teacher gives: the classifier is not computed.
        """
        return spatial_attention_map(self.backbone(images))

    def scores(self, features: Tensor) -> Tensor:
        """Features [N,D,h,w] of the last stage → scores [N,C]."""
        pooled = features.mean((2, 3)) if self._options["head"] == "linear" else features.amax((2, 3))
        return self.classifier(pooled)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """images [N,3,H,W] → scores [N,C]. `seed` is not used: nothing in the network is random."""
        return self.scores(self.backbone(images))

    def explain(self, images: Tensor) -> Explanation:
        """The attention map [N,1,h,w]; with the linear head the class activation maps [N,C,h,w] too."""
        features = self.backbone(images)
        maps = {"attention": spatial_attention_map(features)[:, None]}
        if isinstance(self.classifier, nn.Linear):
            maps["class activation"] = activation_maps(features, self.classifier)
        return Explanation(maps=maps, scores=self.scores(features))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The backbone's groups, then "classifier"."""
        return {**backbone_groups(self.backbone), "classifier": list(self.classifier.parameters())}

    def settings(self) -> dict[str, Any]:
        return {"backbone": self.backbone.settings(), **self._options}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> KnowledgeTransfer:
        options = dict(settings)
        return cls(build_backbone(**options.pop("backbone")), **options)
