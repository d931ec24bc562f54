"""One synthetic bird: its shape, its plumage and the parts that tell its species, drawn with Pillow.

The bird is built in units of half its body length, looking to the right, then turned, mirrored, scaled and placed.
Colour and coverage are painted apart; the light is computed from the blurred coverage, which gives a rounded body.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .scene import Color, Point, Scene, jitter, mix, uniform
from .shapes import Canvas, Frame, circle, smooth
from .species import PARTS, Looks

SUPERSAMPLING = 2
"""Canvas pixels a side for one image pixel: the drawing's antialiasing."""

_BLACK, _WHITE, _RED, _GOLD = (32, 29, 32), (244, 243, 236), (204, 48, 40), (240, 190, 48)
_PLUMAGE: dict[str, tuple[Color, Color]] = {  # back, belly
    "russet": (((158, 92, 56)), (232, 204, 172)),
    "slate": ((88, 102, 122), (216, 220, 222)),
    "olive": ((124, 126, 66), (226, 216, 150)),
    "umber": ((112, 86, 68), (220, 204, 186)),
    "azure": ((62, 112, 172), (224, 214, 198)),
    "fawn": ((190, 160, 120), (240, 230, 212)),
    "moss": ((78, 124, 84), (214, 222, 182)),
    "plum": ((112, 76, 104), (222, 200, 206)),
}
_BEAKS: dict[str, tuple[str, Color]] = {
    "cone-horn": ("cone", (186, 164, 138)),
    "cone-red": ("cone", (216, 66, 44)),
    "dagger-black": ("dagger", (46, 42, 46)),
    "dagger-yellow": ("dagger", (244, 192, 44)),
    "hook-black": ("hook", (46, 42, 46)),
    "curved-orange": ("curved", (236, 128, 40)),
}
# Upper edge from the base to the tip, then the lower edge back; the gape line runs from the middle of the base.
_BEAK_SHAPES: dict[str, list[Point]] = {
    "cone": [(0.26, 0.25), (0.50, 0.20), (0.74, -0.02), (0.55, -0.12), (0.26, -0.17)],
    "dagger": [(0.28, 0.14), (0.60, 0.08), (1.12, -0.02), (0.60, -0.08), (0.28, -0.12)],
    "hook": [
        (0.26, 0.22),
        (0.48, 0.23),
        (0.66, 0.14),
        (0.76, -0.01),
        (0.75, -0.24),
        (0.64, -0.09),
        (0.50, -0.15),
        (0.26, -0.16),
    ],
    "curved": [(0.28, 0.14), (0.60, 0.13), (0.90, -0.03), (1.12, -0.36), (0.84, -0.15), (0.56, -0.03), (0.28, -0.10)],
}


@dataclass
class Bird:
    """One finished image and what is known about it, in image pixels."""

    image: Image.Image
    box: tuple[float, float, float, float]
    """xyxy of the visible bird."""
    parts: list[tuple[float, float, float]]
    """(x, y, visible) of each of `PARTS`."""


def draw_bird(looks: Looks, image_size: int, random: Random) -> Bird:
    """One bird of a species in a random place, pose and light; everything random comes from `random`."""
    return _Painter(looks, image_size * SUPERSAMPLING, random).paint(image_size)


class _Painter(Canvas):
    def __init__(self, looks: Looks, size: int, random: Random) -> None:
        self.looks, self.random = looks, random
        self.scene = Scene(size, random)
        unit = size * uniform(random, 0.165, 0.235)
        side = 1 if random.random() < 0.5 else -1
        centre = (size * uniform(random, 0.42, 0.58) - side * 0.02 * size, size * uniform(random, 0.44, 0.60))
        pitch = uniform(random, -0.05, 0.75)
        self.body = Frame(centre, pitch, unit, side)
        neck = self.body(0.62, 0.42)
        nod = uniform(random, -0.25, 0.35)
        gaze = -side if random.random() < 0.15 else side  # some look back over the shoulder
        lean = 0.75 * pitch + 0.55 + uniform(random, -0.15, 0.15)
        reach = 0.36 * unit
        head = (neck[0] + side * reach * math.cos(lean), neck[1] - reach * math.sin(lean))
        self.head = Frame(head, nod, unit, gaze)
        self.tail = Frame(self.body(-0.92, 0.10), pitch * 0.8 + uniform(random, -0.25, 0.2), unit, side)
        back, belly = _PLUMAGE[looks["body"]]
        self.back, self.belly = jitter(back, random, 0.16), jitter(belly, random, 0.06)
        self.dark = mix(self.back, (18, 16, 20), 0.5)
        super().__init__(size, unit, self.back)

    # -- the picture

    def paint(self, image_size: int) -> Bird:
        random, size = self.random, self.size
        canvas = self.scene.background()
        tilt = uniform(random, -0.22, 0.22)
        foot = self.body(-0.05, -1.02)
        self.scene.perch(canvas, foot, tilt, uniform(random, 0.16, 0.30) * self.unit)
        self.paint_tail()
        self.paint_body()
        self.paint_breast()
        self.paint_wing()
        self.paint_head()
        bird = self.lit(random)
        legs = self.paint_legs(canvas, foot, tilt)
        area = self.cover.getbbox() or (0, 0, size, size)
        canvas.paste(bird.crop(area), area, self.cover.crop(area))
        for leg in legs:
            self.cut.line(leg, 255, self.width(0.065))
        hidden = Image.new("L", (size, size), 0)
        if random.random() < 0.3:
            self.scene.foreground(
                canvas, hidden, (uniform(random, 0.2, 0.8) * size, uniform(random, 0.45, 0.95) * size)
            )
        box = ImageChops.subtract(self.cover, hidden).point(lambda v: 255 if v > 127 else 0).getbbox()
        image = self.developed(canvas.reduce(SUPERSAMPLING))
        assert box is not None, "the bird is always larger than what hides it"
        return Bird(image, tuple(edge / SUPERSAMPLING for edge in box), self.part_positions(hidden))  # type: ignore[arg-type]

    def part_positions(self, hidden: Image.Image) -> list[tuple[float, float, float]]:
        tail_length = 0.95 if self.looks["tail"] == "long" else 0.6
        where = {
            "body": self.body(-0.1, 0.0),
            "beak": self.head(0.52, 0.02),
            "crown": self.head(-0.03, 0.34),
            "eye": self.head(0.12, 0.08),
            "breast": self.body(0.68, -0.12),
            "wing": self.body(-0.05, 0.12),
            "tail": self.tail(-tail_length, 0.0),
        }
        positions = []
        for part in PARTS:
            x, y = where[part]
            inside = 0 <= x < self.size and 0 <= y < self.size
            seen = inside and hidden.getpixel((int(x), int(y))) == 0
            positions.append((x / SUPERSAMPLING, y / SUPERSAMPLING, float(seen)))
        return positions

    # -- the parts

    def paint_tail(self) -> None:
        look, at = self.looks["tail"], self.tail
        length = 1.55 if look == "long" else 1.0
        spread = {"long": 0.13, "forked": 0.24, "white-tip": 0.26, "banded": 0.26}.get(look, 0.17)
        feathers = [-1.0, -0.5, 0.5, 1.0, 0.0]
        for k, turn in enumerate(feathers):
            reach = length * (0.72 + 0.34 * abs(turn) if look == "forked" else 1 - 0.05 * abs(turn))
            y = turn * spread
            outline = [
                (0.2, 0.12),
                (-0.35, y * 0.5 + 0.12),
                (-reach + 0.12, y + 0.095),
                (-reach, y),
                (-reach + 0.12, y - 0.095),
                (-0.35, y * 0.5 - 0.12),
                (0.2, -0.12),
            ]
            shade = mix(self.dark, self.back, 0.15 + 0.14 * k)
            self.fill(at.points(smooth(outline, 3)), shade)
            self.ink.line([at(-0.2, y * 0.4), at(-reach + 0.04, y)], mix(shade, (0, 0, 0), 0.3), 1)
        across = self.cover.copy()
        if look == "white-tip":
            self.fill(
                at.points([(-length - 0.1, 0.6), (-0.74, 0.6), (-0.68, 0), (-0.74, -0.6), (-length - 0.1, -0.6)]),
                _WHITE,
                across,
            )
        if look == "banded":
            for x in (-0.38, -0.64, -0.90):
                self.fill(
                    at.points([(x, 0.6), (x, -0.6), (x - 0.12, -0.6), (x - 0.12, 0.6)]), mix(_GOLD, _WHITE, 0.6), across
                )

    def paint_body(self) -> None:
        at, head = self.body, self.head
        egg = [
            (-1.12, 0.12),
            (-0.62, 0.40),
            (0.0, 0.53),
            (0.5, 0.50),
            (0.85, 0.22),
            (0.93, -0.12),
            (0.70, -0.47),
            (0.22, -0.63),
            (-0.4, -0.50),
            (-0.88, -0.18),
        ]
        neck = [at(0.0, 0.46), head(-0.36, 0.12), head(0.30, -0.20), at(0.90, 0.0), at(0.4, -0.2)]
        # Blurring and cutting at half melts head, neck and body into one outline.
        self.torso = self.shape(at.points(smooth(egg)), circle(head, 0, 0, 0.415), neck, blurs=(0.10, 0.07))
        self.torso = self.torso.point([min(255, max(0, (v - 112) * 8)) for v in range(256)])
        self.cover.paste(255, mask=self.torso)
        self.tint(self.back, self.torso)
        under = [(-1.1, -0.1), (-0.3, -0.14), (0.35, -0.05), (0.8, 0.25), (1.2, 0.2), (1.1, -0.9), (-0.6, -0.9)]
        throat = circle(head, 0.22, -0.38, 0.26) if head.side == at.side else circle(at, 0.7, 0.2, 0.2)
        pale = ImageChops.darker(self.shape(at.points(under), throat, blurs=(0.12,)), self.torso)
        self.tint(self.belly, pale)

    def paint_breast(self) -> None:
        look, at, random = self.looks["breast"], self.body, self.random
        # Drawn whatever the look: two species from one random stream differ in their parts alone.
        places = [
            (
                0.26 + 0.15 * column + 0.07 * (row % 2) + uniform(random, -0.03, 0.03),
                0.18 - 0.15 * row + uniform(random, -0.03, 0.03),
            )
            for row in range(5)
            for column in range(5)
        ]
        bib_color = jitter((206, 66, 40) if look == "red-bib" else (240, 188, 50), random, 0.08)
        if look == "spots":
            self.fill_all([circle(at, x, y, 0.05) for x, y in places], _BLACK, self.torso)
        if look == "streaks":
            streak = [(-0.02, 0.1), (0.035, 0.0), (-0.02, -0.1), (-0.06, 0.0)]
            marks = [at.points([(x + u, y + v) for u, v in streak]) for x, y in places]
            self.fill_all(marks, (92, 58, 40), self.torso)
        if look == "black-band":
            band = [(0.30, 0.24), (0.60, 0.10), (1.2, 0.16), (1.2, -0.12), (0.62, -0.13), (0.30, 0.06)]
            self.fill(at.points(smooth(band)), _BLACK, self.torso)
        if look in ("red-bib", "gold-bib"):
            bib = [(0.42, 0.40), (0.80, 0.62), (1.2, 0.3), (1.1, -0.35), (0.62, -0.42), (0.40, -0.05)]
            mask = self.shape(at.points(smooth(bib)), blurs=(0.05,))
            self.tint(bib_color, ImageChops.darker(mask, self.torso))

    def paint_wing(self) -> None:
        look, at, random = self.looks["wing"], self.body, self.random
        droop = uniform(random, -0.06, 0.06)
        tip = (-1.42, -0.06 + droop)
        wing = [
            (0.52, 0.30),
            (0.56, 0.05),
            (0.36, -0.20),
            (-0.1, -0.32),
            (-0.70, -0.24 + droop),
            tip,
            (-0.85, 0.16),
            (-0.3, 0.42),
            (0.2, 0.44),
        ]
        outline = at.points(smooth(wing))
        color = mix(self.back, self.dark, 0.18)
        self.fill(outline, mix(self.dark, self.back, 0.2))  # a darker rim under the wing, seen where the feathers end
        mask = self.shape(at.points(smooth([(x * 0.98, y * 0.94 + 0.015) for x, y in wing])))
        self.tint(color, mask)
        for k in range(7):  # long flight feathers, fanning to the wing tip
            share = k / 6
            start, end = (
                (0.05 - 0.30 * share, -0.27 + 0.42 * share),
                (tip[0] + 0.10 + 0.12 * share, tip[1] - 0.03 + 0.10 * share),
            )
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 0.10 + 0.13 * share)
            self.ink.line(at.points([start, middle, end]), self.dark, self.width(0.022))
        for row in range(3):  # coverts: scallops in rows, each with a shaded edge
            for k in range(4):
                x, y = 0.34 - 0.20 * row, 0.29 - 0.125 * k - 0.01 * row
                scallop = smooth(
                    [
                        (x + 0.06, y + 0.06),
                        (x - 0.12, y + 0.06),
                        (x - 0.15, y),
                        (x - 0.12, y - 0.06),
                        (x + 0.06, y - 0.06),
                    ],
                    2,
                )
                if row:
                    self.ink.polygon(at.points(scallop), mix(color, self.dark, 0.5))
                tone = mix(color, self.belly, 0.10 + 0.06 * row)
                self.ink.polygon(at.points([(px + 0.025, py) for px, py in scallop]), tone)
        if look in ("white-bar", "two-bars"):
            for x in (0.02,) if look == "white-bar" else (0.20, -0.14):
                bar = [
                    (x + 0.05, 0.36),
                    (x + 0.08, 0.0),
                    (x, -0.36),
                    (x - 0.11, -0.36),
                    (x - 0.04, 0.0),
                    (x - 0.07, 0.36),
                ]
                self.fill(at.points(bar), _WHITE, mask)
        if look in ("gold-patch", "blue-patch"):
            patch = [(0.12, 0.10), (0.10, -0.18), (-0.20, -0.26), (-0.52, -0.20), (-0.44, 0.02), (-0.14, 0.12)]
            self.fill(at.points(smooth(patch)), _GOLD if look == "gold-patch" else (44, 92, 214), mask)

    def paint_head(self) -> None:
        at, look = self.head, self.looks["crown"]
        skull = ImageChops.darker(self.shape(circle(at, 0, 0, 0.60)), self.torso)
        caps = {"black-cap": _BLACK, "red-cap": _RED, "crest": self.dark}
        if look == "crest":
            crest = [
                (0.26, 0.30),
                (0.02, 0.50),
                (-0.26, 0.72),
                (-0.55, 0.86),
                (-0.44, 0.58),
                (-0.62, 0.56),
                (-0.44, 0.36),
                (-0.38, 0.14),
                (0, 0.2),
            ]
            self.fill(at.points(crest), self.dark)
        if look in caps:
            cap = [
                (0.50, 0.20),
                (0.25, 0.20),
                (0.0, 0.23),
                (-0.25, 0.16),
                (-0.50, 0.02),
                (-0.6, 0.3),
                (-0.2, 0.6),
                (0.4, 0.5),
            ]
            self.fill(at.points(smooth(cap)), caps[look], skull)
        if look == "white-brow":
            brow = [(0.42, 0.20), (0.15, 0.33), (-0.2, 0.30), (-0.46, 0.12), (-0.2, 0.20), (0.15, 0.22)]
            self.fill(at.points(smooth(brow)), _WHITE, skull)
        if look == "gold-stripe":
            stripe = [(0.45, 0.21), (0.2, 0.30), (-0.12, 0.29), (-0.5, 0.18), (-0.45, 0.5), (0, 0.6), (0.4, 0.5)]
            self.fill(at.points(smooth(stripe)), _GOLD, skull)
        self.paint_eye(skull)
        self.paint_beak()

    def paint_eye(self, skull: Image.Image) -> None:
        at, look = self.head, self.looks["eye"]
        if look == "black-mask":
            mask = [
                (0.40, 0.10),
                (0.15, 0.19),
                (-0.15, 0.15),
                (-0.42, 0.04),
                (-0.2, -0.06),
                (0.15, -0.05),
                (0.38, -0.02),
            ]
            self.fill(at.points(smooth(mask)), _BLACK, skull)
        rings = {"white-ring": _WHITE, "gold-ring": (248, 206, 50), "red-patch": (214, 44, 40)}
        if look in rings:
            self.disc(at, 0.12, 0.08, 0.165, rings[look])
        self.disc(at, 0.12, 0.08, 0.098, (24, 18, 18))
        self.disc(at, 0.12, 0.08, 0.075, (52, 32, 24))
        self.disc(at, 0.13, 0.08, 0.05, (10, 8, 10))
        self.disc(at, 0.15, 0.115, 0.03, (250, 250, 250))

    def paint_beak(self) -> None:
        at = self.head
        kind, color = _BEAKS[self.looks["beak"]]
        shape = _BEAK_SHAPES[kind]
        tip = {"cone": 2, "dagger": 2, "hook": 4, "curved": 3}[kind]
        gape = [shape[0][0] + 0.02, 0.02]
        self.fill(at.points(shape), mix(color, (0, 0, 0), 0.28))
        self.fill(at.points([*shape[: tip + 1], (gape[0], gape[1])]), color)
        ridge = [at(x, y - 0.035) for x, y in shape[:tip]]
        self.ink.line(ridge, mix(color, (255, 255, 255), 0.45), self.width(0.03))

    def paint_legs(self, canvas: Image.Image, foot: Point, tilt: float) -> list[tuple[Point, Point]]:
        """Legs and toes onto the canvas, below the body; returns their lines."""
        draw, color, side = ImageDraw.Draw(canvas), (88, 66, 58), self.body.side
        lines = []
        for shift, shade in ((0.16, 0.35), (-0.06, 0.0)):
            hip = self.body(shift * 0.8, -0.50)
            along = side * shift * self.unit
            toe = (foot[0] + along * math.cos(tilt), foot[1] + along * math.sin(tilt) - 0.02 * self.unit)
            ends = [(toe[0] + side * reach * self.unit, toe[1] + 0.10 * self.unit) for reach in (-0.14, 0.05, 0.17)]
            tone = mix(color, (0, 0, 0), shade)
            draw.line((hip, toe), tone, self.width(0.065))
            for end in ends:
                draw.line((toe, end), tone, self.width(0.055))
            lines += [(hip, toe), *((toe, end) for end in ends)]
        return lines

    def developed(self, image: Image.Image) -> Image.Image:
        """The camera: exposure, white balance and sensor noise."""
        random = self.random
        gain, warmth = uniform(random, 0.78, 1.16), uniform(random, -0.07, 0.07)
        gains = np.array([gain * (1 + warmth), gain, gain * (1 - warmth)], dtype=np.float32)
        noise = np.random.RandomState(int(random.random() * 2**32)).randint(-3, 4, (image.height, image.width, 1))
        pixels = np.asarray(image, dtype=np.float32) * gains + noise.astype(np.float32)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
