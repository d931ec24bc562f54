"""Where boxes and points of an image lie in the crop that a network is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class CentreCrop:
    """Shorter side to `resize` pixels, then the central `crop` × `crop`: the frame of `data.eval_transform`.

    Without `keep_ratio` both sides become `resize` pixels long.
    """

    resize: int
    crop: int
    keep_ratio: bool = True

    def image(self, image: Tensor) -> Tensor:
        """The crop of a uint8 image [3,H,W], to be shown: uint8 [3,crop,crop]."""
        height, width = self._resized(*image.shape[-2:])
        resized = F.interpolate(
            image[None].float(), size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
        top, left = self._offset(height), self._offset(width)
        part = resized[0, :, top : top + self.crop, left : left + self.crop]
        return part.round().clamp(0, 255).to(torch.uint8)

    def points(self, points: Tensor, height: int, width: int) -> Tensor:
        """Points [...,2] xy of an image of this size, in pixels of the crop; what lies outside is not changed."""
        resized = self._resized(height, width)
        scale = torch.tensor([resized[1] / width, resized[0] / height], dtype=torch.float64)
        offset = torch.tensor([self._offset(resized[1]), self._offset(resized[0])], dtype=torch.float64)
        return (points.double() * scale - offset).to(points.dtype)

    def boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Boxes [...,4] xyxy of an image of this size, in pixels of the crop and cut to it."""
        corners = self.points(boxes.reshape(*boxes.shape[:-1], 2, 2), height, width)
        return corners.clamp(0, self.crop).flatten(-2)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not self.keep_ratio:
            return self.resize, self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def _offset(self, length: int) -> int:
        return round((length - self.crop) / 2)
