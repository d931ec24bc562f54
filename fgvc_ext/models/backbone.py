"""What a feature extractor is: layers in groups, maps at the ends of the groups."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD

IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
"""What torchvision's weights expect of images."""


class Backbone(nn.Sequential):
    """The layers up to the last feature map, under the names of the model they come from.

    Attributes:
        channels: C of the features [N,C,h,w].
        group_of: name of a parameter → the group of layers that it belongs to, such as "layer4".
        preprocessing: mean, std and interpolation of the images with which its library's weights were trained.
    """

    def __init__(self, layers: Mapping[str, nn.Module], channels: int, group_of: Callable[[str], str]) -> None:
        super().__init__(OrderedDict(layers))
        self.channels = channels
        self.group_of = group_of
        self.preprocessing: dict[str, Any] = dict(IMAGENET)
        self._settings: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """The arguments of `build_backbone` that make the same layers, without any weights."""
        return dict(self._settings)

    def levels(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The feature maps [N,C,h,w] at the ends of these groups of layers, in the order of `names`.

        Names are those of `groups()`. What lies behind the deepest of them is not computed.

        Raises:
            ValueError: a name that `groups()` does not have.
        """
        known = list(self.groups())
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"backbone: levels: expected some of {', '.join(known)}, got {unknown[0]!r}")
        last = max((known.index(name) for name in names), default=-1)
        found: dict[str, Tensor] = {}
        features = images
        for group, layer in self._layers():
            if known.index(group) > last:
                break
            features = found[group] = layer(features)
        return [found[name] for name in names]

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers with their groups, from input to output; one without parameters belongs to the group before it."""
        group = next(iter(self.groups()))
        for name, module in self.named_children():
            nested = isinstance(module, nn.Sequential) and name == "features"  # of a VGG or DenseNet
            children = [(f"{name}.{part}", layer) for part, layer in module.named_children()] if nested else []
            for path, layer in children or [(name, module)]:
                parameter = next((parameter for parameter, _ in layer.named_parameters()), None)
                group = group if parameter is None else self.group_of(f"{path}.{parameter}")
                yield group, layer

    def groups(self) -> dict[str, list[str]]:
        """Groups of layers from input to output, each with the names of its parameters."""
        found: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            found.setdefault(self.group_of(name), []).append(name)
        return found
