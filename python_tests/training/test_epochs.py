"""What an epoch begins with, what it counts, and what a stage keeps of it."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from torch import nn
from toy_training import ToyImages, ToyModel, centre, open_run, toy_config, toy_stages, train

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.loading import Samples
from fgvc_ext.models.weights_file import load_weights_file, save_weights
from fgvc_ext.training import (
    Classification,
    Preempted,
    RunFolder,
    Task,
    run_stages,
)
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.config import OptimConfig
from fgvc_ext.training.optimisation import build_optimizer
from fgvc_ext.training.stop_request import StopRequest
from fgvc_ext.training.trainer import Trainer


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
    config = toy_config(ema_decay=ema_decay)
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

    config = toy_config()
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

    config = toy_config(ema_decay=None)
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: Odd(ToyModel(), nn.CrossEntropyLoss())
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    assert run.entry("first")["best"]["test"] == {"iou": pytest.approx(0.4), "epoch": 3}


def test_a_batch_of_one_trains_where_it_is_asked_for(tmp_path):
    config = toy_config(epochs=1, batch_size=1, images=5)
    train(tmp_path, config)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 5
    assert row["train_loss"] > 0


def test_batches_of_which_one_image_is_left_move_the_schedule(tmp_path):
    config = toy_config(epochs=1, batch_size=2, images=8, broken_images="skip", warmup_epochs=0.0)
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
    config = toy_config(broken_images="skip")
    (stage,) = toy_stages(config)
    samples = stage.train({})
    samples.dataset.broken = tuple(range(33))
    stage.train = lambda earlier: samples
    with open_run(tmp_path, config) as run, pytest.raises(ValueError, match="first: none of its 33 training images"):
        run_stages([stage], run, config.engine)


def test_skipped_steps_stand_in_their_own_epoch_once(tmp_path):
    """Also where the host does not look before the epoch's end, and where the run is stopped in between."""
    config = toy_config(nan_at=6, max_skipped_steps=1, look_every=100, checkpoint_every=0)
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

    config = toy_config(epochs=2, precision="fp16", lr=1e-37, new_layers_lr=1e-37, ema_decay=None)
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

    config = toy_config(epochs=1, eval_batch_size=10)
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
        open_run(tmp_path, toy_config()) as run,
    ):
        run_stages(toy_stages(toy_config()), run, toy_config().engine)


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
        train(tmp_path, toy_config())
    monkeypatch.undo()
    train(tmp_path, toy_config())
    entry = json.loads((tmp_path / "run.json").read_text())["stages"][0]
    assert (entry["status"], entry["epoch"], entry["step"]) == ("done", 3, 12)


def _interrupting(update):
    def interrupted(self, name, **values):
        if values.get("epoch") == 3:
            raise KeyboardInterrupt
        update(self, name, **values)

    return interrupted


def test_weights_better_than_the_checkpoint_knows_are_not_kept_as_the_best(tmp_path):
    config = toy_config(epochs=2, ema_decay=None)
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


class _Counted(Task):
    """Its loss and what it logs are known beforehand: nothing is learnt at the rate 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def step(self, batch):
        loss = (batch["label"].double() * self.weight).mean()
        return {"loss": loss, "logs": {"labels": batch["label"].sum()}, "n": len(batch["label"])}

    def eval_step(self, batch):
        return {"n": torch.tensor(len(batch["label"])), "labels": batch["label"].sum()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_an_epoch_reports_is_of_all_its_samples(accumulate, tmp_path):
    config = toy_config(
        epochs=1, images=32, batch_size=5, lr=0.0, accumulate=accumulate, schedule="constant", ema_decay=None
    )
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: _Counted()
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    labels = ToyImages(config.images).labels.double().mean().item()
    assert row["train_loss"] == pytest.approx(labels, rel=1e-12)
    assert row["train_labels"] == pytest.approx(labels, rel=1e-12)
