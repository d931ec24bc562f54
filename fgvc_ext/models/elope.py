"""The network of "ELoPE: Fine-Grained Visual Classification with Efficient Localization, Pooling and Embedding"
(Hanselmann and Ney, WACV 2020)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import build_backbone
from fgvc_ext.models.heads import Pooling, embedding_layer, pooled_map, pooling_layer
from fgvc_ext.models.localiser import LOCALISERS, Localiser, crop_and_resize, paste_back, resized_to
from fgvc_ext.models.model import Explanation, Model, Prediction, backbone_groups, pixels_of

__all__ = ["ELoPE", "Pooling", "crop_and_resize"]


class ELoPE(Model, method="elope"):
    """Images → localiser → crop → backbone → k-max pooling → embedding layer → scores.

    In training, and without a localiser, the backbone gets the images as they are: crops that were cut before. In
    evaluation a localiser finds the object in images of any size, and the backbone sees the object alone, in `size`
    pixels: one pass through the backbone. Whatever has another size than `size` is resized to it then.

    Args:
        backbone: feature extractor; its `channels` is the width of its output.
        num_classes: C.
        pooling: "gap" (mean of a feature map), "gmp" (its maximum), "gkmp" (mean of its `k` largest values, eq. 3).
        k: K of "gkmp"; the paper's is 4.
        weighted: the k values have weights that are learnt (eq. 4).
        embedding_dim: E, width of the embedding layer, which is Linear, BatchNorm, PReLU.
        size: side of what the backbone sees in evaluation, in pixels; None: the images as they are.
        localiser: finds the box; needs `size`. It is not trained with the rest.
    """

    trained_before = ("localiser",)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        pooling: Pooling = "gkmp",
        k: int = 4,
        weighted: bool = False,
        embedding_dim: int = 512,
        size: int | None = None,
        localiser: Localiser | None = None,
    ) -> None:
        super().__init__(Preprocessing(**backbone.preprocessing))
        if num_classes < 1 or embedding_dim < 1:
            raise ValueError(
                f"ELoPE: expected at least one class and one embedding dimension, got {num_classes} and {embedding_dim}"
            )
        if localiser is not None and size is None:
            raise ValueError("ELoPE: size: expected a number of pixels with a localiser, got None")
        self.backbone = backbone
        self.pooling = pooling_layer(pooling, k, weighted=weighted)
        self.embedding = embedding_layer(backbone.channels, embedding_dim)
        self.classifier = nn.Linear(embedding_dim, num_classes)
        self.size = size
        self.localiser = None if localiser is None else localiser.requires_grad_(False)
        self._options = {
            "num_classes": num_classes,
            "pooling": pooling,
            "k": k,
            "weighted": weighted,
            "embedding_dim": embedding_dim,
        }

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """images [N,3,H,W] → scores [N,C]. `seed` is not used: nothing here is random."""
        return self.classifier(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → embeddings [N,E], of the length that they have: losses normalise them, scores do not."""
        if not self.training:
            images = self.looked_at(images)[0]
        return self.embedding(self.pooling(self.backbone(images)))

    def scores(self, features: Tensor) -> Tensor:
        """The backbone's features [N,D,h,w] → scores [N,C]."""
        return self.classifier(self.embedding(self.pooling(features)))

    def looked_at(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the backbone sees of images in evaluation, and the boxes [N,4] that it was cut from, if it was.

        Raises:
            ValueError: the output of frozen layers in the place of images, of which a localiser is to cut something.
        """
        if images.shape[1] != 3:  # a backbone also takes the output of its frozen layers
            if self.localiser is not None:
                raise ValueError(
                    f"ELoPE: expected images [N,3,H,W], of which the localiser cuts, got {list(images.shape)}: the "
                    "output of frozen layers serves training, but no evaluation"
                )
            return images, None
        if self.size is None:
            return images, None
        if self.localiser is None:
            return resized_to(images, self.size), None
        boxes = self.localiser.boxes(images)
        return crop_and_resize(images, boxes, self.size), boxes

    def boxes(self, images: Tensor) -> Tensor | None:
        return None if self.localiser is None else self.localiser.boxes(images)

    def explain(self, images: Tensor) -> Explanation:
        """Maps in the frame of the images, and the box [N,1,4] that the model looks at, if it has a localiser.

        "pooled": [N,1,h,w], how much each position gives to the pooled features, on average over the channels; its sum
        over the positions is the mean of the pooled features. "mean feature map": the mean over the channels.
        """
        parts, boxes = self.looked_at(images)
        features = self.backbone(parts)
        scores = self.scores(features)
        maps = {"pooled": pooled_map(self.pooling, features), "mean feature map": features.mean(1, keepdim=True)}
        if boxes is None or self.localiser is None:
            return Explanation(maps, scores=scores)
        size = (images.shape[-2], images.shape[-1])
        maps = {name: paste_back(value, boxes, size) for name, value in maps.items()}
        maps["heat map"] = self.localiser(images)[:, None]
        return Explanation(maps, {"looked at": boxes[:, None]}, scores)

    @torch.no_grad()
    def predict(
        self, images: Sequence[str | os.PathLike[str] | Tensor], top: int = 5, *, batch_size: int = 32
    ) -> list[Prediction]:
        """See `Model.predict`. With a localiser, every image is looked at in its own resolution, one at a time."""
        if self.localiser is None:
            return super().predict(images, top, batch_size=batch_size)
        device, training, found = self.classifier.weight.device, self.training, []
        self.eval()
        try:
            for image in images:
                pixels = self.preprocessing.normalise(pixels_of(image))[None].to(device)
                parts, boxes = self.looked_at(pixels)
                assert boxes is not None
                scores = self.scores(self.backbone(parts))
                found.append(self._prediction(scores[0].float().softmax(0).cpu(), top, boxes[0].cpu()))
        finally:
            self.train(training)
        return found

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The backbone's groups, then "pooling" (its weights, if it has some), "embedding" and "classifier"; before
        them "localiser", if there is one, whose parameters need no gradient."""
        parts = {"pooling": self.pooling, "embedding": self.embedding, "classifier": self.classifier}
        groups = {} if self.localiser is None else {"localiser": list(self.localiser.parameters())}
        groups |= backbone_groups(self.backbone)
        return groups | {name: list(part.parameters()) for name, part in parts.items()}

    def settings(self) -> dict[str, Any]:
        localiser = None
        if self.localiser is not None:
            localiser = {"method": self.localiser.method, "settings": self.localiser.settings()}
        return {"backbone": self.backbone.settings(), **self._options, "size": self.size, "localiser": localiser}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ELoPE:
        options = dict(settings)
        known = options.pop("localiser")
        localiser = None if known is None else LOCALISERS[known["method"]].from_settings(known["settings"])
        return cls(build_backbone(**options.pop("backbone")), localiser=localiser, **options)
