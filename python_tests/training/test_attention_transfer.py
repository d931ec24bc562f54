"""The task of a model with teachers: its loss, and what never happens to the teachers."""

from __future__ import annotations

import copy
from functools import partial

import job
import pytest
import torch
from test_step import waiting_for_nothing
from torch import nn
from toy_training import ToyImages, centre, jitter, open_run, toy_config

from fgvc_ext import reference
from fgvc_ext.data.loading import Samples
from fgvc_ext.models import Backbone, KnowledgeTransfer
from fgvc_ext.training import Classification, EngineConfig, OptimConfig, Stage, run_stages
from fgvc_ext.training.attention_transfer import AttentionTransfer
from fgvc_ext.training.distributed import current_process, share_sizes
from fgvc_ext.training.step import TrainingStep

CPU = torch.device("cpu")


def _backbone() -> Backbone:
    layers = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "relu": nn.ReLU()}
    return Backbone(layers, 8, lambda name: "stem")


def _model(seed: int = 0, **options) -> KnowledgeTransfer:
    torch.manual_seed(seed)
    return KnowledgeTransfer(_backbone(), 3, **options)


def _batch(n: int = 8) -> dict[str, torch.Tensor]:
    images = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"image": images, "label": torch.arange(n) % 3, "seed": torch.arange(n), "index": torch.arange(n)}


def _task(teachers: int = 2, **options) -> AttentionTransfer:
    taught = [_model(seed) for seed in range(1, teachers + 1)]
    return AttentionTransfer(_model(), nn.CrossEntropyLoss(), taught, **options)


def _by_hand(task: AttentionTransfer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, and the mean of the losses against each teacher alone (eq. 6)."""
    twin = copy.deepcopy(task.model)
    features = twin.backbone(batch["image"])
    own = reference.spatial_attention_map(features)
    each = []
    for teacher in task.teachers:
        with torch.no_grad():
            taught = reference.spatial_attention_map(teacher.module.eval().backbone(batch["image"]))
        each.append(reference.orthogonal_loss(own, taught[None]))
    cross_entropy = nn.functional.cross_entropy(twin.classifier(features.mean((2, 3))), batch["label"])
    return cross_entropy, torch.stack(each).mean()


@pytest.mark.parametrize("teachers", [1, 3])
def test_the_loss_is_equation_6_over_the_own_teachers(teachers):
    task, batch = _task(teachers, alpha=0.7).train(), _batch()
    cross_entropy, shared = _by_hand(task, batch)
    answer = task.step(batch)
    torch.testing.assert_close(answer["loss"], cross_entropy + 0.7 * shared)
    torch.testing.assert_close(answer["logs"]["orthogonal"], (8 * shared).detach())
    assert answer["n"] == 8


def test_relative_balance_keeps_the_share_of_the_cross_entropy():
    task, batch = _task(alpha=0.3, balance="relative").train(), _batch()
    cross_entropy, shared = _by_hand(task, batch)
    answer = task.step(batch)
    torch.testing.assert_close(answer["loss"], 1.3 * cross_entropy)
    weight = task.model.backbone.conv.weight
    (found,) = torch.autograd.grad(answer["loss"], weight)
    again = task.step(batch)  # the running means move, what is computed of the batch does not
    absolute = AttentionTransfer(task.model, nn.CrossEntropyLoss(), (), alpha=0)
    absolute.teachers, absolute.alpha = task.teachers, float((0.3 * cross_entropy / shared).detach())
    (expected,) = torch.autograd.grad(absolute.step(batch)["loss"], weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again["loss"], answer["loss"])


def test_without_anything_shared_the_relative_balance_is_cross_entropy_alone(monkeypatch):
    """A teacher that looks everywhere alike has A = 0: the loss is 0, and 0 / 0 must not reach the student."""
    task, batch = _task(1, balance="relative").train(), _batch()
    monkeypatch.setattr(task.teachers[0].module, "attention", lambda images: torch.ones(len(images), 10, 10))
    answer = task.step(batch)
    plain = nn.functional.cross_entropy(task.model(batch["image"]), batch["label"])
    torch.testing.assert_close(answer["loss"], plain)
    answer["loss"].backward()
    assert all(p.grad.isfinite().all() for p in task.model.parameters())
    assert answer["logs"]["orthogonal"] == 0


def test_another_balance_is_refused_and_a_relative_one_not_accumulated():
    with pytest.raises(ValueError, match="balance: expected one of"):
        _task(balance="even")
    for teachers, refused in ((2, True), (0, False)):
        task, optim = _task(teachers, balance="relative"), OptimConfig(accumulate=2)
        if refused:
            with pytest.raises(ValueError, match=r"the task \(AttentionTransfer\) is a loss of the whole batch"):
                TrainingStep(task, optim, EngineConfig(precision="fp32"), CPU, 2)
        else:
            TrainingStep(task, optim, EngineConfig(precision="fp32"), CPU, 2)


@pytest.mark.parametrize("balance", ["absolute", "relative"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teachers_see_the_students_batch_in_its_precision_and_stay_as_they_are(precision, balance):
    task = _task(balance=balance)
    before = [copy.deepcopy(teacher.module.state_dict()) for teacher in task.teachers]
    seen, dtypes, heads = [], [], []
    for teacher in task.teachers:
        teacher.module.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        teacher.module.backbone.conv.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
        teacher.module.classifier.register_forward_hook(lambda module, args, out: heads.append(out))
    step = TrainingStep(task, OptimConfig(lr=0.1), EngineConfig(precision=precision), CPU, 2)
    batch = _batch()
    step(batch, 0, [8])
    with waiting_for_nothing():
        step(batch, 1, [8])
    assert len(seen) == 4
    assert all(image.data_ptr() == batch["image"].data_ptr() for image in seen), "not even a copy"
    assert set(dtypes) == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert not heads, "what they would answer is not computed"
    for teacher, state in zip(task.teachers, before, strict=True):
        assert not any(p.requires_grad or p.grad is not None for p in teacher.module.parameters())
        assert all(torch.equal(value, state[name]) for name, value in teacher.module.state_dict().items())
    known = {id(p) for p in step.parameters}
    assert known == {id(p) for p in task.model.parameters()}


def _stage(task) -> Stage:
    return Stage(
        name="one",
        build=lambda earlier: task(),
        optim=OptimConfig(epochs=2, batch_size=8, lr=0.05),
        train=lambda earlier: Samples(ToyImages(33), jitter),
        evaluations=lambda earlier: {"test": Samples(ToyImages(21, "test"), centre)},
        seed=3,
        config={},
    )


def test_without_teachers_it_is_a_plain_training_bit_for_bit(tmp_path):
    files = []
    for kind in (Classification, AttentionTransfer):
        config = toy_config()
        with open_run(tmp_path / kind.__name__, config) as run:
            stage = _stage(lambda kind=kind: kind(KnowledgeTransfer(_backbone(), 3), nn.CrossEntropyLoss()))
            files.append(run_stages([stage], run, config.engine)["one"])
    assert files[0].path.read_bytes() == files[1].path.read_bytes()


# ------------------------------------------------------------------ several processes


def _gradients(balance: str, batch: dict, sizes: list[int]) -> dict[str, torch.Tensor]:
    """The gradients of one step, with BatchNorm that does not depend on how the batch is cut."""
    task = _task(balance=balance, alpha=0.7)
    step = TrainingStep(task, OptimConfig(lr=0.0), EngineConfig(precision="fp32"), CPU, 2)
    task.eval()
    step(batch, 0, sizes)
    return {name: p.grad.clone() for name, p in task.model.named_parameters()}


def _agree(expected: dict, balance: str, count: int) -> int:
    share = current_process().share(count)
    own = {name: value[share] for name, value in _batch(count).items()}
    found = _gradients(balance, own, share_sizes(count))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    return 0


@pytest.mark.parametrize("balance", ["absolute", "relative"])
@pytest.mark.parametrize("count", [7, 1])
def test_two_processes_step_as_one(balance, count, tmp_path):
    """Of 7 images the shares are 4 and 3; of one the other process has none."""
    expected = _gradients(balance, _batch(count), [count])
    job.run(tmp_path / "output", 2, partial(_agree, expected, balance, count))
