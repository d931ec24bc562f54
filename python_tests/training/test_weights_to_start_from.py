"""`--model.weights` from the command line to run.json: what begins with weights, what goes on without their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fgvc_ext.atomic_files import file_sha256
from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.models import SubtleDifferences, build_backbone, save
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training.stop_request import Preempted
from fgvc_ext.training.trainer import Trainer

SMALL = [
    *("--data.classes", "4", "--data.train-per-class", "6", "--data.test-per-class", "3", "--data.image-size", "48"),
    *("--data.resize", "48", "--data.crop", "40", "--optim.epochs", "1", "--optim.batch-size", "8"),
    *("--optim.warmup-epochs", "0", "--method.compare-plain", "False", "--five-crop", "False", "--report", "False"),
    *("--engine.checkpoint-every", "1"),
]


@pytest.fixture(scope="module")
def driver():
    return load_driver(drivers_folder() / "subtle_differences.py").DRIVER


@pytest.fixture
def file(tmp_path) -> Path:
    """A model for two other classes."""
    torch.manual_seed(9)
    save(SubtleDifferences(build_backbone("resnet10_narrow"), 2), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def _run(driver, out: Path | None, *arguments: str) -> int:
    return driver.main(["demo", *SMALL, *([] if out is None else ["--out", str(out)]), *arguments])


def _stop_after_the_first_step(self) -> None:
    self._save()
    raise Preempted("stopped by a test")


def test_a_run_begins_with_the_file_and_names_it(driver, file, tmp_path, capsys):
    out = tmp_path / "run"
    # Nothing is learnt at this rate, and weights decay by too little to be seen.
    rate = ("--optim.lr", "1e-12", "--optim.schedule", "constant")
    assert _run(driver, out, *rate, "--model.weights", str(file)) == 0
    assert f"{file}: 72 tensors loaded" in capsys.readouterr().out
    run = json.loads((out / "run.json").read_text())
    assert run["weights"] == {"name": str(file), "sha256": file_sha256(file)}
    assert run["stages"][0]["identity"]["weights"] == file_sha256(file)
    state, given = load_weights_file(out / "weights/ours.safetensors")[0], load_weights_file(file)[0]
    for name in ("backbone.conv1.weight", "backbone.layer4.0.conv2.weight"):
        torch.testing.assert_close(state[name], given[name])


def test_a_stopped_run_goes_on_without_the_file_to_the_same_bits(driver, file, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    assert _run(driver, tmp_path / "whole", "--model.weights", str(copy)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_stop_if_asked", _stop_after_the_first_step)
        assert _run(driver, tmp_path / "run", "--model.weights", str(file)) == 75
    file.unlink()
    capsys.readouterr()
    assert _run(driver, tmp_path / "run", "--model.weights", str(file)) == 0
    assert "tensors loaded" not in capsys.readouterr().out
    whole, again = (tmp_path / name / "weights/last.safetensors" for name in ("whole", "run"))
    assert load_weights_file(whole)[1] == load_weights_file(again)[1], "the same identity"
    assert whole.read_bytes() == again.read_bytes()
    assert _run(driver, tmp_path / "run", "--model.weights", str(file)) == 0, "it is done"
    assert _run(driver, tmp_path / "new", "--model.weights", str(file)) == 1
    assert f"{file}: expected imagenet, birds, none or a file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_other_content_under_the_same_name_is_refused(driver, file, tmp_path, capsys):
    assert _run(driver, tmp_path / "run", "--model.weights", str(file)) == 0
    save(SubtleDifferences(build_backbone("resnet10_narrow"), 3), file)
    assert _run(driver, tmp_path / "run", "--model.weights", str(file)) == 1
    assert "\n  weights: " in capsys.readouterr().err


def test_a_default_folder_belongs_to_its_weights(driver, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_stop_if_asked", _stop_after_the_first_step)
    assert _run(driver, None) == 75
    assert _run(driver, None, "--model.weights", str(file)) == 75
    file.unlink()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert _run(driver, None, "--model.weights", str(file)) == 0, "its run remembers them"
    status = {path.parent.name: json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/*/run.json")}
    assert status == {"subtle_differences_demo": "preempted", "subtle_differences_demo-2": "finished"}


def test_what_the_presets_start_from(driver):
    found = {name: preset.model.weights for name, (_, preset) in driver.presets.items()}
    assert found.pop("demo") == "birds"
    assert set(found.values()) == {"imagenet"}


def test_a_dry_run_neither_downloads_nor_fails(driver, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads"))
    arguments = ("--model.backbone", "resnet18", "--model.weights", "imagenet", "--dry-run", "True")
    assert _run(driver, tmp_path / "run", *arguments) == 0
    assert "maps [1, 4, 2, 2]" in capsys.readouterr().out


@pytest.mark.parametrize(("weights", "words"), [("none.pth", "no such file"), ("imagenet", "resnet10_narrow has no")])
def test_weights_that_there_are_not_are_one_line(driver, weights, words, tmp_path, capsys):
    assert _run(driver, tmp_path / "run", "--model.weights", weights) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()
