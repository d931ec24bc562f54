"""Where the object is, for "ELoPE" (Hanselmann and Ney, 2020, section 5): heat maps, boxes around them, their crops."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import build_backbone
from fgvc_ext.models.model import Explanation, Model, backbone_groups
from fgvc_ext.ops import heatmap_to_boxes

INPUT_SIDE = 64
"""Pixels a side that the localisation module sees of an image, whatever the image's size (section 5)."""
FIRST_STAGE = ("conv1", "bn1", "relu", "maxpool", "layer1")
"""What the module takes of a ResNet: everything up to the end of its first residual stage."""


def resized_to(images: Tensor, side: int) -> Tensor:
    """Images [N,3,H,W] as [N,3,side,side], squeezed bilinearly with antialias; those of this size are left alone."""
    if images.shape[-2] == side and images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The parts of images within boxes, resized bilinearly to squares: one call for a batch, differentiable.

    Output pixel i of a line lies at x1 + (i + 1/2)·(x2 − x1)/size of the image, whose own pixel j has its centre at
    j + 1/2. Beyond the image its border values go on. These are the values of `grid_sample` (bilinear, border, no
    aligned corners), a line after the other: its coordinates from −1 to 1 are, in float32 and at 448 pixels, too coarse
    to give an image back to 1e-5. A box more than twice as long as `size` loses pixels: there is no antialias.

    Args:
        images: float [N,3,H,W]; half precision is computed in float32.
        boxes: [N,4] xyxy in pixels of the images.
        size: side of the result in pixels.

    Returns:
        [N,3,size,size] in the images' dtype. The whole image at its own size is the image.

    Raises:
        ValueError: arguments of another shape.
    """
    if images.dim() != 4 or boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.shape[0] != images.shape[0] or size < 1:
        raise ValueError(
            "crop_and_resize: expected images [N,3,H,W], boxes [N,4] and a size of at least 1, got "
            f"{list(images.shape)}, {list(boxes.shape)} and {size}"
        )
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    x1, y1, x2, y2 = boxes.to(wide.dtype).unbind(1)
    return _resampled(_resampled(wide, y1, y2, size, 2), x1, x2, size, 3).to(images.dtype)


def _resampled(images: Tensor, low: Tensor, high: Tensor, size: int, axis: int) -> Tensor:
    """`size` samples between `low` [N] and `high` [N] along an axis of images [N,C,H,W], bilinear."""
    last = images.shape[axis] - 1
    steps = torch.arange(size, dtype=images.dtype, device=images.device) + 0.5
    places = (low[:, None] + steps * ((high - low) / size)[:, None] - 0.5).clamp(0, last)
    before = places.floor()
    shape = [-1, 1, 1, 1]
    shape[axis] = size
    share, first = (places - before).view(shape), before.long().view(shape)
    second = (first + 1).clamp(max=last)
    whole = list(images.shape)
    whole[axis] = size
    return torch.lerp(images.gather(axis, first.expand(whole)), images.gather(axis, second.expand(whole)), share)


def paste_back(maps: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Maps [N,K,h,w] of crops as maps [N,K,2h,2w] of the images that they were cut from.

    Args:
        boxes: [N,4] xyxy in pixels of the images, whose height and width are `image_size`.

    Outside its box a map has its own lowest value.
    """
    height, width = maps.shape[-2:]
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes.to(maps.dtype).unbind(1))

    def along(cells: int, length: int, low: Tensor, high: Tensor) -> Tensor:
        centres = (torch.arange(cells, dtype=maps.dtype, device=maps.device) + 0.5) * (length / cells)
        return (centres - low) / (high - low) * 2 - 1

    x, y = along(2 * width, image_size[1], x1, x2), along(2 * height, image_size[0], y1, y2)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    found = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None]
    return torch.where(inside, found, maps.amin((2, 3), keepdim=True))


class Localiser(Model):
    """A heat map of where the object is, and the box around it. No classifier.

    Args:
        threshold: τ, the share of a heat map's range that the box's positions exceed; paper: 0.3 on CUB-200, 0.2 on
            Cars and Aircraft.
        min_size: the smallest side of a box in pixels of the image; below it the box is the whole image.
    """

    is_classifier = False

    def __init__(self, preprocessing: Preprocessing, threshold: float, min_size: float) -> None:
        super().__init__(preprocessing)
        self.threshold, self.min_size = threshold, min_size

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] of any size → heat maps [N,h,w]."""
        raise NotImplementedError

    def boxes(self, images: Tensor) -> Tensor:
        """The box [N,4] xyxy of each image, in its pixels; the whole image where nothing stands out."""
        size = (images.shape[-2], images.shape[-1])
        return heatmap_to_boxes(self(images), threshold=self.threshold, image_size=size, min_size=self.min_size)

    def explain(self, images: Tensor) -> Explanation:
        """The heat maps [N,1,h,w] and the boxes [N,1,4]."""
        return Explanation({"heat map": self(images)[:, None]}, {"object": self.boxes(images)[:, None]})

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "min_size": self.min_size}


class LocalisationModule(Localiser, method="elope_localisation_module"):
    """The light module that predicts a classifier's mean feature map: about 220,000 parameters at 64 × 64 pixels.

    The layers of a ResNet up to the end of its first residual stage, and a 3×3 convolution without padding to one
    channel: heat maps of 14 × 14.

    Args:
        backbone: whose layers are copied with their weights, where it is one of torchvision's ResNets or
            resnet10_narrow. Of another one nothing is copied: the module then has those of a new ResNet-50.
    """

    def __init__(self, backbone: Backbone, *, threshold: float = 0.3, min_size: float = 10.0) -> None:
        super().__init__(_thumbnails(backbone), threshold, min_size)
        source = backbone
        if not all(hasattr(backbone, name) for name in FIRST_STAGE):
            source = build_backbone("resnet50")
        # Copies, and they shall learn: a classifier's own first layers may be frozen.
        layers = {name: copy.deepcopy(getattr(source, name)) for name in FIRST_STAGE}
        self.stem = nn.Sequential(*layers.values()).requires_grad_(True)
        self._stem = {name: source.settings()[name] for name in ("name", "stride_on_first_conv")}
        channels = [module.num_features for module in self.stem.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        self.heat = nn.Conv2d(channels, 1, kernel_size=3)

    def forward(self, images: Tensor) -> Tensor:
        return self.heat(self.stem(resized_to(images, INPUT_SIDE)))[:, 0]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"stem": list(self.stem.parameters()), "heat": list(self.heat.parameters())}

    def settings(self) -> dict[str, Any]:
        return {"stem": dict(self._stem), **super().settings()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> LocalisationModule:
        options = dict(settings)
        return cls(build_backbone(**options.pop("stem")), **options)


class MeanFeatureMap(Localiser, method="elope_mean_feature_map"):
    """A trained classifier's last feature map, averaged over its channels: what the module learns, at a whole pass.

    Args:
        backbone: of the trained classifier.
        size: pixels a side that it sees of an image.
    """

    def __init__(self, backbone: Backbone, size: int, *, threshold: float = 0.3, min_size: float = 10.0) -> None:
        super().__init__(Preprocessing(size, size, keep_ratio=False, **backbone.preprocessing), threshold, min_size)
        self.backbone, self.size = backbone, size

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(resized_to(images, self.size)).mean(1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return backbone_groups(self.backbone)

    def settings(self) -> dict[str, Any]:
        return {"backbone": self.backbone.settings(), "size": self.size, **super().settings()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> MeanFeatureMap:
        options = dict(settings)
        return cls(build_backbone(**options.pop("backbone")), **options)


def _thumbnails(backbone: Backbone) -> Preprocessing:
    return Preprocessing(INPUT_SIDE, INPUT_SIDE, keep_ratio=False, **backbone.preprocessing)


LOCALISERS: dict[str, type[LocalisationModule] | type[MeanFeatureMap]] = {
    kind.method: kind for kind in (LocalisationModule, MeanFeatureMap)
}
