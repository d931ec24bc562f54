"""Ranking, concentrate loss, soft targets, hints, and how areas are counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fgvc_ext.training.part_losses import (
    Hint,
    area_counts,
    area_quantiles,
    mean_part_scores,
    part_targets,
    ranking_loss,
    soft_target_loss,
)

ALL = torch.ones(1, 3, dtype=torch.bool)


def _rank(scores, targets, valid=ALL, margin=1.0):
    return ranking_loss(torch.tensor([scores]), torch.tensor([targets]), valid, margin)


def test_equal_scores_have_all_pairs_active():
    found = _rank([0.0, 0, 0], [1.0, 2, 3])
    assert (found.loss, found.active, found.comparable) == (3, 3, 3)


def test_scores_in_order_and_apart_cost_nothing():
    found = _rank([4.0, 2, 0], [1.0, 2, 3])
    assert (found.loss, found.active, found.comparable) == (0, 0, 3)
    assert _rank([0.0, 2, 4], [1.0, 2, 3]).loss == 3 + 3 + 5
    assert _rank([4.0, 2, 0], [1.0, 2, 3], margin=3).loss == 1 + 1


def test_equal_targets_are_no_pair():
    found = _rank([0.0, 5, 9], [2.0, 2, 2])
    assert (found.loss, found.active, found.comparable) == (0, 0, 0)


def test_regions_that_are_not_valid_do_not_count():
    found = _rank([0.0, 0, -math.inf], [1.0, 2, 3], torch.tensor([[True, True, False]]))
    assert (found.loss, found.comparable) == (1, 1)
    assert _rank([0.0, 0, 0], [1.0, 2, 3], ~ALL).loss == 0


def test_ranking_knows_no_order_of_the_regions():
    source = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(2, 4, 3, generator=source)
    order = torch.tensor([2, 0, 1])
    valid = ALL.expand(4, 3)
    torch.testing.assert_close(
        ranking_loss(scores, targets, valid).loss, ranking_loss(scores[:, order], targets[:, order], valid).loss
    )


def test_the_mean_is_over_the_images_and_the_gradient_one_for_a_pair():
    scores = torch.zeros(2, 3, requires_grad=True)
    targets = torch.tensor([[1.0, 2, 2], [0, 0, 0]], requires_grad=True)
    loss = ranking_loss(scores, targets, ALL.expand(2, 3)).loss
    assert loss == 1
    loss.backward()
    assert scores.grad.tolist() == [[-1, 0.5, 0.5], [0, 0, 0]]
    assert targets.grad is None


def test_no_images_rank_nothing():
    scores = torch.zeros(0, 3, requires_grad=True)
    found = ranking_loss(scores, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    found.loss.backward()
    assert (found.loss, scores.grad.shape) == (0, (0, 3))


def test_the_target_of_a_part_is_its_cross_entropy():
    scores, label = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([4, 1])
    found = part_targets(scores, label)
    for n in range(2):
        torch.testing.assert_close(found[n], F.cross_entropy(scores[n], label[n].repeat(3), reduction="none"))
    assert not found.requires_grad


def test_the_mean_is_that_of_the_valid_parts():
    scores = torch.randn(3, 3, 5)
    valid = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    found = mean_part_scores(scores, valid)
    torch.testing.assert_close(found[0], scores[0].mean(0))
    torch.testing.assert_close(found[1], scores[1, [0, 2]].mean(0))
    torch.testing.assert_close(found[2], scores[2].mean(0), msg="of all where none is")


def test_soft_targets():
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    student.requires_grad_()
    found = soft_target_loss(student, teacher.requires_grad_(), 4.0)
    p, q = (teacher / 4).softmax(1).detach(), (student / 4).log_softmax(1)
    torch.testing.assert_close(found.loss, -16 * (p * q).sum(1).mean())
    torch.testing.assert_close(found.divergence, 16 * F.kl_div(q, p, reduction="batchmean").detach())
    found.loss.backward()
    torch.testing.assert_close(student.grad, 4 * (q.exp() - p).detach() / 4)
    assert teacher.grad is None
    assert soft_target_loss(teacher, teacher).divergence.abs() < 1e-12
    uniform = torch.zeros(1, 200)
    assert soft_target_loss(uniform, uniform).loss == pytest.approx(16 * math.log(200), rel=1e-5)


def test_a_hint_is_half_the_mean_square_behind_the_regressor():
    hint, student, teacher = Hint(4), torch.randn(2, 4, 3, 3, requires_grad=True), torch.rand(2, 4, 3, 3)
    teacher.requires_grad_()
    loss = hint(student, teacher)
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(hint.eval().train().regressor(student), teacher))
    loss.backward()
    assert teacher.grad is None
    assert student.grad.any()
    assert (hint.regressor(student) >= 0).all(), "as both maps are"


def test_areas_are_counted_by_their_ratio():
    boxes = torch.tensor(
        [[[0.0, 0, 4, 4], [0, 0, 8, 8], [0, 0, 1, 100]], [[0, 0, 0, 9], [0, 0, 1000, 1000], [0, 0, 4, 4]]]
    )
    valid = torch.tensor([[True, True, False], [True, True, True]])
    counts = area_counts(boxes, valid, torch.tensor([16.0, 16.0]))
    assert counts.nonzero()[:, 0].tolist() == [0, 48, 64, 95]
    assert counts[[0, 48, 64, 95]].tolist() == [1, 2, 1, 1]
    assert area_counts(boxes * torch.nan, valid, torch.tensor([16.0, 16.0])).sum() == 0


def test_quantiles_of_areas():
    ratios = 2 ** torch.linspace(-3, 3, 1001, dtype=torch.float64)
    boxes = torch.stack([torch.zeros(1001), torch.zeros(1001), ratios.float(), torch.ones(1001)], 1)[None]
    counts = area_counts(boxes, torch.ones(1, 1001, dtype=torch.bool), torch.ones(1))
    found = area_quantiles(counts, (0.1, 0.5, 0.9))
    assert found == pytest.approx(ratios.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist(), rel=0.02)
    both = area_quantiles(counts + counts, (0.5,))
    assert both == pytest.approx([found[1]]), "what adds up"
