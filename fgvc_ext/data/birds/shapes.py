"""Shapes in units of a bird, and a canvas that keeps colour and coverage apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .scene import Color, Point, uniform

Box = tuple[int, int, int, int]
_CIRCLE = [(math.cos(2 * math.pi * k / 24), math.sin(2 * math.pi * k / 24)) for k in range(24)]


class Frame:
    """Maps unit coordinates (x forward, y up) to canvas pixels: turned by `angle`, mirrored by `side`, scaled."""

    def __init__(self, origin: Point, angle: float, scale: float, side: int) -> None:
        self.side, cos, sin = side, math.cos(angle) * scale, math.sin(angle) * scale
        self.x0, self.xx, self.xy = origin[0], side * cos, -side * sin
        self.y0, self.yx, self.yy = origin[1], -sin, -cos

    def __call__(self, x: float, y: float) -> Point:
        return self.x0 + self.xx * x + self.xy * y, self.y0 + self.yx * x + self.yy * y

    def points(self, points: Sequence[Point]) -> list[Point]:
        x0, xx, xy, y0, yx, yy = self.x0, self.xx, self.xy, self.y0, self.yx, self.yy
        return [(x0 + xx * x + xy * y, y0 + yx * x + yy * y) for x, y in points]


def smooth(points: Sequence[Point], steps: int = 5) -> list[Point]:
    """The closed Catmull-Rom curve through the points."""
    return _smooth(tuple(points), steps)


@lru_cache(maxsize=512)
def _smooth(points: tuple[Point, ...], steps: int) -> list[Point]:
    curve, count = [], len(points)
    for i in range(count):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = (points[(i + k) % count] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            a, b = t * (t * (1 - 0.5 * t) - 0.5), 1 + t * t * (1.5 * t - 2.5)
            c, d = t * (0.5 + t * (2 - 1.5 * t)), 0.5 * t * t * (t - 1)
            curve.append((a * ax + b * bx + c * cx + d * dx, a * ay + b * by + c * cy + d * dy))
    return curve


def circle(frame: Frame, x: float, y: float, radius: float) -> list[Point]:
    return frame.points([(x + radius * u, y + radius * v) for u, v in _CIRCLE])


class Canvas:
    """A square RGB picture `color` with its coverage `cover` (L); `unit`: the pixels of one unit of length."""

    def __init__(self, size: int, unit: float, color: Color) -> None:
        self.size, self.unit = size, unit
        self.color = Image.new("RGB", (size, size), color)
        self.cover = Image.new("L", (size, size), 0)
        self.ink, self.cut = ImageDraw.Draw(self.color), ImageDraw.Draw(self.cover)

    def fill(self, outline: Sequence[Point], color: Color, within: Image.Image | None = None) -> None:
        """A polygon into colour and coverage; with `within`, only into the colour under that mask."""
        if within is not None:
            self.fill_all([outline], color, within)
            return
        self.ink.polygon(list(outline), fill=color)
        self.cut.polygon(list(outline), fill=255)

    def fill_all(self, outlines: Sequence[Sequence[Point]], color: Color, within: Image.Image) -> None:
        """Polygons into the colour under the mask `within`, through one stencil of their size."""
        box = self.bounds([point for outline in outlines for point in outline])
        if box is not None:
            stencil = Image.new("L", (box[2] - box[0], box[3] - box[1]), 0)
            draw = ImageDraw.Draw(stencil)
            for outline in outlines:
                draw.polygon([(x - box[0], y - box[1]) for x, y in outline], fill=255)
            self.color.paste(color, box, ImageChops.darker(stencil, within.crop(box)))

    def bounds(self, outline: Sequence[Point], margin: float = 0) -> Box | None:
        """The canvas pixels that the outline can touch; None where it lies outside."""
        xs, ys = [x for x, _ in outline], [y for _, y in outline]
        x0, y0 = max(0, int(min(xs) - margin)), max(0, int(min(ys) - margin))
        x1, y1 = min(self.size, int(max(xs) + margin) + 2), min(self.size, int(max(ys) + margin) + 2)
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def shape(self, *outlines: Sequence[Point], blurs: Sequence[float] = ()) -> Image.Image:
        """A mask of the outlines, then blurred by each of `blurs` (units)."""
        mask = Image.new("L", (self.size, self.size), 0)
        for outline in outlines:
            ImageDraw.Draw(mask).polygon(list(outline), fill=255)
        self.blur(
            mask, self.bounds([point for outline in outlines for point in outline], sum(blurs) * self.unit), blurs
        )
        return mask

    def blur(self, mask: Image.Image, box: Box | None, blurs: Sequence[float]) -> None:
        if box is not None and blurs:
            region = mask.crop(box)
            for radius in blurs:
                region = region.filter(ImageFilter.BoxBlur(radius * self.unit))
            mask.paste(region, box)

    def tint(self, color: Color, mask: Image.Image) -> None:
        """The colour where the mask is; like `Image.paste`, but only over the mask's own box."""
        box = mask.getbbox()
        if box is not None:
            self.color.paste(color, box, mask.crop(box))

    def disc(
        self, frame: Frame, x: float, y: float, radius: float, color: Color, within: Image.Image | None = None
    ) -> None:
        self.fill(circle(frame, x, y, radius), color, within)

    def width(self, units: float) -> int:
        return max(1, round(units * self.unit))

    def lit(self, random: Random) -> Image.Image:
        """The colours under a light from above: bright where the rounded form faces it, dark underneath."""
        x0, y0, x1, y1 = self.cover.getbbox() or (0, 0, self.size, self.size)
        box = (x0, y0, x1, y1)
        form = self.cover.copy()
        self.blur(form, self.bounds([(x0, y0), (x1, y1)], 0.4 * self.unit), (0.22, 0.16))
        slant = uniform(random, -0.16, 0.16) * self.unit
        rise = 0.20 * self.unit
        lower = ImageChops.offset(form, round(-slant), round(-rise)).crop(box)
        upper = ImageChops.offset(form, round(slant), round(rise)).crop(box)
        relief = (np.asarray(lower, dtype=np.float32) - np.asarray(upper, dtype=np.float32)) / 255
        strength = uniform(random, 0.45, 0.8)
        grain = _grain(random, relief.shape)
        light = 1.0 + strength * relief + grain
        pixels = np.asarray(self.color.crop(box), dtype=np.float32) * light[..., None]
        pixels += np.maximum(relief, 0)[..., None] * 22
        self.color.paste(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), box[:2])
        return self.color


def _grain(random: Random, shape: tuple[int, int]) -> np.ndarray:
    """Soft mottling of the plumage, about +-6 %."""
    coarse = np.random.RandomState(int(random.random() * 2**32)).randint(0, 256, (28, 28)).astype(np.uint8)
    field = Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return (np.asarray(field, dtype=np.float32) - 128) / 128 * 0.06
