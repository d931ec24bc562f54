"""What each switch of the engine changes, what an epoch begins with, and what it counts."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn
from toy_training import ToyConfig, ToyImages, ToyModel, centre, open_run, toy_stages, traces, train

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.loading import Samples
from fgvc_ext.models.weights_file import load_weights_file, save_weights
from fgvc_ext.training import (
    Classification,
    ConfigMismatch,
    EngineConfig,
    NonFiniteLoss,
    Preempted,
    RunFolder,
    distributed,
    run_stages,
    trainer,
)
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.config import OptimConfig
from fgvc_ext.training.device import choose_precision, configure_backends, hint_of_bf16, worker_count
from fgvc_ext.training.distributed import Process
from fgvc_ext.training.evaluation import evaluate
from fgvc_ext.training.optimisation import build_optimizer
from fgvc_ext.training.sampling import EpochBatches, evaluation_loader
from fgvc_ext.training.stop_request import StopRequest
from fgvc_ext.training.trainer import Trainer


def _config(**changes) -> ToyConfig:
    config = ToyConfig(stages=1)
    for name, value in changes.items():
        group = "optim" if hasattr(config.optim, name) else "engine" if hasattr(config.engine, name) else None
        setattr(getattr(config, group) if group else config, name, value)
    return config


# ---------------------------------------------------------------- switches that must not be ignored


@pytest.mark.parametrize("look_every", [2, 3, 100])
def test_between_two_looks_a_nan_loss_still_names_its_step(look_every, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 5: the loss is nan.*-s000000004\.pt") as caught:
        train(tmp_path, _config(nan_at=6, look_every=look_every))
    (stage,) = toy_stages(_config())
    expected = EpochBatches(33, 8, stage.seed).samples_of(1, 1)
    assert str(caught.value).partition("Samples: ")[2] == ", ".join(f"train/{index}" for index in expected)
    newest = max((tmp_path / "checkpoints").glob("*.pt"))
    assert newest.name == "first-e00001-s000000004.pt", "nothing is saved after a step that ends the run"


def test_images_are_channels_last_unless_told_otherwise(tmp_path):
    for channels_last in (True, False):
        seen = []
        config = _config(epochs=1, channels_last=channels_last)
        (stage,) = toy_stages(config)
        build = stage.build

        def hooked(earlier, build=build, seen=seen):
            task = build(earlier)
            convolution = task.model.backbone[0]
            convolution.register_forward_pre_hook(lambda module, args: seen.append((args[0], module.weight)))
            return task

        stage.build = hooked
        with open_run(tmp_path / str(channels_last), config) as run:
            run_stages([stage], run, config.engine)
        for tensor in (t for pair in seen for t in pair):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert EngineConfig().channels_last


def test_the_averaged_weights_are_evaluated_and_saved(tmp_path):
    plain = load_weights_file(train(tmp_path / "plain", _config(ema_decay=None))["first"].path)[0]
    average = load_weights_file(train(tmp_path / "average", _config(ema_decay=0.99))["first"].path)[0]
    checkpoint = Checkpoints(tmp_path / "average/checkpoints", "first").load_latest()[0]["step"]
    for name, value in average.items():
        assert torch.equal(value, checkpoint["average"][f"module.model.{name}"])
        torch.testing.assert_close(checkpoint["task"][f"model.{name}"], plain[name])
    assert not torch.equal(average["classifier.weight"], plain["classifier.weight"])


def test_the_best_weights_on_validation_are_kept(tmp_path):
    config = _config(epochs=6, lr=0.5, ema_decay=None)
    (stage,) = toy_stages(config)
    val = Samples(ToyImages(12, "val"), centre)
    evaluations = stage.evaluations({})
    stage.evaluations = lambda earlier: {**evaluations, "val": val}
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row["val_accuracy"] for row in rows]
    state, metadata = load_weights_file(tmp_path / "weights/first.best.safetensors")
    assert metadata["epoch"] == found.index(max(found)) + 1 == run.entry("first")["best"]["val"]["epoch"]
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    task.model.load_state_dict(state)
    sums = evaluate(task, evaluation_loader(val, range(12), 64, workers=0), lambda batch: batch)
    assert int(sums["correct"]) / 12 == max(found)


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch):
    train(tmp_path, _config(epochs=1))
    assert json.loads((tmp_path / "run.json").read_text())["precision"] == "fp32"
    seen = []
    monkeypatch.setattr("fgvc_ext.training.stages.choose_precision", lambda engine, device: seen.append(1) or "bf16")
    train(tmp_path, _config(epochs=1))
    assert not seen
    train(tmp_path / "other", _config(epochs=1))
    assert json.loads((tmp_path / "other/run.json").read_text())["precision"] == "bf16"
    with pytest.raises(ConfigMismatch, match=r'engine\.precision: "fp32" in the run, "bf16" now'):
        train(tmp_path, _config(epochs=1, precision="bf16"))


def test_processes_that_load_stay_for_the_next_evaluation_and_end_with_the_training(tmp_path, monkeypatch):
    made = []

    def loader(samples, *rest, **options):
        made.append(samples)
        return evaluation_loader(samples, *rest, **options)

    monkeypatch.setattr(trainer, "evaluation_loader", loader)
    train(tmp_path / "2", _config(workers=2))
    assert len(made) == 1, "three evaluations"
    assert not multiprocessing.active_children()
    train(tmp_path / "0", _config(workers=0))
    assert traces(tmp_path / "2") == traces(tmp_path / "0")


def test_as_many_processes_load_as_a_training_process_has_cores(monkeypatch):
    for cores, local_size, expected in ((2, 1, 2), (1, 1, 1), (64, 1, 8), (64, 16, 4), (8, 3, 2), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))  # noqa: B023
        monkeypatch.setattr(distributed, "current_process", lambda: Process(local_size=local_size))  # noqa: B023
        assert worker_count(EngineConfig()) == expected
        assert worker_count(EngineConfig(workers=0)) == 0
        assert worker_count(EngineConfig(workers=13)) == 13


def test_auto_is_decided_from_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
        assert choose_precision(EngineConfig(), cuda) == ("bf16" if supported else "fp32")
        assert choose_precision(EngineConfig(), cpu) == "fp32"
        assert choose_precision(EngineConfig(precision="fp16"), cpu) == "fp16"
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)  # noqa: B023
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert (hint_of_bf16(cpu) is not None) == supported
        assert hint_of_bf16(cuda) is None


def test_backends_do_as_they_are_told(monkeypatch):
    for deterministic, other in ((True, False), (False, True)):
        engine = EngineConfig(deterministic=deterministic, tf32=other, cudnn_benchmark=True)
        configure_backends(engine)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.deterministic == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == other


def test_a_balanced_epoch_draws_every_class_equally_often(tmp_path):
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    batches = EpochBatches(100, 10, seed=0, labels=labels)
    drawn = torch.zeros(3)
    for epoch in range(30):
        batches.start(epoch)
        keys = [key for batch in batches for key in batch]
        assert len(keys) == len({seed for _, seed in keys}) == 100, "a sample that comes again looks different"
        drawn += torch.bincount(labels[[index for index, _ in keys]], minlength=3)
    assert (drawn / 3000 - 1 / 3).abs().max() < 0.03
    config = _config(balanced=True)
    (stage,) = toy_stages(config)
    samples = stage.train({})
    samples.dataset.labels = torch.tensor([0] * 31 + [1, 2])
    with open_run(tmp_path, config) as run:
        trainer = Trainer(stage.training({}), run, config.engine, StopRequest())
    assert torch.equal(trainer.batches.labels, samples.dataset.labels)


# ---------------------------------------------------------------- what an epoch begins with, and what it counts


class _Watched(Classification):
    """Writes down the epoch that it was told of when it is evaluated, and the mode of its BatchNorm in a step."""

    def __init__(self) -> None:
        super().__init__(ToyModel(), nn.CrossEntropyLoss())
        self.told, self.seen, self.modes = -1, [], []

    def start_epoch(self, epoch):
        super().start_epoch(epoch)
        self.told = epoch
        self.model.backbone[1].eval()

    def step(self, batch):
        self.modes.append(self.model.backbone[1].training)
        return super().step(batch)

    def eval_step(self, batch):
        self.seen.append(self.told)
        return super().eval_step(batch)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_what_is_evaluated_hears_of_epochs_and_their_settings_hold(ema_decay, tmp_path):
    config = _config(ema_decay=ema_decay)
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: _Watched()
    with open_run(tmp_path, config) as run:
        trainer = Trainer(stage.training({}), run, config.engine, StopRequest())
        run.update_entry("first", status="running")
        trainer.fit()
    assert trainer.step.evaluated.seen == [0, 1, 2]
    assert not any(trainer.task.modes)


def test_a_parameter_that_an_epoch_unfreezes_must_have_been_in_the_optimiser(tmp_path):
    class Unfreezing(Classification):
        def start_epoch(self, epoch):
            self.model.classifier.requires_grad_(epoch > 0)

    config = _config()
    (stage,) = toy_stages(config)

    def build(earlier):
        task = Unfreezing(ToyModel(), nn.CrossEntropyLoss())
        task.start_epoch(0)
        return task

    stage.build = build
    with open_run(tmp_path, config) as run, pytest.raises(ValueError, match=r"leaves out model\.classifier\.weight"):
        run_stages([stage], run, config.engine)


def test_an_evaluation_without_a_number_is_not_the_best(tmp_path):
    class Odd(Classification):
        def measures(self, sums):
            iou = float("nan") if self.epoch_told == 0 else 0.2 + 0.1 * self.epoch_told
            return {"iou": iou}

        def start_epoch(self, epoch):
            self.epoch_told = epoch

    config = _config(ema_decay=None)
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: Odd(ToyModel(), nn.CrossEntropyLoss())
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    assert run.entry("first")["best"]["test"] == {"iou": pytest.approx(0.4), "epoch": 3}


def test_a_batch_of_one_trains_where_it_is_asked_for(tmp_path):
    config = _config(epochs=1, batch_size=1, images=5)
    train(tmp_path, config)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 5
    assert row["train_loss"] > 0


def test_batches_of_which_one_image_is_left_move_the_schedule(tmp_path):
    config = _config(epochs=1, batch_size=2, images=8, broken_images="skip", warmup_epochs=0.0)
    (stage,) = toy_stages(config)
    samples = stage.train({})
    samples.dataset.broken = (1, 3, 5, 7)
    stage.train = lambda earlier: samples
    with open_run(tmp_path, config) as run:
        trainer = Trainer(stage.training({}), run, config.engine, StopRequest())
        run.update_entry("first", status="running")
        trainer.fit()
    assert trainer.step.rate == pytest.approx(0, abs=1e-9), "a cosine ends at zero"
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    batches = [sum(index % 2 == 0 for index in trainer.batches.samples_of(0, batch)) for batch in range(4)]
    assert row.get("left_out", 0) == batches.count(1)
    assert row["broken"] == 4


def test_training_images_of_which_none_can_be_read_are_named(tmp_path):
    config = _config(broken_images="skip")
    (stage,) = toy_stages(config)
    samples = stage.train({})
    samples.dataset.broken = tuple(range(33))
    stage.train = lambda earlier: samples
    with open_run(tmp_path, config) as run, pytest.raises(ValueError, match="first: none of its 33 training images"):
        run_stages([stage], run, config.engine)


def test_skipped_steps_stand_in_their_own_epoch_once(tmp_path):
    """Also where the host does not look before the epoch's end, and where the run is stopped in between."""
    config = _config(nan_at=6, max_skipped_steps=1, look_every=100, checkpoint_every=0)
    train(tmp_path / "whole", config)
    stop = StopRequest()
    learn, steps = Trainer._learn, []

    def then_stop(self, batch):
        learn(self, batch)
        steps.append(1)
        if len(steps) == 7:
            stop.received = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_learn", then_stop)
        with pytest.raises(Preempted), open_run(tmp_path / "stopped", config) as run:
            run_stages(toy_stages(config), run, config.engine, stop=stop)
    train(tmp_path / "stopped", config)  # whose model counts its calls anew, and has fewer left
    for folder in ("whole", "stopped"):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        assert [row.get("skipped_steps") for row in rows] == [None, 1, None]


def test_overflows_of_fp16_are_counted_and_its_state_goes_on(tmp_path):
    class Overflowing(Classification):
        def step(self, batch):
            answer = super().step(batch)
            return {**answer, "loss": answer["loss"] * 1e35}  # times a scale of 65536: more than float32 holds

    config = _config(epochs=2, precision="fp16", lr=1e-37, new_layers_lr=1e-37, ema_decay=None)
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: Overflowing(ToyModel(), nn.CrossEntropyLoss())
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    state = Checkpoints(tmp_path / "checkpoints", "first").load_latest()[0]["step"]
    assert rows[0]["overflows"] >= 1
    assert state["scaler"]["scale"] == 65536 / 2 ** sum(row.get("overflows", 0) for row in rows)
    assert int(state["health"]["counts"][1]) == sum(row.get("overflows", 0) for row in rows)


def test_crops_share_the_batch_size_of_an_evaluation(tmp_path):
    sizes = []

    class Sized(Classification):
        def eval_step(self, batch):
            sizes.append(tuple(batch["image"].shape[:2]))
            return super().eval_step(batch)

    config = _config(epochs=1, eval_batch_size=10)
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: Sized(ToyModel(), nn.CrossEntropyLoss())
    crops = Samples(ToyImages(4, "test"), lambda image: torch.stack([centre(image)] * 5), crops=5)
    stage.final = lambda earlier: {"five_crop": crops}
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    assert sizes == [(10, 3), (10, 3), (1, 3), (2, 5), (2, 5)]
    assert set(run.entry("first")["best"]) == {"test"}, "epochs cannot be compared by what only the last one has"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nesterov": True, "momentum": 0.0}, "optim.nesterov: expected a momentum above 0"),
        ({"betas": (0.9, 1.0)}, r"optim.betas: expected two numbers .* got \(0.9, 1.0\)"),
        ({"clip_grad_norm": 0.0}, "optim.clip_grad_norm: expected more than 0"),
        ({"label_smoothing": 1.0}, "optim.label_smoothing: expected less than 1, got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], OptimConfig(**wrong))


def test_processes_that_have_not_joined_do_not_train(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but the processes have not joined"),
        open_run(tmp_path, _config()) as run,
    ):
        run_stages(toy_stages(_config()), run, _config().engine)


def test_the_restart_of_a_job_does_not_force_again(monkeypatch):
    driver = load_driver(drivers_folder() / "subtle_differences.py").DRIVER
    words = ["demo", "--resume", "never", "--force-stage", "ours"]
    assert driver.read_arguments(words).force_stage == ("ours",)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = driver.read_arguments(words)
    assert (config.resume, config.force_stage) == ("auto", ())


def test_a_killed_run_that_only_had_to_say_that_it_is_done_says_its_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "update_entry", _interrupting(RunFolder.update_entry))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, _config())
    monkeypatch.undo()
    train(tmp_path, _config())
    entry = json.loads((tmp_path / "run.json").read_text())["stages"][0]
    assert (entry["status"], entry["epoch"], entry["step"]) == ("done", 3, 12)


def _interrupting(update):
    def interrupted(self, name, **values):
        if values.get("epoch") == 3:
            raise KeyboardInterrupt
        update(self, name, **values)

    return interrupted


def test_weights_better_than_the_checkpoint_knows_are_not_kept_as_the_best(tmp_path):
    config = _config(epochs=2, ema_decay=None)
    (stage,) = toy_stages(config)
    evaluations = stage.evaluations({})
    stage.evaluations = lambda earlier: {**evaluations, "val": Samples(ToyImages(12, "val"), centre)}

    def run_it():
        with open_run(tmp_path, config) as run:
            run_stages([stage], run, config.engine)
        return run

    run_it()
    best = tmp_path / "weights/first.best.safetensors"
    state, metadata = load_weights_file(best)
    save_weights(best, state, {**metadata, "epoch": 7})
    (tmp_path / "weights/first.safetensors").unlink()  # so that the stage is not done
    with open_run(tmp_path, config) as run:
        trainer = Trainer(stage.training({}, run.entry("first")["config_hash"]), run, config.engine, StopRequest())
        trainer._restore()
    assert "val" not in trainer.at.best
    assert "test" in trainer.at.best
