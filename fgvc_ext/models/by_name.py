"""Backbones by name: images [N,3,H,W] → features [N,C,h,w]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgvc_ext.models.backbone import IMAGENET, Backbone
from fgvc_ext.models.pretrained import load_weights
from fgvc_ext.models.timm_backbone import build_timm, timm_preprocessing
from fgvc_ext.models.torchvision_backbone import (
    build_resnet10_narrow,
    build_torchvision,
    move_stride,
    torchvision_names,
    torchvision_preprocessing,
)


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
    backbone: Backbone
    if name.startswith("timm/"):
        backbone = build_timm(name.removeprefix("timm/"), pretrained)
    elif name == "resnet10_narrow":
        if pretrained:
            raise ValueError("backbone: resnet10_narrow has no pretrained weights")
        backbone = build_resnet10_narrow()
    elif name in available_backbones():
        backbone = build_torchvision(name, pretrained)
    else:
        raise ValueError(f"backbone: expected one of {', '.join(available_backbones())} or timm/<name>, got {name!r}")
    if stride_on_first_conv:
        move_stride(backbone, name)
    backbone.preprocessing = backbone_preprocessing(name)
    backbone._settings = {"name": name, "stride_on_first_conv": stride_on_first_conv}
    if weights is not None:
        result = load_weights(backbone, weights)
        if report is not None:
            report(result.text())
    return backbone


def available_backbones() -> list[str]:
    """Names that `build_backbone` knows without timm."""
    return ["resnet10_narrow", *torchvision_names()]


def backbone_preprocessing(name: str) -> dict[str, Any]:
    """Mean, std and interpolation of the images with which a backbone's pretrained weights were trained.

    Needs the name only: nothing is built or downloaded. Names without pretrained weights have ImageNet's values.
    """
    if name.startswith("timm/"):
        return timm_preprocessing(name.removeprefix("timm/"))
    return torchvision_preprocessing(name) if name in torchvision_names() else dict(IMAGENET)
