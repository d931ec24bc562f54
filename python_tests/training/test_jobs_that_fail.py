"""What happens to one process of a job, or to its launcher, and how the job goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import job
import pytest
import test_pipeline_of_four_stages as pipeline
import torch
from toy_training import Child, ToyConfig, ToyImages, slow_jitter, toy_stages, traces, train

from fgvc_ext.data.loading import Samples
from fgvc_ext.training import (
    CheckpointCorrupt,
    EngineConfig,
    OptimConfig,
    Preempted,
    distributed,
    trainer,
)
from fgvc_ext.training.distributed import current_process

HERE = Path(__file__).parent
CONFIG = ToyConfig(
    optim=OptimConfig(epochs=3, batch_size=8, lr=0.05, schedule="cosine", ema_decay=0.9),
    engine=EngineConfig(device="cpu", workers=0, checkpoint_every=2),
)


def whole(folder: Path) -> int:
    train(folder, CONFIG, slow_jitter)
    return 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    job.run(folder / "output", 2, whole, folder)
    return traces(folder)


# ---------------------------------------------------------------- killed at any moment


def _pipeline(folder: Path, count: int, output: Path) -> list[Child]:
    if count == 1:
        return [Child(output, pipeline.train, folder)]
    return job.start(output, count, pipeline.train, folder)


def _kill(folder: Path, count: int, output: Path, moment: float | str, victim: int) -> bool:
    """Kill one process when a file is there, or so many seconds after training began; whether it still lived."""
    children = _pipeline(folder, count, output)
    waited_for = moment if isinstance(moment, str) else BEGUN
    while not list(folder.glob(waited_for)) and all(child.process.is_alive() for child in children):
        time.sleep(0.001)
    if isinstance(moment, float):
        time.sleep(moment)
    children[victim].process.kill()
    codes = [child.ended()[0] for child in children]
    if codes[victim] == -signal.SIGKILL and count > 1 and any(code == 0 for code in codes):
        assert (folder / "weights/last.safetensors").exists(), "a process has ended well without the other"
    return codes[victim] == -signal.SIGKILL


BEGUN = "checkpoints/classifier-e00001-*.json"


def _end(folder: Path, count: int, output: Path) -> float:
    """Run to the end; seconds since training began."""
    children = _pipeline(folder, count, output)
    while not list(folder.glob(BEGUN)) and children[0].process.is_alive():
        time.sleep(0.001)
    begun = time.monotonic()
    for child in children:
        code, text = child.ended()
        assert code == 0, text
    return time.monotonic() - begun


def _assert_same_bytes(folder: Path, whole: Path) -> None:
    assert traces(folder) == traces(whole)
    boxes = "artefacts/boxes.safetensors"
    assert (folder / boxes).read_bytes() == (whole / boxes).read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_named_moments_it_ends_with_the_same_bytes(count, tmp_path):
    """One run, killed at each of them in turn."""
    _end(tmp_path / "whole", count, tmp_path / "output")
    for number, moment in enumerate(pipeline.MOMENTS):
        assert _kill(tmp_path / "run", count, tmp_path / f"output{number}", moment, number % count), moment
    _end(tmp_path / "run", count, tmp_path / "last")
    _assert_same_bytes(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(count, tmp_path):
    """A run for each of fifteen moments between the first checkpoint and the end."""
    whole, chance, hits = tmp_path / "whole", random.Random(0), 0
    seconds = min(_end(whole, count, tmp_path / "output"), _end(tmp_path / "again", count, tmp_path / "output"))
    for number in range(15):
        folder, output = tmp_path / f"run{number}", tmp_path / f"output{number}"
        hits += _kill(folder, count, output, chance.uniform(0, 0.9 * seconds), chance.randrange(count))
        _end(folder, count, output)
        _assert_same_bytes(folder, whole)
    assert hits >= 10, f"only {hits} of the kills met a process that still ran"


# ---------------------------------------------------------------- under a launcher


def main(folder: str, *what: str) -> int:
    """What torchrun starts: the training; "die": the second process is killed in the first attempt's ninth step."""
    torch.set_num_threads(1)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if "die" in what and current_process().rank == 1 and attempt == "0":
        learn = trainer.Trainer._learn

        def die(self, batch):
            if self.at.step == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            learn(self, batch)

        trainer.Trainer._learn = die
    with distributed.joined():
        try:
            train(Path(folder), CONFIG, slow_jitter if "slow" not in what else _very_slow)
        except Preempted as stop:
            print(stop, flush=True)
    return 0


def _very_slow(image):
    time.sleep(0.02)
    return slow_jitter(image)


def _torchrun(folder: Path, *options: str, file: Path = Path(__file__), what: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(file), *([str(folder)] if file == Path(__file__) else []), *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen, seconds: float = 180) -> tuple[int, str]:
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, text


def test_a_killed_process_is_started_again(uninterrupted, tmp_path):
    code, text = _ended(_torchrun(tmp_path / "run", "--max-restarts=2", what=("die",)))
    assert code == 0, text
    assert traces(tmp_path / "run") == uninterrupted


def test_sigterm_to_the_launcher_saves_and_the_same_command_goes_on(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = _torchrun(folder, what=("slow",))
    while not list((folder / "checkpoints").glob("first-e00001-*.json")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.terminate()
    _, text = _ended(process)
    assert "SIGTERM received; saved at epoch 1" in text, text
    assert '"status": "preempted"' in (folder / "run.json").read_text()
    code, text = _ended(_torchrun(folder))
    assert code == 0, text
    assert traces(folder) == uninterrupted


def test_a_driver_trains_in_several_processes_and_speaks_with_one_voice(tmp_path):
    small = {"--data.classes": 4, "--data.train-per-class": 6, "--data.test-per-class": 3, "--data.image-size": 48,
             "--data.resize": 48, "--data.crop": 40, "--optim.epochs": 1, "--optim.batch-size": 8,
             "--optim.warmup-epochs": 0, "--engine.workers": 0}  # fmt: skip
    words = [str(word) for pair in small.items() for word in pair]
    driver = HERE.parents[1] / "train/subtle_differences.py"
    code, text = _ended(_torchrun(tmp_path / "run", file=driver, what=("demo", "--out", str(tmp_path / "run"), *words)))
    assert code == 0, text
    assert text.count("report.html") == text.count("ours: last") == text.count("ours 1/1") == 1, text
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (run["status"], run["sessions"][0]["processes"]) == ("finished", 2)
    assert (tmp_path / "run/report.html").is_file()


# ---------------------------------------------------------------- faults of one process


def broken(folder: Path) -> int:
    """One image cannot be read, and one process has it."""
    (stage,) = toy_stages(ToyConfig(stages=1))
    samples = Samples(ToyImages(33, broken=(5,)), slow_jitter)
    stage.train = lambda earlier: samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy_training.toy_stages", lambda *_: [stage])
        train(folder, CONFIG)
    return 0


def test_a_broken_image_of_one_process_ends_all(tmp_path):
    ended = [child.ended() for child in job.start(tmp_path / "output", 2, broken, tmp_path / "run")]
    assert all(code == 1 for code, _ in ended)
    assert sum("cannot decode image train/5" in text for _, text in ended) == 1


def without_the_checkpoint(folder: Path) -> int:
    """The second process does not find the file that the main one goes on from."""

    def load(file):
        raise CheckpointCorrupt(f"checkpoint {file}: not there")

    if current_process().rank == 1:
        trainer.load_checkpoint = load
    return whole(folder)


def stopped_early(folder: Path) -> int:
    """Ends after the first epoch, as if it had been killed then."""
    save = trainer.Trainer._save

    def then_end(self):
        save(self)
        if self.at.epoch == 1:
            raise KeyboardInterrupt

    trainer.Trainer._save = then_end
    try:
        return whole(folder)
    except KeyboardInterrupt:
        return 0


def test_processes_that_do_not_see_the_same_checkpoint_stop(tmp_path):
    job.run(tmp_path / "first", 2, stopped_early, tmp_path / "run")
    ended = [child.ended() for child in job.start(tmp_path / "output", 2, without_the_checkpoint, tmp_path / "run")]
    assert all(code == 1 for code, _ in ended)
    assert "OtherProcessFailed: process 1: CheckpointCorrupt" in ended[0][1]
    assert "CheckpointCorrupt: checkpoint" in ended[1][1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tmp_path):
    folder = tmp_path / "run"
    job.run(tmp_path / "first", before, stopped_early, folder)
    children = job.start(tmp_path / "output", after, whole, folder)
    texts = [child.ended()[1] for child in children]
    assert [child.process.exitcode for child in children] == [0] * after
    assert f"was trained by {before} processes and goes on with {after}" in "".join(texts)
    rows = [row.split(",")[:3] for row in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert rows == [[stage, str(epoch), str(4 * epoch)] for stage in ("first", "second") for epoch in (1, 2, 3)]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main(*sys.argv[1:]))
