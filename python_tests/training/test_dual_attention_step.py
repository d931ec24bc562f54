"""The training step of dual attention fusion: its losses, its switches and its figures."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_dual_attention import SMALL, parts_of, small_batch, small_bottlenecks, small_task
from test_step import waiting_for_nothing
from torch import nn

from fgvc_ext.models import DualAttention
from fgvc_ext.training import EngineConfig, OptimConfig
from fgvc_ext.training.dual_attention import DualAttentionConfig
from fgvc_ext.training.part_losses import mean_part_scores
from fgvc_ext.training.step import TrainingStep

ROWS = {
    "baseline": {"use_sppn": False, "use_lhm": False, "use_teacher": False, "use_distill": False},
    "sppn": {"use_lhm": False, "use_teacher": False, "use_distill": False},
    "lhm": {"use_teacher": False, "use_distill": False},
    "teacher": {"use_distill": False},
    "all": {},
}


def test_the_weights_of_the_three_losses():
    whole = parts_of(small_task(student_weight=0.5, teacher_weight=2.0, fusion_weight=3.0))
    student = sum(whole[name] for name in ("pred", "rank", "overlap", "con", "area", "distill"))
    task = small_task(student_weight=0.5, teacher_weight=2.0, fusion_weight=3.0)
    expected = 0.5 * student + 2 * (whole["teacher"] + whole["grouping"]) + 3 * whole["fusion"]
    torch.testing.assert_close(task.step(small_batch())["loss"], expected)


def test_the_distillation_rises_over_the_first_epochs():
    task = small_task(distill_warmup_epochs=5)
    weights = []
    for epoch in (0, 1, 4, 5, 9):
        task.start_epoch(epoch)
        weights.append(task.ramp.item())
    assert weights == pytest.approx([0, 0.2, 0.8, 1, 1])
    task.start_epoch(0)
    assert parts_of(task)["distill"] == 0
    plain = small_task(distill_warmup_epochs=0)
    plain.start_epoch(0)
    assert plain.ramp == 1
    assert "ramp" not in task.state_dict()


def test_hint_and_soft_targets_may_share_one():
    whole, shared = parts_of(small_task(hint_weight=0.3)), small_task(hint_weight=0.3, distill_mix="convex")
    answer = shared.step(small_batch())
    hint, soft = answer["logs"]["hint"] / 4, answer["logs"]["soft"] / 4
    torch.testing.assert_close(whole["distill"].detach(), 0.3 * hint + soft)
    torch.testing.assert_close(answer["logs"]["distill"] / 4, 0.3 * hint + 0.7 * soft)


def test_the_smallest_area_and_the_blur_shrink_with_the_image(monkeypatch):
    from fgvc_ext.training import dual_attention

    seen = {}
    real = dual_attention.part_box_losses
    monkeypatch.setattr(dual_attention, "part_box_losses", lambda *a, **o: seen.update(o) or real(*a, **o))
    small_task(parts=7).step(small_batch(side=64))
    assert seen["min_area"] == pytest.approx(32**2 * (64 / 448) ** 2)
    assert seen["parts"] == 7


def test_every_setting_reaches_the_network_and_the_losses(monkeypatch):
    from fgvc_ext.models import dual_attention as models
    from fgvc_ext.training import dual_attention

    given = {
        "dropout": 0.25,
        "regions": 2,
        "iou_threshold": 0.4,
        "fpn_channels": 12,
        "head_depth": 2,
        "paf_floor": 0.2,
        "anchor_sizes": (40.0, 80.0, 160.0),
        "sppn_detach": False,
        "fg_threshold": 0.9,
        "dbt_sites": ("res5",),
        "use_bilinear": False,
        "paf": "learnable",
        "csf_detach": False,
        "part_images": "crops",
        "part_size": 30,
        "blur_sigma": 5.0,
        "noise_std": 0.5,
        "noise_mode": "replace",
        "part_statistics": "own",
        "use_sppn": True,
        "use_lhm": True,
        "use_teacher": True,
    }
    assert set(given) == set(dual_attention.NETWORK)
    method = DualAttentionConfig(**given, position="upstream")
    settings = DualAttention(small_bottlenecks(), 5, **method.network()).settings()
    named = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    assert {name: settings[name] for name in given} == named
    assert (settings["position"], DualAttentionConfig(position="none").network()["position"]) == ("upstream", None)

    built = DualAttention(small_bottlenecks(), 5, **{**method.network(), "use_bilinear": True})
    assert {block.attention.floor for block in built.teacher.blocks().values()} == {0.2}
    code = built.teacher.blocks()["res5"].bilinear.position
    formula = DualAttention(small_bottlenecks(), 5).teacher.blocks()["res5"].bilinear.position
    none = DualAttention(small_bottlenecks(), 5, position=None).teacher.blocks()["res5"].bilinear.position
    assert not torch.equal(code, formula) or code.unique().numel() < formula.numel()
    assert none is None

    composed, real_parts = {}, models.compose_parts
    monkeypatch.setattr(models, "compose_parts", lambda *a, **o: composed.update(o) or real_parts(*a, **o))
    asked = {"noise_mode": "replace", "noise_std": 0.5, "part_size": 48, "seed": None}
    small_task(noise_mode="replace", noise_std=0.5, part_size=48).network.part_images(
        small_batch()["image"], torch.ones(4, 1, 4)
    )
    assert {name: composed[name] for name in asked} == asked

    boxes = {"iou_weight": 0.5, "detach_denominator": True, "area_mode": "hinge"}
    seen, real = {}, dual_attention.part_box_losses
    monkeypatch.setattr(dual_attention, "part_box_losses", lambda *a, **o: seen.update(o) or real(*a, **o))
    half, whole = parts_of(small_task(**boxes, area_weight=0.5)), parts_of(small_task(**boxes))
    assert {name: seen[name] for name in boxes} == boxes
    torch.testing.assert_close(half["area"], 0.5 * whole["area"])
    alone = {"use_teacher": False, "use_distill": False}
    losses = [small_task(**alone, student_weight=weight).step(small_batch())["loss"] for weight in (1.0, 0.5)]
    torch.testing.assert_close(losses[1], 0.5 * losses[0])


def test_the_defaults_are_the_specifications():
    method = DualAttentionConfig()
    assert (method.regions, method.parts, method.iou_threshold, method.iou_weight) == (3, 4, 0.25, 2.0)
    assert (method.area_mode, method.min_area, method.margin, method.detach_denominator) == (
        "two_sided",
        1024,
        1,
        False,
    )
    assert (method.fpn_channels, method.head_depth, method.anchor_sizes) == (128, 2, (48.0, 96.0, 192.0))
    assert (method.fg_threshold, method.blur_sigma, method.noise_std, method.noise_mode) == (0.5, 20, 1, "add")
    assert (method.part_images, method.part_size, method.part_statistics) == ("composed", None, "shared")
    assert (method.temperature, method.hint_weight, method.hint_levels) == (4, 1, ("res4",))
    assert (method.distill_mix, method.distill_warmup_epochs, method.grouping_weight) == ("sum", 5, 1e-5)
    assert (method.dbt_sites, method.position, method.use_bilinear) == (("res4", "res5", "last"), "formula", True)
    assert (method.paf, method.paf_floor, method.dropout) == ("pooled", 0, 0.5)
    assert (method.csf_detach, method.sppn_detach, method.sppn_lr) == (True, True, 1)
    weights = ("area_weight", "con_weight", "student_weight", "teacher_weight", "fusion_weight")
    assert [getattr(method, name) for name in weights] == [1.0] * 5


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_part_images_move_running_statistics_only_where_they_share_them(kind):
    model = small_task("resnet10_narrow", part_statistics=kind).network
    parts = torch.randn(2, 3, 3, 64, 64)
    norms = [module for module in model.student.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(module.running_mean.clone(), module.running_var.clone(), module.momentum) for module in norms]
    scores = model.part_scores(parts)
    same = [
        torch.equal(module.running_mean, mean) and torch.equal(module.running_var, variance)
        for module, (mean, variance, _) in zip(norms, before, strict=True)
    ]
    assert set(same) == {kind == "own"}
    assert [module.momentum for module in norms] == [momentum for _, _, momentum in before]
    assert not torch.equal(scores, model.eval().part_scores(parts)), "by their own batch, and not by what is running"


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_table_3_trains(row):
    task = small_task("resnet10_narrow", **ROWS[row])
    step = TrainingStep(task, OptimConfig(lr=0.01), EngineConfig(precision="fp32"), torch.device("cpu"), 2)
    before = copy.deepcopy(task.state_dict())
    sums = step(small_batch(side=64), 0, [4])
    assert step.look().skipped == 0
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    # Of the proposals, those of levels that were not selected do not; and a ranking knows no common shift of scores.
    assert {name for name, _ in task.named_parameters() if "proposals" not in name} <= moved
    assert task.network.proposals is None or "model.proposals.score.0.weight" in moved
    expected = {
        "baseline": {"pred"},
        "sppn": {"pred", "rank", "overlap", "con"},
        "lhm": {"pred", "rank", "overlap", "con", "area"},
        "teacher": {"pred", "rank", "overlap", "con", "area", "teacher", "grouping", "fusion"},
        "all": {"pred", "rank", "overlap", "con", "area", "teacher", "grouping", "fusion", "distill"},
    }[row]
    losses = {"pred", "rank", "overlap", "con", "area", "teacher", "grouping", "fusion", "distill"}
    assert losses & set(sums) == expected
    assert all(value.isfinite().all() for value in sums.values())
    task.eval()
    measures = task.measures(task.eval_step(small_batch(side=64)))
    assert next(iter(measures)) == "accuracy"
    assert ("teacher_accuracy" in measures) == (row in ("teacher", "all"))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bilinear": False},
        {"paf": "off"},
        {"paf": "learnable", "paf_floor": 0.1},
        {"dbt_sites": ("last",), "position": "none"},
        {"dbt_sites": (), "grouping_weight": 0.0},
        {"grouping_weight": 0.0, "con_weight": 0.0, "area_weight": 0.0, "iou_weight": 0.0},
        {"part_images": "crops", "regions": 2},
        {"part_size": 32, "area_mode": "log", "noise_mode": "replace"},
        {"hint_levels": ()},
    ],
)
def test_every_switch_trains(changes):
    task = small_task("resnet10_narrow", **changes)
    step = TrainingStep(task, OptimConfig(lr=0.01), EngineConfig(precision="fp32"), torch.device("cpu"), 2)
    step(small_batch(side=64), 0, [4])
    assert step.look().skipped == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing(precision):
    task = small_task()
    step = TrainingStep(task, OptimConfig(lr=0.01), EngineConfig(precision=precision), torch.device("cpu"), 2)
    step(small_batch(), 0, [4])
    with waiting_for_nothing():
        step(small_batch(), 1, [4])
    assert step.look().skipped == 0


@pytest.mark.slow
def test_a_step_is_one_graph_in_all_epochs():
    torch._dynamo.reset()
    task, graphs = small_task("resnet10_narrow", distill_warmup_epochs=5), []
    compiled = torch.compile(task, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    twin, batch = copy.deepcopy(task), small_batch(side=64)
    for epoch in range(2):
        task.start_epoch(epoch)
        twin.start_epoch(epoch)
        torch.testing.assert_close(compiled(batch)["loss"], twin(batch)["loss"])
    assert len(graphs) == 1


def test_part_images_have_the_noise_of_their_sample():
    """Whatever batch a sample is in: its seed keys it."""
    task, seen = small_task(), []
    task.network.student.backbone.conv1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    batch = small_batch()
    task.step(batch)
    task.step({**batch, "seed": batch["seed"] + 1})
    task.step(batch)
    assert torch.equal(seen[1], seen[5]), "running means moved, batch statistics did not"
    assert not torch.equal(seen[1], seen[3])
    assert seen[1].shape == (12, 3, 96, 96)


def test_a_process_without_samples_takes_part():
    task = small_task("resnet10_narrow")
    batch = {name: value[:0] for name, value in small_batch(side=64).items()}
    answer = task.step(batch)
    answer["loss"].nan_to_num().backward()
    assert answer["n"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
    assert all(value.isfinite().all() and not value.any() for value in answer["logs"].values())


def test_a_task_without_teacher_cannot_distil():
    with pytest.raises(ValueError, match=r"use-distill: expected False without --method\.use-teacher"):
        replace(SMALL, use_teacher=False).network()


# ---------------------------------------------------------------- figures


def test_what_is_counted_of_the_regions():
    task, batch = small_task(), small_batch()
    twin = copy.deepcopy(task)
    logs = task.step(batch)["logs"]
    seen = twin.network.look(batch["image"])
    area, boxes, valid = seen.object.area, seen.proposals.boxes, seen.proposals.valid
    union = twin.network.saliency(seen, batch["image"]).sum((1, 2, 3))
    torch.testing.assert_close(logs["union_to_object"], (union / area).sum())
    torch.testing.assert_close(logs["foreground"], seen.object.mask.float().mean((1, 2)).sum())
    assert logs["fallback"] == seen.object.fallback.sum()
    assert logs["valid_regions"] == valid.float().mean(1).sum()
    assert logs["areas"].sum() == valid.sum()
    assert 0 <= logs["active_pairs"] <= logs["comparable_pairs"] <= 4 * 3
    measures = task.measures({**logs, "loss": torch.tensor(4.0), "n": torch.tensor(4)})
    assert measures["active_share"] == logs["active_pairs"] / logs["comparable_pairs"]
    sides = (boxes[..., 2:] - boxes[..., :2]).detach()
    ratios = (sides.prod(-1) / (area / 4).clamp(min=1024 * (96 / 448) ** 2)[:, None])[valid]
    assert measures["area_ratio_p50"] == pytest.approx(float(ratios.quantile(0.5)), rel=0.2)
    assert measures["area_ratio_p10"] <= measures["area_ratio_p50"] <= measures["area_ratio_p90"]
    assert {"student_accuracy", "teacher_accuracy", "accuracy"} <= set(measures)


@torch.no_grad()
def test_evaluation_counts_every_score():
    task, batch = small_task(evaluate_parts=True).eval(), small_batch(8)
    nn.init.normal_(task.network.fusion.linear.weight)
    sums, found = task.eval_step(batch), task.network.all_scores(batch["image"])
    mean = found["student"].softmax(1) + found["teacher"].softmax(1)
    seen = task.network.look(batch["image"])
    parts = task.network.part_scores(task.network.part_images(batch["image"], seen.proposals.boxes, batch["seed"]))
    with_parts = seen.scores + mean_part_scores(parts, seen.proposals.valid)
    right = {"": found["fused"], "student_": found["student"], "teacher_": found["teacher"], "mean_": mean}
    for name, scores in {**right, "parts_": with_parts}.items():
        assert sums[f"{name}correct"] == (scores.argmax(1) == batch["label"]).sum(), name
    answers = task._answers(batch["image"], batch)  # the scores themselves: few samples have the same best class anyway
    torch.testing.assert_close(answers["mean"], mean / 2)
    torch.testing.assert_close(answers["parts"], with_parts / 2)
    assert sums["confusion"].sum() == 8
    measures = task.measures(sums)
    assert next(iter(measures)) == "accuracy"
    assert measures["parts_accuracy"] == sums["parts_correct"] / 8


@torch.no_grad()
def test_crops_are_averaged():
    task, batch = small_task("resnet10_narrow").eval(), small_batch(2, 64)
    crops = torch.stack([batch["image"], batch["image"].flip(3)], 1)
    sums = task.eval_step({**batch, "image": crops})
    scores = (task.network(batch["image"]) + task.network(batch["image"].flip(3))) / 2
    torch.testing.assert_close(sums["loss"], nn.functional.cross_entropy(scores, batch["label"], reduction="sum"))


def test_every_parameter_has_the_rate_of_its_group():
    task = small_task(sppn_lr=0.5)
    names = {id(p): name for name, p in task.named_parameters()}
    optim, rates = OptimConfig(lr=0.1, new_layers_lr=1.0, new_layers=("classifier", "bilinear")), {}
    for group in task.param_groups(optim):
        rates |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert set(rates) == set(names.values())
    new = {id(p) for name in optim.new_layers for p in task.network.parameter_groups()[name]}
    for parameter, name in names.items():
        fresh = parameter in new or name.startswith("losses.")
        assert rates[name] == (0.1 * 0.5 if ".proposals." in name else 1.0 if fresh else 0.1), name
    both = task.param_groups(OptimConfig(lr=0.1, new_layers_lr=1.0, new_layers=("proposals",)))
    assert {group["lr"] for group in both if group["params"]} == {0.1, 1.0, 0.5}
