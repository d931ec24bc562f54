"""Greedy non-maximum suppression with a fixed number of results (dual attention fusion, section 3.3)."""

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ._checks import check_beside, check_device, check_int, check_real, check_tensor
from ._operator import Operator

OP = "select_boxes"
_MOST_BOXES = 2**31 - 1  # of an image: what the kernels count in 32 bits


def select_boxes(
    scores: Tensor, boxes: Tensor, candidates: Tensor, *, iou_threshold: float = 0.25, top: int = 3
) -> tuple[Tensor, Tensor]:
    """The ``top`` best boxes of each image that overlap little: greedy non-maximum suppression, cut to a fixed number.

    Of the candidates that are left, the one with the highest score is selected, and those whose intersection over
    union with it exceeds ``iou_threshold`` are suppressed; ``top`` times. It is ``torchvision.ops.nms`` on an image's
    candidates and its first ``top`` results, without waiting for the device: where fewer are left, the selection is
    filled up and says so. Dual attention fusion, section 3.3, keeps 3 at a threshold of 0.25.

    Args:
        scores: [N,A], float32, float64, bfloat16 or float16, any strides. Raw scores: only their order counts.
        boxes: [N,A,4], x1, y1, x2, y2, dtype of ``scores`` or float32, any strides.
        candidates: [N,A], bool. A box whose score is NaN or −∞ is no candidate, whatever stands here.
        iou_threshold: in [0, 1].
        top: M, how many boxes to select, at least 1 and at most A.

    Returns:
        ``(indices, valid)``: int64 [N,M], different numbers of boxes in the order of their selection, and bool [N,M].
        Where no candidate is left, the suppressed ones follow by score and then the boxes that are no candidates by
        score, NaN as −∞; ``valid`` is False for these.

    Gradient:
        none: gather what needs one, ``scores.gather(1, indices)``.

    The intersection over union is I/(|A| + |B| − I), computed in float32 (float64 for float64), in which it is also
    compared with the threshold; it is 0 where the union is. A box with a NaN suppresses nothing and is not suppressed.
    Equal scores, also −0 and +0: the lowest index. N = 0 gives empty results. The same bits on every run and for every
    thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range, or fewer than ``top`` boxes.
    """
    check_tensor(OP, "scores", scores, "[N,A]")
    samples, number = scores.shape
    check_tensor(OP, "boxes", boxes, "[N,A,4]")
    check_beside(OP, "boxes", boxes, "scores", scores)
    if boxes.shape != (samples, number, 4):
        raise ValueError(
            f"{OP}: boxes must have shape [{samples}, {number}, 4], a box a score, got {list(boxes.shape)}"
        )
    check_tensor(OP, "candidates", candidates, "[N,A]", (torch.bool,))
    check_device(OP, "candidates", candidates, "scores", scores)
    if candidates.shape != scores.shape:
        raise ValueError(
            f"{OP}: candidates must have shape [{samples}, {number}], one value a score, got {list(candidates.shape)}"
        )
    check_real(OP, "iou_threshold", iou_threshold, lambda value: 0 <= value <= 1, "in [0, 1]")
    top = check_int(OP, "top", top, least=1)
    if number < top:
        raise ValueError(f"{OP}: scores must have at least top = {top} boxes an image, got {list(scores.shape)}")
    if number > _MOST_BOXES:
        raise ValueError(f"{OP}: scores must have at most {_MOST_BOXES} boxes an image, got {list(scores.shape)}")
    # Python's integers may be too large for the operator, floats of the same value are not.
    iou_threshold = float(iou_threshold)
    if not use_kernel(OP, scores):
        return reference.select_boxes(scores, boxes, candidates, iou_threshold=iou_threshold, top=top)
    return _select_boxes(scores, boxes, candidates, iou_threshold, top)


def _fake(scores: Tensor, boxes: Tensor, candidates: Tensor, iou_threshold: float, top: int) -> tuple[Tensor, Tensor]:
    indices = scores.new_empty((scores.shape[0], top), dtype=torch.int64)
    return indices, indices.new_empty(indices.shape, dtype=torch.bool)


_select_boxes = Operator(OP, _fake)
