"""train/dual_attention.py from its command line to its report, in miniature."""

from __future__ import annotations

import csv
import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job
import numpy as np
import pytest
import torch
from PIL import Image
from toy_driver import die_in_call
from toy_training import Child, kill_at_random_moments, steps_and_weights, traces

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.loading import make_loader, to_device
from fgvc_ext.data.pipeline import evaluation_samples, load_datasets
from fgvc_ext.models import DualAttention, build_backbone, load

pytestmark = pytest.mark.xdist_group("dual attention driver")  # one worker, which makes what they share once

FILE = drivers_folder() / "dual_attention.py"
TINY = [
    *("--data.classes", "4", "--data.train-per-class", "6", "--data.test-per-class", "4", "--data.image-size", "48"),
    *("--data.resize", "48", "--data.crop", "40", "--optim.epochs", "2", "--optim.batch-size", "8"),
    *("--optim.warmup-epochs", "0", "--engine.workers", "0", "--engine.device", "cpu", "--optim.lr", "0.005"),
    *("--method.fpn-channels", "8", "--method.head-depth", "1", "--method.distill-warmup-epochs", "1"),
    *("--method.part-size", "20"),
]
OURS = ["--report", "False", "--method.compare-plain", "False"]
ROWS_OFF = [word for name in ("sppn", "lhm", "teacher", "distill") for word in (f"--method.use-{name}", "False")]


@pytest.fixture(scope="module")
def driver():
    return load_driver(FILE)


def _run(driver, folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The run's stages by name, as run.json has them."""
    assert driver.DRIVER.main(["demo", "--out", str(folder), *TINY, *arguments]) == 0
    return {entry["name"]: entry for entry in json.loads((folder / "run.json").read_text())["stages"]}


def _plan(driver, *arguments: str) -> dict[str, Any]:
    config = driver.DRIVER.read_arguments(["demo", *TINY, *arguments])
    return {stage.name: stage for stage in driver.stages(config, load_datasets(config.data, config.seed))}


@pytest.fixture(scope="module")
def finished(driver, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, _run(driver, folder)


# ---------------------------------------------------------------- the whole pipeline


@torch.no_grad()
def test_the_shipped_model_answers_in_one_call_as_it_was_measured(driver, finished):
    folder, stages = finished
    assert list(stages) == ["plain", "ours"]
    config = driver.DRIVER.read_arguments(["--config", str(folder / "config.json")])
    model = load(folder / "weights/last.safetensors")
    assert isinstance(model, DualAttention)
    samples = evaluation_samples(load_datasets(config.data, config.seed), model.preprocessing)["test"]
    (batch,) = make_loader(samples, [[(index, 0) for index in range(16)]], workers=0)
    batch = to_device(batch, torch.device("cpu"), normalise=samples.normalise)
    scores, measures = model.all_scores(batch["image"]), stages["ours"]["measures"]["test"]

    def accuracy(answer: torch.Tensor) -> float:
        return float((answer.argmax(1) == batch["label"]).double().mean())

    assert measures["accuracy"] == accuracy(model(batch["image"])) == accuracy(scores["fused"])
    assert measures["student_accuracy"] == accuracy(scores["student"])
    assert measures["teacher_accuracy"] == accuracy(scores["teacher"])
    assert measures["mean_accuracy"] == accuracy(scores["student"].softmax(1) + scores["teacher"].softmax(1))
    assert model.explain(batch["image"]).boxes["parts"].shape == (16, 3, 4)
    (prediction,) = model.predict([torch.zeros(3, 60, 50, dtype=torch.uint8)], top=2)
    assert len(prediction.names) == 2
    assert "student_accuracy" not in stages["plain"]["measures"]["test"]


def test_every_risk_is_a_column_of_the_metrics(finished):
    with (finished[0] / "metrics.csv").open(newline="") as file:
        first, last = [row for row in csv.DictReader(file) if row["stage"] == "ours"]
    for name in (
        *("pred", "con", "rank", "overlap", "area", "distill", "teacher", "grouping", "fusion", "hint", "soft"),
        *("active_share", "area_ratio_p10", "area_ratio_p50", "area_ratio_p90", "foreground", "fallback"),
        *("union_to_object", "student_accuracy", "teacher_accuracy"),
    ):
        assert float(last[f"train_{name}"]) >= 0, name
    assert (float(first["train_distill"]), float(last["train_distill"]) > 0) == (0, True), "its weight rises from 0"


def test_the_report_shows_how_parts_are_found_and_whether_they_learn(finished):
    page = (finished[0] / "report.html").read_text()
    for title in (
        "From image to parts",
        "Where student and teacher look",
        "What the proposals cover",
        "Whether the regions learn",
    ):
        assert f"<h2>{title}</h2>" in page, title
    with (finished[0] / "tables/parts_covered.csv").open(newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    assert next(iter(rows)) == "the part that separates the classes"
    assert {"beak", "wing", "tail"} <= set(rows)
    assert all(0 <= float(row["in a proposed box"].split()[0]) <= 100 for row in rows.values())


def test_photographs_of_a_folder_are_trained_on_and_shown(driver, tmp_path):
    for split, number in (("train", 4), ("test", 2)):
        for name in ("one", "two", "three"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(number):  # of other sizes, standing and lying
                image = np.random.default_rng(index).integers(0, 255, (50 + 9 * index, 64, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / f"images/{split}/{name}/{index}.jpg")
    words = [
        *TINY[8:],
        "--data.root",
        str(tmp_path / "images"),
        "--model.weights",
        "none",
        "--model.backbone",
        "resnet18",
    ]
    assert driver.DRIVER.main(["folder", "--out", str(tmp_path / "run"), *words]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>From image to parts</h2>" in page
    assert "<h2>Whether the regions learn</h2>" in page
    assert "What the proposals cover" not in page, "the true parts are not known"
    assert load(tmp_path / "run/weights/last.safetensors").classes == ["one", "three", "two"]


def test_the_engines_switches_work_here_too(driver, tmp_path, capsys):
    words = ["--optim.ema-decay", "0.9", "--optim.accumulate", "2", "--data.val-fraction", "0.25"]
    frozen = ["--model.frozen-until", "layer1", "--engine.precision", "bf16", "--data.random-crop", "False"]
    ours = _run(driver, tmp_path / "run", *OURS, *words, *frozen)["ours"]
    assert {"test", "val"} <= set(ours["measures"])
    assert "ours: frozen until layer1, trained on images because the method" in capsys.readouterr().out
    start = build_backbone("resnet10_narrow", weights="birds", frozen_until="layer1").state_dict()
    model = load(tmp_path / "run/weights/last.safetensors")
    assert isinstance(model, DualAttention)
    end = model.student.backbone.state_dict()
    assert torch.equal(end["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"])
    assert not torch.equal(end["layer2.0.conv1.weight"], start["layer2.0.conv1.weight"])


# ---------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("words", "parts", "losses"),
    [
        (["--method.use-distill", "False"], {"proposals", "teacher", "fusion"}, {"main", "first"}),
        (["--method.use-distill", "False", "--method.use-teacher", "False"], {"proposals"}, {"main", "first"}),
    ],
)
def test_rows_of_table_3_are_switches(words, parts, losses, driver):
    task = _plan(driver, *words)["ours"].build({})
    assert {name for name in ("proposals", "teacher", "fusion") if getattr(task.model, name) is not None} == parts
    assert "hint" not in task.losses


def test_plain_is_the_network_without_any_part(driver):
    plan = _plan(driver)
    assert list(plan) == ["plain", "ours"]
    task = plan["plain"].build({}).eval()
    plain = task.model
    assert (plain.proposals, plain.teacher, plain.fusion, plain.use_lhm) == (None, None, None, False)
    images, labels = torch.randn(3, 3, 40, 40), torch.arange(3)
    batch = {"image": images, "label": labels, "seed": labels, "index": labels}
    expected = torch.nn.functional.cross_entropy(plain(images), labels)  # dropout and batch statistics are off
    torch.testing.assert_close(task.step(batch)["loss"], expected, msg="no weight but 1")
    assert list(_plan(driver, *OURS[2:])) == ["ours"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.use-teacher", "False"], "--method.use-distill: expected False without --method.use-teacher"),
        (
            ["--method.use-distill", "False", "--method.use-lhm", "False"],
            "use_teacher: expected False without use_lhm",
        ),
        (["--method.paf-floor", "2"], "a floor from 0 to 1"),
        (["--method.part-size", "15"], "--method.part-size: expected a divisor of --data.crop 40, got 15"),
        (["--method.temperature", "inf"], "--method.temperature: expected a finite number, got inf"),
        (["--method.anchor-sizes", "48", "inf", "192"], "--method.anchor-sizes: expected a finite number, got inf"),
        (["--optim.step-factor", "nan"], "--optim.step-factor: expected at least 0, got nan"),
        (["--method.distill-mix", "convex", "--method.hint-weight", "3"], "expected at most 1 with"),
        (["--method.temperature", "0"], "--method.temperature: expected above 0, got 0"),
        (["--method.fg-threshold", "2"], "--method.fg-threshold: expected at most 1, got 2"),
        (["--method.anchor-sizes", "48", "96"], "--method.anchor-sizes: expected three"),
        (["--method.anchor-sizes", "-48", "96", "192"], "AnchorLevel: expected a size, scales and ratios above 0"),
        (["--model.frozen-until", "layer4", "--optim.new-layers", "layer4"], "layer4 is frozen"),
    ],
)
def test_errors_are_one_line(words, message, driver, tmp_path, capsys):
    assert driver.DRIVER.main(["demo", "--out", str(tmp_path / "x"), *TINY, *OURS, *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "words",
    [
        ["--method.part-size", "15", "--method.part-images", "crops"],
        ["--method.part-size", "15", *ROWS_OFF],
        ["--method.part-size", "20"],
    ],
)
def test_part_images_of_any_size_but_where_cells_are_averaged(words, driver):
    assert _plan(driver, *words)["ours"].build({})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method.distill-warmup-epochs", "2"], "2 in a training of 2 epochs: the distillation reaches 50% of its"),
        (["--method.distill-warmup-epochs", "2", "--method.use-distill", "False"], None),
        (["--method.distill-warmup-epochs", "1"], None),
        (["--method.distill-warmup-epochs", "0"], None),
    ],
)
def test_a_training_that_is_too_short_for_the_distillation_says_so(words, told, driver):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _plan(driver, *words)
    found = [str(one.message) for one in caught if "distill-warmup" in str(one.message)]
    assert (len(found), told is None or told in found[0]) == (int(told is not None), True)


def test_the_demo_is_a_short_training_of_the_whole_method(driver):
    """Its settings are what its numbers are of."""
    few = ["--data.classes", "2", "--data.train-per-class", "1", "--data.test-per-class", "1"]
    config = driver.DRIVER.read_arguments(["demo", *few])
    task = driver.stages(config, load_datasets(config.data, config.seed))[-1].build({})
    method, teacher = task.method, task.model.teacher
    assert 0 < teacher.blocks()["last"].attention.floor < 0.5, "the filter filters, but not all"
    assert (method.part_statistics, method.dropout) == ("own", 0)
    assert method.anchor_sizes == (112, 160, 224)
    assert method.student_weight + method.teacher_weight + method.fusion_weight < 1.5
    assert method.use_sppn
    assert method.use_lhm
    assert method.use_teacher
    assert method.use_distill


def test_presets(driver):
    for preset in ("cub", "folder", "cars", "aircraft"):
        config = driver.DRIVER.read_arguments([preset, "--data.root", "x"])
        optim, method = config.optim, config.method
        assert (config.model.backbone, config.model.weights) == ("resnet50", "imagenet")
        assert (config.data.name, config.data.resize, config.data.crop) == (preset, 600, 448)
        assert (optim.lr, optim.new_layers_lr, optim.weight_decay, optim.momentum) == (0.01, None, 1e-4, 0.9)
        assert (optim.epochs, optim.batch_size, optim.schedule) == (200, 16, "step")
        assert (optim.step_epochs, optim.step_factor) == (50, 0.5)
        assert (method.regions, method.parts, method.iou_threshold, method.compare_plain) == (3, 4, 0.25, False)
        assert (method.temperature, method.grouping_weight, method.dbt_sites) == (4.0, 1e-5, ("res4", "res5", "last"))


# ---------------------------------------------------------------- killed, and several processes


def _train(folder: Path, arm: Callable[..., None] | None = None, *point: Any) -> int:
    torch.set_num_threads(1)
    if arm is not None:
        arm(*point)
    arguments = [*TINY, *OURS, "--engine.checkpoint-every", "1"]
    return load_driver(FILE).DRIVER.main(["demo", "--out", str(folder), *arguments])


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    code, output = Child(tmp_path / "output", _train, tmp_path / "whole").ended()
    assert code == 0, output
    # three steps an epoch: in the second of the second
    point = (die_in_call, 5, "fgvc_ext.training.dual_attention.DualAttentionClassification.step")
    code, output = Child(tmp_path / "output", _train, tmp_path / "run", *point).ended()
    assert code == -signal.SIGKILL, output
    code, output = Child(tmp_path / "output", _train, tmp_path / "run").ended()
    assert code == 0, output
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")


def _train_both(folder: Path) -> int:
    torch.set_num_threads(1)
    arguments = [*TINY, "--report", "False", "--engine.checkpoint-every", "1"]
    return load_driver(FILE).DRIVER.main(["demo", "--out", str(folder), *arguments])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    kill_at_random_moments(tmp_path, _train_both, steps_and_weights({"plain": 6, "ours": 6}))


def test_two_processes_finish_and_count_every_image_once(tmp_path):
    job.run(tmp_path / "output", 2, _train, tmp_path / "two")
    run = json.loads((tmp_path / "two/run.json").read_text())
    assert (run["status"], [entry["name"] for entry in run["stages"]]) == ("finished", ["ours"])
    measures = run["stages"][0]["measures"]["test"]
    for name in ("accuracy", "student_accuracy", "teacher_accuracy", "mean_accuracy"):
        assert (16 * measures[name]).is_integer(), name
