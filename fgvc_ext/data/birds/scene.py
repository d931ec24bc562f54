"""Backgrounds, perches and foliage of the synthetic birds. Cluttered on purpose: the colours of beaks, bars and bibs
also occur on berries, flowers and leaves, so that no colour alone gives a class away."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .species import pick

Color = tuple[int, int, int]
Point = tuple[float, float]

# Each place: colours from top to bottom, colours of the blurred blobs, foliage colours.
_PLACES: list[tuple[list[Color], list[Color], list[Color]]] = [
    ([(122, 172, 216), (190, 214, 228), (226, 226, 210)], [(240, 244, 246), (150, 188, 150)], [(96, 140, 70)]),
    ([(30, 52, 40), (58, 92, 58), (40, 62, 36)], [(120, 160, 84), (196, 210, 130), (22, 40, 30)], [(70, 120, 56)]),
    ([(186, 206, 150), (138, 174, 92), (92, 132, 60)], [(226, 220, 130), (110, 156, 70)], [(88, 138, 52)]),
    (
        [(206, 160, 96), (170, 110, 62), (104, 66, 44)],
        [(236, 176, 82), (196, 92, 48)],
        [(198, 112, 44), (222, 162, 60)],
    ),
    ([(116, 96, 144), (208, 142, 140), (242, 196, 150)], [(250, 214, 170), (140, 104, 140)], [(84, 82, 70)]),
    ([(176, 196, 200), (142, 164, 166), (102, 122, 116)], [(206, 218, 218), (110, 130, 110)], [(120, 136, 84)]),
    ([(226, 230, 232), (198, 206, 212), (168, 178, 186)], [(246, 248, 250), (150, 160, 170)], [(110, 122, 112)]),
    ([(74, 98, 116), (92, 120, 112), (66, 84, 66)], [(150, 170, 140), (48, 66, 72)], [(74, 108, 74)]),
]
_ACCENTS: list[Color] = [(206, 44, 38), (238, 186, 44), (242, 240, 232), (236, 134, 40), (70, 110, 200), (34, 30, 34)]
_BARK: list[Color] = [(104, 78, 58), (82, 68, 60), (134, 110, 84), (150, 140, 128), (92, 62, 46)]


def jitter(color: Color, random: Random, amount: float) -> Color:
    """The colour a little brighter or darker and a little shifted."""
    gain = 1 + amount * (2 * random.random() - 1)
    return tuple(
        min(255, max(0, round(channel * gain * (1 + 0.4 * amount * (2 * random.random() - 1))))) for channel in color
    )  # type: ignore[return-value]


def mix(first: Color, second: Color, share: float) -> Color:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def uniform(random: Random, low: float, high: float) -> float:
    return low + (high - low) * random.random()


class Scene:
    """One place: paints its background, and foliage in its colours. `size`: pixels of the square canvas."""

    def __init__(self, size: int, random: Random) -> None:
        self.size, self.random = size, random
        sky, blobs, foliage = pick(_PLACES, random)
        self.sky = [jitter(color, random, 0.15) for color in sky]
        self.blobs, self.foliage = blobs, foliage
        self.bark = jitter(pick(_BARK, random), random, 0.2)

    def background(self) -> Image.Image:
        """Gradient, out-of-focus blobs, twigs and leaves; all blurred, so painted small and enlarged."""
        random, coarse, small = self.random, 48, 112
        image = self._gradient(coarse)
        draw = ImageDraw.Draw(image)
        for _ in range(4 + int(random.random() * 6)):
            self._disc(draw, coarse, uniform(random, 0.10, 0.32), jitter(pick(self.blobs, random), random, 0.2))
        image = image.filter(ImageFilter.GaussianBlur(uniform(random, 2.5, 4.5)))
        image = image.resize((small, small), Image.Resampling.BICUBIC)
        lights = image.copy()
        draw = ImageDraw.Draw(lights)
        for _ in range(int(random.random() * 14)):
            self._disc(draw, small, uniform(random, 0.02, 0.07), jitter(pick(self.blobs, random), random, 0.25))
        for _ in range(int(random.random() * 5)):
            self._disc(draw, small, uniform(random, 0.012, 0.035), jitter(pick(_ACCENTS, random), random, 0.1))
        image = Image.blend(image, lights.filter(ImageFilter.GaussianBlur(1.0)), uniform(random, 0.35, 0.75))
        far = image.copy()
        draw = ImageDraw.Draw(far)
        for _ in range(2 + int(random.random() * 5)):
            self._twig(draw, small, uniform(random, 0.006, 0.02))
        image = Image.blend(image, far.filter(ImageFilter.GaussianBlur(uniform(random, 1.1, 2.2))), 0.75)
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _gradient(self, small: int) -> Image.Image:
        tilt = uniform(self.random, -0.35, 0.35)
        rows = np.linspace(0, 1, small, dtype=np.float64)
        height = np.clip(rows[:, None] + tilt * (rows[None, :] - 0.5), 0, 1)[..., None]
        top, middle, bottom = (np.array(color, dtype=np.float64) for color in self.sky)
        upper = top + (middle - top) * np.minimum(2 * height, 1)
        pixels = upper + (bottom - upper) * np.maximum(2 * height - 1, 0)
        return Image.fromarray(np.rint(pixels).astype(np.uint8))

    def _disc(self, draw: ImageDraw.ImageDraw, size: int, radius: float, color: Color) -> None:
        x, y, r = self.random.random() * size, self.random.random() * size, radius * size
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def _twig(self, draw: ImageDraw.ImageDraw, size: int, width: float) -> None:
        random = self.random
        x, y, angle = random.random() * size, random.random() * size, random.random() * 2 * math.pi
        color = jitter(mix(self.bark, self.sky[1], 0.35), random, 0.2)
        for _ in range(5):
            angle += uniform(random, -0.35, 0.35)
            end = (x + 0.16 * size * math.cos(angle), y + 0.16 * size * math.sin(angle))
            draw.line((x, y, *end), fill=color, width=max(1, round(width * size)))
            if random.random() < 0.6:
                leaf(
                    draw,
                    end,
                    0.07 * size,
                    angle + uniform(random, -1, 1),
                    jitter(pick(self.foliage, random), random, 0.3),
                )
            x, y = end

    def perch(self, image: Image.Image, foot: Point, tilt: float, width: float) -> None:
        """A branch through `foot`, lit from above, with side twigs and leaves. `width` in pixels, `tilt` in radians."""
        random, draw = self.random, ImageDraw.Draw(image)
        for _ in range(1 + int(random.random() * 3)):
            self._side_twig(draw, foot, tilt, width)
        steps, points = 9, []
        for i in range(steps + 1):
            along = (i / steps - 0.5) * 2.6 * self.size
            wave = 0 if abs(along) < 0.15 * self.size else uniform(random, -0.10, 0.10) * width
            points.append((foot[0] + along * math.cos(tilt), foot[1] + along * math.sin(tilt) + wave + width * 0.45))
        taper = uniform(random, -0.35, 0.35)
        widths = [width * (1 + taper * (i / steps - 0.5)) for i in range(steps + 1)]
        bands = ((0.5, 0.55), (0.36, 0.8), (0.18, 1.0), (-0.02, 1.18), (-0.24, 1.38))
        for lower, gain in bands:  # from the shaded underside to the lit upper edge
            color: Color = tuple(min(255, round(c * gain)) for c in self.bark)  # type: ignore[assignment]
            top = [(x, y - w / 2) for (x, y), w in zip(points, widths, strict=True)]
            bottom = [(x, y + lower * w) for (x, y), w in zip(points, widths, strict=True)]
            draw.polygon(top + bottom[::-1], fill=color)
        for _ in range(14):
            share, along = uniform(random, -0.4, 0.4), uniform(random, -0.7, 0.7) * self.size
            x = foot[0] + along * math.cos(tilt)
            y = foot[1] + along * math.sin(tilt) + (0.45 + share) * width
            length = uniform(random, 0.02, 0.06) * self.size
            end = (x + length * math.cos(tilt), y + length * math.sin(tilt))
            draw.line((x, y, *end), fill=jitter(mix(self.bark, (20, 14, 10), 0.45), random, 0.3), width=2)

    def _side_twig(self, draw: ImageDraw.ImageDraw, foot: Point, tilt: float, width: float) -> None:
        random = self.random
        side = 1 if random.random() < 0.5 else -1
        along = side * uniform(random, 0.2, 0.5) * self.size
        x, y = foot[0] + along * math.cos(tilt), foot[1] + along * math.sin(tilt) + 0.4 * width
        angle = tilt + (0 if side > 0 else math.pi) + uniform(random, -1.1, 1.1)
        for step in range(4):
            angle += uniform(random, -0.25, 0.25)
            end = (x + 0.09 * self.size * math.cos(angle), y + 0.09 * self.size * math.sin(angle))
            draw.line((x, y, *end), fill=self.bark, width=max(2, round(width * (0.3 - 0.06 * step))))
            for turn in (-0.9, 0.9):
                if random.random() < 0.6:
                    color = jitter(pick(self.foliage, random), random, 0.3)
                    leaf(draw, end, uniform(random, 0.05, 0.10) * self.size, angle + turn, color)
            x, y = end
        if random.random() < 0.5:
            r = uniform(random, 0.012, 0.024) * self.size
            for _ in range(1 + int(random.random() * 3)):
                berry(draw, (x + uniform(random, -3, 3) * r, y + uniform(random, 0, 3) * r), r, pick(_ACCENTS, random))

    def foreground(self, image: Image.Image, mask: Image.Image, spot: Point) -> None:
        """A few leaves in front of the bird around `spot`; also drawn into `mask` (L)."""
        random, draw, cover = self.random, ImageDraw.Draw(image), ImageDraw.Draw(mask)
        for _ in range(1 + int(random.random() * 3)):
            base = (spot[0] + uniform(random, -0.1, 0.1) * self.size, spot[1] + uniform(random, -0.05, 0.1) * self.size)
            length, angle = uniform(random, 0.10, 0.18) * self.size, random.random() * 2 * math.pi
            leaf(draw, base, length, angle, jitter(pick(self.foliage, random), random, 0.3))
            cover.polygon(_leaf_outline(base, length, angle), fill=255)


def _leaf_outline(base: Point, length: float, angle: float) -> list[Point]:
    cos, sin = math.cos(angle) * length, math.sin(angle) * length
    half = [(0.0, 0.0), (0.2, 0.15), (0.45, 0.2), (0.72, 0.13), (1.0, 0.0)]
    outline = half + [(u, -v) for u, v in half[-2:0:-1]]
    return [(base[0] + u * cos - v * sin, base[1] + u * sin + v * cos) for u, v in outline]


def leaf(draw: ImageDraw.ImageDraw, base: Point, length: float, angle: float, color: Color) -> None:
    """A pointed leaf with a lit half and a midrib."""
    outline = _leaf_outline(base, length, angle)
    draw.polygon(outline, fill=mix(color, (10, 20, 10), 0.22))
    draw.polygon(outline[:5], fill=color)
    draw.line((*outline[0], *outline[4]), fill=mix(color, (235, 240, 200), 0.3), width=max(1, round(length / 28)))


def berry(draw: ImageDraw.ImageDraw, centre: Point, radius: float, color: Color) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=mix(color, (0, 0, 0), 0.3))
    draw.ellipse((x - radius, y - radius, x + 0.6 * radius, y + 0.6 * radius), fill=color)
    draw.ellipse(
        (x - 0.6 * radius, y - 0.6 * radius, x - 0.1 * radius, y - 0.1 * radius), fill=mix(color, (255, 255, 255), 0.6)
    )
