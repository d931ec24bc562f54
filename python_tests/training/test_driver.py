"""The command line that all drivers share, and the same drivers from an installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fgvc_ext.cli import main
from fgvc_ext.training import EXIT_PREEMPTED, Preempted, RunConfig
from fgvc_ext.training.driver import choose_folder
from fgvc_ext.training.run_folder import RunFolder
from fgvc_ext.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--data.classes", "4", "--data.train-per-class", "6", "--data.test-per-class", "3", "--data.image-size", "48"),
    *("--data.resize", "48", "--data.crop", "40", "--optim.epochs", "1", "--optim.batch-size", "8"),
    *("--optim.warmup-epochs", "0", "--method.compare-plain", "False", "--five-crop", "False", "--report", "False"),
]


def _left(folder: Path, config: RunConfig, status: str) -> None:
    """A run folder as a run leaves it."""
    folder.mkdir()
    run = {"status": status, "identity": RunFolder(folder, config, facts={}).identity, "stages": []}
    (folder / "run.json").write_text(json.dumps(run))


def _chosen(out: Path, **changes) -> str:
    config = RunConfig(out=out, **changes)
    return choose_folder(config, lambda folder: RunFolder(folder, config, facts={})).name


def test_a_default_folder_goes_on_or_gets_the_next_number(tmp_path):
    out = tmp_path / "demo"
    assert _chosen(out) == "demo"
    _left(out, RunConfig(), "finished")
    assert _chosen(out) == "demo-2"
    _left(tmp_path / "demo-2", RunConfig(seed=1), "preempted")
    assert _chosen(out) == "demo-3", "unfinished, but of another seed"
    assert _chosen(out, seed=1) == "demo-2"
    assert _chosen(out, seed=1, engine=RunConfig().engine, report=False) == "demo-2", "the report changes nothing"
    assert _chosen(out, seed=1, resume="never") == "demo-3"
    assert _chosen(out, resume="must") == "demo-2"
    assert _chosen(out, force_stage=("a",)) == "demo-2"
    assert _chosen(out, resume=str(out / "checkpoints/a-e00000-s000000001.pt")) == "demo"
    (tmp_path / "demo-3").mkdir()
    (tmp_path / "demo-3/run.json").write_text("{")
    assert _chosen(out) == "demo-4", "what is damaged is left alone"


def test_the_command_lists_the_drivers(capsys):
    assert main(["train", "--help"]) == 0
    assert "subtle_differences" in capsys.readouterr().out
    assert main(["train"]) == main(["train", "birds"]) == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "expected one of" in problem
    assert problem.endswith("subtle_differences, got birds")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "subtle_differences", "--help"])
    assert stopped.value.code == 0
    assert "cub" in capsys.readouterr().out


def test_the_command_goes_on_by_the_command(tmp_path, capsys, monkeypatch):
    def stop(trainer):
        raise Preempted("stopped by a test")

    monkeypatch.setattr(Trainer, "_stop_if_asked", stop)
    assert main(["train", "subtle_differences", "demo", *SMALL, "--out", str(tmp_path / "a")]) == EXIT_PREEMPTED
    words = " ".join(["fgvc-ext train subtle_differences demo", *SMALL, "--out", str(tmp_path / "a")])
    assert f"To go on: {words} --resume auto\n" in capsys.readouterr().out


def test_the_command_and_the_file_train_the_same(tmp_path, capsys):
    assert main(["train", "subtle_differences", "demo", *SMALL, "--out", str(tmp_path / "a")]) == 0
    command = [sys.executable, str(ROOT / "train/subtle_differences.py"), "demo", *SMALL, "--out", str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    first, second = ((tmp_path / run / "weights/last.safetensors").read_bytes() for run in "ab")
    assert first == second


@pytest.mark.slow
def test_a_wheel_can_train(tmp_path):
    """Built without the libraries, unpacked elsewhere, far from the source tree."""
    source = tmp_path / "source"
    names = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "fgvc_ext", "train")
    source.mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=source, env={**os.environ, "FGVC_EXT_BUILD": "0"}, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "fgvc_ext.cli", "train", "subtle_differences", "demo", *SMALL, "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "FGVC_EXT_BACKEND": "reference"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run/weights/last.safetensors").exists()
