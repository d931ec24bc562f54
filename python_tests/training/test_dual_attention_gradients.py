"""Dual attention fusion: its step against a naive one, and which way gradients go."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from naive_dual_attention import naive_step
from small_dual_attention import parts_of, small_batch, small_task


@pytest.fixture
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _reached(loss: torch.Tensor, task) -> set[str]:
    """Which parts of the model a loss has a gradient for that is not zero."""
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    moved = {name for (name, _), g in zip(named, gradients, strict=True) if g is not None and g.any()}
    places = {
        "student.backbone": "model.student.backbone.",
        "student.classifier": "model.student.classifier.",
        "pyramid": "model.proposals.pyramid.",
        "scores": "model.proposals.score.",
        "boxes": "model.proposals.change.",
        "teacher.backbone": "model.teacher.backbone.",
        "teacher.last": "model.teacher.last.",
        "teacher.classifier": "model.teacher.classifier.",
        "fusion": "model.fusion.",
        "hint": "losses.hint.",
    }
    return {place for place, prefix in places.items() if any(name.startswith(prefix) for name in moved)}


# ---------------------------------------------------------------- the naive step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grouping_weight": 1.0, "con_weight": 0.5, "hint_levels": ("res3", "res5"), "margin": 0.3},
        {"regions": 40, "iou_threshold": 0.0},
    ],
    ids=["usual", "weights", "some refilled"],
)
def test_losses_and_gradients_are_those_of_the_naive_step(changes, in_float64):
    task, batch = small_task(**changes).double(), small_batch()
    task.ramp.fill_(0.6)
    twin = copy.deepcopy(task)
    expected = naive_step(twin, batch)
    expected["loss"].backward()
    answer = task.step(batch)
    answer["loss"].backward()
    torch.testing.assert_close(answer["loss"], expected["loss"], rtol=1e-6, atol=0)
    assert (answer["logs"]["valid_regions"] < 4) == ("iou_threshold" in changes), "refilled regions are in no loss"
    for name, value in expected.items():
        if name != "loss":
            torch.testing.assert_close(answer["logs"][name] / 4, value.detach(), rtol=1e-5, atol=1e-9, msg=name)
    for (name, own), other in zip(task.named_parameters(), twin.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-5 * scale + 1e-12, msg=name)
    for (name, own), other in zip(task.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


# ---------------------------------------------------------------- which way gradients go


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        ("rank", {"pyramid", "scores"}),
        ("overlap", {"pyramid", "boxes"}),
        ("area", {"pyramid", "boxes"}),
        ("pred", {"student.backbone", "student.classifier"}),
        ("con", {"student.backbone", "student.classifier"}),
        ("distill", {"student.backbone", "student.classifier", "hint"}),
        ("teacher", {"teacher.backbone", "teacher.last", "teacher.classifier"}),
        ("grouping", {"teacher.backbone", "teacher.last"}),
        ("fusion", {"fusion"}),
    ],
)
def test_what_a_loss_trains(loss, reached):
    """Boxes learn from their own two losses alone, scores from the ranking, the student from its predictions and from
    the teacher, the teacher from its own, the fusion alone from the fused scores."""
    task = small_task(grouping_weight=1.0)
    assert _reached(_overlapping(task, loss), task) == reached


def _overlapping(task, loss: str) -> torch.Tensor:
    """One of the losses; boxes that do not overlap have no gradient of it: here they may."""
    if loss == "overlap":
        task.network.proposals.iou_threshold = 1.0
    return parts_of(task)[loss]


@pytest.mark.parametrize("loss", ["rank", "overlap", "area"])
def test_the_backbone_is_reached_by_regions_only_where_that_is_asked_for(loss):
    task = small_task(sppn_detach=False)
    assert "student.backbone" in _reached(_overlapping(task, loss), task)


def test_the_networks_are_reached_by_the_fusion_only_where_that_is_asked_for():
    task = small_task(csf_detach=False)
    found = _reached(parts_of(task)["fusion"], task)
    assert found == {
        *("fusion", "student.backbone", "student.classifier"),
        *("teacher.backbone", "teacher.last", "teacher.classifier"),
    }


def test_every_parameter_has_a_gradient_that_a_step_makes():
    for name in ("bottlenecks", "resnet10_narrow"):
        task = small_task(name)
        task.step(small_batch(side=64))["loss"].backward()
        assert [n for n, p in task.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
