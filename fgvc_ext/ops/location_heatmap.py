"""Location heat map of dual attention fusion (section 3.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import check_labels, use_kernel
from ._checks import MOST_POSITIONS, check_beside, check_positions, check_tensor, image_sides
from ._operator import Operator, transforms_are_active

OP = "location_heatmap"
MOST_LEVELS = 8


def location_heatmap(features: Sequence[Tensor], image_size: int | tuple[int, int]) -> Tensor:
    """Where the object is: the share of the levels of features that respond more than on average at each pixel.

    For each level, A[n, y, x] is the sum of its channels; its mask is one where A exceeds the mean of A over the
    positions, and zero elsewhere. The masks are resized to the image by nearest neighbours and averaged: with three
    levels the values are 0, 1/3, 2/3 and 1. Dual attention fusion, section 3.2; Wei et al., "Selective Convolutional
    Descriptor Aggregation", 2017. What the paper leaves open is decided in docs/location_heatmap.md.

    Args:
        features: a list of 1 to 8 levels, [N,C,h,w] each, C, h and w of their own. The first is float32, float64,
            bfloat16 or float16, the others of its dtype or float32; contiguous, channels_last or any strides.
        image_size: side of the square image in pixels, or its (height, width).

    Returns:
        [N,1,H,W], contiguous, in the dtype of ``features[0]``; sums in float32 (float64 for float64). Pixel i of H
        takes the mask's row floor((i + 0.5) · h / H), and columns likewise.

    Gradient:
        none: the map does not require a gradient.

    Where nothing exceeds the mean, as in a constant map, the level's mask is one everywhere. A NaN, or infinities of
    both signs, in a sample's level make its mean NaN, and with it the sample's heat map; FGVC_EXT_CHECK=1 turns that
    into a ValueError, but in a compiled graph. N = 0 gives an empty output. The same bits on every run and for every
    thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range, another number of levels, or C, h
            or w of 0.
    """
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"{OP}: features must be a list of tensors [N,C,h,w], got {type(features).__name__}")
    if not 1 <= len(features) <= MOST_LEVELS:
        raise ValueError(f"{OP}: features must hold 1 to {MOST_LEVELS} levels, got {len(features)}")
    for number, level in enumerate(features):
        _check_level(f"features[{number}]", level, features[0])
    height, width = image_sides(OP, image_size)
    if height * width > MOST_POSITIONS:
        raise ValueError(f"{OP}: image_size must be at most {MOST_POSITIONS} pixels in all, got {height} x {width}")
    levels = [level.detach() for level in features]
    if not use_kernel(OP, levels[0]):
        heatmap = reference.location_heatmap(levels, (height, width))
    else:
        heatmap = _location_heatmap(levels, height, width)
    if check_labels() and not torch.compiler.is_compiling() and not transforms_are_active():
        _look_at(heatmap)
    return heatmap


def _check_level(name: str, level: Any, first: Tensor) -> None:
    check_tensor(OP, name, level, "[N,C,h,w]")
    check_beside(OP, name, level, "features[0]", first)
    if 0 in level.shape[1:]:
        raise ValueError(f"{OP}: {name} must have C, h and w of at least 1, got {list(level.shape)}")
    check_positions(OP, name, level)
    if level.shape[0] != first.shape[0]:
        raise ValueError(f"{OP}: {name} must have the {first.shape[0]} samples of features[0], got {list(level.shape)}")


def _look_at(heatmap: Tensor) -> None:
    wrong = heatmap.flatten(1).isnan().any(dim=1)
    if bool(wrong.any()):
        raise ValueError(f"{OP}: features must be finite, got NaN or infinities in sample {int(wrong.nonzero()[0])}")


def _fake(features: list[Tensor], image_height: int, image_width: int) -> Tensor:
    return features[0].new_empty((features[0].shape[0], 1, image_height, image_width))


_location_heatmap = Operator(OP, _fake)
