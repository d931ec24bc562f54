"""Where the parts of an object are, for "dual attention fusion" (sections 3.3 and 3.7.2): boxes that only class labels
teach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc_ext.ops import select_boxes
from fgvc_ext.reference.accumulation import accumulation_dtype

IMAGE_SIDE = 448
"""Side in pixels of the images for which sizes in pixels are given; they grow and shrink with the image."""
THIRDS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Three scales between one level's size and the next level's, which is twice as large."""
LONGEST = math.log(1000 / 16)
"""Bound of the predicted logarithm of a side, by which an anchor's side is multiplied."""


@dataclass(frozen=True)
class AnchorLevel:
    """The anchors of every cell of a map: the scale is the outer loop, the ratio the inner one.

    Attributes:
        size: side in pixels of the square anchor of scale 1, in an image of 448 × 448.
        scales: factors of the size.
        ratios: width to height; the area does not depend on them.
    """

    size: float
    scales: tuple[float, ...] = THIRDS
    ratios: tuple[float, ...] = (2 / 3, 1.0, 3 / 2)

    def __post_init__(self) -> None:
        if not all(0 < value < math.inf for value in (self.size, *self.scales, *self.ratios)):
            raise ValueError(
                f"AnchorLevel: expected a size, scales and ratios above 0, got {self.size}, {self.scales} and "
                f"{self.ratios}"
            )

    def shapes(self) -> Tensor:
        """Width and height of each anchor, float32 [A,2]."""
        sides = [(self.size * scale, math.sqrt(ratio)) for scale in self.scales for ratio in self.ratios]
        return torch.tensor([[side * root, side / root] for side, root in sides])


LEVELS = (AnchorLevel(48.0), AnchorLevel(96.0), AnchorLevel(192.0))
"""Those of the maps of strides 8, 16 and 32."""


def relative_side(image_size: Sequence[int]) -> float:
    """The side of an image of this height and width, of another form the geometric mean of its sides, to 448."""
    side: float = (image_size[0] * image_size[1]) ** 0.5  # not math.sqrt: an exported size is a symbol
    return side / IMAGE_SIDE


def anchors(
    shapes: Sequence[Tensor], map_sizes: Sequence[Sequence[int]], strides: Sequence[Sequence[float]], scale: float = 1.0
) -> Tensor:
    """Every anchor of every cell: centre x, centre y, width and height in pixels, float32 [A,4].

    The levels follow each other, within a level its cells row by row, within a cell its anchors. The first centre is
    half a stride from the corner.

    Args:
        shapes: width and height [a,2] of a cell's anchors on each level.
        map_sizes: height and width of each level's map, in cells.
        strides: pixels from a cell to the next, down and across.
        scale: factor of the shapes.
    """
    found = []
    for shape, (height, width), (down, across) in zip(shapes, map_sizes, strides, strict=True):
        y = (torch.arange(height, device=shape.device, dtype=torch.float32) + 0.5) * down
        x = (torch.arange(width, device=shape.device, dtype=torch.float32) + 0.5) * across
        size = (height, width, len(shape))
        centres = [x[None, :, None].expand(size), y[:, None, None].expand(size)]
        sides = [side.expand(size) for side in (shape.float() * scale).unbind(1)]
        found.append(torch.stack([*centres, *sides], dim=-1).flatten(0, 2))
    return torch.cat(found)


def decode(deltas: Tensor, anchors: Tensor, image_size: Sequence[int]) -> Tensor:
    """Predicted changes of anchors as boxes xyxy within the image, whose sides are at least one pixel.

    A side that is shorter becomes one pixel about its middle, inside the image.

    Args:
        deltas: [...,4]: shift of the centre in sides of the anchor, logarithm of the factor of each side.
        anchors: [...,4]: centre x, centre y, width, height.
        image_size: height and width.
    """
    dx, dy, dw, dh = deltas.unbind(-1)
    x, y, width, height = anchors.unbind(-1)
    low_x, high_x = _edges(x + dx * width, width * dw.clamp(max=LONGEST).exp(), image_size[1])
    low_y, high_y = _edges(y + dy * height, height * dh.clamp(max=LONGEST).exp(), image_size[0])
    return torch.stack([low_x, low_y, high_x, high_y], dim=-1)


def _edges(centre: Tensor, side: Tensor, length: int) -> tuple[Tensor, Tensor]:
    low, high = (centre - side / 2).clamp(0, length), (centre + side / 2).clamp(0, length)
    short, pixel = high - low < 1, ((low + high) / 2 - 0.5).clamp(0, length - 1)
    return torch.where(short, pixel, low), torch.where(short, pixel + 1, high)


def centre_values(values: Tensor, anchors: Tensor) -> Tensor:
    """What a map [N,H,W] of the image's size has at the centre of each anchor [A,4], by the cell that holds it: [N,A].

    Centres beyond the image have the nearest cell's.
    """
    height, width = values.shape[-2:]
    x = anchors[:, 0].long().clamp(0, width - 1)  # centres are positive: this is the floor
    y = anchors[:, 1].long().clamp(0, height - 1)
    return values.flatten(1)[:, y * width + x]


class FeaturePyramid(nn.Module):
    """Maps of one width, each with what the deeper ones know: 1×1 convolutions, sums from above, 3×3 convolutions.

    A deeper map is enlarged to the size of the next one, the nearest cell's value everywhere.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """levels [N,C,h,w], the finest first → as many [N,width,h,w]."""
        above: Tensor | None = None
        found: list[Tensor] = []
        for lateral, output, level in zip(reversed(self.lateral), reversed(self.output), reversed(levels), strict=True):
            own = lateral(level)
            above = own if above is None else own + F.interpolate(above, own.shape[-2:], mode="nearest")
            found.insert(0, output(above))
        return found


def _tower(width: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)]
    tower = nn.Sequential(*layers, nn.Conv2d(width, outputs, 3, padding=1))
    for module in tower:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return tower


class Proposals(NamedTuple):
    """The regions that are kept of every image, the best first."""

    indices: Tensor
    """Of their anchors, int64 [N,M]."""
    scores: Tensor
    """Raw scores, float32 [N,M]: the only way of a gradient to the scoring tower."""
    boxes: Tensor
    """float32 [N,M,4] xyxy in pixels of the image: the only way of a gradient to the regression tower."""
    valid: Tensor
    """bool [N,M]: False for a region that is there only because there must be M."""


class PartProposalNetwork(nn.Module):
    """The saliency part proposal network: feature maps → the best regions of each image.

    A feature pyramid over the maps, two towers that its levels share (a score and four changes of the box for every
    anchor), and of each image the `regions` best boxes that do not overlap: among the anchors whose centre lies in the
    foreground. The others are nobody's negatives: they are left alone.

    Args:
        channels: of the feature maps, the finest first.
        width: channels of the pyramid and of the towers.
        depth: 3×3 convolutions of a tower before its last.
        regions: M, the boxes that are kept.
        iou_threshold: a box that overlaps a better one by more than this is suppressed.
        levels: the anchors of each map, as many in a cell on all of them.
        detach: no gradient of a box or score reaches the feature maps.

    Raises:
        ValueError: levels that differ from the channels in number, or from each other in their anchors'; no region, an
            overlap beyond 0 to 1, or towers without channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        width: int = 128,
        depth: int = 2,
        regions: int = 3,
        iou_threshold: float = 0.25,
        levels: Sequence[AnchorLevel] = LEVELS,
        detach: bool = True,
    ) -> None:
        super().__init__()
        shapes = [level.shapes() for level in levels]
        if len(shapes) != len(channels) or len({len(shape) for shape in shapes}) != 1:
            raise ValueError(
                "PartProposalNetwork: expected as many anchors in a cell on each of the "
                f"{len(channels)} levels, got {[len(shape) for shape in shapes]}"
            )
        if (
            not 1 <= regions < math.inf
            or regions != int(regions)
            or width < 1
            or depth < 0
            or not 0 <= iou_threshold <= 1
        ):
            raise ValueError(
                "PartProposalNetwork: expected at least one region and channel, no fewer than 0 convolutions before a "
                f"tower's last, and an iou_threshold from 0 to 1, got {regions}, {width}, {depth} and {iou_threshold}"
            )
        self.regions, self.iou_threshold, self.detach = regions, iou_threshold, detach
        self.pyramid = FeaturePyramid(channels, width)
        self.score = _tower(width, depth, len(shapes[0]))
        self.change = _tower(width, depth, 4 * len(shapes[0]))
        self.register_buffer("shapes", torch.stack(shapes), persistent=False)

    def predictions(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Feature maps [N,C,h,w], the finest first → scores [N,A] and changes [N,A,4] of all anchors, in float32."""
        maps = self.pyramid([level.detach() if self.detach else level for level in levels])
        scores = [self.score(one).permute(0, 2, 3, 1).flatten(1) for one in maps]
        changes = [self.change(one).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for one in maps]
        dtype = accumulation_dtype(levels[0].dtype)
        return torch.cat(scores, dim=1).to(dtype), torch.cat(changes, dim=1).to(dtype)

    def anchors(self, levels: Sequence[Tensor], image_size: Sequence[int]) -> Tensor:
        """The anchors [A,4] of these feature maps of images of this height and width: centre and sides in pixels."""
        shapes: Tensor = self.shapes  # type: ignore[assignment]
        sizes = [level.shape[-2:] for level in levels]
        strides = [(image_size[0] / height, image_size[1] / width) for height, width in sizes]
        return anchors(shapes.unbind(0), sizes, strides, relative_side(image_size))

    def forward(
        self, levels: Sequence[Tensor], image_size: Sequence[int], foreground: Tensor | None = None
    ) -> Proposals:
        """The regions of images from their feature maps.

        Args:
            levels: [N,C,h,w], the finest first.
            image_size: height and width of the images.
            foreground: bool [N,H,W]; None: every anchor may be kept.
        """
        scores, changes = self.predictions(levels)
        with torch.no_grad():
            places = self.anchors(levels, image_size)
            positive = torch.ones_like(scores, dtype=torch.bool)
            if foreground is not None:
                positive = centre_values(foreground, places)
            boxes = decode(changes, places, image_size)
            indices, valid = select_boxes(scores, boxes, positive, iou_threshold=self.iou_threshold, top=self.regions)
        # Decoded again, with a gradient, are only the boxes that are kept.
        kept = changes.gather(1, indices[..., None].expand(-1, -1, 4))
        return Proposals(indices, scores.gather(1, indices), decode(kept, places[indices], image_size), valid)
