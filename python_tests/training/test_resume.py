"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_training
from toy_training import Child, ToyConfig, ToyImages, open_run, toy_stages, traces, train

from fgvc_ext.training import CheckpointCorrupt, Classification, ConfigMismatch, Preempted, run_stages
from fgvc_ext.training.stop_request import StopRequest

STEPS_PER_EPOCH = 4  # 33 images in batches of 8: the 33rd joins the last batch


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, ToyConfig())
    return traces(folder)


class _StopAt(StopRequest):
    """Asks to stop after so many questions: one a training step, one an evaluation batch, one an epoch."""

    questions = 0

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    @property
    def received(self):
        type(self).questions += 1
        return signal.SIGTERM if type(self).questions >= self.at else None

    @received.setter
    def received(self, value) -> None:
        pass


def _interrupt(folder: Path, config: ToyConfig, at: int) -> None:
    _StopAt.questions = 0
    with pytest.raises(Preempted), open_run(folder, config) as run:
        run_stages(toy_stages(config), run, config.engine, stop=_StopAt(at))
    assert run.data["status"] == "preempted"


# steps 1–4 of an epoch, the evaluation's batch, the epoch's end; the last ones of a stage; the first of the second
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 18, 19])
def test_stopped_anywhere_and_continued(at, uninterrupted, tmp_path):
    _interrupt(tmp_path, ToyConfig(), at)
    train(tmp_path, ToyConfig())
    assert traces(tmp_path) == uninterrupted


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 2)])
def test_workers_change_nothing(before, after, uninterrupted, tmp_path):
    config = ToyConfig()
    _interrupt(tmp_path, replace(config, engine=replace(config.engine, workers=before)), 7)
    train(tmp_path, replace(config, engine=replace(config.engine, workers=after)))
    assert traces(tmp_path) == uninterrupted


class _Dice(Classification):
    """Its loss depends on all generators of random numbers, and so does what it is built with."""

    def __init__(self, model, loss) -> None:
        super().__init__(model, loss)
        self.register_buffer("drawn", torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))]))

    def step(self, batch):
        answer = super().step(batch)
        factor = 1 + random.random() + np.random.rand() + np.random.randn() + random.gauss(0, 1)
        return {**answer, "loss": answer["loss"] * factor}


def test_the_generators_of_python_and_numpy_go_on_too(monkeypatch, tmp_path):
    monkeypatch.setattr(toy_training, "Classification", _Dice)
    train(tmp_path / "whole", ToyConfig())
    for at in (3, 11):
        _interrupt(tmp_path / f"run-{at}", ToyConfig(), at)
        random.seed(at)
        np.random.seed(at)
        train(tmp_path / f"run-{at}", ToyConfig())
        assert traces(tmp_path / f"run-{at}") == traces(tmp_path / "whole")


def test_another_seed_gives_another_run(uninterrupted, tmp_path):
    train(tmp_path, ToyConfig(seed=8))
    assert traces(tmp_path)["last.safetensors"] != uninterrupted["last.safetensors"]


def test_a_finished_run_is_left_alone(tmp_path):
    train(tmp_path, ToyConfig(stages=1))
    before = traces(tmp_path)
    results = train(tmp_path, ToyConfig(stages=1))
    assert traces(tmp_path) == before
    assert results["first"].sha256 == before["first.safetensors"]


def test_a_stage_whose_output_was_changed_is_not_done(tmp_path):
    train(tmp_path, ToyConfig(stages=1))
    before = traces(tmp_path)
    (tmp_path / "weights/first.safetensors").write_bytes(b"other")
    train(tmp_path, ToyConfig(stages=1))
    assert traces(tmp_path) == before


def _damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "one bit":
        data[len(data) // 2] ^= 1
    file.write_bytes({"one bit": data, "one byte less": data[:-1], "half": data[: len(data) // 2], "empty": b""}[how])


@pytest.mark.parametrize("how", ["one bit", "one byte less", "half", "empty"])
def test_a_damaged_checkpoint_is_passed_over(how, uninterrupted, tmp_path):
    _interrupt(tmp_path, ToyConfig(), 9)
    newest = max((tmp_path / "checkpoints").glob("*.pt"))
    _damage(newest, how)
    with pytest.warns(UserWarning, match=f"{newest.name}.*going back"):
        train(tmp_path, ToyConfig())
    assert traces(tmp_path) == uninterrupted


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    _interrupt(tmp_path, ToyConfig(), 9)
    for file in (tmp_path / "checkpoints").glob("*.pt"):
        _damage(file, "half")
    with (
        pytest.warns(UserWarning, match="going back"),
        pytest.raises(CheckpointCorrupt, match=r"no checkpoint of .* is whole"),
    ):
        train(tmp_path, ToyConfig())


def test_resume_from_a_given_checkpoint(uninterrupted, tmp_path):
    train(tmp_path, ToyConfig())
    older = min((tmp_path / "checkpoints").glob("first*.pt"))
    train(tmp_path, ToyConfig(resume=str(older)))
    assert traces(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("resume", "error"), [("must", "nothing to resume"), ("no/such/file.pt", "expected auto, must")]
)
def test_resume_without_a_run(resume, error, tmp_path):
    with pytest.raises(FileNotFoundError, match=error):
        train(tmp_path, ToyConfig(resume=resume))


def test_never_resume_refuses_a_folder_with_a_run(tmp_path):
    train(tmp_path, ToyConfig(stages=1, resume="never"))
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tmp_path, ToyConfig(stages=1, resume="never"))


def test_another_configuration_is_refused_by_name(tmp_path):
    _interrupt(tmp_path, ToyConfig(), 5)
    config = ToyConfig()
    config.optim.lr = 0.02
    with pytest.raises(ConfigMismatch, match=r"optim\.lr: 0\.05 in the run, 0\.02 now"):
        train(tmp_path, config)
    assert open_run(tmp_path, ToyConfig()).file.read_text().count('"preempted"') == 1


def test_a_checkpoint_of_another_configuration_is_not_taken(tmp_path):
    """One that somebody has copied into the folder of a run."""
    _interrupt(tmp_path / "other", ToyConfig(seed=8), 5)
    _interrupt(tmp_path / "run", ToyConfig(), 3)
    for file in (tmp_path / "other/checkpoints").iterdir():
        shutil.copy(file, tmp_path / "run/checkpoints")
    with pytest.raises(ConfigMismatch, match="was written under another configuration: remove it to start anew"):
        train(tmp_path / "run", ToyConfig())


def test_another_class_list_is_refused_by_name(tmp_path):
    _interrupt(tmp_path, ToyConfig(), 5)
    with pytest.raises(ConfigMismatch, match="data set: classes"):
        train(tmp_path, ToyConfig(classes=4))


def test_another_input_of_a_finished_stage_is_refused(tmp_path):
    config = ToyConfig(stages=1)
    train(tmp_path, config)
    before = (tmp_path / "run.json").read_bytes()
    (stage,) = toy_stages(config)
    stage.inputs = {"weights": "abc"}
    with (
        pytest.raises(ConfigMismatch, match=r'stage first .*\n.*weights: absent in the run, "abc" now'),
        open_run(tmp_path, config) as run,
    ):
        run_stages([stage], run, config.engine)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_checkpoint_of_another_folder_is_refused(tmp_path):
    train(tmp_path / "a", ToyConfig(stages=1))
    other = max((tmp_path / "a/checkpoints").glob("*.pt"))
    with pytest.raises(ValueError, match=r"expected a checkpoint in .*b/checkpoints, got .*a/checkpoints"):
        train(tmp_path / "b", ToyConfig(stages=1, resume=str(other)))


def test_every_session_is_recorded(tmp_path):
    _interrupt(tmp_path, ToyConfig(), 5)
    train(tmp_path, ToyConfig())
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert {"fgvc_ext", "torch", "numpy", "pillow"} <= set(sessions[0]["versions"])
    assert all(entry["command"] and entry["started"] and entry["machine"]["host"] for entry in sessions)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_run_file_is_named(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        train(tmp_path, ToyConfig())


def test_another_input_of_a_half_trained_stage_is_refused_by_name(tmp_path):
    config = ToyConfig(stages=1)
    _interrupt(tmp_path, config, 5)
    (stage,) = toy_stages(config)
    stage.inputs = {"weights": "abc"}
    with (
        pytest.raises(ConfigMismatch, match='weights: absent in the run, "abc" now'),
        open_run(tmp_path, config) as run,
    ):
        run_stages([stage], run, config.engine)


# ------------------------------------------------------------------ real signals to real processes


def _start(folder: Path, *arguments: str) -> Child:
    return Child(folder / "output.txt", toy_training.main, [str(folder), *arguments])


def _wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_exits_with_75(workers, uninterrupted, tmp_path):
    process = _start(tmp_path, f"engine.workers={workers}", "engine.checkpoint_every=1000")
    _wait_for(lambda: (tmp_path / "metrics.csv").exists())
    process.process.terminate()
    code, output = process.ended()
    assert code == 75, output
    assert "SIGTERM received; saved at epoch" in output
    train(tmp_path, ToyConfig())
    assert traces(tmp_path) == uninterrupted


def _kill_when(folder: Path, file: str, dice: random.Random) -> None:
    """Start the run and kill it soon after a file of it has appeared, which must be before it ends."""
    process = _start(folder, "engine.checkpoint_every=1")
    _wait_for(lambda: list(folder.glob(file)) or not process.process.is_alive())
    assert list(folder.glob(file)), process.ended()
    time.sleep(dice.uniform(0, 0.01))
    process.process.kill()
    assert process.ended()[0] == -signal.SIGKILL


def _kill_often(folder: Path, files: list[str], seed: int) -> None:
    dice = random.Random(seed)
    for file in files:
        _kill_when(folder, file, dice)
    assert (folder / "run.lock").exists(), "a dead process' lock does not block the next"
    code, output = _start(folder, "engine.checkpoint_every=1").ended()
    assert code == 0, output


# in the middle of the first stage, at its end, in the middle of the second
MOMENTS = [
    "checkpoints/first-e00000-s000000002.json",
    "weights/first.safetensors",
    "checkpoints/second-e00001-s000000006.json",
]


def test_killed_in_every_part_of_a_run(uninterrupted, tmp_path):
    _kill_often(tmp_path, MOMENTS, 0)
    assert traces(tmp_path) == uninterrupted


@pytest.mark.slow
def test_killed_at_every_step(uninterrupted, tmp_path):
    for seed in range(3):
        steps = [(stage, step) for stage in ("first", "second") for step in range(1 + seed, 11, 3)]
        names = [f"checkpoints/{stage}-e*-s{step:09d}.json" for stage, step in steps]
        _kill_often(tmp_path / str(seed), names, seed)
        assert traces(tmp_path / str(seed)) == uninterrupted


def test_a_live_run_keeps_its_folder(tmp_path):
    with open_run(tmp_path, ToyConfig()):
        code, output = _start(tmp_path).ended()
    assert code == 1
    assert f"is in use by process {os.getpid()}" in output


def test_toy_images_are_stable():
    assert torch.equal(ToyImages(3).load(1), ToyImages(3).load(1))
