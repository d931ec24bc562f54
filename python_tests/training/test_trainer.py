"""The engine: what it computes, and what stops it."""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import operator
import os
import sys
import time

import pytest
import torch
from torch import nn
from toy_training import ToyConfig, ToyImages, ToyModel, centre, open_run, toy_config, toy_stages, traces, train

from fgvc_ext.data.loading import Samples
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training import (
    Classification,
    NonFiniteLoss,
    RunFolder,
    RunLocked,
    run_stages,
)
from fgvc_ext.training.classification import mean_class_accuracy
from fgvc_ext.training.config import OptimConfig, load_config, save_config
from fgvc_ext.training.distributed import Process, current_process
from fgvc_ext.training.evaluation import evaluate
from fgvc_ext.training.metrics import COLUMNS, EventFiles, MetricFiles
from fgvc_ext.training.optimisation import MovingAverage, build_optimizer, build_scheduler
from fgvc_ext.training.run_lock import RunLock
from fgvc_ext.training.sampling import evaluation_loader
from fgvc_ext.training.step import TrainingStep


def test_it_learns_and_writes_what_it_promises(tmp_path):
    results = train(tmp_path, toy_config(epochs=12, ema_decay=None, lr=0.2))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    names = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "test_class_accuracy")
    assert tuple(rows[0]) == (*COLUMNS, *names)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["test_accuracy"]) > 0.9
    assert float(rows[-1]["test_loss"]) < float(rows[0]["test_loss"])
    assert float(rows[-1]["test_class_accuracy"]) > 0.9
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["stages"][0]["status"] == "done"
    assert run["stages"][0]["accuracy"]["last"] == pytest.approx(float(rows[-1]["test_accuracy"]), abs=1e-5)
    state, metadata = load_weights_file(tmp_path / "weights/last.safetensors")
    assert metadata["classes"] == ["class 0", "class 1", "class 2"]
    assert metadata["config_hash"] == run["stages"][0]["config_hash"]
    assert (tmp_path / "weights/last.safetensors").read_bytes() == results["first"].path.read_bytes()
    assert set(state) == set(ToyModel().state_dict())
    assert not (tmp_path / "run.lock").exists()


def test_a_step_is_sgd_on_the_mean_loss(tmp_path):
    """One step of the engine equals one written out by hand."""
    config = toy_config(epochs=1, batch_size=33, ema_decay=None, warmup_epochs=0.0, accumulate=1, schedule="constant")
    (stage,) = toy_stages(config, centre)
    torch.manual_seed(0)
    start = Classification(ToyModel(), nn.CrossEntropyLoss())
    start.model.backbone[3] = nn.Identity()  # dropout
    state = {name: value.clone() for name, value in start.state_dict().items()}
    stage.build = lambda earlier: start
    images = stage.train({})
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    trained = start.state_dict()
    by_hand = Classification(ToyModel(), nn.CrossEntropyLoss()).train()
    by_hand.model.backbone[3] = nn.Identity()
    by_hand.load_state_dict(state)
    batch = torch.stack([centre(images.dataset.load(i)) for i in range(33)])
    nn.functional.cross_entropy(by_hand.model(batch), images.dataset.labels).backward()
    for name, parameter in by_hand.named_parameters():
        rate = 0.1 if "classifier" in name else 0.05
        expected = parameter.detach() - rate * (parameter.grad + 1e-4 * parameter.detach())
        torch.testing.assert_close(trained[name], expected)


def test_accumulated_gradients_equal_one_batch(tmp_path):
    class NoNorm(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

    results = []
    for accumulate in (1, 3):
        config = toy_config(accumulate=accumulate, ema_decay=None)
        (stage,) = toy_stages(config)
        stage.build = lambda earlier: Classification(NoNorm(), nn.CrossEntropyLoss())
        with open_run(tmp_path / str(accumulate), config) as run:
            results.append(load_weights_file(run_stages([stage], run, config.engine)["first"].path)[0])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_nan_loss_stops_with_step_samples_and_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 5: the loss is nan.*-s000000004\.pt.*train/\d+") as caught:
        train(tmp_path, toy_config(nan_at=6))
    assert str(caught.value).count("train/") == 8
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed"
    assert "NonFiniteLoss" in run["error"]


@pytest.mark.parametrize(("look_every", "steps"), [(1, 1), (3, 3), (4, 4)])
def test_a_run_that_cannot_go_on_stops_at_the_next_look(look_every, steps, tmp_path, monkeypatch):
    """And not at the end of an epoch of hours."""
    taken, usual = [], TrainingStep.__call__

    def counted(self, *arguments):
        taken.append(1)
        return usual(self, *arguments)

    monkeypatch.setattr(TrainingStep, "__call__", counted)
    with pytest.raises(NonFiniteLoss):
        train(tmp_path, toy_config(nan_at=1, look_every=look_every, checkpoint_every=0))
    assert len(taken) == steps


def test_a_skipped_step_leaves_nothing_behind(tmp_path):
    results = train(tmp_path, toy_config(nan_at=6, max_skipped_steps=1))
    assert all(value.isfinite().all() for value in load_weights_file(results["first"].path)[0].values())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps") for row in rows] == [None, 1, None]


def test_broken_images_are_counted(tmp_path):
    config = toy_config(broken_images="skip")
    (stage,) = toy_stages(config)
    samples = stage.train({})
    samples.dataset.broken = (4, 5, 6)
    stage.train = lambda earlier: samples
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["broken"] for row in rows] == [3, 3, 3]


def test_parameters_without_gradient_are_named(tmp_path):
    class Unused(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.classifier.extra = nn.Parameter(torch.zeros(2))

    config = toy_config()
    (stage,) = toy_stages(config)
    stage.build = lambda earlier: Classification(Unused(), nn.CrossEntropyLoss())
    with (
        pytest.raises(RuntimeError, match=r"does not depend on model\.classifier\.extra"),
        open_run(tmp_path, config) as r,
    ):
        run_stages([stage], r, config.engine)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size):
    torch.manual_seed(0)
    task = Classification(ToyModel(), nn.CrossEntropyLoss()).train()
    samples = Samples(ToyImages(21, "test"), centre)

    def sums(size: int) -> dict[str, torch.Tensor]:
        return evaluate(task, evaluation_loader(samples, range(21), size, workers=0), lambda batch: batch)

    expected, found = sums(21), sums(batch_size)
    assert found["n"] == 21
    assert found["correct"] == expected["correct"]
    assert torch.equal(found["confusion"], expected["confusion"])
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    assert task.training, "the mode is put back"


def test_five_crops_are_averaged():
    task = Classification(ToyModel(), nn.CrossEntropyLoss()).eval()
    crops = torch.rand(2, 5, 3, 12, 12)
    expected = torch.stack([task.model(crops[:, i]) for i in range(5)]).mean(0)
    torch.testing.assert_close(task.scores(crops), expected)


def test_no_step_in_an_epoch_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no step in an epoch"):
        train(tmp_path, toy_config(images=1))


def test_schedules():
    def rates(**changes) -> list[float]:
        config = OptimConfig(epochs=4, lr=1.0, **changes)
        optimizer = build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], config)
        scheduler, found = build_scheduler(optimizer, config, steps_per_epoch=2), []
        for _ in range(8):
            found.append(round(optimizer.param_groups[0]["lr"], 4))
            optimizer.step()
            scheduler.step()
        return found

    assert rates(schedule="step", step_epochs=2) == [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]
    assert rates(schedule="constant", warmup_epochs=1) == [0.3333, 0.6667, 1, 1, 1, 1, 1, 1]
    assert rates(schedule="cosine")[::4] == [1, 0.5]
    with pytest.raises(ValueError, match="warmup_epochs"):
        rates(warmup_epochs=4)


def test_the_moving_average_copies_buffers():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    average, usable = MovingAverage(model, 0.5), torch.tensor(True)
    average.update(model, ~usable)
    average.update(model, usable)  # the first takes the weights as they are
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    model[1].running_mean += 3
    average.update(model, ~usable)  # a step that was left out
    torch.testing.assert_close(average.module[0].weight, before)
    average.update(model, usable)
    torch.testing.assert_close(average.module[0].weight, before + 0.5)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_new_layers_have_their_own_rate():
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    old, new = task.param_groups(OptimConfig(lr=0.1, new_layers_lr=0.3))
    assert (old["lr"], new["lr"]) == (0.1, 0.3)
    assert {id(p) for p in new["params"]} == {id(p) for p in task.model.classifier.parameters()}
    with pytest.raises(ValueError, match=r"optim\.new_layers: expected some of backbone, classifier, got 'layer9'"):
        task.param_groups(OptimConfig(new_layers=("layer9",)))


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = toy_config(lr=0.25, new_layers=("classifier", "backbone"), clip_grad_norm=1.0)
    save_config(config, tmp_path / "c.json")
    assert load_config(ToyConfig, tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1}, "unknown field 'learning_rate'"),
        ({"optim": {"lr": "fast"}}, "lr: expected float, got 'fast'"),
        ({"engine": {"precision": "fp8"}}, "precision: expected .* got 'fp8'"),
        ({"optim": 3}, "expected an object with the fields of OptimConfig"),
    ],
)
def test_a_bad_configuration_is_named(change, message, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=message):
        load_config(ToyConfig, tmp_path / "c.json")


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    with open_run(tmp_path, toy_config()):
        held = json.loads((tmp_path / "run.lock").read_text())
        with pytest.raises(RunLocked, match=f"process {os.getpid()}"):
            open_run(tmp_path, toy_config()).__enter__()
    for left in ({**held, "host": "elsewhere"}, held):  # of a run that was killed, here or on another machine
        (tmp_path / "run.lock").write_text(json.dumps(left))
        with open_run(tmp_path, toy_config()) as run:
            assert isinstance(run, RunFolder)


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    try:
        lock.forget()  # as if this process were gone
        end = time.monotonic() + 10
        while True:  # the child lets go as soon as it runs
            try:
                RunLock(tmp_path).acquire()
                break
            except RunLocked:
                assert time.monotonic() < end
                time.sleep(0.01)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_processes():
    assert current_process({}) == Process()
    assert current_process({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}).launched
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert current_process(environment) == Process(5, 8, local_rank=1, local_size=4)
    assert [Process(rank, 3).share(2) for rank in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 2)], (
        "first to the main"
    )
    shards = [list(Process(rank, 3).shard(10)) for rank in range(3)]
    assert sorted(functools.reduce(operator.iadd, shards, [])) == list(range(10))


def test_toy_runs_are_comparable(tmp_path):
    train(tmp_path, toy_config(epochs=1))
    assert set(traces(tmp_path)) >= {"first.safetensors", "last.safetensors", "metrics.csv"}


def test_mean_class_accuracy_leaves_out_classes_without_images():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    assert mean_class_accuracy(confusion) == pytest.approx((3 / 4 + 2 / 4) / 2)


def _row(stage: str, epoch: int, **values: float) -> dict:
    return {"stage": stage, "epoch": epoch, "step": 4 * epoch, **values}


def test_new_measures_get_columns_of_their_own(tmp_path):
    files = MetricFiles(tmp_path)
    files.append(_row("a", 1, train_loss=2.0))
    files.append(_row("a", 2, train_loss=1.0, test_iou=0.5))
    files.append(_row("b", 1, train_loss=3.0))
    files.append(_row("a", 3, train_loss=0.5))
    header, *lines = files.csv.read_text().splitlines()
    assert header == ",".join((*COLUMNS, "train_loss", "test_iou"))
    assert [line.split(",")[0] for line in lines] == ["a", "a", "a", "b"], "a line stands behind those of its stage"
    assert [line.split(",")[-2:] for line in lines] == [["2", ""], ["1", "0.5"], ["0.5", ""], ["3", ""]]
    assert [json.loads(line)["epoch"] for line in files.jsonl.open()] == [1, 2, 3, 1]


def test_lines_behind_a_checkpoint_are_dropped(tmp_path):
    files = MetricFiles(tmp_path)
    for stage, epoch in (("a", 1), ("b", 1), ("b", 2), ("a-b", 2)):
        files.append(_row(stage, epoch, train_loss=1.0))
    for file in (files.csv, files.jsonl):  # killed in the middle of a line
        file.write_bytes(file.read_bytes() + b"b,3,")
    files.drop("b", after=1)
    kept = [("a", "1"), ("b", "1"), ("a-b", "2")]
    assert [(row["stage"], row["epoch"]) for row in csv.DictReader(files.csv.open())] == kept
    assert [(row["stage"], str(row["epoch"])) for row in map(json.loads, files.jsonl.open())] == kept


def test_event_files_are_written_where_tensorboard_is(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, toy_config(epochs=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    assert [event.step for event in events.Scalars("test_loss")] == [1, 2]


def test_nothing_breaks_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    events = EventFiles(tmp_path / "tensorboard")
    events.append({"stage": "a", "epoch": 1, "test_loss": 1.0})
    events.close()
    assert not (tmp_path / "tensorboard").exists()
