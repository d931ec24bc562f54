"""train/subtle_differences.py from its command line to its report, in miniature."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fgvc_ext.atomic_files import file_sha256
from fgvc_ext.data.pipeline import load_datasets
from fgvc_ext.models import SubtleDifferences, load
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training.driver import command_to_go_on

pytestmark = pytest.mark.xdist_group("subtle differences driver")  # one worker, which makes what they share once

DRIVER = Path(__file__).parents[2] / "train/subtle_differences.py"
SMALL = [
    "--data.classes",
    "4",
    "--data.train-per-class",
    "6",
    "--data.test-per-class",
    "3",
    "--data.image-size",
    "48",
    "--data.resize",
    "48",
    "--data.crop",
    "40",
    "--optim.epochs",
    "1",
    "--optim.batch-size",
    "8",
    "--optim.warmup-epochs",
    "0",
]


@pytest.fixture(scope="module")
def driver():
    specification = importlib.util.spec_from_file_location("subtle_differences_driver", DRIVER)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(driver, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert driver.DRIVER.main(["demo", "--out", str(folder), *SMALL]) == 0
    return folder


def test_the_demo_writes_everything(finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["status"] == "finished"
    assert [(stage["name"], stage["status"]) for stage in run["stages"]] == [("plain", "done"), ("ours", "done")]
    assert {"last", "five_crop", "best_test"} <= set(run["stages"][1]["accuracy"])
    for name in (
        "config.json",
        "metrics.csv",
        "metrics.jsonl",
        "curves.png",
        "report.html",
        "figures/activation_maps.png",
    ):
        assert (finished / name).stat().st_size > 0, name
    page = (finished / "report.html").read_text()
    assert "plain" in page
    assert "ours" in page
    assert "Where the models look" in page


def test_the_weights_carry_what_prediction_needs(finished):
    state, metadata = load_weights_file(finished / "weights/last.safetensors")
    assert metadata["method"] == "subtle_differences"
    assert len(metadata["classes"]) == 4
    assert metadata["preprocessing"]["crop"] == 40
    model = load(finished / "weights/last.safetensors")
    assert isinstance(model, SubtleDifferences)
    assert torch.equal(model.state_dict()["classifier.weight"], state["classifier.weight"])
    assert (model.classes, model.preprocessing.crop) == (metadata["classes"], 40)
    assert len(model.predict([torch.zeros(3, 60, 50, dtype=torch.uint8)], top=2)[0].names) == 2


def test_a_configuration_file_repeats_the_run(driver, finished, tmp_path):
    out = tmp_path / "again"
    arguments = ["--config", str(finished / "config.json"), "--out", str(out), "--report", "False"]
    assert driver.DRIVER.main(arguments) == 0
    name = "weights/last.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_run_only_reports_again(driver, finished, capsys):
    before = (finished / "metrics.csv").read_bytes()
    assert driver.DRIVER.main(["demo", "--out", str(finished), *SMALL, "--report", "False"]) == 0
    assert (finished / "metrics.csv").read_bytes() == before
    assert "ours: last" in capsys.readouterr().out


def test_another_configuration_in_the_same_folder_is_refused(driver, finished, capsys):
    assert driver.DRIVER.main(["demo", "--out", str(finished), *SMALL, "--method.alpha", "0.2"]) == 1
    assert "method.alpha: 0.1 in the run, 0.2 now" in capsys.readouterr().err


def test_dry_run_shows_shapes_and_writes_nothing(driver, tmp_path, capsys):
    assert driver.DRIVER.main(["demo", "--out", str(tmp_path / "x"), *SMALL, "--dry-run", "True"]) == 0
    assert "images [3, 40, 40] -> maps [1, 4, 3, 3]" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_an_unknown_preset_is_an_error(driver, capsys):
    with pytest.raises(SystemExit) as caught:
        driver.DRIVER.main(["birds"])
    assert caught.value.code == 2
    assert "birds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cub"], "needs the folder that holds it: --data.root"),
        (["folder", "--data.root", "/no/such/folder"], "/no/such/folder is not a folder"),
        (
            ["demo", *SMALL, "--model.backbone", "resnet17", "--model.weights", "none"],
            "expected one of resnet10_narrow",
        ),
        (["demo", *SMALL, "--optim.new-layers", "layer9"], "optim.new_layers: expected some of stem"),
        (["demo", *SMALL, "--method.k", "0"], "--method.k: expected at least 1, got 0"),
        (["demo", *SMALL, "--optim.epochs", "0"], "--optim.epochs: expected at least 1, got 0"),
        (["demo", *SMALL, "--engine.eval-every", "0"], "--engine.eval-every: expected at least 1, got 0"),
        (["demo", *SMALL, "--optim.lr", "nan"], "--optim.lr: expected at least 0, got nan"),
        (["demo", *SMALL, "--resume", "must"], "nothing to resume"),
    ],
)
def test_errors_are_one_clear_line(driver, arguments, message, tmp_path, capsys):
    assert driver.DRIVER.main([*arguments, "--out", str(tmp_path / "x")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line


def test_the_ablations_differ(driver):
    def loss_and_block(*arguments: str) -> tuple[str, bool]:
        config = driver.DRIVER.read_arguments(["demo", *SMALL, *arguments])
        task = driver.stages(config, load_datasets(config.data, config.seed))[-1].build({})
        task.start_epoch(0)
        return type(task.loss).__name__, task.model.diversification is not None

    assert loss_and_block() == ("GradientBoostingCrossEntropyLoss", True)
    assert loss_and_block("--method.gce", "False") == ("CrossEntropyLoss", True)
    assert loss_and_block("--method.diversification", "False") == ("GradientBoostingCrossEntropyLoss", False)
    assert loss_and_block("--method.gce-from-epoch", "1") == ("CrossEntropyLoss", True)


def test_what_the_method_is_set_to_reaches_block_and_loss(driver):
    given = ["--method.p-peak", "0.25", "--method.p-patch", "0.75", "--method.patch-size", "5", "--method.alpha", "0.3"]
    config = driver.DRIVER.read_arguments(["demo", *SMALL, *given, "--method.k", "2", "--method.gce-from-epoch", "3"])
    task = driver.stages(config, load_datasets(config.data, config.seed))[-1].build({})
    block = task.model.diversification
    assert (block.p_peak, block.p_patch, block.patch_size, block.alpha) == (0.25, 0.75, 5, 0.3)
    task.start_epoch(2)
    assert type(task.loss).__name__ == "CrossEntropyLoss"
    task.start_epoch(3)
    assert (type(task.loss).__name__, task.loss.k) == ("GradientBoostingCrossEntropyLoss", 2)


def test_the_run_ships_ours_and_not_the_plain_network(finished):
    read = {name: (finished / f"weights/{name}.safetensors").read_bytes() for name in ("plain", "ours", "last")}
    assert read["last"] == read["ours"] != read["plain"]
    assert load(finished / "weights/plain.safetensors").diversification is None


def test_five_crops_are_evaluated_where_they_are_wanted(driver, finished):
    def final(*arguments: str) -> list[str]:
        config = driver.DRIVER.read_arguments(["demo", *SMALL, *arguments])
        return list(driver.stages(config, load_datasets(config.data, config.seed))[-1].final({}))

    assert (final(), final("--five-crop", "False")) == (["five_crop"], [])


def test_another_method_makes_only_its_own_stage_stale(driver, finished, capsys):
    before = (finished / "run.json").read_bytes()
    assert driver.DRIVER.main(["demo", "--out", str(finished), *SMALL, "--method.p-peak", "0.1"]) == 1
    assert "stage ours of the run" in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["cub", "cars", "aircraft", "dogs", "gtos"])
def test_the_papers_recipe_is_the_preset_of_each_benchmark(driver, name):
    config = driver.DRIVER.read_arguments([name, "--data.root", "x"])
    assert (config.data.name, config.five_crop) == (name, name != "gtos")
    optim = config.optim
    assert (config.model.backbone, config.model.weights) == ("resnet50", "imagenet")
    assert (config.data.resize, config.data.crop) == (600, 448)
    assert (optim.lr, optim.step_epochs, optim.step_factor, optim.momentum) == (0.001, 50, 0.1, 0.9)
    assert (optim.weight_decay, optim.batch_size, optim.epochs, optim.schedule) == (1e-4, 32, 150, "step")
    assert (config.method.alpha, config.method.k) == (0.1, 15)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "missing.json does not exist"), ("{", "missing.json is not JSON"), ('{"k": 1}', "unknown field 'k'")],
)
def test_a_bad_configuration_file_is_one_clear_line(driver, content, message, tmp_path, capsys):
    file = tmp_path / "missing.json"
    if content is not None:
        file.write_text(content)
    assert driver.DRIVER.main(["--config", str(file)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_help_tells_of_configuration_files(driver, capsys):
    with pytest.raises(SystemExit):
        driver.DRIVER.main(["--help"])
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [[], ["--resume", "a b.pt"], ["--resume=a b.pt"], ["--resume", "never"], ["--force-stage", "plain", "ours"]],
)
def test_the_command_to_go_on_can_be_pasted(given):
    command = shlex.split(command_to_go_on(["python", "my driver.py"], ["demo", *given, "--out", "my run"]))
    assert command == ["python", "my driver.py", "demo", "--out", "my run", "--resume", "auto"]


def test_other_weights_are_refused_after_the_run_is_done(driver, finished, tmp_path, capsys):
    """Its accuracies are not those of a run that begins with others."""
    before = (finished / "run.json").read_bytes()
    other = finished / "weights/plain.safetensors"
    assert driver.DRIVER.main(["demo", "--out", str(finished), *SMALL, "--model.weights", str(other)]) == 1
    assert "weights: " in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == before


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _folder_with_a_broken_image(root: Path, split: str) -> Path:
    for part in ("train", "test"):
        for name in "ab":
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (48, 48), (40 * number, 0, 200 if name == "a" else 0)).save(folder / f"{number}.jpg")
    broken = root / split / "b/3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    return broken


def test_a_broken_test_image_is_left_out_counted_and_named_where_that_is_asked_for(driver, tmp_path, capsys):
    broken = _folder_with_a_broken_image(tmp_path / "data", "test")
    words = ["folder", "--data.root", str(tmp_path / "data"), *SMALL[8:], "--model.backbone", "resnet10_narrow"]
    words += ["--model.weights", "none", "--out", str(tmp_path / "run"), "--engine.broken-images", "skip"]
    assert driver.DRIVER.main(words) == 0
    out = capsys.readouterr().out
    assert "WARNING: folder test: 1 of 12 images cannot be read and are left out" in out
    assert str(broken) in out
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (data["test_images"], data["test_images_left_out"]) == (11, 1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_image_ends_a_run_with_workers(split, tmp_path):
    """In a real process: the loading processes neither keep it from ending nor print tracebacks of their own."""
    broken = _folder_with_a_broken_image(tmp_path / "data", split)
    command = [sys.executable, str(DRIVER), "folder", "--data.root", str(tmp_path / "data"), *SMALL[8:]]
    command += ["--model.backbone", "resnet10_narrow", "--model.weights", "none", "--engine.workers", "2"]
    command += ["--out", str(tmp_path / "run")]
    ended = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith(f"error: cannot decode image {broken}")


def _kill_when(file: str, command: list[str], folder: Path) -> None:
    """Start the run and kill it as soon as a file of it is there, which must be before it ends."""
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL)
    while not list(folder.glob(file)):
        assert process.poll() is None, f"the run ended before {file} was there"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list(folder.glob(file))


@pytest.mark.slow
def test_a_killed_demo_ends_with_the_same_weights(tmp_path):
    def run(folder: Path) -> list[str]:
        options = [*SMALL, "--report", "False", "--engine.checkpoint-every", "1"]
        return [sys.executable, str(DRIVER), "demo", "--out", str(folder), *options]

    # Not interrupted, and like the others in a process of its own: threads and instruction set are the same.
    whole, folder = tmp_path / "whole", tmp_path / "run"
    subprocess.run(run(whole), env=_environment(), stdout=subprocess.DEVNULL, timeout=300, check=True)
    command = run(folder)
    # in the middle of the first stage, at its end, in the middle of the second
    for file in ("checkpoints/plain-e00000-*1.json", "weights/plain.safetensors", "checkpoints/ours-e00000-*1.json"):
        _kill_when(file, command, folder)
    assert not (folder / "weights/ours.safetensors").exists()
    subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL, timeout=300, check=True)
    for name in ("plain", "ours", "last"):
        file = f"weights/{name}.safetensors"
        assert file_sha256(folder / file) == file_sha256(whole / file), f"{file} has other bits"
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 4
