"""What a task may leave to the engine: measures, teachers, parameters of losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy_models import ToyClassifier
from toy_training import ToyImages, ToyModel, centre, open_run, toy_config, toy_stages

from fgvc_ext.data.loading import Samples
from fgvc_ext.models import SubtleDifferences, build_backbone
from fgvc_ext.training import Classification, EngineConfig, Frozen, OptimConfig, Task, run_stages
from fgvc_ext.training.evaluation import map_samples, measured
from fgvc_ext.training.step import TrainingStep
from fgvc_ext.training.teachers import frozen_in

CPU = torch.device("cpu")


class ScaledLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, scores, labels):
        return nn.functional.cross_entropy(scores * self.scale, labels)


def _step(task: Task) -> TrainingStep:
    return TrainingStep(task, OptimConfig(lr=0.1), EngineConfig(), CPU, 1)


def _batch(n: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 12, 12, generator=generator)
    return {"image": images, "label": torch.arange(n) % 3, "seed": torch.arange(n), "index": torch.arange(n)}


def test_parameters_of_a_loss_are_optimised():
    loss = ScaledLoss()
    _step(Classification(ToyModel(), loss))(_batch(), 0, [4])
    assert loss.scale != 1


def test_a_parameter_outside_of_the_optimiser_is_named():
    class Forgetful(Classification):
        def param_groups(self, config):
            return [{"params": list(self.model.parameters())}]

    with pytest.raises(ValueError, match=r"Forgetful.param_groups leaves out losses\.main\.scale"):
        _step(Forgetful(ToyModel(), ScaledLoss()))
    task = Forgetful(ToyModel(), ScaledLoss())
    task.losses["main"].scale.requires_grad_(False)
    _step(task)  # nobody expects it to be trained


def test_a_loss_that_begins_later_has_its_place_in_every_checkpoint():
    task = Classification(ToyModel(), ScaledLoss(), first_loss=nn.CrossEntropyLoss(), from_epoch=2)
    states = []
    for epoch in range(4):
        task.start_epoch(epoch)
        states.append(type(task.loss).__name__)
        assert "losses.main.scale" in task.state_dict()
    assert states == ["CrossEntropyLoss"] * 2 + ["ScaledLoss"] * 2


def test_sums_that_measures_do_not_look_at_are_reported_as_means():
    class Own(Classification):
        def measures(self, sums):
            return {"iou": float(sums["overlap"]) / float(sums["union"])}

    sums = {"n": 4, "overlap": 1.0, "union": 2.0, "loss": 6.0, "correct": 3}
    found = measured(Own(ToyModel(), nn.CrossEntropyLoss()), {name: torch.tensor(v) for name, v in sums.items()})
    assert found == {"iou": 0.5, "loss": 1.5, "correct": 0.75}
    assert next(iter(found)) == "iou"


def test_measures_of_a_classification():
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    sums = {"n": torch.tensor(4), "loss": torch.tensor(2.0), "correct": torch.tensor(3), "within": torch.tensor(8.0)}
    assert measured(task, sums) == {"accuracy": 0.75, "loss": 0.5, "within": 2.0}
    assert measured(task, {}) == {}


def test_the_class_accuracy_is_of_the_labels_and_not_of_what_was_predicted():
    class Fixed(nn.Module):
        def forward(self, images, seed=None):
            return images  # which are the scores

    task = Classification(Fixed(), nn.CrossEntropyLoss())
    scores = torch.eye(3)[[0, 0, 0, 0, 2, 2]][..., None, None]  # [N,3,1,1]
    batch = {"image": scores, "label": torch.tensor([0, 0, 1, 1, 2, 2])}
    task.scores = lambda images: images[..., 0, 0]
    found = measured(task, task.eval_step(batch))
    assert found["class_accuracy"] == pytest.approx((1 + 0 + 1) / 3)  # by prediction it would be (1/2 + 1) / 2


def _teacher() -> ToyClassifier:
    torch.manual_seed(0)
    return ToyClassifier()


def test_a_frozen_module_is_no_part_of_the_task():
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    before = set(task.state_dict())
    task.teachers = [Frozen(_teacher())]
    task.model.by_name = {"other": (Frozen(_teacher()),)}
    assert set(task.state_dict()) == before
    assert len(list(frozen_in(task))) == 2
    assert copy.deepcopy(task).teachers[0] is task.teachers[0], "a moving average needs no second copy"


def test_a_frozen_module_always_evaluates_and_never_learns():
    task, images = Classification(ToyModel(), nn.CrossEntropyLoss()), _batch()["image"]
    frozen = task.teacher = Frozen(_teacher())
    state = {name: value.clone() for name, value in frozen.module.state_dict().items()}
    expected = _teacher().eval()(images)
    task.train()
    frozen.module.train()  # whoever does that by hand
    images.requires_grad_()
    for answer, wanted in ((frozen(images), expected), (frozen.features(images), _teacher().eval().features(images))):
        assert torch.equal(answer, wanted)
        assert not answer.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in frozen.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())
    with pytest.raises(AttributeError):
        frozen.nothing  # noqa: B018


def test_its_answers_can_stand_in_a_loss():
    weight, frozen = torch.ones(2, 3, requires_grad=True), Frozen(_teacher())
    (weight * frozen(_batch(2)["image"])).sum().backward()
    assert weight.grad is not None


def test_frozen_modules_are_moved_with_their_task():
    frozen = Frozen(_teacher()).to(torch.device("meta"), torch.channels_last)
    weight = next(frozen.module.parameters())
    assert weight.is_meta
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_mapped_samples_keep_their_order(batch_size):
    samples = Samples(ToyImages(9), centre)
    rows = map_samples(lambda images: images.mean((2, 3)), samples, EngineConfig(device="cpu"), batch_size=batch_size)
    expected = torch.stack([centre(samples.dataset.load(i)).mean((1, 2)) for i in range(9)])
    torch.testing.assert_close(rows, expected)
    assert not rows.is_inference()


def test_a_model_draws_from_the_seeds_of_its_samples():
    """Not from the generator: masks shall be the same for any split of a batch."""
    backbone = build_backbone("resnet10_narrow")
    task = Classification(SubtleDifferences(backbone, 3, patch_size=2), nn.CrossEntropyLoss()).train()
    batch = {**_batch(), "image": torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    first, again = (float(task.step(batch)["loss"]) for _ in range(2))
    assert first == again
    other = {**batch, "seed": batch["seed"] + 1000}
    assert first != float(task.step(other)["loss"])


def test_what_is_frozen_has_the_memory_layout_of_the_step(tmp_path):
    teacher = Frozen(_teacher())
    config = toy_config(epochs=1)
    (stage,) = toy_stages(config)

    def build(earlier):
        task = Classification(ToyModel(), nn.CrossEntropyLoss())
        task.teacher = teacher
        return task

    stage.build = build
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    assert teacher.module.features[0].weight.is_contiguous(memory_format=torch.channels_last)
