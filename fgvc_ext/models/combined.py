"""Two heads of different papers on one feature map, whose scores are averaged: a combination that no paper has."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import build_backbone
from fgvc_ext.models.ensemble import Average, average_scores
from fgvc_ext.models.heads import EmbeddingHead, MapHead, pooled_map
from fgvc_ext.models.model import Explanation, Model, backbone_groups
from fgvc_ext.ops import spatial_attention_map

Seed = int | Tensor | None
_DEFAULTS: Mapping[str, Any] = types.MappingProxyType({})


class Combined(Model, method="combined"):
    """Backbone → embedding head and map head → the average of their scores; either head may be left out.

    Embedding head: k-max pooling, embedding layer, linear classifier (`ELoPE`). Map head: 1×1 convolution,
    diversification block (`SubtleDifferences`). A model with one head is that paper's own, its scores are the head's.

    Args:
        backbone: feature extractor; its `channels` is the width of its output.
        num_classes: C.
        embedding: arguments of the embedding head, see `heads.EmbeddingHead`; None: without it.
        maps: arguments of the map head, see `heads.MapHead`; None: without it.
        average: "probabilities": the scores are the logarithm of the heads' mean probabilities. "logits": their mean
            scores, for which the head with the larger ones counts more.

    Raises:
        ValueError: no classes, no head, or another `average`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        embedding: Mapping[str, Any] | None = _DEFAULTS,
        maps: Mapping[str, Any] | None = _DEFAULTS,
        average: Average = "probabilities",
    ) -> None:
        super().__init__(Preprocessing(**backbone.preprocessing))
        if num_classes < 1:
            raise ValueError(f"Combined: num_classes: expected at least 1, got {num_classes}")
        if embedding is None and maps is None:
            raise ValueError("Combined: expected an embedding head, a map head or both, got none")
        if average not in get_args(Average):
            raise ValueError(f"Combined: average: expected one of {', '.join(get_args(Average))}, got {average!r}")
        self.backbone = backbone
        # One module, and so one group of layers: starting weights may lack it, or have another classifier in its place.
        self.classifier = nn.ModuleDict()
        if embedding is not None:
            self.classifier["embedding"] = EmbeddingHead(backbone.channels, num_classes, **embedding)
        if maps is not None:
            self.classifier["maps"] = MapHead(backbone.channels, num_classes, **maps)
        self.average: Average = average
        self._options: dict[str, Any] = {
            "num_classes": num_classes,
            "embedding": None if embedding is None else dict(embedding),
            "maps": None if maps is None else dict(maps),
            "average": average,
        }

    @property
    def embedding_head(self) -> EmbeddingHead | None:
        head = dict(self.classifier.items()).get("embedding")
        return head if isinstance(head, EmbeddingHead) else None

    @property
    def map_head(self) -> MapHead | None:
        head = dict(self.classifier.items()).get("maps")
        return head if isinstance(head, MapHead) else None

    def head_scores(self, features: Tensor, seed: Seed = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Features [N,D,h,w] → the scores [N,C] of each head, "embedding" and "maps"; the embeddings [N,E], if any."""
        scores, embeddings = dict[str, Tensor](), None
        if (embedding := self.embedding_head) is not None:
            embeddings = embedding.embed(features)
            scores["embedding"] = embedding.classifier(embeddings)
        if (maps := self.map_head) is not None:
            scores["maps"] = maps(features, seed)
        return scores, embeddings

    def averaged(self, scores: Mapping[str, Tensor], average: Average | None = None) -> Tensor:
        """Scores [N,C] of each head → [N,C], by this average in place of the model's own; of one head its own."""
        found = list(scores.values())
        return found[0] if len(found) == 1 else average_scores(torch.stack(found), average or self.average)

    def scores(self, features: Tensor, seed: Seed = None) -> Tensor:
        """Features [N,D,h,w] of the last stage → scores [N,C]."""
        return self.averaged(self.head_scores(features, seed)[0])

    def forward(self, images: Tensor, seed: Seed = None) -> Tensor:
        """images [N,3,H,W] → scores [N,C]. `seed`: int64 [N] keys each sample's mask; only used in training."""
        return self.scores(self.backbone(images), seed)

    def attention(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → the spatial attention map [N,h,w] of the last stage: what a teacher gives."""
        return spatial_attention_map(self.backbone(images))

    def explain(self, images: Tensor) -> Explanation:
        """The attention map [N,1,h,w] that both heads share; the map head's class activation maps [N,C,h,w], whose
        spatial means are its scores; and "pooled" [N,1,h,w], what the embedding head's pooling takes from where."""
        features = self.backbone(images)
        maps = {"attention": spatial_attention_map(features)[:, None]}
        if (head := self.map_head) is not None:
            maps["class activation"] = head.maps(features)
        if (embedding := self.embedding_head) is not None:
            maps["pooled"] = pooled_map(embedding.pooling, features)
        return Explanation(maps=maps, scores=self.scores(features))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The backbone's groups, then "classifier": both heads."""
        return {**backbone_groups(self.backbone), "classifier": list(self.classifier.parameters())}

    def settings(self) -> dict[str, Any]:
        return {"backbone": self.backbone.settings(), **self._options}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Combined:
        options = dict(settings)
        return cls(build_backbone(**options.pop("backbone")), **options)
