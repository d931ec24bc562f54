"""Part images of dual attention fusion (section 3.3)."""

from typing import Any

from torch import Tensor

from .. import reference
from .._library import use_kernel
from ._checks import (
    LARGEST_FLOAT32,
    check_beside,
    check_positions,
    check_real,
    check_tensor,
    image_sides,
    seed_tensor,
)
from ._operator import Operator

OP = "compose_parts"
NOISE_MODES = ("add", "replace")
LARGEST_SIGMA = 4096.0  # its weights reach over 6145 values of the quarter-size image


def compose_parts(
    images: Tensor,
    boxes: Tensor,
    *,
    blur_sigma: float = 20.0,
    noise_std: float = 1.0,
    noise_mode: str = "add",
    part_size: int | tuple[int, int] | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """One image for each box: the box as it is, what the image's other boxes show noisy, and the rest heavily blurred.

    Pixel (y, x) lies in a box if x1 ≤ x + 0.5 < x2 and y1 ≤ y + 0.5 < y2. Part image m has the image's pixels in box m,
    noise in the other boxes and the blurred image elsewhere, in this order where boxes overlap. Dual attention fusion,
    section 3.3, which gives no parameters: the defaults are our choice.

    The noise is ``noise_std`` · e with e normal, the same for all boxes of an image; it is added to the pixel, or takes
    its place. Pixel (y, x) draws the words of Philox 4x32-10 with key = ``seed`` and counter = (y·W + x, 0, sample, 2);
    Box and Muller's method makes them three normal numbers, one a channel. The words are the same on the CPU, on CUDA
    and in the reference, the normal numbers up to some 1e-6. The blur is a Gaussian of ``blur_sigma`` / 4 on the means
    of 4 × 4 pixels, reflected at the sides, read bilinearly.

    Args:
        images: [N,3,H,W], float32, float64, bfloat16 or float16; contiguous, channels_last or any strides.
        boxes: [N,M,4], x1, y1, x2, y2 in pixels, dtype of ``images`` or float32, any strides. What reaches beyond the
            image has no pixels there; a box with a NaN, or with x2 ≤ x1, has none at all.
        blur_sigma: in pixels of these images, in [0, 4096]; 0 blurs nothing.
        noise_std: at least 0 and finite in the dtype of the sums.
        noise_mode: "add" or "replace".
        part_size: None for parts as large as the images; else their side, or (height, width), of which the image's
            sides must be multiples: a part's pixel is the mean of the pixels that it stands for.
        seed: None (drawn from torch's generator of the device), an int, or int64 [] or [N] on the device of ``images``:
            [] numbers the samples of the call, [N] keys each sample on its own, whatever batch it stands in.

    Returns:
        [N,M,3,h,w], contiguous, in the dtype of ``images``; computed in float32 (float64 for float64). Without
        ``part_size`` the pixels in the own box have the image's bits.

    Gradient:
        none: the parts do not require a gradient.

    A NaN stays in its pixel, and spreads as far as the blur does. N = 0 or M = 0 gives an empty output. The same bits
    on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range, or H or W of 0.
    """
    check_tensor(OP, "images", images, "[N,3,H,W]")
    height, width = images.shape[2:]
    if images.shape[1] != 3 or check_positions(OP, "images", images) == 0:
        raise ValueError(f"{OP}: images must have 3 channels, and H and W of at least 1, got {list(images.shape)}")
    check_tensor(OP, "boxes", boxes, "[N,M,4]")
    check_beside(OP, "boxes", boxes, "images", images)
    if boxes.shape[0] != images.shape[0] or boxes.shape[2] != 4:
        raise ValueError(f"{OP}: boxes must have shape [{images.shape[0]}, M, 4], got {list(boxes.shape)}")
    check_real(OP, "blur_sigma", blur_sigma, lambda value: 0 <= value <= LARGEST_SIGMA, "in [0, 4096]")
    check_real(
        OP, "noise_std", noise_std, lambda value: 0 <= value <= LARGEST_FLOAT32, "at least 0 and finite in float32"
    )
    if noise_mode not in NOISE_MODES:
        raise ValueError(f"{OP}: noise_mode must be 'add' or 'replace', got {noise_mode!r}")
    part_height, part_width = _part_sides(part_size, height, width)
    seed = seed_tensor(OP, seed, images, "images")
    images, boxes, blur_sigma, noise_std = images.detach(), boxes.detach(), float(blur_sigma), float(noise_std)
    if not use_kernel(OP, images):
        return reference.compose_parts(
            images,
            boxes,
            blur_sigma=blur_sigma,
            noise_std=noise_std,
            noise_mode=noise_mode,
            part_size=None if part_size is None else (part_height, part_width),
            seed=seed,
        )
    return _compose_parts(images, boxes, seed, blur_sigma, noise_std, noise_mode == "replace", part_height, part_width)


def _part_sides(part_size: Any, height: int, width: int) -> tuple[int, int]:
    if part_size is None:
        return height, width
    part_height, part_width = image_sides(OP, part_size, "part_size")
    if height % part_height or width % part_width:
        raise ValueError(
            f"{OP}: part_size must divide the sides of images, {height} x {width}, got {part_height} x {part_width}"
        )
    return part_height, part_width


def _fake(
    images: Tensor,
    boxes: Tensor,
    seed: Tensor,
    blur_sigma: float,
    noise_std: float,
    replace: bool,
    part_height: int,
    part_width: int,
) -> Tensor:
    return images.new_empty((images.shape[0], boxes.shape[1], 3, part_height, part_width))


_compose_parts = Operator(OP, _fake)
