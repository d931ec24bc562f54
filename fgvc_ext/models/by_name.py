"""Backbones by name: images [N,3,H,W] → features [N,C,h,w]."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fgvc_ext.models.backbone import IMAGENET, Backbone
from fgvc_ext.models.pretrained import load_weights
from fgvc_ext.models.starting_weights import starting_weights
from fgvc_ext.models.timm_backbone import build_timm
from fgvc_ext.models.timm_library import timm_preprocessing
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
    weights: str | Path = "none",
    new_layers: Collection[str] = (),
    stride_on_first_conv: bool = False,
    image_size: int | None = None,
    frozen_until: str | None = None,
    report: Callable[[str], Any] | None = None,
) -> Backbone:
    """Build a feature extractor.

    Args:
        name: a torchvision ResNet, VGG or DenseNet ("resnet50", "vgg16_bn", "densenet169"), "resnet10_narrow" for
            small images on a CPU, or "timm/<name>" where timm is installed: its convolutional networks and
            transformers, see `TimmBackbone`.
        weights: "none" (random), "imagenet" (its library's, downloaded once), or a file, see `load_weights`.
        new_layers: groups of layers that the weights may lack, see `load_weights`.
        stride_on_first_conv: put a bottleneck's stride on its first 1×1 convolution, as Caffe's ResNets have it.
        image_size: side of the images, in pixels, for which a transformer of timm is built: its position embeddings
            are of that size, and those of a weights file are interpolated once. None: the size of its pretraining.
            Most take images of any size then, and interpolate as they go; the others, such as BEiT, need it.
        frozen_until: freeze the groups of layers up to and with this one, see `Backbone.freeze`.
        report: called with a text that tells what was loaded, and what of it did not match.

    Raises:
        ValueError: an unknown name, weights that there are not, or that do not fit. OSError: no such file, or it
            cannot be downloaded.
    """
    source = starting_weights(weights, name)
    backbone: Backbone
    if image_size is not None and not name.startswith("timm/"):
        raise ValueError(f"backbone: {name} takes images of any size: leave out image_size, got {image_size}")
    if name.startswith("timm/"):
        backbone = build_timm(name.removeprefix("timm/"), image_size)
    elif name == "resnet10_narrow":
        backbone = build_resnet10_narrow()
    elif name in available_backbones():
        backbone = build_torchvision(name)
    else:
        raise ValueError(f"backbone: expected one of {', '.join(available_backbones())} or timm/<name>, got {name!r}")
    if stride_on_first_conv:
        move_stride(backbone, name)
    backbone.preprocessing = backbone_preprocessing(name)
    backbone._settings = {"name": name, "stride_on_first_conv": stride_on_first_conv}
    if image_size is not None:
        backbone._settings["image_size"] = image_size
    if source is not None:
        result = load_weights(backbone, source.fetch(), new_layers=new_layers)
        if report is not None:
            report(result.text())
    return backbone.freeze(frozen_until)


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
