"""What is object, what lies in boxes, and what a filter leaves of feature maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fgvc_ext.models.part_attention import PartAttentionFilter, box_union, foreground


def test_two_of_three_levels_make_the_foreground():
    heat = torch.tensor([[0.0, 1 / 3, 2 / 3], [1.0, torch.nan, 2 / 3]]).view(1, 1, 2, 3)
    found = foreground(heat)
    assert found.mask[0].tolist() == [[False, False, True], [True, False, True]]
    assert (found.area.tolist(), found.fallback.tolist()) == ([3], [False])


def test_without_one_a_lower_threshold_serves():
    heat = torch.zeros(3, 1, 2, 2)
    heat[0, 0, 1, 0], heat[2] = 1 / 3, torch.nan
    found = foreground(heat)
    assert found.mask[0].tolist() == [[False, False], [True, False]]
    assert found.mask[1:].all(), "nothing stands out, or nothing is known: the whole image"
    assert (found.area.tolist(), found.fallback.tolist()) == ([1, 4, 4], [True, True, True])
    assert foreground(heat, threshold=0.3).fallback.tolist() == [False, True, True]


def test_a_pixel_lies_in_the_box_that_holds_its_centre():
    boxes = torch.tensor([[[0.5, 0.0, 2.5, 1.0], [3.0, 2.0, 3.6, 3.5]], [[0.0, 0.0, 0.0, 4.0], [0.51, 1.5, 1.5, 2.5]]])
    found = box_union(boxes, (4, 5))
    assert (found.shape, found.dtype) == ((2, 1, 4, 5), torch.float32)
    assert found[0, 0].tolist() == [[1, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], [0] * 5]
    assert found[1, 0].tolist() == [[0] * 5, [0] * 5, [0] * 5, [0] * 5]
    wider = box_union(torch.tensor([[[0.49, 1.5, 1.51, 2.5]]]), (4, 5))
    assert wider[0, 0].tolist() == [[0] * 5, [1, 1, 0, 0, 0], [0] * 5, [0] * 5]


def test_the_filter_may_follow_the_convolution():
    torch.manual_seed(0)
    features, weight = torch.randn(2, 6, 4, 4), torch.randn(3, 6, 1, 1)
    mask = (torch.rand(2, 1, 16, 16) > 0.5).float()
    pooled = mask.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    found = PartAttentionFilter()(F.conv2d(features, weight), mask)
    torch.testing.assert_close(found, F.conv2d(features * pooled, weight))


def test_what_is_at_the_threshold_is_foreground():
    heat = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]).view(1, 1, 1, 4)
    assert foreground(heat, 1.0).mask.flatten().tolist() == [False, False, False, True]
    assert foreground(heat, float(heat[0, 0, 0, 2])).mask.flatten().tolist() == [False, False, True, True]


def test_floor_and_kinds():
    mask, features = torch.zeros(1, 1, 8, 8), torch.ones(1, 2, 4, 4)
    mask[..., :4, :] = 1
    kept = PartAttentionFilter("pooled", 0.1)(features, mask)
    torch.testing.assert_close(kept[0, 0, :, 0], torch.tensor([1, 1, 0.1, 0.1]))
    assert PartAttentionFilter("off")(features, mask) is features
    learnt = PartAttentionFilter("learnable")
    assert learnt.share(mask, (2, 1)).flatten().tolist() == pytest.approx([0.982, 0.018], abs=1e-3)
    learnt.learnt.weight.data.fill_(2.0)
    learnt.learnt.bias.data.fill_(-1.0)
    torch.testing.assert_close(learnt(features, mask)[0, 1, :, 0], torch.tensor([1.0, 1, -1, -1]).sigmoid())
    assert PartAttentionFilter()(features.bfloat16(), mask).dtype == torch.bfloat16
    assert learnt.bfloat16()(features.bfloat16(), mask).dtype == torch.bfloat16
    for kind, floor in (("mean", 0.0), ("pooled", 1.1)):
        with pytest.raises(ValueError, match="PartAttentionFilter: expected one of pooled, learnable, off and a floor"):
            PartAttentionFilter(kind, floor)
