"""The processes that load images: how many, how long they stay."""

from __future__ import annotations

import multiprocessing
import os

from toy_training import toy_config, traces, train

from fgvc_ext.training import EngineConfig, distributed, trainer
from fgvc_ext.training.device import worker_count
from fgvc_ext.training.distributed import Process
from fgvc_ext.training.sampling import evaluation_loader


def test_processes_that_load_stay_for_the_next_evaluation_and_end_with_the_training(tmp_path, monkeypatch):
    made = []

    def loader(samples, *rest, **options):
        made.append(evaluation_loader(samples, *rest, **options))  # held, so that only closing ends its processes
        return made[-1]

    monkeypatch.setattr(trainer, "evaluation_loader", loader)
    train(tmp_path / "2", toy_config(workers=2))
    assert len(made) == 1, "three evaluations"
    assert not multiprocessing.active_children()
    train(tmp_path / "0", toy_config(workers=0))
    assert traces(tmp_path / "2") == traces(tmp_path / "0")


def test_as_many_processes_load_as_a_training_process_has_cores(monkeypatch):
    for cores, local_size, expected in ((2, 1, 2), (1, 1, 1), (64, 1, 8), (64, 16, 4), (8, 3, 2), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))  # noqa: B023
        monkeypatch.setattr(distributed, "current_process", lambda: Process(local_size=local_size))  # noqa: B023
        assert worker_count(EngineConfig()) == expected
        assert worker_count(EngineConfig(workers=0)) == 0
        assert worker_count(EngineConfig(workers=13)) == 13
