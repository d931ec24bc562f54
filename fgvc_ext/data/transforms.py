"""Image preparation: what a network expects of its images, and transforms from uint8 [3,H,W] to normalised float32.

Training and evaluation load crops in uint8 (`crops.py`), a quarter of the bytes, and normalise them in batches on the
device; the transforms here do both, for single images. Random numbers: see `crops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .crops import EvalCrop, FiveCrops, TrainCrop, resized

Transform = Callable[[Tensor], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through before a network sees it: kept with the network's weights.

    `mean`, `std` and `interpolation` ("bilinear" or "bicubic") are those with which the backbone was pretrained.

    Raises ValueError for other than three means and three deviations above 0.
    """

    resize: int = 600
    """Length of the shorter side before the crop, in pixels; without `keep_ratio`, of both sides."""
    crop: int = 448
    """Side of the square that the network sees."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    keep_ratio: bool = True
    """False: an image is squeezed into a square of `resize` pixels a side, of which nothing is lost."""

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(
                f"preprocessing: expected 3 means and 3 deviations above 0, got mean {self.mean} and std {self.std}"
            )

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
        return _Normalised(self.eval_crop(), self)

    def train_crop(self, *, flip: float = 0.5, jitter: float = 0.0, **augmentation: Any) -> TrainCrop:
        """uint8 [3,H,W] → uint8 [3,crop,crop], augmented: see `TrainCrop`, which takes the `augmentation`."""
        options = {"flip": flip, "jitter": jitter, "keep_ratio": self.keep_ratio, **augmentation}
        return TrainCrop(self.resize, self.crop, self.interpolation, **options)

    def eval_crop(self) -> EvalCrop:
        """uint8 [3,H,W] → uint8 [3,crop,crop], the centre."""
        return EvalCrop(self.resize, self.crop, self.interpolation, keep_ratio=self.keep_ratio)

    def five_crops(self) -> FiveCrops:
        """uint8 [3,H,W] → uint8 [5,3,crop,crop], centre and corners."""
        return FiveCrops(self.resize, self.crop, self.interpolation, keep_ratio=self.keep_ratio)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [...,3,H,W] → float32, (image / 255 - mean) / std, on the images' device and in their order in memory.

        The bits are those of torchvision's `v2.ToDtype(torch.float32, scale=True)` and `v2.Normalize`.
        """
        mean, std = (_constant(tuple(values), images.device) for values in (self.mean, self.std))
        if images.stride(-3) != 1:
            mean, std = mean[:, None, None], std[:, None, None]
            return images.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)
        # The channels of a pixel lie beside each other: whole rows at a time, since three numbers make no vector.
        rows = images.movedim(-3, -1).flatten(-2).to(torch.float32)
        rows.mul_(1 / 255).sub_(mean.repeat(images.shape[-1])).div_(std.repeat(images.shape[-1]))
        return rows.unflatten(-1, (-1, 3)).movedim(-1, -3)

    def in_image(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Boxes [...,4] xyxy of the crop that `transform` takes of an image, in pixels of that image."""
        new_height, new_width = resized(height, width, self.resize, self.keep_ratio)
        offset = torch.tensor(
            [round((side - self.crop) / 2) for side in (new_width, new_height)] * 2, dtype=boxes.dtype
        )
        scale = torch.tensor([width / new_width, height / new_height] * 2, dtype=boxes.dtype)
        return (boxes + offset) * scale


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [3] on the device, made once: a copy in every step would make the host wait for a GPU."""
    with torch.inference_mode(False):  # it serves training and evaluation
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


class _Normalised:
    """A crop and its normalisation: uint8 [3,H,W] → float32."""

    def __init__(self, crop: Transform, prepare: Preprocessing) -> None:
        self.crop, self.prepare = crop, prepare

    def __call__(self, image: Tensor) -> Tensor:
        return self.prepare.normalise(self.crop(image)).contiguous()


def train_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
    *,
    keep_ratio: bool = True,
    flip: float = 0.5,
    jitter: float = 0.0,
) -> Transform:
    """Shorter side to `resize`, random `crop` x `crop`, horizontal flip with probability `flip`, colour jitter.

    Without `keep_ratio` both sides become `resize` pixels long.
    `jitter` is the largest relative change of brightness, contrast and saturation; 0 turns it off.
    Returns float32 [3,crop,crop]. Raises ValueError for `crop` larger than `resize`: an image would have to be padded.
    """
    prepare = Preprocessing(resize, crop, tuple(mean), tuple(std), interpolation, keep_ratio)
    return _Normalised(prepare.train_crop(flip=flip, jitter=jitter), prepare)


def eval_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
    *,
    keep_ratio: bool = True,
) -> Transform:
    """Shorter side to `resize` (without `keep_ratio`: both sides), centre crop: float32 [3,crop,crop].

    Raises ValueError for `crop` above `resize`.
    """
    return Preprocessing(resize, crop, tuple(mean), tuple(std), interpolation, keep_ratio).transform()


def five_crop_transform(
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
    *,
    keep_ratio: bool = True,
) -> Transform:
    """Centre and the four corners: float32 [5,3,crop,crop], in the order centre, top left, top right, bottom left,
    bottom right. Raises ValueError for `crop` larger than `resize`.
    """
    prepare = Preprocessing(resize, crop, tuple(mean), tuple(std), interpolation, keep_ratio)
    return _Normalised(prepare.five_crops(), prepare)
