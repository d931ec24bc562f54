"""What the specification says of the losses of part proposals, beyond the contract that every operator keeps."""

import math

import pytest
import torch
from torch import Tensor

import fgvc_ext
from fgvc_ext import nn, ops
from fgvc_ext.ops.part_box_losses import BoxLosses

from .conftest import needs_libraries

A, B = [10.0, 20.0, 110.0, 90.0], [60.0, 10.0, 150.0, 70.0]


def losses(*boxes: list[float], area: float = 40000.0, valid: list[bool] | None = None, **options: object) -> BoxLosses:
    """Of one image, in float64."""
    corners = torch.tensor([boxes], dtype=torch.float64)
    counted = torch.tensor([valid or [True] * len(boxes)])
    return ops.part_box_losses(corners, counted, torch.tensor([area], dtype=torch.float64), **options)


def random_boxes(*size: int) -> Tensor:
    corner = 200 * torch.rand(*size, 2, dtype=torch.float64)
    return torch.cat((corner, corner + 20 + 200 * torch.rand(*size, 2, dtype=torch.float64)), dim=-1)


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_overlap_and_its_gradient() -> None:
    boxes = torch.tensor([[A, B]], dtype=torch.float64, requires_grad=True)
    overlap = ops.part_box_losses(boxes, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1).double()).overlap
    assert overlap.item() == pytest.approx(2 * 50 * 50 / (7000 + 5400))
    assert overlap.item() == pytest.approx(0.403226, abs=1e-6)
    (gradient,) = torch.autograd.grad(overlap, boxes)
    expected = torch.tensor([0.00227627, -0.0048127, 0.00578824, -0.00325182], dtype=torch.float64)
    torch.testing.assert_close(gradient[0, 0], expected, rtol=0, atol=1e-8)


def test_two_weights_make_the_dice_coefficient() -> None:
    assert losses(A, A).overlap == 1
    assert losses(A, A, iou_weight=0.6).overlap.item() == pytest.approx(0.3)
    jaccard = 2500 / (7000 + 5400 - 2500)
    assert losses(A, B).overlap.item() == pytest.approx(2 * jaccard / (1 + jaccard))


@pytest.mark.parametrize(
    "other", [[110.0, 20.0, 200.0, 90.0], [10.0, 95.0, 110.0, 100.0], [300.0, 300.0, 400.0, 400.0]]
)
def test_boxes_apart_or_touching_have_neither_loss_nor_gradient(other: list[float]) -> None:
    boxes = torch.tensor([[A, other]], requires_grad=True)
    overlap = ops.part_box_losses(boxes, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1)).overlap
    overlap.backward()
    assert overlap == 0
    assert not boxes.grad.any()


def test_equal_edges_share_the_derivative() -> None:
    boxes = torch.tensor([[A, A]], dtype=torch.float64, requires_grad=True)
    ops.part_box_losses(
        boxes, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1).double(), detach_denominator=True
    ).overlap.backward()
    width, height, total = 100, 70, 14000
    half = torch.tensor([-height, -width, height, width], dtype=torch.float64) / total  # 2 · ½
    torch.testing.assert_close(boxes.grad, half.expand(1, 2, 4))


def test_without_the_denominators_gradient_only_the_intersection_moves() -> None:
    boxes = torch.tensor([[A, B]], dtype=torch.float64, requires_grad=True)
    valid, area = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1).double()
    detached = ops.part_box_losses(boxes, valid, area, detach_denominator=True).overlap
    assert detached == ops.part_box_losses(boxes, valid, area).overlap
    (gradient,) = torch.autograd.grad(detached, boxes)
    # The intersection is [60, 20, 110, 70], of 50 by 50: its edges are B's, A's, A's and B's.
    step = 2 * 50 / 12400
    expected = torch.tensor([[[0, -step, step, 0], [-step, 0, 0, step]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


def test_an_image_has_the_mean_of_its_valid_pairs() -> None:
    boxes = random_boxes(4).tolist()
    pairs = [(0, 2), (0, 3), (2, 3)]
    alone = [losses(boxes[i], boxes[j]).overlap for i, j in pairs]
    together = losses(*boxes, valid=[True, False, True, True]).overlap
    torch.testing.assert_close(together, torch.stack(alone).mean())


# --- area -------------------------------------------------------------------------------------------------------------


def test_a_box_of_the_size_of_a_part_costs_nothing() -> None:
    part = [0.0, 0.0, 100.0, 100.0]
    for mode in ("two_sided", "hinge", "log"):
        assert losses(part, area_mode=mode).area == 0
        assert losses(part, area=20000, parts=2, area_mode=mode).area == 0


def test_the_modes_by_hand() -> None:
    large, small = [0.0, 0.0, 200.0, 100.0], [0.0, 0.0, 50.0, 100.0]  # r = 2 and 1/2
    for mode, of_large, of_small in (("two_sided", 1, 0.5), ("hinge", 1, 0), ("log", math.log(2), math.log(2))):
        assert losses(large, area_mode=mode).area.item() == pytest.approx(of_large)
        assert losses(small, area_mode=mode).area.item() == pytest.approx(of_small)
        assert losses(large, small, area_mode=mode).area.item() == pytest.approx((of_large + of_small) / 2)
        only = losses(large, small, valid=[False, True], area_mode=mode).area
        assert only.item() == pytest.approx(of_small)


@pytest.mark.parametrize(("mode", "slopes"), [("two_sided", (1, -1)), ("hinge", (1, 0)), ("log", (0.5, -2))])
def test_the_gradient_of_the_area(mode: str, slopes: tuple[float, float]) -> None:
    boxes = torch.tensor([[[0, 0, 200, 100], [0, 0, 50, 100]]], dtype=torch.float64, requires_grad=True)
    valid, area = torch.ones(1, 2, dtype=torch.bool), torch.tensor([40000.0], dtype=torch.float64)
    ops.part_box_losses(boxes, valid, area, area_mode=mode).area.backward()
    sides = torch.tensor([[-100.0, -200, 100, 200], [-100, -50, 100, 50]], dtype=torch.float64)
    expected = torch.tensor(slopes, dtype=torch.float64)[:, None] / 10000 * sides / 2
    torch.testing.assert_close(boxes.grad[0], expected)


@pytest.mark.parametrize("area", [0.0, 1000.0, -7.0])
def test_a_small_object_has_parts_of_the_least_area(area: float) -> None:
    assert losses([0.0, 0.0, 32.0, 32.0], area=area).area == 0
    assert losses([0.0, 0.0, 32.0, 32.0], area=area, min_area=512).area == 1


def test_the_scale_of_the_image_makes_no_difference() -> None:
    boxes, valid, area = random_boxes(5, 3), torch.rand(5, 3) < 0.8, 30000 + 30000 * torch.rand(5).double()
    expected = ops.part_box_losses(boxes, valid, area)
    torch.testing.assert_close(ops.part_box_losses(3 * boxes, valid, 9 * area, min_area=9 * 1024), expected)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_images_without_a_pair_or_a_box_count_as_zero(count: int) -> None:
    boxes, area = random_boxes(2, 3), torch.full((2,), 50000.0).double()
    valid = torch.ones(2, 3, dtype=torch.bool)
    valid[1, count:] = False
    both, first = ops.part_box_losses(boxes, valid, area), ops.part_box_losses(boxes[:1], valid[:1], area[:1])
    second = ops.part_box_losses(boxes[1:], valid[1:], area[1:])
    torch.testing.assert_close(both.overlap, first.overlap / 2)
    torch.testing.assert_close(both.area, (first.area + second.area) / 2)
    assert second.overlap == 0
    assert (second.area == 0) == (count == 0)


def test_the_shards_of_a_batch_have_its_losses_as_their_mean() -> None:
    boxes, valid, area = random_boxes(6, 3), torch.rand(6, 3) < 0.6, torch.full((6,), 50000.0).double()
    whole = ops.part_box_losses(boxes, valid, area)
    shards = [ops.part_box_losses(boxes[i : i + 2], valid[i : i + 2], area[i : i + 2]) for i in (0, 2, 4)]
    for loss, of_shards in zip(whole, zip(*shards, strict=True), strict=True):
        torch.testing.assert_close(loss, torch.stack(of_shards).mean())


@pytest.mark.parametrize("mode", ["two_sided", "hinge", "log"])
@pytest.mark.parametrize("detached", [False, True])
def test_gradcheck_at_the_size_of_images(mode: str, detached: bool) -> None:
    """But for the detached denominator, which is another function's gradient."""
    boxes = random_boxes(3, 4).requires_grad_()
    valid = torch.tensor([[True] * 4, [True, False, True, True], [False, True, False, False]])
    area = torch.tensor([30000.0, 60000.0, 500.0], dtype=torch.float64)

    def function(boxes: Tensor) -> tuple[Tensor, ...]:
        found = ops.part_box_losses(boxes, valid, area, area_mode=mode, detach_denominator=detached)
        return (found.area,) if detached else tuple(found)

    assert torch.autograd.gradcheck(function, (boxes,))


def test_one_loss_has_a_gradient_without_the_other() -> None:
    boxes = random_boxes(3, 4).requires_grad_()
    valid, area = torch.ones(3, 4, dtype=torch.bool), torch.full((3,), 50000.0).double()
    of_overlap, of_area = (
        torch.autograd.grad(ops.part_box_losses(boxes, valid, area)[number], boxes)[0] for number in range(2)
    )
    both = ops.part_box_losses(boxes, valid, area)
    (weighted,) = torch.autograd.grad(3 * both.overlap - 2 * both.area, boxes)
    torch.testing.assert_close(weighted, 3 * of_overlap - 2 * of_area)


# --- what is not a box ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [[50.0, 30, 50, 80], [30.0, 80, 90, 20], [90.0, 80, 30, 20], [50.0, 50, 50, 50]])
def test_an_empty_box_has_no_area_and_no_gradient(box: list[float]) -> None:
    boxes = torch.tensor([[box, A]], dtype=torch.float64, requires_grad=True)
    valid, area = torch.ones(1, 2, dtype=torch.bool), torch.tensor([40000.0]).double()
    for mode, distance in (("two_sided", 1), ("hinge", 0), ("log", math.inf)):
        found = ops.part_box_losses(boxes, valid, area, area_mode=mode)
        assert found.overlap == 0
        assert losses(box, area_mode=mode).area == distance
        (gradient,) = torch.autograd.grad(found, boxes, [torch.ones(()).double()] * 2)
        assert gradient.isfinite().all()
        assert not gradient[0, 0].any()
    assert losses(box, box).overlap == 0


def test_a_nan_counts_only_in_a_valid_box() -> None:
    nan = [math.nan, 20.0, 110.0, 90.0]
    ignored = losses(A, nan, B, valid=[True, False, True])
    assert ignored == losses(A, B)
    assert losses(A, nan, B).overlap.isnan()
    assert losses(A, nan, B).area.isnan()
    alone = losses(A, nan, B, valid=[False, True, False])
    assert alone.overlap == 0
    assert alone.area.isnan()
    assert losses(A, area=math.nan).area.isnan()
    boxes = torch.tensor([[A, nan, B]], requires_grad=True)
    found = ops.part_box_losses(boxes, torch.tensor([[True, False, True]]), torch.tensor([40000.0]))
    (found.overlap + found.area).backward()
    assert boxes.grad.isfinite().all()
    assert not boxes.grad[0, 1].any()


@pytest.mark.parametrize("side", range(4))
def test_a_nan_reaches_the_same_gradients_as_in_the_reference(side: int) -> None:
    """Also where the other box would have decided without it, and no gradient passes through the areas."""
    boxes = torch.tensor([[A, B, [200.0, 200.0, 300.0, 300.0]]])
    boxes[0, 0, side] = math.nan
    valid, area = torch.ones(1, 3, dtype=torch.bool), torch.tensor([40000.0])

    def gradient() -> Tensor:
        leaf = boxes.clone().requires_grad_()
        ops.part_box_losses(leaf, valid, area, detach_denominator=True).overlap.backward()
        return leaf.grad.isnan()

    with fgvc_ext.use_reference():
        expected = gradient()
    assert torch.equal(gradient(), expected)


def test_the_object_is_a_constant() -> None:
    boxes, area = random_boxes(2, 3).requires_grad_(), torch.full((2,), 50000.0).double().requires_grad_()
    found = ops.part_box_losses(boxes, torch.ones(2, 3, dtype=torch.bool), area)
    (found.overlap + found.area).backward()
    assert boxes.grad is not None
    assert area.grad is None


# --- the module, and errors -------------------------------------------------------------------------------------------


def test_the_module_passes_its_options_on() -> None:
    options = {"iou_weight": 0.7, "parts": 3, "min_area": 5000, "area_mode": "log", "detach_denominator": True}
    module = nn.PartBoxLosses(**options)
    boxes, valid, area = (
        random_boxes(3, 3).requires_grad_(),
        torch.ones(3, 3, dtype=torch.bool),
        torch.zeros(3).double(),
    )
    found, expected = module(boxes, valid, area), ops.part_box_losses(boxes, valid, area, **options)
    assert found == expected
    gradients = [torch.autograd.grad(one.overlap + one.area, boxes)[0] for one in (found, expected)]
    assert torch.equal(*gradients)
    assert repr(module) == (
        "PartBoxLosses(iou_weight=0.7, parts=3, min_area=5000, area_mode='log', detach_denominator=True)"
    )
    assert nn.PartBoxLosses()(boxes, valid, area) == ops.part_box_losses(boxes, valid, area)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 3)}, ValueError, r"boxes must have shape \[N,M,4\], got \[2, 3\]"),
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes must have shape \[N,M,4\], got \[2, 3, 5\]"),
        ({"valid": torch.ones(2, 4) > 0}, ValueError, r"valid must have shape \[2, 3\], one value a box, got \[2, 4\]"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid must be of dtype bool, got float32"),
        (
            {"object_area": torch.zeros(1)},
            ValueError,
            r"object_area must have shape \[2\], one area an image, got \[1\]",
        ),
        ({"object_area": torch.zeros(2).double()}, TypeError, "object_area must have the dtype of boxes"),
        ({"iou_weight": math.inf}, ValueError, "iou_weight must be finite in float32, got inf"),
        ({"parts": 0}, ValueError, "parts must be at least 1, got 0"),
        ({"parts": 2.5}, TypeError, "parts must be an int, got float"),
        ({"min_area": 0}, ValueError, "min_area must be above 0 and a normal number in float32, got 0"),
        ({"area_mode": "l1"}, ValueError, "area_mode must be one of two_sided, hinge, log, got 'l1'"),
        ({"detach_denominator": 1}, TypeError, "detach_denominator must be a bool, got int"),
    ],
)
def test_bad_arguments(changed: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"boxes": torch.zeros(2, 3, 4), "valid": torch.ones(2, 3, dtype=torch.bool), "object_area": torch.zeros(2)}
    with pytest.raises(error, match=f"^part_box_losses: {message}"):
        ops.part_box_losses(**{**right, **changed})


@needs_libraries
def test_the_raw_operator_takes_boxes_of_four_numbers() -> None:
    valid, areas = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)
    with pytest.raises(RuntimeError, match="part_box_losses: boxes must have 4 numbers a box, got 3"):
        torch.ops.fgvc_ext.part_box_losses(torch.zeros(2, 3, 3), valid, areas, 2.0, 4, 1024.0, 0, False)
