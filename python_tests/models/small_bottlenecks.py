"""A ResNet of narrow bottlenecks, which builds in no time."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import Bottleneck

from fgvc_ext.models import Backbone


def small_bottlenecks() -> Backbone:
    """Stages of 1, 1, 2 and 2 blocks, 16 to 128 channels, total stride 32."""
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        "bn1": nn.BatchNorm2d(8),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, 2, 1),
    }
    before = 8
    for number, (width, blocks, stride) in enumerate([(4, 1, 1), (8, 1, 2), (16, 2, 2), (32, 2, 2)], start=1):
        shortcut = nn.Sequential(nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        stage = [Bottleneck(before, width, stride, shortcut)]
        stage += [Bottleneck(4 * width, width) for _ in range(blocks - 1)]
        layers[f"layer{number}"] = nn.Sequential(*stage)
        before = 4 * width
    return Backbone(layers, before, _group)


def _group(name: str) -> str:
    first = name.partition(".")[0]
    return first if first.startswith("layer") else "stem"
