"""Models small enough to be trained in a second, with the interface of `fgvc_ext.models`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toy_training import ToyImages

from fgvc_ext.data import ImageDataset
from fgvc_ext.models import Explanation, Model, load
from fgvc_ext.training import Result


class ToyClassifier(Model, method="toy_classifier"):
    """Features, a 1×1 convolution to class maps, their means."""

    def __init__(self, classes: int = 3, weighted: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, classes, 1)
        self.pooling = nn.Parameter(torch.ones(classes)) if weighted else None

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        scores = self.classifier(self.features(images)).mean((2, 3))
        return scores if self.pooling is None else scores * self.pooling

    def explain(self, images: Tensor) -> Explanation:
        return Explanation(maps={"classes": self.classifier(self.features(images))})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"features": list(self.features.parameters()), "classifier": list(self.classifier.parameters())}
        return groups if self.pooling is None else {**groups, "pooling": [self.pooling]}

    def settings(self) -> dict[str, Any]:
        return {"classes": self.classifier.out_channels, "weighted": self.pooling is not None}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ToyClassifier:
        return cls(**settings)


class ToyLocaliser(Model, method="toy_localiser"):
    """One map [N,1,H,W] of where the object is."""

    is_classifier = False

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.map(images)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"map": list(self.map.parameters())}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ToyLocaliser:
        return cls()


class ToyEnsemble(Model, method="toy_ensemble"):
    """The logarithm of the members' mean probabilities."""

    def __init__(self, members: Sequence[Model]) -> None:
        super().__init__()
        self.models = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).softmax(1) for member in self.models]).mean(0).log()

    def settings(self) -> dict[str, Any]:
        return {"members": [member.settings() for member in self.models]}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ToyEnsemble:
        return cls([ToyClassifier.from_settings(member) for member in settings["members"]])


class ToyCrops(ImageDataset):
    """The part of each image that its box [N,4] shows, enlarged to the image's size."""

    def __init__(self, images: ToyImages, boxes: Tensor) -> None:
        super().__init__("toy crops", images.split, images.classes, images.labels, images.ids)
        self.images, self.boxes = images, boxes

    def load(self, index: int) -> Tensor:
        image = self.images.load(index)
        x1, y1, x2, y2 = self.boxes[index].round().int().tolist()
        part = nn.functional.interpolate(image[None, :, y1:y2, x1:x2].float(), size=image.shape[1:])
        return part[0].to(torch.uint8)

    def content_key(self) -> str:
        return "1"


def loaded(result: Result) -> Model:
    return load(result.path)
