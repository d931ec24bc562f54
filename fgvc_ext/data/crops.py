"""The part of an image that a network sees, resized: uint8 [3,H,W] in, uint8 out; a batch is normalised as a whole.

Images are resized as torchvision's `v2.Resize` with antialias does it. On the way the three channels of a pixel lie
beside each other in memory, as an image file decodes: torch resizes that several times as fast, with the same result.

All randomness comes from torch's global generator, in the order of torchvision's RandomCrop, RandomRotation,
RandomHorizontalFlip and ColorJitter, then of the lighting noise; what is switched off draws nothing. So one
`torch.manual_seed` a sample, inside `torch.random.fork_rng(devices=[])`, makes an augmentation depend on it alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms import v2

SUPPORT = {"bilinear": 1, "bicubic": 2}
"""By interpolation, how many pixels its kernel reaches to either side: of the image, or of the smaller result."""

REDUCED_AT_LEAST = 2.5
"""A photo may be decoded at 1/2, 1/4 or 1/8 of its size where its shorter side stays so many times `resize`.

Resized from there, the sharpest photos differ by half a grey level on average from resizing the photo itself; at twice
`resize` it is one grey level, at 1.5 times it is one and a half in the worst photos (measured)."""


LIGHTING_STD = torch.tensor([0.2175, 0.0188, 0.0045])
LIGHTING_AXES = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
"""Principal components (columns) of the colours of ImageNet's pixels, in shares of the full range, and their standard
deviations: those of fb.resnet.torch, after A. Krizhevsky et al., *ImageNet Classification with Deep Convolutional
Neural Networks*, 2012, section 4.1."""


class _Crop:
    """Shorter side to `resize` (without `keep_ratio`: both sides), then squares of `crop` pixels a side.

    Raises ValueError for `crop` larger than `resize` (an image would have to be padded) and for an interpolation other
    than bilinear and bicubic.
    """

    def __init__(self, resize: int, crop: int, interpolation: str = "bilinear", *, keep_ratio: bool = True) -> None:
        if not 0 < crop <= resize:
            raise ValueError(f"transform: expected 0 < crop <= resize, got crop {crop} and resize {resize}")
        if interpolation not in SUPPORT:
            raise ValueError(f"transform: interpolation: expected bilinear or bicubic, got {interpolation!r}")
        self.resize, self.crop, self.interpolation, self.keep_ratio = resize, crop, interpolation, keep_ratio

    def whole(self, image: Tensor) -> Tensor:
        """The resized image."""
        height, width = image.shape[-2:]
        size = resized(height, width, self.resize, self.keep_ratio)
        return image if size == (height, width) else _resize(image, size, self.interpolation)


class TrainCrop(_Crop):
    """A random square: uint8 [3,crop,crop], flipped with probability `flip`, with jittered colours.

    `jitter` is the largest relative change of brightness, contrast and saturation; `rotation` the largest angle in
    degrees, by which the square is turned about its centre (corners that nothing falls on are black); `lighting` the
    standard deviation of a factor of each of `LIGHTING_STD`, by which all pixels of an image are moved along
    `LIGHTING_AXES`. 0 turns each of them off. Without `random_crop` the square is the centre. Only the part of the
    image that the square needs is resized. `size` is (height, width) of the photo where `image` is a reduced copy.
    """

    def __init__(
        self,
        resize: int,
        crop: int,
        interpolation: str = "bilinear",
        *,
        flip: float = 0.5,
        jitter: float = 0.0,
        rotation: float = 0.0,
        lighting: float = 0.0,
        random_crop: bool = True,
        keep_ratio: bool = True,
    ) -> None:
        super().__init__(resize, crop, interpolation, keep_ratio=keep_ratio)
        if not (0 <= rotation <= 180 and 0 <= lighting < math.inf):
            raise ValueError(
                "transform: expected a rotation from 0 to 180 degrees and a lighting of at least 0, got "
                f"{rotation} and {lighting}"
            )
        self.random_crop, self.lighting = random_crop, lighting
        self.least_side = math.ceil(REDUCED_AT_LEAST * resize)
        self.rotate = v2.RandomRotation(rotation, v2.InterpolationMode.BILINEAR) if rotation else None
        self.flip = v2.RandomHorizontalFlip(flip) if flip else None
        self.jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None

    def __call__(self, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = image.shape[-2:] if size is None else size
        new = resized(height, width, self.resize, self.keep_ratio)
        place = _place if self.random_crop else _centre
        top, left = (place(length, self.crop) for length in new)
        part = resized_part(image, new, top, left, self.crop, self.interpolation)
        for change in (self.rotate, self.flip, self.jitter):
            part = part if change is None else change(part)
        return _lit(part, self.lighting) if self.lighting else part


class EvalCrop(_Crop):
    """The centre: uint8 [3,crop,crop]."""

    def __call__(self, image: Tensor) -> Tensor:
        return v2.functional.center_crop(self.whole(image), [self.crop, self.crop])


class FiveCrops(_Crop):
    """Centre, top left, top right, bottom left, bottom right: uint8 [5,3,crop,crop]."""

    def __call__(self, image: Tensor) -> Tensor:
        *corners, centre = v2.functional.five_crop(self.whole(image), [self.crop, self.crop])
        return stacked([centre, *corners])


def resized(height: int, width: int, shorter: int, keep_ratio: bool = True) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes `shorter`, rounded as torchvision does.

    Without `keep_ratio` both sides become `shorter`.
    """
    if not keep_ratio:
        return shorter, shorter
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def resized_part(
    image: Tensor, size: tuple[int, int], top: int, left: int, crop: int, interpolation: str = "bilinear"
) -> Tensor:
    """`crop` × `crop` pixels at (top, left) of the image [3,H,W] as resized to `size`, from what they need of it.

    Where torch resizes uint8 itself (AVX2, ARM) these are the bits of the whole image resized; where it computes in
    float32 a pixel in some thousand differs by one grey level.
    """
    rows, height, top = _needed(image.shape[-2], size[0], top, crop, SUPPORT[interpolation])
    columns, width, left = _needed(image.shape[-1], size[1], left, crop, SUPPORT[interpolation])
    part = image[:, rows, columns]
    if part.shape[-2:] != (height, width):
        part = _resize(part, (height, width), interpolation)
    return part[:, top : top + crop, left : left + crop]


def _needed(length: int, new: int, start: int, count: int, support: int) -> tuple[slice, int, int]:
    """What `count` pixels from `start` on need of an axis that is resized from `length` to `new` pixels.

    With length / new = p / q in lowest terms, the weights repeat every q new pixels, of p old ones: a part that begins
    and ends at such a place has the same weights as the whole. Returns the part, its length once resized, and where
    the pixels begin in that.
    """
    parts = math.gcd(length, new)
    p, q, scale = length // parts, new // parts, length / new
    reach = support * max(1.0, scale) + 1
    first = max(0, math.floor((start * scale - reach) / p))
    last = min(parts, math.ceil(((start + count) * scale + reach) / p))
    return slice(first * p, last * p), (last - first) * q, start - first * q


def _place(length: int, crop: int) -> int:
    """Where a random square begins on an axis; drawn only where there is a choice, as RandomCrop does."""
    return int(torch.randint(0, length - crop + 1, ())) if length > crop else 0


def _centre(length: int, crop: int) -> int:
    """Where the centre begins on an axis, rounded as torchvision's CenterCrop does."""
    return round((length - crop) / 2)


def _lit(image: Tensor, deviation: float) -> Tensor:
    """The image [3,h,w] with every pixel moved by one random colour along the principal components."""
    shift = 255 * (LIGHTING_AXES @ (deviation * torch.randn(3) * LIGHTING_STD))
    return (image + shift[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)


def _resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    beside = image.movedim(-3, -1).contiguous().movedim(-1, -3)  # the channels of a pixel
    return v2.functional.resize(beside, list(size), v2.InterpolationMode(interpolation), antialias=True)


def stacked(images: list[Tensor]) -> Tensor:
    """Images [...,3,H,W] as one tensor [N,...,3,H,W] of the same order in memory, which copies whole rows."""
    if all(image.stride(-3) == 1 for image in images):
        return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)
    return torch.stack(images)
