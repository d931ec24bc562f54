"""A step waits for nothing, and one that is not finite leaves nothing behind, whatever the precision and optimiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import ToyModel

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.loading import to_device
from fgvc_ext.data.pipeline import load_datasets
from fgvc_ext.models.weights_file import save_weights
from fgvc_ext.nn import ClassMeanLoss
from fgvc_ext.training import Artefact, Classification, EngineConfig, OptimConfig, Result, RunFolder, stages
from fgvc_ext.training.health import Health
from fgvc_ext.training.sampling import EpochBatches, training_loader
from fgvc_ext.training.step import TrainingStep

CPU = torch.device("cpu")


class _NoLook(TorchFunctionMode):
    """Refuses what a program would wait for on a GPU, as it is called in Python."""

    NAMES = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            raise AssertionError(f"a step waits for the device: Tensor.{name}")
        return function(*args, **(kwargs or {}))


class _NoRead(TorchDispatchMode):
    """The same for what reaches the dispatcher: reads of a value, and results whose size depends on values."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        masks = name.startswith("index") and any(getattr(i, "dtype", None) == torch.bool for i in _indices(args))
        if masks or name in self.NAMES:
            raise AssertionError(f"a step waits for the device: {function}")
        return function(*args, **(kwargs or {}))


def _indices(args: tuple) -> list:
    return args[1] if len(args) > 1 and isinstance(args[1], list) else []


@contextmanager
def waiting_for_nothing() -> Iterator[None]:
    with _NoLook(), _NoRead():
        yield


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: float(x),
        lambda x: bool(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x),
        lambda x: x[None][x[None] > 0],
    ],
)
def test_waiting_is_seen(wait):
    with pytest.raises(AssertionError, match="waits for the device"), waiting_for_nothing():
        wait(torch.ones(()))


# ---------------------------------------------------------------- a step


class _Spoiled(nn.Module):
    """A loss with a buffer that it writes, and a factor: NaN makes the loss NaN, `gradient` only the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.factor, self.gradient = 1.0, 1.0

    def forward(self, scores, labels):
        self.seen += 1
        scores = _Times.apply(scores, self.gradient)
        return nn.functional.cross_entropy(scores * self.scale, labels) * self.factor


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _batch(n: int = 8) -> dict[str, torch.Tensor]:
    images = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"image": images, "label": torch.arange(n) % 3, "seed": torch.arange(n), "index": torch.arange(n)}


def _step(precision: str = "fp32", allowed: int = 9, **optim) -> TrainingStep:
    torch.manual_seed(0)
    task = Classification(ToyModel(), _Spoiled())
    settings = OptimConfig(**{"lr": 0.1, "ema_decay": 0.9, "schedule": "step", "step_epochs": 1, **optim})
    return TrainingStep(task, settings, EngineConfig(precision=precision, max_skipped_steps=allowed), CPU, 2)


def _learned(step: TrainingStep) -> dict:
    """Everything that a step may change but the schedule, the scaler and the counts."""
    state = copy.deepcopy(step.state_dict())
    return {
        "task": state["task"],
        "average": state["average"],
        "optimizer": {str(key): value for key, value in state["optimizer"]["state"].items()},
    }


def _assert_same(found: dict, expected: dict, path: str = "") -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            _assert_same(found[name], value, f"{path}{name}.")
        else:
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), path + str(name)


OPTIMIZERS = [{}, {"momentum": 0.0}, {"nesterov": True}, {"optimizer": "adamw"}, {"clip_grad_norm": 0.1}]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spoiled", ["the loss", "a gradient"])
@pytest.mark.parametrize("at", [0, 1], ids=["first", "second"])
def test_a_step_that_is_not_finite_leaves_nothing_behind(at, spoiled, precision, optim):
    step = _step(precision, **optim)
    for number in range(at):
        step(_batch(), number, [8])
    before, rate = _learned(step), step.rate
    loss = step.task.loss
    if spoiled == "the loss":
        loss.factor = float("nan")
    else:
        loss.gradient = float("inf")
    sums = step(_batch(), at, [8])
    assert not any(value.any() for value in sums.values())
    if not before["optimizer"]:  # AdamW makes its state at the first step: as if it had always been zero
        assert not any(value.any() for state in _learned(step)["optimizer"].values() for value in state.values())
        before["optimizer"] = _learned(step)["optimizer"]
    _assert_same(_learned(step), before)
    if at == 1:
        assert step.rate < rate, "the schedule moves on"
    loss.factor = loss.gradient = 1.0
    assert step(_batch(), at + 1, [8])["n"] == 8
    after = _learned(step)
    assert not torch.equal(after["task"]["losses.main.scale"], before["task"]["losses.main.scale"])
    assert all(value.isfinite().all() for value in after["task"].values())
    found = step.look()
    is_overflow = precision == "fp16" and spoiled == "a gradient"
    assert (found.skipped, found.overflows) == ((0, 1) if is_overflow else (1, 0))


def test_a_step_after_a_skipped_first_one_is_a_first_step():
    """The optimiser's buffers begin at zero, not with whatever lay in memory."""
    for optim in OPTIMIZERS:
        skipped, plain = _step(schedule="constant", **optim), _step(schedule="constant", **optim)
        skipped.task.loss.factor = float("nan")
        torch.manual_seed(1)
        skipped(_batch(), 0, [8])
        skipped.task.loss.factor = 1.0
        for step in (skipped, plain):
            torch.manual_seed(2)  # dropout
            step(_batch(), 1, [8])
        _assert_same(_learned(skipped), _learned(plain))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_that_never_become_finite_stop_the_training(precision):
    step = _step(precision, allowed=2, schedule="constant")
    step.task.loss.gradient = float("nan")
    for number in range(40):
        step(_batch(), number, [8])
    found = step.look()
    # fp16 begins with a scale of 65536 = 2¹⁶, which is halved 17 times before it is smaller than one.
    first = 17 if precision == "fp16" else 0
    assert (found.failed_at, found.problem) == (first, "a gradient is not finite")
    assert found.overflows == first


def test_the_health_names_the_first_step_of_the_row_that_was_too_long():
    health, good, bad = Health(CPU, allowed=1), torch.tensor(True), torch.tensor(False)
    steps = [bad, good, bad, good, bad, bad, bad, good, bad]
    for number, finite in enumerate(steps):
        usable = health.note(number, torch.tensor(1.0 if finite else math.inf), finite, good)
        assert usable == finite
        assert (health.look().failed_at is not None) == (number >= 5)
    assert (health.look().failed_at, health.look().problem) == (4, "the loss is inf")
    again = Health(CPU, allowed=1)
    again.load_state_dict(health.state_dict())
    assert again.look() == health.look()


def test_the_health_tells_a_loss_of_its_own_from_another_processes():
    health = Health(CPU, allowed=0)
    health.note(7, torch.tensor(1.23), torch.tensor(False), torch.tensor(True))
    assert (health.look().failed_at, health.look().problem) == (7, "the loss of another process is not finite")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optim", [*OPTIMIZERS, {"accumulate": 2}], ids=str)
def test_a_step_waits_for_nothing(optim, precision):
    step = _step(precision, **optim)
    step(_batch(), 0, [8])
    with waiting_for_nothing():
        step(_batch(), 1, [8])


@pytest.mark.parametrize("paper", [file.stem for file in sorted(drivers_folder().glob("*.py"))])
def test_no_driver_waits_in_a_step(paper, tmp_path):
    """In any of its stages; those that need others get what these begin with, and artefacts made of that."""
    driver = load_driver(drivers_folder() / f"{paper}.py").DRIVER
    config = copy.deepcopy(driver.presets["demo"][1])
    data = {"classes": 3, "train_per_class": 4, "test_per_class": 1, "image_size": 64, "resize": 112, "crop": 56}
    for name, value in data.items():
        setattr(config.data, name, value)
    config.engine.workers, config.engine.device, config.out = 0, "cpu", tmp_path
    datasets, results = load_datasets(config.data, 0), dict[str, Result]()
    run = RunFolder(tmp_path, config, facts={"data": datasets.facts()})
    for stage in driver.stages(config, datasets):
        earlier = {name: results[name] for name in stage.needs}
        if isinstance(stage, Artefact):
            ((file, sha256),) = stages._write(stage, stage.make(earlier), run, "").items()
        else:
            file = f"weights/{stage.name}.safetensors"
            sha256 = _begun_without_waiting(stage.training(earlier), tmp_path / file)
        results[stage.name] = Result(tmp_path / file, sha256)
    assert results


def _begun_without_waiting(training, file: Path) -> str:
    """Two steps of a stage, the second of which may wait for nothing; writes its model and returns the file's hash."""
    task = training.build()
    step = TrainingStep(task, training.optim, EngineConfig(precision="fp32"), CPU, 2)
    batches = EpochBatches(len(training.train), 6, 0)
    for number, loaded in enumerate(training_loader(training.train, batches, workers=0)):
        batch = to_device(loaded, CPU, normalise=training.train.normalise)
        if number == 0:
            step(batch, number, [6])
        else:
            with waiting_for_nothing():
                step(batch, number, [6])
    assert number > 0
    return save_weights(file, task.model_state(), task.model_metadata())


@pytest.mark.cuda
def test_a_step_does_not_synchronise_with_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    for precision in ("fp32", "bf16", "fp16"):
        task = Classification(ToyModel(), _Spoiled()).to(device)
        settings = OptimConfig(ema_decay=0.9, clip_grad_norm=1.0)
        step = TrainingStep(task, settings, EngineConfig(precision=precision), device, 2)
        batch = {name: value.to(device) for name, value in _batch().items()}
        step(batch, 0, [8])
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batch, 1, [8])
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- switches that must not be ignored


def test_clipping_bounds_the_update():
    def moved(**optim) -> float:
        step = _step(momentum=0.0, weight_decay=0.0, ema_decay=None, schedule="constant", lr=1.0, **optim)
        before = [p.detach().clone() for p in step.parameters]
        torch.manual_seed(1)
        step(_batch(), 0, [8])
        return float(
            torch.cat([(p.detach() - q).flatten() for p, q in zip(step.parameters, before, strict=True)]).norm()
        )

    assert moved(clip_grad_norm=1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert moved() > 1e-2
    assert moved(clip_grad_norm=1e6) == pytest.approx(moved(), rel=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_forward(precision, dtype):
    step, seen = _step(precision), []
    step.task.model.classifier.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    step(_batch(), 0, [8])
    assert seen == [dtype]


def test_fp16_scales_the_loss_and_not_the_update():
    seen, moved = [], []
    for precision in ("fp32", "fp16"):
        step = _step(precision, momentum=0.0, weight_decay=0.0, schedule="constant")
        weight = step.task.model.classifier.weight
        weight.register_hook(lambda grad: seen.append(float(grad.abs().max())))
        before = weight.detach().clone()
        torch.manual_seed(1)
        step(_batch(), 0, [8])
        moved.append(weight.detach() - before)
    assert seen[1] == pytest.approx(65536 * seen[0], rel=0.1)
    torch.testing.assert_close(moved[1], moved[0], rtol=0.1, atol=1e-4)


def test_the_forward_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    TrainingStep(task, OptimConfig(), EngineConfig(precision="fp32", compile=True), CPU, 2)(_batch(), 0, [8])
    assert compiled == [task]


def test_a_batch_is_accumulated_in_parts():
    sizes, step = [], _step(accumulate=3)
    step.task.model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    sums = step(_batch(), 0, [8])
    assert sizes == [3, 3, 2]
    assert sums["n"] == 8


def test_adamw_is_adamw():
    step = _step(optimizer="adamw", betas=(0.8, 0.9), weight_decay=0.1, schedule="constant", ema_decay=None)
    by_hand = copy.deepcopy(step.task)
    groups = by_hand.param_groups(OptimConfig(lr=0.1))
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for number in range(3):
        torch.manual_seed(number)
        step(_batch(), number, [8])
        torch.manual_seed(number)
        optimizer.zero_grad()
        by_hand.step(_batch())["loss"].backward()
        optimizer.step()
    for (name, found), expected in zip(step.task.named_parameters(), by_hand.parameters(), strict=True):
        if name != "model.backbone.0.bias":  # before a BatchNorm: its gradient is rounding, whose sign Adam follows
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_of_the_whole_batch_is_not_accumulated():
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    task.within = ClassMeanLoss(3, 4)
    with pytest.raises(ValueError, match=r"optim\.accumulate: expected 1, got 2: within \(ClassMeanLoss\) is a loss"):
        TrainingStep(task, OptimConfig(accumulate=2), EngineConfig(precision="fp32"), CPU, 2)


def test_the_moving_average_follows_every_step():
    step = _step(ema_decay=0.5, schedule="constant")
    step(_batch(), 0, [8])
    begun = {name: value.clone() for name, value in step.task.named_parameters()}
    _assert_same(dict(step.average.module.named_parameters()), begun)
    step(_batch(), 1, [8])
    for name, value in step.task.named_parameters():
        mean = dict(step.average.module.named_parameters())[name]
        torch.testing.assert_close(mean, (value + begun[name]) / 2, msg=name)
