"""Boxes around the high values of heat maps (Hanselmann and Ney, "ELoPE", section 5)."""

from torch import Tensor

from .. import reference
from .._library import use_kernel
from ..reference.accumulation import accumulation_dtype
from ._checks import check_positions, check_real, check_tensor, image_sides
from ._operator import Operator

OP = "heatmap_to_boxes"


def heatmap_to_boxes(
    heatmaps: Tensor, *, threshold: float, image_size: int | tuple[int, int], min_size: float = 10
) -> Tensor:
    """The smallest box around the positions of each heat map that exceed a threshold, in pixels of the image.

    A position is kept if ``value − min > threshold · (max − min)``, with the smallest and largest value of its own map.
    With columns j and rows i of a map of h × w positions and an image of H × W pixels, the box is
    x1 = j_min · W / w, y1 = i_min · H / h, x2 = (j_max + 1) · W / w and y2 = (i_max + 1) · H / h over what is kept.
    ELoPE (Hanselmann and Ney, 2020), section 5.

    Args:
        heatmaps: [N,h,w], float32, float64, bfloat16 or float16, any strides.
        threshold: in [0, 1], the share of a map's range that a position must exceed. The paper uses 0.3 on CUB-200 and
            0.2 on Stanford Cars and FGVC-Aircraft.
        image_size: side of the square image in pixels, or its (height, width).
        min_size: the smallest width and height in pixels that a box may have. The paper gives none; the authors'
            public code has 10.

    Returns:
        [N,4], x1, y1, x2, y2, float32 (float64 for float64). The comparison is computed in that dtype, whatever the
        dtype of ``heatmaps``.

    Gradient:
        none: the boxes do not require a gradient.

    The box is the whole image, [0, 0, W, H], where nothing can be located: in a constant map, where no position
    exceeds the threshold, in a map with a NaN or an infinity, and where a side of the box would be shorter than
    ``min_size``. N = 0 gives an empty output. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range, or h or w of 0.
    """
    check_tensor(OP, "heatmaps", heatmaps, "[N,h,w]")
    if 0 in heatmaps.shape[1:]:
        raise ValueError(f"{OP}: heatmaps must have h and w of at least 1, got {list(heatmaps.shape)}")
    check_real(OP, "threshold", threshold, lambda value: 0 <= value <= 1, "in [0, 1]")
    sides = image_sides(OP, image_size)
    check_real(OP, "min_size", min_size, lambda value: value >= 0, "finite and at least 0")
    check_positions(OP, "heatmaps", heatmaps)
    # Python's integers may be too large for the operator, floats of the same value are not.
    heatmaps, threshold, min_size = heatmaps.detach(), float(threshold), float(min_size)
    if not use_kernel(OP, heatmaps):
        return reference.heatmap_to_boxes(heatmaps, threshold=threshold, image_size=sides, min_size=min_size)
    return _heatmap_to_boxes(heatmaps, threshold, *sides, min_size)


def _fake(heatmaps: Tensor, threshold: float, image_height: int, image_width: int, min_size: float) -> Tensor:
    return heatmaps.new_empty((heatmaps.shape[0], 4), dtype=accumulation_dtype(heatmaps.dtype))


_heatmap_to_boxes = Operator(OP, _fake)
