"""Class activation maps against a network whose scores are known, and measures against maps worked out by hand."""

import math

import pytest
import torch
from torch import nn

from fgvc_ext.explain.cam import (
    class_activation_maps,
    effective_area,
    grad_cam,
    local_maxima,
    part_hits,
    share_by_part,
    share_in_box,
    summarise,
)

NAN = float("nan")


def one_cell(value: float = 1.0) -> torch.Tensor:
    map = torch.zeros(4, 4)
    map[1, 2] = value
    return map


def test_map_is_the_weighted_sum_of_features_and_its_mean_the_score():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(5, 8, 3, 4, generator=generator)
    head = nn.Conv2d(8, 6, 1, bias=False)
    classes = torch.tensor([5, 0, 3, 3, 1])
    maps = class_activation_maps(head, features, classes, batch_size=2)
    weights = head.weight[classes, :, 0, 0]
    torch.testing.assert_close(maps, torch.einsum("nk,nkhw->nhw", weights, features).detach())
    scores = (features.mean((2, 3)) @ head.weight[:, :, 0, 0].T).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(maps.mean((1, 2)), scores.detach())
    assert not maps.requires_grad
    assert torch.equal(class_activation_maps(head, features, 3)[2:4], maps[2:4])


def test_maps_of_no_images():
    assert class_activation_maps(nn.Conv2d(3, 2, 1), torch.zeros(0, 3, 5, 5), 1).shape == (0, 5, 5)


@pytest.mark.parametrize("label", [-1, 2])
def test_class_out_of_range(label):
    with pytest.raises(IndexError, match=f"class {label} of 2"):
        class_activation_maps(nn.Conv2d(3, 2, 1), torch.zeros(2, 3, 5, 5), torch.tensor([0, label]))


def test_scores_instead_of_maps_are_refused():
    with pytest.raises(ValueError, match=r"maps_fn.*\[2, 7\]"):
        class_activation_maps(lambda images: torch.zeros(len(images), 7), torch.zeros(2, 3, 5, 5), 0)


def test_share_in_box_by_hand():
    cells = one_cell()  # covers x 20..30, y 10..20 of 40 × 40 pixels
    maps = torch.stack([cells] * 5 + [torch.ones(4, 4), cells - 5, cells])
    boxes = torch.tensor(
        [
            [20, 10, 30, 20],
            [0, 0, 40, 40],
            [25, 10, 40, 20],
            [25, 15, 40, 40],
            [0, 0, 20, 40],
            [0, 0, 20, 20],
            [0, 0, 40, 40],
            [NAN, 0, 40, 40],
        ]
    )
    expected = torch.tensor([1, 1, 0.5, 0.25, 0, 0.25, NAN, NAN], dtype=torch.float64)
    torch.testing.assert_close(share_in_box(maps, boxes, 40), expected, equal_nan=True)


def test_share_in_box_counts_positive_activation_alone_and_takes_height_before_width():
    maps = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]]])
    box = torch.tensor([[0.0, 0.0, 50.0, 20.0]])  # the left half of a 20 × 100 image
    assert share_in_box(maps, box, (20, 100)).item() == pytest.approx(0.75)


def test_effective_area_by_hand():
    half = torch.zeros(4, 4)
    half[:2] = 7.0
    uneven = torch.zeros(4, 4)
    uneven[0, 0], uneven[0, 1] = 3.0, 1.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    maps = torch.stack([torch.ones(4, 4), one_cell(), half, uneven, half - 100])
    expected = torch.tensor([1, 1 / 16, 0.5, math.exp(entropy) / 16, NAN], dtype=torch.float64)
    torch.testing.assert_close(effective_area(maps), expected, equal_nan=True)
    torch.testing.assert_close(effective_area(5 * maps[:4]), expected[:4])


def test_summary_leaves_out_what_is_not_defined():
    summary = summarise(torch.tensor([1.0, NAN, 3.0]))
    assert (summary.mean, summary.std, summary.count) == (2.0, 1.0, 2)
    assert str(summary) == "2.000 ± 1.000"
    assert summarise(torch.tensor([NAN])).count == 0
    assert str(summarise(torch.tensor([]))) == "–"


def test_local_maxima_are_ordered_and_a_plateau_counts_once():
    map = torch.zeros(5, 5)
    map[0, 0] = 1.0
    map[2, 2] = map[2, 3] = 3.0
    map[4, 0] = 2.0
    points, valid = local_maxima(torch.stack([map, -map, torch.ones(5, 5)]), 4, (50, 100))
    assert points[0, :3].tolist() == [[50, 25], [10, 45], [10, 5]]
    assert valid.tolist() == [[True, True, True, False], [False] * 4, [True, False, False, False]]
    assert points[~valid].isnan().all()


def test_part_hits_counts_different_visible_parts():
    map = torch.zeros(8, 8)  # cells of 10 pixels
    map[1, 1], map[1, 6], map[6, 1], map[6, 6] = 4, 3, 2, 1
    crown, tail, wing = [15.0, 15, 1], [65.0, 15, 1], [15.0, 65, 0]
    parts = torch.tensor([[crown, tail, wing, [40.0, 40, 1]]])
    assert part_hits(map[None], parts, 80).tolist() == [2]
    assert part_hits(map[None], parts, 80, top=1).tolist() == [1]
    parts[0, 2, 2] = 1  # the wing becomes visible
    assert part_hits(map[None], parts, 80).tolist() == [3]


def test_one_maximum_touches_one_part_and_one_part_counts_once():
    map = torch.zeros(8, 8)
    map[1, 1], map[1, 3] = 4, 3
    crowded = torch.tensor([[[14.0, 14, 1], [16.0, 16, 1], [13.0, 17, 1]]])
    assert part_hits(map[None], crowded, 80, top=1).tolist() == [1]
    between = torch.tensor([[[25.0, 15, 1]]])
    assert part_hits(map[None], between, 80).tolist() == [1]
    assert part_hits(map[None], between, 80, reach=0.5).tolist() == [0]


def test_part_hits_without_parts_or_evidence():
    assert part_hits(torch.zeros(2, 3, 3), torch.ones(2, 4, 3), 9).tolist() == [0, 0]
    assert part_hits(torch.ones(2, 3, 3), torch.ones(2, 0, 3), 9).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"parts: expected \[2,P,3\].*\[1, 4, 3\]"):
        part_hits(torch.ones(2, 3, 3), torch.ones(1, 4, 3), 9)


@pytest.mark.parametrize("measure", [effective_area, lambda m: local_maxima(m, 1, 4)])
def test_maps_of_all_classes_are_refused(measure):
    with pytest.raises(ValueError, match=r"expected \[N,h,w\].*\[2, 5, 3, 3\]"):
        measure(torch.zeros(2, 5, 3, 3))


# ------------------------------------------------------------------ Grad-CAM


def test_grad_cam_of_a_linear_head_is_the_positive_part_of_its_class_activation_map():
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(4, 6, 3, 5, generator=generator), torch.randn(2, 6, generator=generator)
    classes = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():  # as a report does
        found = grad_cam(features, lambda f: f.mean((2, 3)) @ weight.T, classes)
    exact = torch.einsum("ndhw,nd->nhw", features, weight[classes]) / 15
    torch.testing.assert_close(found, exact.clamp(min=0))
    assert not found.requires_grad


def test_grad_cam_of_maximum_pooling_is_by_hand():
    """The gradient of a maximum is 1 at its place, so a channel weighs w / (h·w)."""
    features = torch.tensor([[[[1.0, 4.0]], [[6.0, 2.0]]]])
    weight = torch.tensor([[3.0, -1.0], [-1.0, 1.0]])
    found = grad_cam(features, lambda f: f.amax((2, 3)) @ weight.T, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 5.0]]]))  # (3·1 − 6) / 2 < 0, (3·4 − 2) / 2


# ------------------------------------------------------------------ parts


def test_every_point_of_the_box_belongs_to_its_nearest_visible_part():
    """An image of 40 × 20: the box is its left 30 columns; parts at 5 and 25 meet at 15, a third is not visible."""
    parts = torch.tensor([[[5.0, 10.0, 1.0], [25.0, 10.0, 1.0], [15.0, 10.0, 0.0]]])
    boxes = torch.tensor([[0.0, 0.0, 30.0, 20.0]])
    even = share_by_part(torch.ones(1, 2, 4), parts, boxes, (20, 40))
    torch.testing.assert_close(even, torch.tensor([[0.375, 0.375, 0.0, 0.25]], dtype=torch.float64))
    maps = torch.tensor([[[4.0, 0.0, 0.0, 2.0], [0.0, 2.0, -9.0, 0.0]]])  # cells of 10: the second is cut at 15
    found = share_by_part(maps, parts, boxes, (20, 40))
    torch.testing.assert_close(found, torch.tensor([[5 / 8, 1 / 8, 0.0, 2 / 8]], dtype=torch.float64))


def test_without_evidence_part_or_box_there_is_no_share():
    parts, boxes = torch.ones(4, 2, 3), torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(4, 1)
    maps = torch.ones(4, 2, 2)
    maps[0], parts[1, :, 2], boxes[2, 3] = 0, 0, torch.nan
    parts[3, 0] = torch.nan  # an invisible part may have no place
    parts[3, 0, 2] = 0
    found = share_by_part(maps, parts, boxes, 8, batch=3)
    assert found[:3].isnan().all()
    assert found[3].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"parts: expected \[4,P,3\]"):
        share_by_part(maps, parts[:, :0], boxes, 8)
    with pytest.raises(ValueError, match=r"boxes: expected \[4,4\]"):
        share_by_part(maps, parts, boxes[:2], 8)
