"""train/subtle_differences.py above frozen layers, and what its block hides of maps of any size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.pipeline import load_datasets
from fgvc_ext.models import load
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.subtle_differences import suppression_for
from fgvc_ext.models.weights_file import load_weights_file

SMALL = [
    *("demo", "--data.classes", "4", "--data.train-per-class", "6", "--data.test-per-class", "3"),
    *("--data.image-size", "48", "--data.resize", "48", "--data.crop", "48", "--data.random-crop", "False"),
    *("--optim.epochs", "3", "--optim.batch-size", "8", "--optim.warmup-epochs", "0"),
    *("--method.compare-plain", "False", "--report", "False", "--engine.workers", "0"),
]


@pytest.fixture(scope="module")
def driver():
    return load_driver(drivers_folder() / "subtle_differences.py")


def run(driver, folder: Path, cache: Path, *more: str) -> dict:
    """The run's only stage, as run.json has it."""
    assert driver.DRIVER.main([*SMALL, "--out", str(folder), "--data.cache", str(cache), *more]) == 0
    (stage,) = json.loads((folder / "run.json").read_text())["stages"]
    return stage


def test_a_frozen_run_ships_a_whole_model_that_tuning_starts_from(driver, tmp_path, capsys):
    cache, out = tmp_path / "cache", tmp_path / "frozen"
    stage = run(driver, out, cache, "--model.frozen-until", "layer4", "--engine.eval-every", "1")
    assert "computing features of 24 images (train) once: resnet10_narrow up to layer4" in capsys.readouterr().out
    assert len(list(cache.glob("*.npy"))) == 2
    assert {"last", "five_crop", "best_test"} <= set(stage["accuracy"])
    file = out / "weights/last.safetensors"
    model = load(file)
    assert model.backbone.frozen_until == "layer4"
    config = driver.DRIVER.read_arguments(SMALL)
    images = load_datasets(config.data, 0).test
    right = sum(model.predict([images.load(i)])[0].names[0] == images.classes[images.labels[i]] for i in range(12))
    assert right / 12 == stage["accuracy"]["last"]
    run(driver, tmp_path / "tuned", cache, "--model.weights", str(file))
    assert "tensors loaded" in capsys.readouterr().out
    before, after = load_weights_file(file)[0], load_weights_file(tmp_path / "tuned/weights/last.safetensors")[0]
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    assert "frozen_until" not in load(tmp_path / "tuned/weights/last.safetensors").settings()["backbone"]


def test_a_run_that_is_done_or_goes_on_elsewhere_keeps_its_identity(driver, tmp_path):
    run(driver, tmp_path / "run", tmp_path / "cache", "--model.frozen-until", "layer3")
    run(
        driver, tmp_path / "run", tmp_path / "moved", "--model.frozen-until", "layer3"
    )  # where it is kept is no setting
    assert not (tmp_path / "moved").exists()  # nothing was left to do
    changed = [*SMALL, "--out", str(tmp_path / "run"), "--model.frozen-until", "layer2"]
    assert driver.DRIVER.main(changed) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.frozen-until", "layer9"], "all or one of stem, layer1, layer2, layer3, layer4, got 'layer9'"),
        (
            ["--model.frozen-until", "all", "--optim.new-layers", "classifier", "layer4"],
            "optim.new_layers: layer4 is frozen",
        ),
    ],
)
def test_what_cannot_be_frozen_is_one_line(driver, tmp_path, capsys, more, message):
    assert driver.DRIVER.main([*SMALL, "--out", str(tmp_path / "run"), *more]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_the_block_hides_less_of_small_maps():
    found = {side: suppression_for(side) for side in (1, 5, 7, 10, 14, 28)}
    assert [rule["patch_size"] for rule in found.values()] == [1, 1, 1, 2, 3, 3]
    assert [rule["p_patch"] for rule in found.values()] == [0.2, 0.2, 0.2, 0.2, 0.5, 0.5]
    assert all(rule["p_peak"] == rule["p_patch"] for rule in found.values())


@pytest.mark.parametrize(
    ("name", "crop", "side"), [("resnet10_narrow", 112, 7), ("vgg11", 224, 7), ("resnet50", 448, 14)]
)
def test_the_side_of_a_map_is_known_without_computing_it(name, crop, side):
    before = torch.get_rng_state()
    assert ModelConfig(backbone=name).map_side(crop) == side
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_left_out_follows_the_rule_and_is_part_of_the_identity(driver):
    def method_of(*words: str):
        config = driver.DRIVER.read_arguments([*SMALL, "--data.resize", "160", "--data.crop", "160", *words])
        (stage,) = driver.stages(config, load_datasets(config.data, 0))
        return stage.config["method"]

    given = method_of("--method.patch-size", "4", "--method.p-peak", "0.9")
    assert (given.p_peak, given.p_patch, given.patch_size) == (0.9, 0.2, 4)
    ruled = method_of("--method.patch-size", "None")
    assert (ruled.p_peak, ruled.p_patch, ruled.patch_size) == (0.2, 0.2, 2)  # 10 × 10 cells
    off = method_of("--method.diversification", "False", "--method.patch-size", "None")
    assert (off.p_peak, off.patch_size) == (None, None)
