"""Image preparation: uint8 [3,H,W] in, normalised float32 out.

All randomness comes from torch's global generator: one `torch.manual_seed` a sample, inside
`torch.random.fork_rng(devices=[])`, makes an augmentation depend on that seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through before a network sees it: kept with the network's weights.

    `mean`, `std` and `interpolation` ("bilinear" or "bicubic") are those with which the backbone was pretrained.
    """

    resize: int = 600
    """Length of the shorter side before the crop, in pixels."""
    crop: int = 448
    """Side of the square that the network sees."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what `options` wrote through JSON, which turns tuples into lists."""
        lists: dict[str, Any] = {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**{**values, **lists})

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the transforms below."""
        return asdict(self)

    def transform(self) -> Transform:
        """uint8 [3,H,W] → float32 [3,crop,crop], as in evaluation."""
        return eval_transform(**self.options())

    def in_image(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Boxes [...,4] xyxy of the crop that `transform` takes of an image, in pixels of that image."""
        short = min(height, width)
        resized = [int(self.resize * side / short) for side in (width, height)]
        offset = torch.tensor([round((side - self.crop) / 2) for side in resized] * 2, dtype=boxes.dtype)
        scale = torch.tensor([width / resized[0], height / resized[1]] * 2, dtype=boxes.dtype)
        return (boxes + offset) * scale


def train_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
    *,
    flip: float = 0.5,
    jitter: float = 0.0,
) -> Transform:
    """Shorter side to `resize`, random `crop` x `crop`, horizontal flip with probability `flip`, colour jitter.

    `jitter` is the largest relative change of brightness, contrast and saturation; 0 turns it off.
    Returns float32 [3,crop,crop]. Raises ValueError for `crop` larger than `resize`: an image would have to be padded.
    """
    _check(resize, crop)
    steps: list[torch.nn.Module] = [
        _resize(resize, interpolation),
        v2.RandomCrop(crop),
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose([*steps, *_normalise(mean, std)])


def eval_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
) -> Transform:
    """Shorter side to `resize`, centre crop: float32 [3,crop,crop]. Raises ValueError for `crop` above `resize`."""
    _check(resize, crop)
    return v2.Compose([_resize(resize, interpolation), v2.CenterCrop(crop), *_normalise(mean, std)])


def five_crop_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
) -> Transform:
    """Centre and the four corners: float32 [5,3,crop,crop], in the order centre, top left, top right, bottom left,
    bottom right. Raises ValueError for `crop` larger than `resize`.
    """
    _check(resize, crop)
    return v2.Compose([_resize(resize, interpolation), _FiveCrops(crop), *_normalise(mean, std)])


class _FiveCrops(torch.nn.Module):
    """[3,H,W] to [5,3,crop,crop]."""

    def __init__(self, crop: int) -> None:
        super().__init__()
        self.crop = crop

    def forward(self, image: Tensor) -> Tensor:
        *corners, centre = v2.functional.five_crop(image, [self.crop, self.crop])
        return torch.stack([centre, *corners])


def _resize(size: int, interpolation: str) -> v2.Resize:
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"transform: interpolation: expected bilinear or bicubic, got {interpolation!r}")
    return v2.Resize(size, v2.InterpolationMode(interpolation), antialias=True)


def _normalise(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def _check(resize: int, crop: int) -> None:
    if not 0 < crop <= resize:
        raise ValueError(f"transform: expected 0 < crop <= resize, got crop {crop} and resize {resize}")
