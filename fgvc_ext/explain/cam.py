"""Class activation maps, and measures of where and how widely they look.

A network that ends in a 1×1 convolution and spatial averaging has its class activation maps already: the
convolution's output at class c is M_c(x, y) = Σ_k w_kc f_k(x, y), whose mean is the score of c (B. Zhou et al.,
*Learning Deep Features for Discriminative Localization*, CVPR 2016, eq. 1 and 2). So the maps are exact, and no
gradient is needed.

The measures turn "the model looks at more of the bird" into numbers. They use the positive part of a map, the
evidence for the class. A sample without any has no value: NaN, which `summarise` counts out. Which class wins does
not change when one number is added to the maps of all classes, the positive part does: to compare models, whose maps
have different zero levels, pass `maps - maps.amin((-2, -1), keepdim=True)`, as `comparison` does for every model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ImageSize = int | tuple[int, int]


def class_activation_maps(
    maps_fn: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor | int, *, batch_size: int = 64
) -> Tensor:
    """The map [N,h,w] that speaks for each image's class in `classes` (int64 [N], or one class for all).

    `maps_fn` takes images [n,3,H,W] and returns the maps of all classes [n,C,h,w], nothing suppressed: the model must
    be in evaluation mode. Runs without gradients. A class outside [0,C) raises IndexError.
    """
    classes = torch.as_tensor(classes, dtype=torch.int64).expand(len(images))
    chosen = []
    with torch.no_grad():
        for first in range(0, max(1, len(images)), batch_size):
            part, wanted = images[first : first + batch_size], classes[first : first + batch_size]
            maps = maps_fn(part)
            if maps.ndim != 4 or len(maps) != len(part):
                raise ValueError(
                    f"class_activation_maps: maps_fn: expected maps [{len(part)},C,h,w], got {list(maps.shape)}"
                )
            outside = wanted[(wanted < 0) | (wanted >= maps.shape[1])]
            if len(outside):
                raise IndexError(f"class_activation_maps: class {outside[0].item()} of {maps.shape[1]} classes")
            chosen.append(maps[torch.arange(len(part), device=maps.device), wanted.to(maps.device)])
    return torch.cat(chosen)


def grad_cam(features: Tensor, scores_of: Callable[[Tensor], Tensor], classes: Tensor) -> Tensor:
    """Grad-CAM [N,h,w] of features [N,D,h,w] for each sample's class in `classes` (int64 [N]).

    The positive part of Σ_d w_d F_d, with w_d the mean over the positions of the gradient of the class's score
    (R. R. Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*, ICCV
    2017, eq. 1 and 2). For networks whose class activation maps are not exact, such as those with maximum pooling.

    Args:
        scores_of: features → scores [N,C], each sample for itself (evaluation mode).
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        chosen = scores_of(features).gather(1, classes[:, None])
        (gradient,) = torch.autograd.grad(chosen.sum(), features)
    return (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1).clamp(min=0)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of the values that exist, and how many those are."""

    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f}" if self.count else "–"


def summarise(values: Tensor) -> Summary:
    """Mean ± population standard deviation over the values that are not NaN (both NaN where there are none)."""
    known = values.detach().double()
    known = known[~known.isnan()]
    if len(known) == 0:
        return Summary(float("nan"), float("nan"), 0)
    return Summary(known.mean().item(), known.std(correction=0).item(), len(known))


def share_in_box(maps: Tensor, boxes: Tensor, image_size: ImageSize) -> Tensor:
    """Share [N] of each map's positive activation that lies inside its box: 1 = looks at the object alone.

    Maps [N,h,w] cover images of `image_size` (one number, or height and width) pixels; boxes [N,4] are xyxy in those
    pixels. A cell that the box cuts counts with the share of its area inside. Even attention scores the box's share
    of the image, which is the number to compare with. float64; NaN without positive activation and for a box that
    holds a NaN.
    """
    evidence = _evidence(maps, "share_in_box")
    if tuple(boxes.shape) != (len(maps), 4):
        raise ValueError(f"share_in_box: boxes: expected [{len(maps)},4] xyxy, got {list(boxes.shape)}")
    height, width = _height_width(image_size)
    x1, y1, x2, y2 = boxes.to(evidence).unbind(1)
    rows = _covered(y1, y2, evidence.shape[1], height)
    columns = _covered(x1, x2, evidence.shape[2], width)
    inside: Tensor = (evidence * rows[:, :, None] * columns[:, None, :]).sum((1, 2))
    return inside.div(evidence.sum((1, 2)))  # 0 / 0 is the NaN that the docstring promises


def effective_area(maps: Tensor) -> Tensor:
    """How widely each map [N,h,w] spreads: exp(entropy) of its positive part over the number of cells, float64 [N].

    1 = every cell counts the same, 1/(h·w) = one cell holds all: the number of evenly used cells that would have the
    same entropy (the perplexity), as a share. NaN without positive activation.
    """
    evidence = _evidence(maps, "effective_area")
    shares = evidence / evidence.sum((1, 2), keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum((1, 2))
    return entropy.exp().div(evidence.shape[1] * evidence.shape[2])


def local_maxima(maps: Tensor, top: int, image_size: ImageSize) -> tuple[Tensor, Tensor]:
    """The `top` strongest local maxima of each map [N,h,w]: centres of their cells, float64 [N,top,2] xy in pixels.

    A local maximum is positive and no neighbour of its eight is larger; of equal neighbours the first in reading
    order wins. Also returns which entries exist, bool [N,top]; the others are NaN. Strongest first.
    """
    evidence = _evidence(maps, "local_maxima")
    count, h, w = evidence.shape
    height, width = _height_width(image_size)
    order = evidence.flatten(1).argsort(dim=1, descending=True, stable=True)
    # Ranks instead of values: all different, so that a plateau has one maximum.
    standing = torch.empty_like(order).scatter_(1, order, torch.arange(h * w, 0, -1).expand(count, -1))
    standing = standing.reshape(count, h, w).double()
    peak = (F.max_pool2d(standing[:, None], 3, stride=1, padding=1)[:, 0] == standing) & (evidence > 0)
    places = torch.where(peak, standing, 0).flatten(1)
    best, index = places.topk(min(top, h * w), dim=1)
    found = torch.stack([(index % w + 0.5) * width / w, (index // w + 0.5) * height / h], -1)
    points, valid = torch.full((count, top, 2), torch.nan, dtype=torch.float64), torch.zeros(count, top).bool()
    points[:, : found.shape[1]] = found.double().masked_fill((best == 0)[..., None], torch.nan)
    valid[:, : found.shape[1]] = best > 0
    return points, valid


def part_hits(maps: Tensor, parts: Tensor, image_size: ImageSize, top: int = 3, *, reach: float = 1.0) -> Tensor:
    """How many different true parts the `top` strongest local maxima of each map [N,h,w] touch: int64 [N], 0..top.

    `parts` [N,P,3] holds x and y in pixels of `image_size` and whether the part is visible. A maximum touches the
    visible part nearest to its cell's centre if that lies within `reach` cells in both directions; one maximum
    touches one part, however many a coarse cell holds.
    """
    points, valid = local_maxima(maps, top, image_size)
    if parts.ndim != 3 or parts.shape[0] != len(maps) or parts.shape[2] != 3:
        raise ValueError(f"part_hits: parts: expected [{len(maps)},P,3] (x, y, visible), got {list(parts.shape)}")
    if parts.shape[1] == 0:
        return torch.zeros(len(maps), dtype=torch.int64)
    height, width = _height_width(image_size)
    cell = torch.tensor([width / maps.shape[2], height / maps.shape[1]], dtype=torch.float64)
    parts = parts.detach().cpu().double()
    distance = ((points[:, :, None] - parts[:, None, :, :2]) / cell).abs().amax(-1)
    distance = distance.masked_fill(parts[:, None, :, 2] <= 0, torch.inf).nan_to_num(nan=torch.inf)
    nearest, part = distance.min(-1)
    touched = torch.zeros(len(maps), parts.shape[1], dtype=torch.int64)
    touched.scatter_add_(1, part, (valid & (nearest <= reach)).long())
    return (touched > 0).sum(1)


def share_by_part(
    maps: Tensor, parts: Tensor, boxes: Tensor, image_size: ImageSize, *, points: int = 64, batch: int = 64
) -> Tensor:
    """How much of each map's positive activation [N,h,w] lies on which part: float64 [N,P+1], rows that add up to 1.

    Every point of the object's box belongs to the visible part that is nearest to it; the last column is what lies
    outside the box. `parts` [N,P,3] and `boxes` [N,4] are as of `part_hits` and `share_in_box`. The image is looked at
    in at least `points` × `points` points. NaN without positive activation, a visible part, or a whole box.
    """
    evidence = _evidence(maps, "share_by_part")
    count, h, w = evidence.shape
    if parts.ndim != 3 or parts.shape[0] != count or parts.shape[1] == 0 or parts.shape[2] != 3:
        raise ValueError(f"share_by_part: parts: expected [{count},P,3] (x, y, visible), got {list(parts.shape)}")
    if tuple(boxes.shape) != (count, 4):
        raise ValueError(f"share_by_part: boxes: expected [{count},4] xyxy, got {list(boxes.shape)}")
    height, width = _height_width(image_size)
    finer = -(-points // min(h, w))  # a cell is so many points wide and high
    y, x = ((torch.arange(n * finer) + 0.5) * side / (n * finer) for n, side in ((h, height), (w, width)))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    parts, boxes = parts.detach().cpu().float(), boxes.detach().cpu().float()
    found = torch.zeros(count, parts.shape[1] + 1, dtype=torch.float64)
    for first in range(0, count, batch):
        rows = slice(first, first + batch)
        weight = evidence[rows].repeat_interleave(finer, 1).repeat_interleave(finer, 2).flatten(1)
        far = torch.cdist(grid.expand(len(weight), -1, -1), parts[rows, :, :2].nan_to_num())
        owner = far.masked_fill(parts[rows, None, :, 2] <= 0, torch.inf).argmin(-1)
        low, high = boxes[rows, None, :2], boxes[rows, None, 2:]
        inside = ((grid >= low) & (grid < high)).all(-1)
        found[rows].scatter_add_(1, torch.where(inside, owner, parts.shape[1]), weight)
    unknown = (parts[:, :, 2] <= 0).all(1) | boxes.isnan().any(1)
    return found.div(found.sum(1, keepdim=True)).masked_fill(unknown[:, None], torch.nan)


def _evidence(maps: Tensor, function: str) -> Tensor:
    if maps.ndim != 3 or maps.shape[1] * maps.shape[2] == 0:
        raise ValueError(f"{function}: maps: expected [N,h,w] with h, w > 0, got {list(maps.shape)}")
    return maps.detach().to("cpu", torch.float64).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)


def _covered(low: Tensor, high: Tensor, cells: int, length: int) -> Tensor:
    """Share [N,cells] of each cell of a line of `length` pixels that lies between `low` and `high`."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * (length / cells)
    overlap = torch.minimum(edges[1:], high[:, None]) - torch.maximum(edges[:-1], low[:, None])
    return overlap.clamp(min=0) * (cells / length)


def _height_width(image_size: ImageSize) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size
