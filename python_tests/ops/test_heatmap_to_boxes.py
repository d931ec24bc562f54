"""What ELoPE says of the boxes around heat maps, beyond the contract that every operator keeps."""

import pytest
import torch
from torch import Tensor

from fgvc_ext import ops


def heatmap(height: int, width: int, *kept: tuple[int, int], value: float = 1.0) -> Tensor:
    """[1,h,w] of zeros with a value at the (row, column) that are kept."""
    map_ = torch.zeros(1, height, width)
    for row, column in kept:
        map_[0, row, column] = value
    return map_


def test_an_example_by_hand() -> None:
    maps = heatmap(14, 14, (2, 3), (6, 9), (4, 5))
    assert ops.heatmap_to_boxes(maps, threshold=0.3, image_size=448).tolist() == [[96, 64, 320, 224]]


def test_height_and_width_have_scales_of_their_own() -> None:
    boxes = ops.heatmap_to_boxes(heatmap(4, 8, (1, 2), (2, 6)), threshold=0.2, image_size=(200, 600))
    assert boxes.tolist() == [[2 * 600 / 8, 1 * 200 / 4, 7 * 600 / 8, 3 * 200 / 4]]
    assert ops.heatmap_to_boxes(heatmap(4, 8, (1, 2)), threshold=0.2, image_size=[200, 600]).tolist() == [
        [150, 50, 225, 100]
    ]


def test_the_threshold_is_a_share_of_the_maps_range_and_itself_not_kept() -> None:
    maps = torch.tensor([[[2.0, 3.0, 4.0, 6.0]]])  # shares 0, 1/4, 1/2, 1
    for threshold, left in ((0.0, 25), (0.2, 25), (0.25, 50), (0.49, 50), (0.5, 75), (0.99, 75)):
        boxes = ops.heatmap_to_boxes(maps, threshold=threshold, image_size=(20, 100))
        assert boxes.tolist() == [[left, 0, 100, 20]]


def test_the_comparison_is_in_float32() -> None:
    # 0.3 in float32 is above 0.3: a value of exactly that is not kept, one step more is.
    exactly = torch.tensor(0.3)
    above = torch.nextafter(exactly, torch.tensor(1.0))
    maps = torch.stack((torch.tensor([0.0, exactly, 1.0]), torch.tensor([0.0, above, 1.0])))[:, None]
    boxes = ops.heatmap_to_boxes(maps, threshold=0.3, image_size=90)
    assert boxes.tolist() == [[60, 0, 90, 90], [30, 0, 90, 90]]


@pytest.mark.parametrize("side", [7, 13, 14, 15, 28, 97])
def test_a_map_that_is_high_everywhere_gives_exactly_the_whole_image(side: int) -> None:
    maps = heatmap(side, side, (0, 0), (side - 1, side - 1))
    assert ops.heatmap_to_boxes(maps, threshold=0.3, image_size=(333, 448)).tolist() == [[0, 0, 448, 333]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_where_nothing_is_located_the_box_is_the_whole_image(dtype: torch.dtype) -> None:
    maps = 0.1 * torch.rand(6, 5, 4).to(dtype)
    maps[:, 2, 2] = 1  # a box of one position, if nothing else were in the map
    maps[0] = 0.7  # constant
    maps[1] = 0
    maps[2, 1, 1] = float("nan")
    maps[3, 4, 3] = float("inf")
    maps[4, 0, 2] = float("-inf")
    boxes = ops.heatmap_to_boxes(maps, threshold=0.2, image_size=(100, 80))
    assert boxes[:5].tolist() == [[0, 0, 80, 100]] * 5
    assert boxes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    alone = ops.heatmap_to_boxes(maps[5:], threshold=0.2, image_size=(100, 80))
    assert torch.equal(boxes[5:], alone)


def test_nothing_exceeds_a_threshold_of_one() -> None:
    boxes = ops.heatmap_to_boxes(torch.rand(3, 7, 7), threshold=1, image_size=70)
    assert boxes.tolist() == [[0, 0, 70, 70]] * 3


def test_a_single_position_is_a_constant_map() -> None:
    assert ops.heatmap_to_boxes(torch.rand(1, 1, 1), threshold=0.3, image_size=64).tolist() == [[0, 0, 64, 64]]


def test_a_box_with_a_short_side_is_the_whole_image() -> None:
    wide = heatmap(10, 10, (4, 1), (4, 7))  # one row: 9 of 90 pixels high, 10 of 100
    assert ops.heatmap_to_boxes(wide, threshold=0.3, image_size=90).tolist() == [[0, 0, 90, 90]]
    assert ops.heatmap_to_boxes(wide, threshold=0.3, image_size=100).tolist() == [[10, 40, 80, 50]]
    assert ops.heatmap_to_boxes(wide, threshold=0.3, image_size=90, min_size=9).tolist() == [[9, 36, 72, 45]]
    tall = wide.transpose(1, 2)
    assert ops.heatmap_to_boxes(tall, threshold=0.3, image_size=90).tolist() == [[0, 0, 90, 90]]
    assert ops.heatmap_to_boxes(tall, threshold=0.3, image_size=90, min_size=9).tolist() == [[36, 9, 45, 72]]
    assert ops.heatmap_to_boxes(tall, threshold=0.3, image_size=90, min_size=0).tolist() == [[36, 9, 45, 72]]


def test_offset_and_scale_make_no_difference() -> None:
    maps = torch.randint(0, 16, (8, 9, 11)).float()
    expected = ops.heatmap_to_boxes(maps, threshold=0.7, image_size=448)
    assert torch.equal(ops.heatmap_to_boxes(maps * 4 - 32, threshold=0.7, image_size=448), expected)


def test_any_strides_and_no_samples() -> None:
    maps = torch.rand(3, 9, 11)
    expected = ops.heatmap_to_boxes(maps, threshold=0.7, image_size=448)
    other = maps.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(ops.heatmap_to_boxes(other, threshold=0.7, image_size=448), expected)
    assert ops.heatmap_to_boxes(maps[:0], threshold=0.7, image_size=448).shape == (0, 4)


def test_there_is_no_gradient() -> None:
    maps = torch.rand(2, 5, 5, requires_grad=True)
    compiled = torch.compile(ops.heatmap_to_boxes, backend="aot_eager", fullgraph=True)
    for function in (ops.heatmap_to_boxes, compiled):
        assert not function(maps, threshold=0.3, image_size=50).requires_grad


def test_no_value_is_looked_at() -> None:
    """A whole graph for maps of any size: on a GPU, looking would wait. Under vmap as well."""
    function = torch.compile(ops.heatmap_to_boxes, backend="aot_eager", fullgraph=True, dynamic=True)
    maps = torch.rand(3, 9, 11)
    for batch in (maps, maps[:2, :8], maps.transpose(1, 2)):
        options = {"threshold": 0.7, "image_size": (300, 448)}
        assert torch.equal(function(batch, **options), ops.heatmap_to_boxes(batch, **options))
    mapped = torch.func.vmap(lambda one: ops.heatmap_to_boxes(one, threshold=0.7, image_size=448))(maps[:, None])
    assert torch.equal(mapped[:, 0], ops.heatmap_to_boxes(maps, threshold=0.7, image_size=448))


@pytest.mark.parametrize(
    ("maps", "options", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 4), {}, ValueError, r"heatmaps must have shape \[N,h,w\], got \[2, 1, 4, 4\]"),
        (torch.zeros(2, 0, 4), {}, ValueError, r"heatmaps must have h and w of at least 1, got \[2, 0, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), {}, TypeError, "heatmaps must be of dtype float32, .* got uint8"),
        (torch.zeros(2, 4, 4), {"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        (torch.zeros(2, 4, 4), {"threshold": -0.1}, ValueError, r"threshold must be in \[0, 1\], got -0.1"),
        (torch.zeros(2, 4, 4), {"threshold": float("nan")}, ValueError, r"threshold must be in \[0, 1\], got nan"),
        (torch.zeros(2, 4, 4), {"threshold": "0.3"}, TypeError, "threshold must be a number, got str"),
        (torch.zeros(2, 4, 4), {"image_size": 0}, ValueError, "the height in image_size must be at least 1, got 0"),
        (torch.zeros(2, 4, 4), {"image_size": (4, 0)}, ValueError, "the width in image_size must be at least 1, got 0"),
        (
            torch.zeros(2, 4, 4),
            {"image_size": 4.5},
            TypeError,
            r"image_size must be an int or \(height, width\), got 4.5",
        ),
        (torch.zeros(2, 4, 4), {"image_size": (4, 4, 4)}, TypeError, r"image_size must be an int or \(height, width\)"),
        (torch.zeros(2, 4, 4), {"min_size": -1}, ValueError, "min_size must be finite and at least 0, got -1"),
    ],
)
def test_bad_arguments(maps: Tensor, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^heatmap_to_boxes: {message}"):
        ops.heatmap_to_boxes(maps, **{"threshold": 0.3, "image_size": 448, **options})
