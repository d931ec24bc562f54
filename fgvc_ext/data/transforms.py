"""Image preparation: uint8 [3,H,W] in, normalised float32 out.

All randomness comes from torch's global generator: one `torch.manual_seed` a sample, inside
`torch.random.fork_rng(devices=[])`, makes an augmentation depend on that seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def train_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
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
        _resize(resize),
        v2.RandomCrop(crop),
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose([*steps, *_normalise(mean, std)])


def eval_transform(
    resize: int, crop: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transform:
    """Shorter side to `resize`, centre crop: float32 [3,crop,crop]. Raises ValueError for `crop` above `resize`."""
    _check(resize, crop)
    return v2.Compose([_resize(resize), v2.CenterCrop(crop), *_normalise(mean, std)])


def five_crop_transform(
    resize: int, crop: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transform:
    """Centre and the four corners: float32 [5,3,crop,crop], in the order centre, top left, top right, bottom left,
    bottom right. Raises ValueError for `crop` larger than `resize`.
    """
    _check(resize, crop)
    return v2.Compose([_resize(resize), _FiveCrops(crop), *_normalise(mean, std)])


class _FiveCrops(torch.nn.Module):
    """[3,H,W] to [5,3,crop,crop]."""

    def __init__(self, crop: int) -> None:
        super().__init__()
        self.crop = crop

    def forward(self, image: Tensor) -> Tensor:
        *corners, centre = v2.functional.five_crop(image, [self.crop, self.crop])
        return torch.stack([centre, *corners])


def _resize(size: int) -> v2.Resize:
    return v2.Resize(size, v2.InterpolationMode.BILINEAR, antialias=True)


def _normalise(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def _check(resize: int, crop: int) -> None:
    if not 0 < crop <= resize:
        raise ValueError(f"transform: expected 0 < crop <= resize, got crop {crop} and resize {resize}")
