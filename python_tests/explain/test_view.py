"""What a report shows of a model: its own explanation, whatever the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fgvc_ext import explain
from fgvc_ext.explain.view import as_shares
from fgvc_ext.models import Ensemble, Explanation, KnowledgeTransfer, Model, SubtleDifferences, build_backbone


class _Known(Model):
    """Two classes, scores and maps that follow from the image."""

    def __init__(self, maps: int = 1, scores: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.count, self.scored = maps, scores

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))[:, :2] * self.scale

    def explain(self, images: Tensor) -> Explanation:
        maps = {"first": images[:, : self.count], "second": torch.zeros(len(images), 1, 2, 2)}
        return Explanation(maps=maps, scores=self(images) if self.scored else None)


IMAGES = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0, 1])


@pytest.mark.parametrize("scored", [True, False])
def test_the_first_map_is_shown_of_the_class_or_the_only_one(scored):
    scores, maps = explain.view_of(_Known(2, scored)).look(IMAGES, LABELS)
    torch.testing.assert_close(scores, IMAGES.mean((2, 3))[:, :2])
    assert torch.equal(maps, IMAGES[torch.arange(3), LABELS])
    scores, maps = explain.view_of(_Known(1, scored)).look(IMAGES, LABELS)
    torch.testing.assert_close(scores, IMAGES.mean((2, 3))[:, :2])
    assert torch.equal(maps, IMAGES[:, 0])


def test_other_maps_are_refused():
    with pytest.raises(ValueError, match=r"expected maps \[n,1,h,w\] or \[n,2,h,w\], got \[3, 3, 4, 6\]"):
        explain.view_of(_Known(3)).look(IMAGES, LABELS)


def test_what_is_no_classifier_is_not_shown():
    class Localiser(_Known):
        is_classifier = False

    assert explain.view_of(Localiser()) is None


@torch.no_grad()
def test_features_are_those_of_the_backbone():
    images = torch.rand(2, 3, 64, 64)
    for kind in (SubtleDifferences, KnowledgeTransfer):
        model = kind(build_backbone("resnet10_narrow"), 3).eval()
        torch.testing.assert_close(explain.view_of(model).features(images), model.backbone(images).mean((2, 3)))
    assert explain.view_of(_Known()).features is None


def test_an_ensemble_looks_where_its_members_do():
    """Each member's map counts the same, however large its values; the coarser one is made finer."""
    first, second = _Known(), _Known()
    coarse = nn.functional.avg_pool2d(IMAGES[:, 1:2], 2)
    second.explain = lambda images: Explanation(maps={"x": 1000 * coarse}, scores=second(images))
    scores, maps = explain.view_of(Ensemble([first, second], "logits")).look(IMAGES, LABELS)
    torch.testing.assert_close(scores, IMAGES.mean((2, 3))[:, :2])
    finer = nn.functional.interpolate(coarse, size=(4, 6), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(maps, (as_shares(IMAGES[:, 0]) + as_shares(finer)) / 2)


def test_shares_begin_at_the_minimum_and_add_up():
    maps = torch.tensor([[[3.0, 5.0], [3.0, 9.0]], [[7.0, 7.0], [7.0, 7.0]]])
    expected = torch.tensor([[[0.0, 0.25], [0.0, 0.75]], [[0.25, 0.25], [0.25, 0.25]]])
    torch.testing.assert_close(as_shares(maps), expected)
    maps[0, 0, 0] = torch.nan
    found = as_shares(maps)
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])
