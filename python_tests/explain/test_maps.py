"""Drawing keeps size and type, puts things where they belong, and survives maps that hold nothing to show."""

import pytest
import torch

from fgvc_ext.explain.maps import draw_boxes, draw_mask, draw_points, heat, overlay

NAN, INF = float("nan"), float("inf")


def grey(height: int = 40, width: int = 60, level: int = 128) -> torch.Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("map", "expected"),
    [
        ([[1.0, 3.0], [2.0, 5.0]], [[0.0, 0.5], [0.25, 1.0]]),
        ([[7.0, 7.0]], [[0.0, 0.0]]),
        ([[NAN, 0.0, 4.0]], [[0.0, 0.0, 1.0]]),
        ([[INF, 1.0, 3.0, -INF]], [[1.0, 0.0, 1.0, 0.0]]),
        ([[NAN, INF]], [[0.0, 0.0]]),
    ],
)
def test_heat(map, expected):
    assert torch.equal(heat(torch.tensor(map)), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_heat_is_float32_and_does_not_overflow(dtype):
    map = torch.tensor([[-60000, 60000], [0, 30000]], dtype=torch.float64).to(dtype)
    scaled = heat(map)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([[0.0, 1.0], [0.5, 0.75]]), atol=2e-3, rtol=0)


def test_heat_of_an_empty_map_is_empty():
    assert heat(torch.zeros(0, 3)).shape == (0, 3)


def test_overlay_is_bright_where_the_map_is_high():
    image, before = grey(), grey()
    map = torch.zeros(4, 6, requires_grad=True) + torch.eye(4, 6)[[0, 0, 0, 0]]  # the left column is high
    shown = overlay(image, map)
    assert shown.shape == image.shape
    assert shown.dtype == torch.uint8
    assert torch.equal(image, before)
    brightness = shown.float().mean(0)
    assert brightness[:, :5].min() > brightness[:, 20:].max() + 50


def test_overlay_opacity():
    map = torch.rand(5, 7)
    assert torch.equal(overlay(grey(), map, opacity=0), grey())
    colours = overlay(grey(level=0), map, opacity=1)
    assert torch.equal(colours, overlay(grey(level=255), map, opacity=1))
    with pytest.raises(ValueError, match=r"opacity.*1\.5"):
        overlay(grey(), map, opacity=1.5)


def test_mask_darkens_suppressed_cells_and_nothing_else():
    mask = torch.tensor([[True, False], [False, False]])
    shown = draw_mask(grey(), mask)
    assert torch.equal(shown[:, 20:], grey()[:, 20:])
    assert torch.equal(shown[:, :20, 30:], grey()[:, :20, 30:])
    hidden = shown[0, :20, :30].flatten()
    assert hidden.min() == 38
    assert hidden.max() > 128
    assert (hidden == 38).float().mean() > 0.5
    assert torch.equal(draw_mask(grey(), torch.zeros(3, 3, dtype=torch.bool)), grey())


def test_mask_cells_do_not_drift_when_they_do_not_divide_the_image():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 2] = True
    changed = (draw_mask(grey(10, 10), mask) != grey(10, 10)).any(0).nonzero()
    assert changed.amin(0).tolist() == [4, 7]
    assert changed.amax(0).tolist() == [6, 9]


def test_box_is_an_outline_at_its_place():
    shown = draw_boxes(grey(), torch.tensor([10.0, 8.0, 50.0, 30.0]), "#ff0000", width=1)
    red = (shown == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all(0)
    assert red[8, 10:51].all()
    assert red[30, 10:51].all()
    assert red[8:31, 10].all()
    assert red[8:31, 50].all()
    assert red.sum() == 2 * 41 + 2 * 21
    assert torch.equal(shown[:, 12:27, 14:47], grey()[:, 12:27, 14:47])


def test_boxes_outside_are_cut_and_impossible_ones_left_out():
    shown = draw_boxes(grey(), torch.tensor([[-1e6, -9, 1e6, 99], [NAN, 0, 9, 9], [30, 30, 10, 10], [5, 5, 5, 5]]))
    assert shown.shape == (3, 40, 60)
    assert not torch.equal(shown, grey())
    assert torch.equal(shown[:, 5:35, 5:55], grey()[:, 5:35, 5:55])
    assert torch.equal(draw_boxes(grey(), torch.zeros(0, 4)), grey())


def test_points_are_ringed_not_covered():
    shown = draw_points(grey(), torch.tensor([[30.0, 20.0], [NAN, 3.0]]), "#00ff00", radius=8)
    changed = (shown != grey()).any(0).nonzero().double()
    distance = ((changed - torch.tensor([20.0, 30.0])) ** 2).sum(1).sqrt()
    assert len(changed)
    assert distance.min() > 4
    assert distance.max() < 12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: overlay(grey().float(), torch.zeros(2, 2)), "overlay: image: expected uint8.*float32"),
        (lambda: overlay(grey()[0], torch.zeros(2, 2)), r"overlay: image: .*\[40, 60\]"),
        (lambda: overlay(grey(), torch.zeros(1, 2, 2)), r"heat: map: .*\[1, 2, 2\]"),
        (lambda: draw_mask(grey(), torch.zeros(2, 2)), "draw_mask: mask: expected bool.*float32"),
        (lambda: draw_boxes(grey(), torch.zeros(2, 5)), r"draw_boxes: boxes: .*\[2, 5\]"),
        (lambda: draw_points(grey(), torch.zeros(2, 3)), r"draw_points: points: .*\[2, 3\]"),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
