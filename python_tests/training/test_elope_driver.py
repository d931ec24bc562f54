"""train/elope.py from its command line to the model that it ships, in miniature."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_elope import SMALL, elope, run
from test_step import waiting_for_nothing
from torch import nn

from fgvc_ext.data.boxed import Boxed, boxes_of
from fgvc_ext.data.loading import to_device
from fgvc_ext.data.pipeline import load_datasets
from fgvc_ext.models import ELoPE, LocalisationModule, MeanFeatureMap, load
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.reference.class_mean_loss import class_mean_loss
from fgvc_ext.training import EngineConfig, Result
from fgvc_ext.training.sampling import EpochBatches, training_loader
from fgvc_ext.training.step import TrainingStep

pytestmark = pytest.mark.xdist_group("elope driver")  # one worker, which makes what they share once

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def driver():
    return elope()


@pytest.fixture(scope="module")
def finished(driver, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elope") / "run"
    assert driver.DRIVER.main(["demo", "--out", str(folder), *SMALL]) == 0
    return folder


def _config(driver, *more: str):
    return driver.DRIVER.read_arguments(["demo", *SMALL, *more])


def _plan(driver, *more: str):
    config = _config(driver, *more)
    return {stage.name: stage for stage in driver.stages(config, load_datasets(config.data, config.seed))}


def _results(folder: Path) -> dict[str, Result]:
    stages = json.loads((folder / "run.json").read_text())["stages"]
    return {s["name"]: Result(folder / name, sha) for s in stages for name, sha in s["outputs"].items()}


# ---------------------------------------------------------------- the whole pipeline


def test_four_stages_lead_to_one_network(finished):
    facts = json.loads((finished / "run.json").read_text())
    assert facts["status"] == "finished"
    names = ["classifier", "localiser", "boxes", "localisation", "crops", "means", "weighted"]
    assert [(stage["name"], stage["status"]) for stage in facts["stages"]] == [(name, "done") for name in names]
    assert facts["stages"][1]["headline"] == "smooth_l1"
    read = {name: (finished / f"weights/{name}.safetensors").read_bytes() for name in ("crops", "weighted", "last")}
    assert read["last"] == read["weighted"] != read["crops"]
    page = (finished / "report.html").read_text()
    for words in ("What it costs", "Localisation", "Activations", "Heat maps", "Boxes", "mean feature map", "IoU"):
        assert words in page, words
    table = json.loads((finished / "artefacts/localisation.json").read_text())
    assert set(table) == {"mean feature map", "localisation module"}
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["mean_iou"] <= 1 for row in table.values())
    measured = facts["stages"][3]
    assert measured["headline"] == "localisation_module_accuracy"
    assert measured["measures"]["test"]["mean_feature_map_mean_iou"] == table["mean feature map"]["mean_iou"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {"train_within", "train_between", "train_accuracy"} <= set(lines[0])


def test_the_boxes_are_those_that_a_prediction_looks_at(driver, finished):
    with (finished / "artefacts/boxes.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24 + 12
    config = _config(driver)
    test = load_datasets(config.data, config.seed).test
    boxes, model = boxes_of(finished / "artefacts/boxes.csv", test), load(finished / "weights/last.safetensors")
    assert isinstance(model, ELoPE)
    assert isinstance(model.localiser, LocalisationModule)
    assert model.pooling.weight is not None
    found = model.predict([test.load(i) for i in range(12)], top=2)
    for i, prediction in enumerate(found):
        assert prediction.box == pytest.approx(boxes[i].tolist(), abs=1e-3)
        assert len(prediction.names) == 2
    assert model.localiser.state_dict().keys() == load(finished / "weights/localiser.safetensors").state_dict().keys()


def test_the_module_in_the_network_is_the_one_that_was_trained(finished):
    module = load(finished / "weights/localiser.safetensors").state_dict()
    shipped = load(finished / "weights/last.safetensors").localiser.state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in module.items())


def test_what_is_trained_on_and_evaluated(driver, finished):
    plan, results = _plan(driver), _results(finished)
    whole, crops = plan["classifier"].train({}), plan["crops"].train(results)
    assert isinstance(crops.dataset, Boxed)
    assert not isinstance(whole.dataset, Boxed)
    assert tuple(whole[0, 1]["image"].shape) == tuple(crops[0, 1]["image"].shape) == (3, 32, 32)
    evaluated = plan["weighted"].evaluations(results)["test"]
    assert tuple(evaluated[0, 1]["image"].shape) == (3, 64, 64), "by the whole path: it finds the object itself"
    task = plan["weighted"].build(results)
    means = load_weights_file(results["means"].path)[0]["means"]
    assert torch.equal(task.losses["embedding"].class_means, means)
    assert (means.norm(dim=1) <= 1 + 1e-5).all()
    before = load(results["crops"].path)
    assert all(torch.equal(value, task.model.state_dict()[name]) for name, value in before.state_dict().items())
    assert (task.model.pooling.weight == 1).all()


def test_the_public_codes_means_keep_their_length(driver, finished):
    results = _results(finished)
    means = {v: _plan(driver, "--method.variant", v)["means"].make(results)["means"] for v in ("paper", "official")}
    assert (means["paper"].norm(dim=1) < 1 - 1e-4).any()
    torch.testing.assert_close(means["official"], nn.functional.normalize(means["paper"]))


def test_the_module_sees_turned_images_that_are_not_flipped(driver, finished):
    crop = _plan(driver, "--method.localiser-rotation", "30")["localiser"].train(_results(finished)).transform
    assert crop.flip is None
    assert crop.rotate.degrees == [-30.0, 30.0]


def test_images_and_crops_start_from_the_same_weights(driver, finished):
    file = finished / "weights/classifier.safetensors"
    plan, results = _plan(driver, "--model.weights", str(file)), _results(finished)
    known, module = load(file).backbone.state_dict(), load(results["localiser"].path).state_dict()
    for name, earlier in (("classifier", {}), ("crops", results)):
        task = plan[name].build(earlier)
        assert "tensors loaded" in plan[name].start(task)
        assert all(torch.equal(value, known[key]) for key, value in task.model.backbone.state_dict().items())
        assert "weights" in plan[name].inputs
    assert all(torch.equal(value, module[key]) for key, value in task.model.localiser.state_dict().items())


def test_a_shipped_network_is_what_another_run_starts_from(driver, finished):
    """All of it is tuned from there, but for what later stages add: this run's own localiser stays."""
    file = finished / "weights/last.safetensors"
    plan, results = _plan(driver, "--model.weights", str(file)), _results(finished)
    known = load(file).state_dict()
    module = {name: torch.zeros_like(value) for name, value in known.items() if name.startswith("localiser.")}
    for name, earlier in (("classifier", {}), ("crops", results)):
        task = plan[name].build(earlier)
        model = task.model
        if name == "crops":
            model.load_state_dict(module, strict=False)
        plan[name].start(task)
        for key, value in model.state_dict().items():
            assert torch.equal(value, module[key] if key in module else known[key]), key


def test_the_fine_tunings_rate_is_that_of_the_weights_alone(driver, finished):
    more = ["--optim.schedule", "step", "--optim.step-epochs", "1", "--optim.lr", "0.003"]
    more += ["--optim.new-layers-lr", "0.003"]
    more += ["--fine-tuning.epochs", "2", "--fine-tuning.schedule", "step", "--fine-tuning.step-epochs", "1"]
    stage = _plan(driver, *more)["weighted"]
    optim = replace(stage.optim, lr=0.001)
    step = TrainingStep(stage.build(_results(finished)), optim, EngineConfig(precision="fp32"), CPU, 1)
    weight = step.task.model.pooling.weight

    def rates():
        return {
            "weights" if any(p is weight for p in group["params"]) else "rest": group["lr"]
            for group in step.optimizer.param_groups
        }

    assert rates() == pytest.approx({"weights": 0.001, "rest": 0.003 * 0.1})
    step.leave_out()
    assert rates() == pytest.approx({"weights": 0.0001, "rest": 0.003 * 0.1})
    again = TrainingStep(stage.build(_results(finished)), optim, EngineConfig(precision="fp32"), CPU, 1)
    again.load_state_dict(step.state_dict())
    again.leave_out()
    assert sorted(group["lr"] for group in again.optimizer.param_groups)[0] == pytest.approx(0.00001)
    assert max(group["lr"] for group in again.optimizer.param_groups) == pytest.approx(0.0003)


def test_no_stage_waits_in_a_step(driver, finished):
    results = _results(finished)
    for name, stage in _plan(driver).items():
        if not hasattr(stage, "train"):
            continue
        training = stage.training({need: results[need] for need in stage.needs})
        step = TrainingStep(training.build(), training.optim, EngineConfig(precision="fp32"), CPU, 3)
        frozen = getattr(step.task, "teacher", None)
        assert (frozen is not None) == (name == "localiser")
        for number, loaded in enumerate(training_loader(training.train, EpochBatches(24, 8, 0), workers=0)):
            batch = to_device(loaded, CPU, normalise=training.train.normalise)
            if number == 0:
                step(batch, number, [8])
            else:
                with waiting_for_nothing():
                    step(batch, number, [8])


def test_the_loss_is_the_papers(driver):
    task = _plan(driver)["classifier"].build({})
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 1, 2, 0, 3])
    means = task.losses["embedding"].class_means.clone()
    task.batch_sizes = (6,)
    answer = task.step({"image": images, "label": labels})
    embeddings = task.model.embed(images)
    within, between, moved = class_mean_loss(embeddings, labels, means)
    entropy = torch.nn.functional.cross_entropy(task.model.classifier(embeddings), labels)
    torch.testing.assert_close(answer["loss"], entropy + 2 * (within + between), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.losses["embedding"].class_means[labels], moved, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("localisation", "names"),
    [
        ("off", ["classifier", "means", "weighted"]),
        ("true", ["crops", "means", "weighted"]),
        ("mean", ["classifier", "boxes", "localisation", "crops", "means", "weighted"]),
    ],
)
def test_the_stages_of_a_localisation(localisation, names, driver):
    plan = _plan(driver, "--method.localisation", localisation)
    assert list(plan) == names
    assert list(_plan(driver, "--method.localisation", localisation, "--method.weights", "False")) == names[:-2]
    without = _plan(driver, "--method.localisation", localisation, "--method.embedding-loss", "none")
    assert list(without) == [name for name in names if name != "means"]


@pytest.mark.parametrize("localisation", ["off", "true", "mean"])
def test_every_localisation_trains_to_its_end(localisation, tmp_path):
    more = ["--method.localisation", localisation, "--optim.epochs", "1", "--data.train-per-class", "4"]
    assert run(tmp_path / "run", *more) == 0
    model = load(tmp_path / "run/weights/last.safetensors")
    assert (model.localiser is not None) == (localisation == "mean")
    if localisation == "mean":
        assert isinstance(model.localiser, MeanFeatureMap)
        assert len(model.predict([torch.zeros(3, 50, 40, dtype=torch.uint8)])[0].box) == 4


@pytest.mark.parametrize(
    ("name", "variant", "gamma", "normalize"),
    [
        ("within", "paper", 0.0, True),
        ("within+between", "paper", 16.0, True),
        ("centre", "centre", 16.0, False),
        ("dff", "dff", 16.0, False),
        ("none", None, None, None),
    ],
)
def test_the_embedding_losses_of_table_5(name, variant, gamma, normalize, driver):
    task = _plan(driver, "--method.embedding-loss", name)["classifier"].build({})
    if variant is None:
        assert list(task.losses) == ["main"]
        return
    loss = task.losses["embedding"]
    assert (loss.variant, loss.gamma, loss.normalize) == (variant, gamma, normalize)
    task.step({"image": torch.randn(6, 3, 32, 32), "label": torch.arange(6) % 4})["loss"].backward()


def test_settings_reach_network_and_losses(driver):
    given = ["--method.k", "2", "--method.alpha", "0.3", "--method.margin", "0.5", "--method.gamma", "8"]
    given += ["--method.loss-weight", "1.5", "--method.variant", "official", "--optim.label-smoothing", "0.1"]
    task = _plan(driver, *given)["classifier"].build({})
    loss = task.losses["embedding"]
    assert (task.model.pooling.k, loss.alpha, loss.margin, loss.gamma) == (2, 0.3, 0.5, 8.0)
    assert (loss.variant, task.weight, task.loss.label_smoothing) == ("official", 1.5, 0.1)
    gap = _plan(driver, "--method.pooling", "gap", "--method.weights", "False")["classifier"].build({})
    assert gap.model.settings()["pooling"] == "gap"


def test_above_frozen_layers_all_evaluations_find_the_object_in_images(driver, tmp_path, capsys):
    words = ["--model.frozen-until", "layer3", "--data.random-crop", "False", "--data.cache", str(tmp_path / "cache")]
    words += ["--method.weights", "False", "--model.evaluate-cached", "True", "--report", "False"]
    assert driver.DRIVER.main(["demo", "--out", str(tmp_path / "run"), *SMALL, *words]) == 0
    told = [line.partition(":")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("crops: comp")]
    assert len(told) == 1, "of the crops that it is trained on alone"
    assert "computing features of 24 images (train) once" in told[0]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [("test_accuracy" in line) for line in lines if line["stage"] == "crops"] == [True, True]


def test_a_threshold_makes_only_what_follows_from_it_stale(driver, finished, capsys):
    before = (finished / "run.json").read_bytes()
    assert driver.DRIVER.main(["demo", "--out", str(finished), *SMALL, "--method.threshold", "0.6"]) == 1
    assert "stage boxes of the run" in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.resize", "63"],
            "--data.resize: expected at least 64, twice the crop, with --method.localisation module",
        ),
        (["--method.pooling", "gap"], "--method.weights: expected False with --method.pooling gap: only gkmp has some"),
        (["--method.k", "5"], "k must be at most H*W = 2*2 = 4, got 5"),
        (["--method.threshold", "nan"], "--method.threshold: expected at least 0, got nan"),
        (
            ["--method.threshold", "1.5"],
            "--method: expected a threshold of at most 1 and a localiser-rotation of at most",
        ),
        (["--optim.batch-size", "1"], "model.embedding.1 (BatchNorm1d) needs two images"),
        (["--optim.accumulate", "2"], "losses.embedding (ClassMeanLoss) is a loss of the whole batch"),
        (["--data.rotation", "190"], "expected a rotation from 0 to 180 degrees"),
    ],
)
def test_errors_are_one_clear_line(driver, arguments, message, tmp_path, capsys):
    assert driver.DRIVER.main(["demo", "--out", str(tmp_path / "x"), *SMALL, *arguments]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line


def test_true_boxes_that_are_not_there_are_missed_by_name(driver, tmp_path, capsys):
    from PIL import Image

    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(tmp_path / split / name / f"{number}.png")
    words = ["folder", "--data.root", str(tmp_path), "--model.weights", "none", "--model.backbone", "resnet10_narrow"]
    words += ["--method.localisation", "true", "--out", str(tmp_path / "run"), *SMALL[8:]]
    assert driver.DRIVER.main(words) == 1
    assert "folder train: the images have no true boxes" in capsys.readouterr().err


def test_the_papers_recipe_is_in_the_presets(driver):
    for name, threshold in (("cub", 0.3), ("cars", 0.2), ("aircraft", 0.2)):
        config = driver.PRESETS[name][1]
        assert (config.data.name, config.model.backbone, config.model.weights) == (name, "resnet50", "imagenet")
        assert (config.data.crop, config.data.keep_ratio, config.data.resize) == (448, False, 896)
        assert (config.data.rotation, config.data.jitter, config.data.lighting) == (20.0, 0.4, 0.1)
        optim, method = config.optim, config.method
        assert (optim.batch_size, optim.lr, optim.weight_decay, optim.momentum) == (14, 0.003, 0.001, 0.9)
        assert (optim.epochs, optim.schedule, optim.step_epochs, optim.step_factor) == (90, "step", 30, 0.1)
        assert (method.k, method.loss_weight, method.alpha, method.gamma, method.margin) == (4, 2.0, 0.5, 16.0, 0.75)
        assert (method.threshold, method.min_size, method.embedding_dim) == (threshold, 10, 512)
        local, fine = config.localiser, config.fine_tuning
        assert (local.batch_size, local.lr, local.weight_decay, local.epochs, local.step_epochs) == (
            16,
            0.003,
            0.001,
            45,
            15,
        )
        assert (fine.lr, fine.step_epochs, fine.epochs, method.localiser_rotation) == (0.001, 20, 30, 30.0)


def test_accuracy_over_k_is_read_from_runs(driver, finished, tmp_path):
    from fgvc_ext.explain.elope import _k_and_accuracy, accuracy_over_k

    stages = json.loads((finished / "run.json").read_text())["stages"]
    assert _k_and_accuracy(finished) == (4, stages[-1]["accuracy"]["last"])
    assert len(accuracy_over_k([finished, finished]).axes) == 1
    facts = json.loads((finished / "run.json").read_text())
    between = {**facts, "status": "preempted", "stages": facts["stages"][:1]}  # the first is done, the next not begun
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_bytes((finished / "config.json").read_bytes())
    (tmp_path / "begun/run.json").write_text(json.dumps(between))
    for folder in (tmp_path, tmp_path / "begun"):
        with pytest.raises(ValueError, match="expected a finished ELoPE run"):
            accuracy_over_k([folder])


# ---------------------------------------------------------------- interrupted, and in several processes
