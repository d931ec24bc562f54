"""What processes exchange and decide together, and what only one of them meets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import job
import pytest
import test_pipeline_of_four_stages as pipeline
import torch
from test_jobs_that_fail import CONFIG, HERE, whole
from toy_training import ToyModel, open_run, toy_stages, train

from fgvc_ext.cli.train import load_driver
from fgvc_ext.training import (
    Classification,
    NonFiniteLoss,
    Preempted,
    distributed,
    run_stages,
    trainer,
)
from fgvc_ext.training.distributed import current_process
from fgvc_ext.training.stop_request import StopRequest

# ---------------------------------------------------------------- what processes exchange


def exchange(folder: Path) -> int:
    """Rows, sums and buffers of ranks that have different numbers of them."""
    process = current_process()
    rows = torch.arange(7)[process.shard(7).start :: process.world_size]
    assert distributed.gather_rows(rows, 7).tolist() == list(range(7))
    alone = torch.arange(1) if process.is_main else None
    assert distributed.gather_rows(alone, 1).tolist() == [0], "others have no row, and do not know its shape"
    with pytest.raises(ValueError, match="expected"):
        distributed.gather_rows(torch.arange(9), 7)
    sums = {"n": torch.tensor(process.rank + 1), **({"main": torch.tensor(2.0)} if process.is_main else {})}
    total = distributed.reduce_sums(sums)
    assert (int(total["n"]), float(total["main"])) == (sum(range(1, process.world_size + 1)), 2.0)
    assert distributed.any_process(process.rank == 1)
    assert not distributed.any_process(False)
    assert not bool(distributed.all_true(torch.tensor(process.rank != 1)))
    assert bool(distributed.all_true(torch.tensor(True)))
    module = torch.nn.BatchNorm2d(3)
    module.running_mean += process.rank
    module.num_batches_tracked += process.rank
    distributed.share_buffers(module)
    assert module.running_mean.tolist() == [0, 0, 0]
    assert int(module.num_batches_tracked) == 0
    with pytest.warns(UserWarning, match="only GPUs have it"):
        assert distributed.with_shared_batch_norm(module, torch.device("cpu")) is module
    calls: list[int] = []
    assert distributed.on_main(lambda: calls.append(1) or "said") == "said"
    assert len(calls) == process.is_main
    kind = KeyError if process.is_main else distributed.OtherProcessFailed
    with pytest.raises(kind, match="nothing"):
        distributed.on_main(dict.__getitem__, {}, "nothing")
    return 0


@pytest.mark.parametrize("count", [2, 3])
def test_rows_sums_and_decisions_are_those_of_all(count, tmp_path):
    job.run(tmp_path / "output", count, exchange, tmp_path)


def buffers(folder: Path) -> int:
    """A training with BatchNorm; every rank writes what it ends with."""
    finish = trainer.Trainer._finish

    def then_write(self):
        torch.save(self.task.state_dict(), folder / f"{self.name}.{current_process().rank}.pt")
        finish(self)

    trainer.Trainer._finish = then_write
    return whole(folder / "run")


def test_parameters_and_buffers_are_the_same_in_all_processes(tmp_path):
    job.run(tmp_path / "output", 2, buffers, tmp_path)
    for stage in ("first", "second"):
        main, other = (torch.load(tmp_path / f"{stage}.{rank}.pt", weights_only=True) for rank in range(2))
        assert any("running_mean" in name for name in main)
        assert all(torch.equal(value, other[name]) for name, value in main.items())


# ---------------------------------------------------------------- what one process meets alone


class _NanOfOne(Classification):
    """In its sixth step the second process has a loss that is no number, and gradients that are."""

    def __init__(self) -> None:
        super().__init__(ToyModel(), torch.nn.CrossEntropyLoss())
        self.calls, self.drawn = 0, []

    def step(self, batch):
        self.drawn.append(torch.rand(3))  # as dropout does, whatever the images are
        answer = super().step(batch)
        self.calls += 1
        bad = self.calls == 6 and current_process().rank == 1
        return {**answer, "loss": answer["loss"] + (float("nan") if bad else 0.0)}


def nan_of_one(folder: Path, allowed: int) -> int:
    config = replace(CONFIG, engine=replace(CONFIG.engine, max_skipped_steps=allowed), stages=1)
    (stage,) = toy_stages(config)
    tasks = []

    def build(earlier):
        tasks.append(_NanOfOne())
        return tasks[-1]

    stage.build = build
    try:
        with open_run(folder / "run", config) as run:
            run_stages([stage], run, config.engine)
    except NonFiniteLoss as error:
        (folder / f"said.{current_process().rank}").write_text(str(error))
    torch.save({"state": tasks[0].state_dict(), "drawn": tasks[0].drawn[0]}, folder / f"{current_process().rank}.pt")
    return 0


def test_a_nan_of_one_process_is_a_step_that_all_leave_out(tmp_path):
    job.run(tmp_path / "output", 3, nan_of_one, tmp_path, 1)
    main, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3))
    assert all(torch.equal(value, other["state"][name]) for name, value in main["state"].items() for other in others)
    assert all(value.isfinite().all() for value in main["state"].values())
    assert len({tuple(one["drawn"].tolist()) for one in (main, *others)}) == 3, "dropout of each process' own"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps") for row in rows] == [None, 1, None]


def test_a_nan_of_one_process_ends_all_and_each_says_what_it_saw(tmp_path):
    job.run(tmp_path / "output", 2, nan_of_one, tmp_path, 0)
    main, other = ((tmp_path / f"said.{rank}").read_text() for rank in range(2))
    assert "step 5: the loss of another process is not finite" in main
    assert "step 5: the loss is nan" in other


def asked_alone(folder: Path, moment: str) -> int:
    """One process alone is asked to stop: between two stages, or within an artefact."""
    with StopRequest() as stop:
        if current_process().rank == 1:
            if moment == "between":
                finish = trainer.Trainer._finish
                trainer.Trainer._finish = lambda self: (finish(self), os.kill(os.getpid(), signal.SIGTERM))
            else:
                boxes = pipeline.map_samples
                pipeline.map_samples = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), boxes(*args))[1]
        try:
            with open_run(folder, CONFIG) as run:
                stages = toy_stages(CONFIG) if moment == "between" else pipeline.stages(CONFIG)
                run_stages(stages, run, CONFIG.engine, stop=stop)
        except Preempted as preempted:
            print(preempted, flush=True)
            return 75
        except distributed.OtherProcessFailed as error:
            print(error, flush=True)
            return 1
    return 0


def test_one_process_that_is_asked_between_two_stages_stops_all(tmp_path):
    ended = [child.ended() for child in job.start(tmp_path / "output", 2, asked_alone, tmp_path / "run", "between")]
    assert [code for code, _ in ended] == [75, 75]
    assert "a signal received; first is done" in ended[0][1]
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "preempted"


def test_one_process_that_is_asked_in_an_artefact_does_not_leave_the_other_waiting(tmp_path):
    ended = [child.ended() for child in job.start(tmp_path / "output", 2, asked_alone, tmp_path / "run", "artefact")]
    assert [code for code, _ in ended] == [1, 75]
    assert "another process has ended, see its own message" in ended[0][1]
    job.run(tmp_path / "again", 2, pipeline.train, tmp_path / "run")


def other_data(folder: Path) -> int:
    driver = load_driver(HERE.parents[1] / "train/subtle_differences.py").DRIVER
    count = "5" if current_process().rank else "6"
    return driver.main(["demo", "--out", str(folder), "--data.classes", "4", "--data.train-per-class", count])


def test_processes_that_see_other_images_stop(tmp_path):
    ended = [child.ended() for child in job.start(tmp_path / "output", 2, other_data, tmp_path / "run")]
    assert [code for code, _ in ended] == [1, 1]
    assert "processes [1] see other images than process 0" in ended[0][1]
    assert not (tmp_path / "run").exists()


def test_sums_of_a_process_that_is_no_more_are_counted(tmp_path):
    """Stopped within an epoch by two, and ended by one: the epoch's line counts the images of all its steps."""
    folder = tmp_path / "run"
    job.run(tmp_path / "first", 2, stopped_within, folder)
    job.run(tmp_path / "last", 1, whole, folder)
    job.run(tmp_path / "whole", 1, whole, tmp_path / "whole")
    found, expected = (
        json.loads((place / "metrics.jsonl").read_text().splitlines()[0]) for place in (folder, tmp_path / "whole")
    )
    assert found["train_accuracy"] * 33 == pytest.approx(round(found["train_accuracy"] * 33), abs=1e-9)
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.5)


def stopped_within(folder: Path) -> int:
    learn = trainer.Trainer._learn

    def then_ask(self, batch):
        learn(self, batch)
        if self.at.step == 1:
            self.stop.received = signal.SIGTERM

    trainer.Trainer._learn = then_ask
    with contextlib.suppress(Preempted):
        whole(folder)
    return 0


def test_batch_norm_of_the_global_batch_is_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(distributed, "with_shared_batch_norm", lambda task, device: asked.append(device) or task)
    config = replace(CONFIG, engine=replace(CONFIG.engine, sync_batch_norm=True), stages=1)
    train(tmp_path, config)
    assert asked == [torch.device("cpu")]
