"""Activation maps, suppression masks, boxes and points drawn onto images.

Images are uint8 RGB tensors [3,H,W]; every function returns a new tensor of the same shape and type on the CPU.
Positions are pixels, x before y, measured from the upper left corner.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TypeAlias

import matplotlib
import torch
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

Colour: TypeAlias = str | tuple[float, float, float]
"""Anything matplotlib reads as a colour: "#2166ac", "crimson", (0.1, 0.4, 0.7)."""

COLOUR_MAP = "inferno"
"""Perceptually uniform and rising in lightness: its order survives grey print and colour-blind eyes."""


def heat(map: Tensor) -> Tensor:
    """Scales a map [h,w] to 0..1 by its own minimum and maximum; float32 on the CPU.

    A constant map, and one without any finite value, gives zeros. NaN counts as the minimum, infinities as the
    largest and smallest finite values.
    """
    _require(map.ndim == 2, "heat", "map", "[h,w]", map)
    values = map.detach().to("cpu", torch.float64)
    finite = values[values.isfinite()]
    if finite.numel() == 0:
        return torch.zeros(values.shape)
    low, high = finite.min().item(), finite.max().item()
    if high <= low:
        return torch.zeros(values.shape)
    values = values.nan_to_num(nan=low, posinf=high, neginf=low)
    return ((values - low) / (high - low)).float()


def overlay(image: Tensor, map: Tensor, *, opacity: float = 0.5) -> Tensor:
    """Lays a map [h,w] over an image as colours, from dark (its minimum) to bright yellow (its maximum).

    The map is scaled by `heat` and enlarged bilinearly to the image's size. `opacity` 0 leaves the image as it is, 1
    shows the colours alone. Scaling is each map's own: two overlays show where each map is high, not which is higher.
    """
    _require_image("overlay", image)
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity: expected a number from 0 to 1, got {opacity}")
    enlarged = F.interpolate(heat(map)[None, None], size=image.shape[-2:], mode="bilinear", align_corners=False)
    colours = _colour_table()[(enlarged[0, 0] * 255).round().long()].permute(2, 0, 1)
    mixed = (1 - opacity) * image.cpu().float() + opacity * colours
    return mixed.round().clamp(0, 255).to(torch.uint8)


def draw_mask(image: Tensor, mask: Tensor, *, colour: Colour = "#ffffff", darken: float = 0.7) -> Tensor:
    """Shows which cells of a mask bool [h,w] are True (suppressed): darkened, hatched and outlined.

    Cells are spread over the image without interpolation, so that their borders stay where the operator draws them.
    `darken` is the share of the light that a suppressed cell loses; cells that are False keep their pixels.
    """
    _require_image("draw_mask", image)
    _require(mask.ndim == 2 and mask.dtype == torch.bool and mask.numel() > 0, "draw_mask", "mask", "bool [h,w]", mask)
    height, width = image.shape[-2:]
    rows = torch.arange(height) * mask.shape[0] // height
    columns = torch.arange(width) * mask.shape[1] // width
    hidden = mask.cpu()[rows][:, columns]
    thickness = max(1, min(height, width) // 160)
    ink = (_hatching(height, width, thickness) | _rim(hidden, thickness)) & hidden
    tint = 255 * torch.tensor(to_rgb(colour))[:, None, None]
    base = image.cpu().float()
    dark = torch.where(hidden, (1 - darken) * base, base)
    return torch.where(ink, 0.35 * dark + 0.65 * tint, dark).round().to(torch.uint8)


def draw_boxes(image: Tensor, boxes: Tensor, colour: Colour = "#2fd27d", *, width: int | None = None) -> Tensor:
    """Outlines boxes [M,4] xyxy (one box [4] will do) with a dark edge, which keeps them visible on any background.

    Boxes are cut to the image; one with a coordinate that is not finite, or without area, is left out. `width` is in
    pixels and follows from the image's size by default.
    """
    _require_image("draw_boxes", image)
    boxes = boxes.detach().cpu().double()
    boxes = boxes[None] if boxes.ndim == 1 else boxes
    _require(boxes.ndim == 2 and boxes.shape[1] == 4, "draw_boxes", "boxes", "[M,4] xyxy", boxes)
    line = width or _line_width(image)
    height, breadth = image.shape[-2:]
    limit = torch.tensor([breadth - 1, height - 1] * 2, dtype=boxes.dtype)
    canvas, pen = _canvas(image)
    for box in boxes:
        x1, y1, x2, y2 = box.clamp(min=0).minimum(limit).round().long().tolist() if box.isfinite().all() else [0] * 4
        if x2 > x1 and y2 > y1:
            pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=line + 2)
            pen.rectangle((x1, y1, x2, y2), outline=_rgb(colour), width=line)
    return _tensor(canvas)


def draw_points(image: Tensor, points: Tensor, colour: Colour = "#2fd27d", *, radius: float | None = None) -> Tensor:
    """Rings points [M,2] xy (one point [2] will do) without covering them; points that are not finite are left out.

    `radius` is in pixels and follows from the image's size by default.
    """
    _require_image("draw_points", image)
    points = points.detach().cpu().double()
    points = points[None] if points.ndim == 1 else points
    _require(points.ndim == 2 and points.shape[1] == 2, "draw_points", "points", "[M,2] xy", points)
    line = _line_width(image)
    radius = radius or max(4.0, min(image.shape[-2:]) / 14)
    canvas, pen = _canvas(image)
    for x, y in points[points.isfinite().all(1)].tolist():
        for grown, tone, stroke in ((1, (0, 0, 0), line + 2), (0, _rgb(colour), line)):
            reach = radius + grown
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=tone, width=stroke)
    return _tensor(canvas)


@cache
def _colour_table() -> Tensor:
    return 255 * torch.tensor([matplotlib.colormaps[COLOUR_MAP](level)[:3] for level in range(256)])


def _hatching(height: int, width: int, thickness: int) -> Tensor:
    period = max(6, min(height, width) // 18)
    return (torch.arange(height)[:, None] + torch.arange(width)) % period < thickness


def _rim(hidden: Tensor, thickness: int) -> Tensor:
    """Pixels of `hidden` within `thickness` of a visible one; the image's own edge is no rim."""
    visible = (~hidden).float()[None, None]
    return F.max_pool2d(visible, 2 * thickness + 1, stride=1, padding=thickness)[0, 0] > 0


def _canvas(image: Tensor) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    return canvas, ImageDraw.Draw(canvas)


def _tensor(canvas: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return flat.reshape(canvas.height, canvas.width, 3).permute(2, 0, 1).contiguous()


def _line_width(image: Tensor) -> int:
    return max(1, math.ceil(min(image.shape[-2:]) / 120))


def _rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue


def _require_image(function: str, image: Tensor) -> None:
    suits = image.ndim == 3 and image.shape[0] == 3 and image.dtype == torch.uint8 and image.numel() > 0
    _require(suits, function, "image", "uint8 [3,H,W]", image)


def _require(suits: bool, function: str, argument: str, expected: str, got: Tensor) -> None:
    if not suits:
        raise ValueError(f"{function}: {argument}: expected {expected}, got {got.dtype} {list(got.shape)}")
