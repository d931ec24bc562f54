"""What the specification says of the selection of boxes, beyond the contract that every operator keeps."""

import pytest
import torch
from torch import Tensor

from fgvc_ext import ops, reference

from .conftest import needs_libraries

nan, inf = float("nan"), float("inf")


def row(*boxes: float) -> Tensor:
    """Boxes of 10 × 10 pixels side by side, as [1,A,4]: the left edge of each."""
    left = torch.tensor(boxes, dtype=torch.float32)
    return torch.stack((left, torch.zeros_like(left), left + 10, torch.full_like(left, 10)), dim=1)[None]


def select(scores: list[float], boxes: Tensor, candidates: list[bool] | None = None, **options: object) -> list[object]:
    """The selected numbers and whether they are valid, of one image."""
    given = torch.tensor([candidates or [True] * len(scores)])
    indices, valid = ops.select_boxes(torch.tensor([scores], dtype=torch.float32), boxes, given, **options)
    assert indices.dtype == torch.int64
    assert valid.dtype == torch.bool
    return [indices[0].tolist(), valid[0].tolist()]


def test_an_example_by_hand() -> None:
    # 1 overlaps 0 by 7 of 13, and 3 overlaps 2 by 9 of 11; 1 is better than 3, but suppressed first.
    boxes = row(0, 3, 50, 51, 100)
    assert select([0.9, 0.8, 0.5, 0.7, 0.1], boxes) == [[0, 3, 4], [True] * 3]
    assert select([0.9, 0.8, 0.5, 0.7, 0.1], boxes, top=2) == [[0, 3], [True] * 2]
    assert select([0.9, 0.8, 0.5, 0.7, 0.1], boxes, iou_threshold=0.6) == [[0, 1, 3], [True] * 3]


def test_an_overlap_of_exactly_the_threshold_is_kept() -> None:
    boxes = row(0, 6, 100)  # 4 of 16: 0.25
    assert select([3, 2, 1], boxes, top=2, iou_threshold=0.25) == [[0, 1], [True] * 2]
    assert select([3, 2, 1], boxes, top=2, iou_threshold=0.2499) == [[0, 2], [True] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [40, 3000])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5])
def test_equals_torchvisions_suppression_cut_off(number: int, threshold: float, dtype: torch.dtype) -> None:
    nms = pytest.importorskip("torchvision.ops").nms
    generator = torch.Generator().manual_seed(number)
    corner = 400 * torch.rand(6, number, 2, generator=generator).to(dtype)
    boxes = torch.cat((corner, corner + 5 + 60 * torch.rand(6, number, 2, generator=generator).to(dtype)), dim=2)
    boxes[3:] = boxes[3:].round()  # exact ties of overlaps
    scores = torch.randn(6, number, generator=generator).to(dtype)
    candidates = torch.rand(6, number, generator=generator) < 0.7
    indices, valid = ops.select_boxes(scores, boxes, candidates, iou_threshold=threshold, top=5)
    for image in range(6):
        numbers = candidates[image].nonzero()[:, 0]
        kept = numbers[nms(boxes[image][numbers], scores[image][numbers], threshold)][:5]
        count = len(kept)
        assert indices[image, :count].tolist() == kept.tolist()
        assert valid[image].tolist() == [True] * count + [False] * (5 - count)


def test_the_real_size() -> None:
    """37,044 anchors of an image of 448, and an image without a candidate among them."""
    nms = pytest.importorskip("torchvision.ops").nms
    generator = torch.Generator().manual_seed(0)
    middle, side = 448 * torch.rand(2, 37044, 2, generator=generator), 48 * 2 ** (2 * torch.rand(2, 37044, 1))
    boxes = torch.cat((middle - side / 2, middle + side / 2), dim=2).clamp(0, 448)
    scores = torch.randn(2, 37044, generator=generator)
    candidates = torch.rand(2, 37044, generator=generator) < 0.4
    candidates[1] = False
    indices, valid = ops.select_boxes(scores, boxes, candidates)
    numbers = candidates[0].nonzero()[:, 0]
    assert indices[0].tolist() == numbers[nms(boxes[0][numbers], scores[0][numbers], 0.25)][:3].tolist()
    assert indices[1].tolist() == scores[1].topk(3).indices.tolist()
    assert valid.tolist() == [[True] * 3, [False] * 3]


# --- fewer candidates than results ------------------------------------------------------------------------------------


def test_suppressed_candidates_follow_by_score_and_then_the_others() -> None:
    boxes = row(0, 1, 2, 3, 200, 300)
    scores = [0.5, 0.1, 0.3, 0.9, 0.2, 0.8]
    candidates = [True, True, False, True, False, False]
    expected = [3, 0, 1, 5, 2, 4]  # 3 suppresses 0 and 1; the others by score, which overlap with nothing
    for top in range(1, 7):
        valid = [True, False, False, False, False, False]
        assert select(scores, boxes, candidates, top=top) == [expected[:top], valid[:top]]


def test_what_fills_up_suppresses_nothing() -> None:
    boxes = row(0, 1, 2, 3)
    assert select([4, 3, 2, 1], boxes, [False] * 4, top=4) == [[0, 1, 2, 3], [False] * 4]


def test_without_a_candidate_the_best_scores_fill_up() -> None:
    assert select([0.1, 0.9, 0.5, 0.7], row(0, 50, 100, 150), [False] * 4) == [[1, 3, 2], [False] * 3]


def test_scores_that_are_none_are_no_candidates_and_come_last() -> None:
    boxes = row(0, 50, 100, 150, 200)
    assert select([nan, -inf, 0.1, nan, 5.0], boxes, [True, True, True, False, False], top=5) == [
        [2, 4, 0, 1, 3],
        [True, False, False, False, False],
    ]
    assert select([nan, nan, -inf], boxes[:, :3]) == [[0, 1, 2], [False] * 3]
    assert select([-1e30, inf, nan, inf, 0], boxes) == [[1, 3, 4], [True] * 3]


def test_every_box_is_selected_once() -> None:
    scores = torch.randn(4, 33).round()
    scores[:, ::7] = nan
    indices, _ = ops.select_boxes(scores, 20 * torch.rand(4, 33, 4), torch.rand(4, 33) < 0.5, top=33)
    assert torch.equal(indices.sort(dim=1).values, torch.arange(33).expand(4, 33))


# --- ties, and what is not a box --------------------------------------------------------------------------------------


def test_equal_scores_go_by_number() -> None:
    boxes = row(*range(0, 2000, 50))
    assert select([1.0] * 40, boxes, top=5) == [[0, 1, 2, 3, 4], [True] * 5]
    zeros = [-0.0, 0.0] * 20
    assert select(zeros, boxes, top=5) == [[0, 1, 2, 3, 4], [True] * 5]
    assert select(zeros, boxes, [False] * 40, top=5) == [[0, 1, 2, 3, 4], [False] * 5]
    assert select([0.0] * 30 + [1.0] * 10, boxes, top=3)[0] == [30, 31, 32]


def test_an_empty_union_is_no_overlap() -> None:
    points = torch.tensor([[[5.0, 5.0, 5.0, 5.0]] * 4])
    assert select([1, 2, 3, 4], points, iou_threshold=0) == [[3, 2, 1], [True] * 3]


@pytest.mark.parametrize("side", range(4))
def test_a_box_with_a_nan_suppresses_nothing_and_is_not_suppressed(side: int) -> None:
    boxes = row(0, 1, 2)
    boxes[0, 1, side] = nan
    assert select([1, 3, 2], boxes) == [[1, 2, 0], [True, True, False]]
    assert select([3, 2, 1], boxes) == [[0, 1, 2], [True, True, False]]


@pytest.mark.parametrize("number", [5, 67])
def test_boxes_that_are_none_follow_the_reference(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    boxes = 50 * torch.rand(20, number, 4, generator=generator).cumsum(2)
    for value in (nan, inf, -inf):
        boxes[torch.rand(20, number, 4, generator=generator) < 0.05] = value
    scores, candidates = torch.randn(20, number, generator=generator), torch.ones(20, number, dtype=torch.bool)
    expected = reference.select_boxes(scores, boxes, candidates, top=5)
    for found, right in zip(ops.select_boxes(scores, boxes, candidates, top=5), expected, strict=True):
        assert torch.equal(found, right)


def test_scores_in_half_precision_beside_boxes_in_float32() -> None:
    boxes = torch.tensor([[[1000.0, 0, 1100, 100], [1060, 0, 1160, 100]]])  # in bfloat16 they overlap by 0.3
    scores, candidates = torch.tensor([[3.0, 2.0]]).bfloat16(), torch.ones(1, 2, dtype=torch.bool)
    assert ops.select_boxes(scores, boxes, candidates, top=2)[1].tolist() == [[True, True]]
    assert ops.select_boxes(scores, boxes.bfloat16(), candidates, top=2)[1].tolist() == [[True, False]]


# --- gradient, graphs, errors -----------------------------------------------------------------------------------------


def test_there_is_no_gradient() -> None:
    scores, boxes = torch.randn(2, 9, requires_grad=True), torch.rand(2, 9, 4, requires_grad=True)
    candidates = torch.ones(2, 9, dtype=torch.bool)
    compiled = torch.compile(ops.select_boxes, backend="aot_eager", fullgraph=True)
    for function in (ops.select_boxes, compiled, reference.select_boxes):
        assert not any(result.requires_grad for result in function(scores, boxes, candidates))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": torch.zeros(2)}, ValueError, r"scores must have shape \[N,A\], got \[2\]"),
        (
            {"boxes": torch.zeros(2, 5, 4)},
            ValueError,
            r"boxes must have shape \[2, 6, 4\], a box a score, got \[2, 5, 4\]",
        ),
        ({"boxes": torch.zeros(2, 6, 4).half()}, TypeError, "boxes must have the dtype of scores"),
        ({"candidates": torch.ones(2, 6)}, TypeError, "candidates must be of dtype bool, got float32"),
        (
            {"candidates": torch.ones(6, 2) > 0},
            ValueError,
            r"candidates must have shape \[2, 6\], one value a score, got \[6, 2\]",
        ),
        ({"iou_threshold": 1.1}, ValueError, r"iou_threshold must be in \[0, 1\], got 1.1"),
        ({"iou_threshold": nan}, ValueError, r"iou_threshold must be in \[0, 1\], got nan"),
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"top": 7}, ValueError, r"scores must have at least top = 7 boxes an image, got \[2, 6\]"),
    ],
)
def test_bad_arguments(changed: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"scores": torch.zeros(2, 6), "boxes": torch.zeros(2, 6, 4), "candidates": torch.ones(2, 6) > 0}
    with pytest.raises(error, match=f"^select_boxes: {message}"):
        ops.select_boxes(**{**right, **changed})


@needs_libraries
def test_the_raw_operator_selects_no_more_than_there_are() -> None:
    scores, boxes, candidates = torch.zeros(2, 6), torch.zeros(2, 6, 4), torch.ones(2, 6) > 0
    with pytest.raises(RuntimeError, match=r"select_boxes: top must be at least 1 and at most .* 6, got 7"):
        torch.ops.fgvc_ext.select_boxes(scores, boxes, candidates, 0.25, 7)
