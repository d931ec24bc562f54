"""Losses of part proposals (dual attention fusion, section 3.7.2)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ..reference.accumulation import accumulation_dtype
from ..reference.part_box_losses import BoxLosses
from ._checks import (
    LARGEST_FLOAT32,
    SMALLEST_FLOAT32,
    check_beside,
    check_device,
    check_finite,
    check_int,
    check_real,
    check_tensor,
)
from ._operator import Operator, backward_operator, constant, fake_loss_gradient

OP = "part_box_losses"
AREA_MODES = ("two_sided", "hinge", "log")  # their numbers in the operator's schema


def part_box_losses(
    boxes: Tensor,
    valid: Tensor,
    object_area: Tensor,
    *,
    iou_weight: float = 2.0,
    parts: int = 4,
    min_area: float = 1024.0,
    area_mode: str = "two_sided",
    detach_denominator: bool = False,
) -> BoxLosses:
    """How much an image's part proposals overlap, and how far their areas are from that of a part of the object.

    With I the intersection of two boxes and |A|, |B| their areas, and s = max(S/parts, min_area) for an object of
    area S:

    - ``overlap = (1/N) Σ_n mean over the pairs of valid boxes of iou_weight · I / (|A| + |B|)``, and
    - ``area = (1/N) Σ_n mean over the valid boxes of |r − 1|``, r = |B|/s; with ``area_mode`` "hinge" it is
      max(r − 1, 0), with "log" |log r|.

    Dual attention fusion, section 3.7.2. In the text that we have, the first formula has lost its constant and the
    second is lost whole; the paper says that a part has about 1/N of the object's area. Both are reconstructions:
    with ``iou_weight`` 2 the first is the mean Dice coefficient.

    Args:
        boxes: [N,M,4], x1, y1, x2, y2, float32, float64, bfloat16 or float16, any strides.
        valid: [N,M], bool: the boxes that count.
        object_area: [N], S in the square of the boxes' unit, dtype of ``boxes`` or float32. A constant, even where it
            requires a gradient. A number below zero is taken as zero.
        iou_weight: the factor of ``overlap``, finite in float32.
        parts: into how many parts an object is divided, at least 1. The paper uses 4 on CUB-200.
        min_area: the least area that a part is taken to have, above 0 and normal in float32.
        area_mode: "two_sided", "hinge" or "log".
        detach_denominator: let no gradient of ``overlap`` pass through |A| + |B|. It rewards large boxes.

    Returns:
        A named tuple ``(overlap, area)``, each [] in float32 (float64 for float64).

    Gradient:
        to ``boxes``, of both losses. Where an edge of two boxes is the same, each has half of the intersection's
        derivative; at r = 1 that of ``area`` is 0. Saved for backward: both gradients, [2,N,M,4] in the dtype of the
        losses. No second backward.

    Both means are over all N images: an image with fewer than two valid boxes has an ``overlap`` of 0, one without a
    valid box an ``area`` of 0, and so the losses of a batch's shards of equal size have the batch's as their mean. A
    box whose sides cross or touch is empty: its area is 0, and its own sides have no gradient; with "log" its loss is
    infinite. Two empty boxes do not overlap. A NaN in a valid box gives NaN losses, but no ``overlap`` where it is the
    only one. N = 0 and M = 0 give losses of 0. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
    """
    check_tensor(OP, "boxes", boxes, "[N,M,4]")
    if boxes.shape[2] != 4:
        raise ValueError(f"{OP}: boxes must have shape [N,M,4], got {list(boxes.shape)}")
    samples, number, _ = boxes.shape
    check_tensor(OP, "valid", valid, "[N,M]", (torch.bool,))
    check_device(OP, "valid", valid, "boxes", boxes)
    if valid.shape != boxes.shape[:2]:
        raise ValueError(f"{OP}: valid must have shape [{samples}, {number}], one value a box, got {list(valid.shape)}")
    check_tensor(OP, "object_area", object_area, "[N]")
    check_beside(OP, "object_area", object_area, "boxes", boxes)
    if object_area.shape[0] != samples:
        raise ValueError(
            f"{OP}: object_area must have shape [{samples}], one area an image, got {list(object_area.shape)}"
        )
    check_finite(OP, "iou_weight", iou_weight, boxes)
    parts = check_int(OP, "parts", parts, least=1)
    check_area(min_area=min_area, area_mode=area_mode)
    if not isinstance(detach_denominator, bool):
        raise TypeError(f"{OP}: detach_denominator must be a bool, got {type(detach_denominator).__name__}")
    # Python's integers may be too large for the operator, floats of the same value are not.
    iou_weight, min_area = float(iou_weight), float(min_area)
    if not use_kernel(OP, boxes):
        return reference.part_box_losses(
            boxes,
            valid,
            object_area,
            iou_weight=iou_weight,
            parts=parts,
            min_area=min_area,
            area_mode=area_mode,
            detach_denominator=detach_denominator,
        )
    mode, object_area = AREA_MODES.index(area_mode), constant(object_area)
    overlap, area, _ = _part_box_losses(
        boxes, valid, object_area, iou_weight, parts, min_area, mode, detach_denominator
    )
    return BoxLosses(overlap, area)


def check_area(*, min_area: Any, area_mode: Any) -> None:
    limits = SMALLEST_FLOAT32, LARGEST_FLOAT32
    expected = "above 0 and a normal number in float32"
    check_real(OP, "min_area", min_area, lambda value: limits[0] <= value <= limits[1], expected)
    if area_mode not in AREA_MODES:
        raise ValueError(f"{OP}: area_mode must be one of {', '.join(AREA_MODES)}, got {area_mode!r}")


def _fake(
    boxes: Tensor,
    valid: Tensor,
    object_area: Tensor,
    iou_weight: float,
    parts: int,
    min_area: float,
    area_mode: int,
    detach_denominator: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(boxes.dtype)
    overlap, area = (boxes.new_empty((), dtype=dtype) for _ in range(2))
    return overlap, area, boxes.new_empty((2, *boxes.shape), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, gradients = output
    # The gradients stay differentiable, so that who differentiates them is refused: they depend on the boxes.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradients)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, overlap: Tensor | None, area: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    nothing = overlap is None and area is None
    boxes = None if nothing else _part_box_losses_backward(overlap, area, gradients, ctx.dtype)
    return boxes, *(None,) * 7


def _fake_backward(overlap: Tensor | None, area: Tensor | None, gradients: Tensor, dtype: torch.dtype) -> Tensor:
    return fake_loss_gradient(gradients, dtype)


_part_box_losses = Operator(OP, _fake, _setup_context, _backward)
_part_box_losses_backward = backward_operator(OP, _fake_backward)
