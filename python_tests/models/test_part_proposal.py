"""Anchors, boxes, the feature pyramid, and the regions that the part proposal network keeps."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from fgvc_ext.models.part_proposal import (
    LEVELS,
    THIRDS,
    AnchorLevel,
    FeaturePyramid,
    PartProposalNetwork,
    anchors,
    centre_values,
    decode,
)

CHANNELS, SIZE = (6, 8, 10), (96, 64)


def _levels(samples: int = 2, generator: int = 0) -> list[torch.Tensor]:
    """Maps of strides 8, 16 and 32."""
    source = torch.Generator().manual_seed(generator)
    sides = [(SIZE[0] // stride, SIZE[1] // stride) for stride in (8, 16, 32)]
    return [torch.randn(samples, c, *side, generator=source) for c, side in zip(CHANNELS, sides, strict=True)]


def _network(**options) -> PartProposalNetwork:
    torch.manual_seed(0)
    network = PartProposalNetwork(CHANNELS, width=8, depth=1, **options)
    for tower in (network.score, network.change):
        nn.init.normal_(tower[-1].weight, std=0.1)  # so that anchors differ and boxes move
    return network


# ---------------------------------------------------------------- anchors


def _shapes(levels=LEVELS) -> list[torch.Tensor]:
    return [level.shapes() for level in levels]


def test_anchors_at_448():
    sides = [448 // stride for stride in (8, 16, 32)]
    found = anchors(_shapes(), [(side, side) for side in sides], [(s, s) for s in (8.0, 16.0, 32.0)])
    assert found.shape == (37_044, 4)
    assert found[0, :2].tolist() == [4, 4]
    assert found[9, :2].tolist() == [12, 4], "row by row"
    assert found[9 * 56, :2].tolist() == [4, 12]
    assert found[9 * 56**2, :2].tolist() == [8, 8], "level by level"
    areas = found[:, 2] * found[:, 3]
    assert (round(areas.min().item()), round(areas.max().item())) == (48**2, round((192 * 2 ** (2 / 3)) ** 2))


def test_the_anchors_of_a_cell():
    found = anchors(_shapes(), [(1, 1)] * 3, [(8.0, 8.0)] * 3)
    expected = [
        (size * scale * ratio**0.5, size * scale / ratio**0.5)
        for size in (48, 96, 192)
        for scale in THIRDS
        for ratio in (2 / 3, 1, 1.5)
    ]
    torch.testing.assert_close(found[:, 2:], torch.tensor(expected))
    half = anchors(_shapes(), [(1, 1)] * 3, [(8.0, 8.0)] * 3, scale=0.5)
    torch.testing.assert_close(half[:, 2:], found[:, 2:] / 2)
    assert torch.equal(half[:, :2], found[:, :2])


def test_nts_nets_anchors():
    """Its three levels are coarser, and the finer two have two scales."""
    coarse = [AnchorLevel(48, THIRDS[1:]), AnchorLevel(96, THIRDS[1:]), AnchorLevel(192)]
    found = anchors(_shapes(coarse), [(14, 14), (7, 7), (4, 4)], [(s, s) for s in (32.0, 64.0, 128.0)])
    assert len(found) == 1_614
    assert found[0, :2].tolist() == [16, 16]
    assert found[-1, :2].tolist() == [448, 448]


def test_anchors_take_the_maps_strides_and_the_images_scale():
    network = _network()
    found = network.anchors(_levels(), SIZE)
    assert found[0, :2].tolist() == [4, 4]
    scale = (96 * 64) ** 0.5 / 448
    torch.testing.assert_close(found[:9, 2:], LEVELS[0].shapes() * scale)
    squeezed = [level[..., :5] for level in _levels()]  # maps 5 cells wide, of images as wide as before
    assert network.anchors(squeezed, SIZE)[0, :2].tolist() == pytest.approx([64 / 5 / 2, 4])


# ---------------------------------------------------------------- boxes


def test_changes_of_an_anchor():
    anchor = torch.tensor([50.0, 40.0, 20.0, 10.0])
    same = decode(torch.zeros(4), anchor, (96, 96))
    assert same.tolist() == [40, 35, 60, 45]
    moved = decode(torch.tensor([0.5, -1.0, torch.tensor(2.0).log(), torch.tensor(0.5).log()]), anchor, (96, 96))
    torch.testing.assert_close(moved, torch.tensor([40.0, 27.5, 80.0, 32.5]))


def test_boxes_lie_within_the_image_and_have_a_pixel():
    anchor = torch.tensor([50.0, 40.0, 20.0, 10.0])
    huge = decode(torch.tensor([0.0, 0.0, 50.0, 50.0]), anchor, (60, 96))
    assert huge.tolist() == [0, 0, 96, 60]
    bounded = decode(torch.tensor([0.0, 0.0, 50.0, 50.0]), anchor, (6000, 6000))
    assert bounded[2] - bounded[0] == pytest.approx(20 * 62.5 / 2 + 50), "a side grows by 62.5 at most"
    thin = decode(torch.tensor([0.0, 0.0, -9.0, -9.0]), anchor, (96, 96))
    assert thin.tolist() == [49.5, 39.5, 50.5, 40.5]
    corner = decode(torch.tensor([9.0, -9.0, 0.0, 0.0]), anchor, (96, 96))
    assert corner.tolist() == [95, 0, 96, 1], "about its middle, inside"


def test_a_box_that_is_cut_has_no_gradient_at_the_cut_side():
    delta = torch.tensor([-2.0, 0.0, 0.1, 0.1], requires_grad=True)
    box = decode(delta, torch.tensor([30.0, 40.0, 40.0, 10.0]), (96, 96))
    assert box[0] == 0
    (gradient,) = torch.autograd.grad(box[0], delta, retain_graph=True)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(box[3], delta)
    assert gradient[3] > 0


def test_the_cell_of_a_centre():
    values = torch.arange(12.0).view(1, 3, 4)
    places = torch.tensor([[0.0, 0.0], [1.99, 0.99], [2.0, 1.0], [9.0, 9.0]])
    found = centre_values(values, torch.cat([places, torch.ones(4, 2)], dim=1))
    assert found.tolist() == [[0, 1, 6, 11]]


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_deeper_maps_are_added_from_above_whatever_their_size():
    torch.manual_seed(0)
    pyramid = FeaturePyramid(CHANNELS, 4)
    levels = [torch.randn(1, c, s, s) for c, s in zip(CHANNELS, (13, 7, 4), strict=True)]
    found = pyramid(levels)
    top = F.conv2d(levels[2], pyramid.lateral[2].weight, pyramid.lateral[2].bias)
    middle = F.conv2d(levels[1], pyramid.lateral[1].weight, pyramid.lateral[1].bias)
    rows = torch.arange(7) * 4 // 7  # the nearest cell
    middle = middle + top[:, :, rows][..., rows]
    rows = torch.arange(13) * 7 // 13
    finest = F.conv2d(levels[0], pyramid.lateral[0].weight, pyramid.lateral[0].bias) + middle[:, :, rows][..., rows]
    for own, sums, layer in zip(found, (finest, middle, top), pyramid.output, strict=True):
        torch.testing.assert_close(own, F.conv2d(sums, layer.weight, layer.bias, padding=1))


@torch.no_grad()
def test_predictions_stand_in_the_order_of_the_anchors():
    network = _network()
    levels = _levels()
    scores, changes = network.predictions(levels)
    maps, first = network.pyramid(levels), 0
    for one in maps:
        score, change = network.score(one), network.change(one)
        height, width = one.shape[2:]
        for y, x, anchor in ((0, 0, 0), (0, 1, 3), (height - 1, width - 1, 8), (1, 0, 5)):
            index = first + (y * width + x) * 9 + anchor
            assert scores[1, index] == score[1, anchor, y, x]
            assert torch.equal(changes[1, index], change[1, 4 * anchor : 4 * anchor + 4, y, x])
        first += 9 * height * width
    assert scores.shape[1] == first


@torch.no_grad()
def test_regions_are_those_of_greedy_suppression():
    network, levels = _network(regions=4), _levels()
    found = network(levels, SIZE)
    scores, changes = network.predictions(levels)
    boxes = decode(changes, network.anchors(levels, SIZE), SIZE)
    assert found.valid.all()
    for sample in range(2):
        kept = torchvision.ops.nms(boxes[sample], scores[sample], 0.25)[:4]
        assert torch.equal(found.indices[sample], kept)
        assert torch.equal(found.boxes[sample], boxes[sample, kept])
        assert torch.equal(found.scores[sample], scores[sample, kept])


@torch.no_grad()
def test_regions_have_their_anchors_in_the_foreground():
    network, levels = _network(), _levels()
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[0, 40:60, 20:50] = True
    found = network(levels, SIZE, mask)
    x, y = network.anchors(levels, SIZE)[found.indices[0], :2].unbind(1)
    inside = (y >= 40) & (y < 60) & (x >= 20) & (x < 50)
    assert torch.equal(inside, found.valid[0])
    assert found.valid[0, 0]
    assert not found.valid[1].any(), "there must be three, but none is one"
    assert len(set(found.indices[1].tolist())) == 3


def test_scores_move_one_tower_and_boxes_the_other():
    network, levels = _network(), [level.requires_grad_() for level in _levels()]
    found = network(levels, SIZE)
    found.scores.sum().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in network.change.parameters())
    assert all(p.grad.any() for p in network.score.parameters())
    network.zero_grad()
    found.boxes.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in network.score.parameters())
    assert all(p.grad.any() for p in network.change.parameters())
    assert all(level.grad is None for level in levels)


def test_feature_maps_are_reached_only_where_that_is_asked_for():
    network, levels = _network(detach=False), [level.requires_grad_() for level in _levels()]
    network(levels, SIZE).scores.sum().backward()
    assert all(level.grad is not None for level in levels)


def test_the_towers_start_small_and_indifferent():
    torch.manual_seed(0)
    network = PartProposalNetwork((64, 64, 64))
    scores, changes = network.predictions([torch.rand(1, 64, s, s) for s in (8, 4, 2)])
    assert scores.abs().max() < 0.5
    assert changes.abs().max() < 0.5
    for tower in (network.score, network.change):
        for layer in tower:
            if isinstance(layer, nn.Conv2d):
                assert (layer.bias == 0).all()
                assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("size", [0, -48, float("inf"), float("nan")])
def test_an_anchor_has_a_size(size):
    for wrong in ({"size": size}, {"size": 48, "scales": (1.0, size)}, {"size": 48, "ratios": (size,)}):
        with pytest.raises(ValueError, match="AnchorLevel: expected a size, scales and ratios above 0"):
            AnchorLevel(**wrong)


def test_levels_must_have_as_many_anchors_as_each_other():
    with pytest.raises(ValueError, match=r"as many anchors in a cell on each of the 3 levels, got \[9, 9, 6\]"):
        PartProposalNetwork(CHANNELS, levels=[*LEVELS[:2], AnchorLevel(192, THIRDS[:2])])
    with pytest.raises(ValueError, match="each of the 2 levels"):
        PartProposalNetwork(CHANNELS[:2])
