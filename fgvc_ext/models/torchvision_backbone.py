"""Backbones from torchvision, and the small ResNet for images of 96 to 128 pixels that is made of its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fgvc_ext.models.backbone import Backbone

FAMILIES = ("resnet", "vgg", "densenet")


def torchvision_names() -> list[str]:
    """The models of torchvision that can be backbones."""
    return [name for name in torchvision.models.list_models(torchvision.models) if name.startswith(FAMILIES)]


def torchvision_preprocessing(name: str) -> dict[str, Any]:
    """Mean, std and interpolation of a model's newest weights."""
    trained: Any = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    return {"mean": tuple(trained.mean), "std": tuple(trained.std), "interpolation": str(trained.interpolation.value)}


def torchvision_weights(name: str) -> tuple[str, str]:
    """Name and address of the file of a model's newest weights."""
    url: str = torchvision.models.get_model_weights(name)["DEFAULT"].url
    return url.rpartition("/")[2], url


def build_torchvision(name: str) -> Backbone:
    """A torchvision model without its classifier, with random weights."""
    model: Any = torchvision.models.get_model(name, weights=None)
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


def build_resnet10_narrow() -> Backbone:
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


def move_stride(backbone: Backbone, name: str) -> None:
    """Put a bottleneck's stride on its first convolution, as Caffe's ResNets have it."""
    blocks = [m for m in backbone.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(f"backbone: stride_on_first_conv needs a ResNet of bottlenecks (resnet50 …), got {name!r}")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
