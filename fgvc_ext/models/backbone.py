"""Feature extractors by name: images [N,3,H,W] → features [N,C,h,w]."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fgvc_ext.models.pretrained import load_weights

TORCHVISION_FAMILIES = ("resnet", "vgg", "densenet")
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}


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
        self.preprocessing: dict[str, Any] = dict(_IMAGENET)
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


def build_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    stride_on_first_conv: bool = False,
    report: Callable[[str], Any] | None = None,
) -> Backbone:
    """Build a feature extractor.

    Args:
        name: a torchvision ResNet, VGG or DenseNet ("resnet50", "vgg16_bn", "densenet169"), "resnet10_narrow" for
            small images on a CPU, or "timm/<name>" where timm is installed: its convolutional networks and Swin
            transformers, whose features are maps.
        weights: file to start from, see `load_weights`.
        pretrained: start from the library's ImageNet weights, which it downloads.
        stride_on_first_conv: put a bottleneck's stride on its first 1×1 convolution, as Caffe's ResNets have it.
        report: called with a text that tells what of `weights` did not match.

    Raises:
        ValueError: an unknown name, or arguments that do not go together.
    """
    if weights is not None and pretrained:
        raise ValueError("backbone: give either weights (a file) or pretrained, not both")
    if name.startswith("timm/"):
        from fgvc_ext.models.timm_backbone import build_timm

        backbone: Backbone = build_timm(name.removeprefix("timm/"), pretrained)
    elif name == "resnet10_narrow":
        if pretrained:
            raise ValueError("backbone: resnet10_narrow has no pretrained weights")
        backbone = _resnet10_narrow()
    else:
        backbone = _torchvision(name, pretrained)
    if stride_on_first_conv:
        _move_stride(backbone, name)
    backbone.preprocessing = backbone_preprocessing(name)
    backbone._settings = {"name": name, "stride_on_first_conv": stride_on_first_conv}
    if weights is not None:
        result = load_weights(backbone, weights)
        if report is not None:
            report(result.text())
    return backbone


def available_backbones() -> list[str]:
    """Names that `build_backbone` knows without timm."""
    names = torchvision.models.list_models(torchvision.models)
    return ["resnet10_narrow", *(n for n in names if n.startswith(TORCHVISION_FAMILIES))]


def backbone_preprocessing(name: str) -> dict[str, Any]:
    """Mean, std and interpolation of the images with which a backbone's pretrained weights were trained.

    Needs the name only: nothing is built or downloaded. Names without pretrained weights have ImageNet's values.
    """
    if name.startswith("timm/"):
        from fgvc_ext.models.timm_backbone import timm_preprocessing

        return timm_preprocessing(name.removeprefix("timm/"))
    if name in available_backbones() and name != "resnet10_narrow":
        trained: Any = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
        return {
            "mean": tuple(trained.mean),
            "std": tuple(trained.std),
            "interpolation": str(trained.interpolation.value),
        }
    return dict(_IMAGENET)


def _torchvision(name: str, pretrained: bool) -> Backbone:
    if name not in available_backbones():
        raise ValueError(f"backbone: expected one of {', '.join(available_backbones())} or timm/<name>, got {name!r}")
    model: Any = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    if name.startswith("resnet"):
        layers = {n: m for n, m in model.named_children() if n not in ("avgpool", "fc")}
        return Backbone(layers, model.fc.in_features, _resnet_group)
    if name.startswith("densenet"):
        layers = {"features": model.features, "relu": nn.ReLU(inplace=True)}
        return Backbone(layers, model.classifier.in_features, _densenet_group)
    channels = next(m.out_channels for m in reversed(list(model.features)) if isinstance(m, nn.Conv2d))
    return Backbone({"features": model.features}, channels, _vgg_group(model.features))


def _resnet_group(parameter: str) -> str:
    first = parameter.partition(".")[0]
    return first if first.startswith("layer") else "stem"


def _densenet_group(parameter: str) -> str:
    part = parameter.split(".")[1]
    if part.endswith("0"):  # conv0, norm0
        return "stem"
    number = 4 if part == "norm5" else int(part[-1])
    return f"block{number}"  # a transition goes with the block before it


def _vgg_group(features: nn.Sequential) -> Callable[[str], str]:
    blocks, block = {}, 1
    for index, layer in enumerate(features):
        blocks[str(index)] = f"block{block}"
        block += isinstance(layer, nn.MaxPool2d)
    return _VggGroups(blocks)


@dataclass
class _VggGroups:
    blocks: dict[str, str]

    def __call__(self, parameter: str) -> str:
        return self.blocks[parameter.split(".")[1]]


def _resnet10_narrow() -> Backbone:
    """A ResNet of four basic blocks, 32 to 256 channels, total stride 16: made for 96–128 px on a CPU."""
    widths, strides = (32, 64, 128, 256), (1, 2, 2, 1)
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(widths[0]),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    before = widths[0]
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        shortcut = None
        if stride != 1 or before != width:
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers[f"layer{number}"] = nn.Sequential(BasicBlock(before, width, stride, shortcut))
        before = width
    backbone = Backbone(layers, widths[-1], _resnet_group)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _move_stride(backbone: Backbone, name: str) -> None:
    blocks = [m for m in backbone.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(f"backbone: stride_on_first_conv needs a ResNet of bottlenecks (resnet50 …), got {name!r}")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
