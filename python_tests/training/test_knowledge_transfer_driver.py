"""train/knowledge_transfer.py from its command line to its report, in miniature."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job
import pytest
import torch
from torch import nn
from toy_driver import die_in_call
from toy_training import Child, traces

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.loading import make_loader, to_device
from fgvc_ext.data.pipeline import evaluation_samples, load_datasets
from fgvc_ext.models import Ensemble, KnowledgeTransfer, load, save
from fgvc_ext.training import Classification, Result, RunFolder, run_stages

pytestmark = pytest.mark.xdist_group("knowledge transfer driver")  # one worker, which makes what they share once

FILE = drivers_folder() / "knowledge_transfer.py"
TINY = [
    *("--data.classes", "4", "--data.train-per-class", "6", "--data.test-per-class", "4", "--data.image-size", "48"),
    *("--data.resize", "48", "--data.crop", "40", "--optim.epochs", "1", "--optim.batch-size", "8"),
    *("--optim.warmup-epochs", "0", "--engine.workers", "0", "--engine.device", "cpu"),
]
SHORT = [*TINY, "--report", "False", "--method.baseline", "False"]


@pytest.fixture(scope="module")
def driver():
    return load_driver(FILE)


def _run(driver, folder: Path, *arguments: str) -> dict[str, Any]:
    assert driver.DRIVER.main(["demo", "--out", str(folder), *arguments]) == 0
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def finished(driver, tmp_path_factory) -> Path:
    """Three models, and the baseline's, with validation images."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    _run(driver, folder, *TINY, "--method.models", "3", "--data.val-fraction", "0.34")
    return folder


@pytest.fixture(scope="module")
def batch(driver, finished) -> dict[str, torch.Tensor]:
    """All test images, prepared."""
    config = driver.DRIVER.read_arguments(["--config", str(finished / "config.json")])
    samples = evaluation_samples(
        load_datasets(config.data, config.seed), load(finished / "weights/last.safetensors").preprocessing
    )["test"]
    (batch,) = make_loader(samples, [[(index, 0) for index in range(len(samples))]], workers=0)
    return to_device(batch, torch.device("cpu"), normalise=samples.normalise)


def _stages(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((folder / "run.json").read_text())["stages"]}


def test_the_models_are_trained_in_their_order_and_the_ensemble_is_shipped(finished):
    assert list(_stages(finished)) == ["model1", "model2", "model3", "plain2", "plain3", "plain_ensemble", "ensemble"]
    assert all(entry["status"] == "done" for entry in _stages(finished).values())
    weights = finished / "weights"
    assert (weights / "last.safetensors").read_bytes() == (weights / "ensemble.safetensors").read_bytes()
    with (finished / "metrics.csv").open(newline="") as file:
        taught = {row["stage"]: row["train_orthogonal"] != "" for row in csv.DictReader(file)}
    assert taught == {"model1": False, "model2": True, "model3": True, "plain2": False, "plain3": False}


@torch.no_grad()
def test_every_single_model_and_every_prefix_is_averaged_as_by_hand(finished, batch):
    for name, members in (
        ("ensemble", ["model1", "model2", "model3"]),
        ("plain_ensemble", ["model1", "plain2", "plain3"]),
    ):
        scores = [load(finished / f"weights/{m}.safetensors")(batch["image"]) for m in members]
        measures = _stages(finished)[name]["measures"]["test"]

        def accuracy(answer: torch.Tensor) -> float:
            return float((answer.argmax(1) == batch["label"]).double().mean())

        for n in (1, 2, 3):
            assert measures[f"single_{n}_accuracy"] == accuracy(scores[n - 1])
            assert measures[f"probabilities_{n}_accuracy"] == accuracy(sum(s.softmax(1) for s in scores[:n]))
            assert measures[f"logits_{n}_accuracy"] == accuracy(sum(scores[:n]))
            assert measures[f"single_{n}_accuracy"] == _stages(finished)[members[n - 1]]["accuracy"]["last"]
        assert measures["accuracy"] == measures["probabilities_3_accuracy"]
        assert _stages(finished)[name]["accuracy"].keys() == {"last", "last_val"}


@torch.no_grad()
def test_the_shipped_ensemble_gives_scores_and_every_members_attention_in_one_call(finished, batch):
    ensemble = load(finished / "weights/last.safetensors")
    found = ensemble.explain(batch["image"])
    assert isinstance(ensemble, Ensemble)
    torch.testing.assert_close(found.scores, ensemble(batch["image"]))
    for n in (1, 2, 3):
        member = load(finished / f"weights/model{n}.safetensors")
        torch.testing.assert_close(found.maps[f"member {n}"][:, 0], member.attention(batch["image"]))
    assert len(ensemble.predict([torch.zeros(3, 60, 50, dtype=torch.uint8)], top=2)[0].names) == 2


def test_the_report_shows_table_3_figure_5_and_how_the_models_differ(finished):
    page = (finished / "report.html").read_text()
    for title in (
        "Every model, and the first n together",
        "Attention on each part",
        "How differently the members look",
        "Where the members look",
        "Evidence for the class: teacher and first student",
    ):
        assert f"<h2>{title}</h2>" in page, title
    assert "baseline is plain2, teacher is model1, first student is model2" in page
    with (finished / "tables/attention_by_part.csv").open(newline="") as file:
        rows = {row.pop("model"): [float(value.split()[0]) for value in row.values()] for row in csv.DictReader(file)}
    assert list(rows) == ["model1", "model2", "model3", "plain2", "plain3", "even attention"]
    assert all(sum(row) == pytest.approx(1, abs=0.005) for row in rows.values())
    with (finished / "tables/attention_overlap.csv").open(newline="") as file:
        rows = {row["ensemble"]: row for row in csv.DictReader(file)}
    assert {name: row["pairs of members"] for name, row in rows.items()} == {"plain_ensemble": "3", "ensemble": "3"}
    assert all(0 < float(row["overlap"].split()[0]) < 1 for row in rows.values())


def test_the_best_epoch_on_validation_images_teaches(driver, finished, tmp_path):
    arguments = ["demo", *TINY, "--method.models", "3", "--method.teacher", "best_val", "--data.val-fraction", "0.34"]
    config = driver.DRIVER.read_arguments(arguments)
    stages = {stage.name: stage for stage in driver.stages(config, load_datasets(config.data, config.seed))}
    earlier = {f"model{n}": Result(finished / f"weights/model{n}.safetensors", "") for n in (1, 2)}
    for name, result in earlier.items():  # another network than the last epoch's
        changed = load(result.path)
        with torch.no_grad():
            changed.classifier.bias.fill_(7.0)
        save(changed, tmp_path / f"{name}.best.safetensors")
        save(load(result.path), tmp_path / f"{name}.safetensors")
    earlier = {name: Result(tmp_path / f"{name}.safetensors", "") for name in earlier}
    task = stages["model3"].build(earlier)
    assert [float(teacher.module.classifier.bias.detach()[0]) for teacher in task.teachers] == [7.0, 7.0]
    ensemble = stages["ensemble"].make(earlier)
    assert [float(member.classifier.bias.detach()[0]) for member in ensemble.members] == [7.0, 7.0]
    without = driver.DRIVER.read_arguments(["demo", *TINY, "--method.teacher", "best_val"])
    with pytest.raises(ValueError, match="best_val: expected validation images"):
        driver.stages(without, load_datasets(without.data, 0))


def _needs(driver, *arguments: str) -> dict[str, list[str]]:
    config = driver.DRIVER.read_arguments(["demo", *TINY, *arguments])
    return {stage.name: list(stage.needs) for stage in driver.stages(config, load_datasets(config.data, config.seed))}


def test_switches_decide_who_teaches(driver):
    plain = ["--method.models", "4", "--method.baseline", "False"]
    found = _needs(driver, *plain)
    names = ["model1", "model2", "model3", "model4"]
    assert found == {name: names[:n] for n, name in enumerate(names)} | {"ensemble": names}
    found = _needs(driver, *plain, "--method.no-teachers", "model2")
    assert (found["model3"], found["model4"]) == (["model1"], ["model1", "model3"])
    assert found["ensemble"] == names
    assert set(map(tuple, list(_needs(driver, *plain, "--method.alpha", "0").values())[:4])) == {()}
    assert list(_needs(driver, "--method.models", "1", "--method.baseline", "True")) == [
        "model1",
        "plain_ensemble",
        "ensemble",
    ]
    with pytest.raises(ValueError, match="no-teachers: expected some of model1, model2, got 'model3'"):
        _needs(driver, "--method.models", "2", "--method.no-teachers", "model3")


def test_without_alpha_the_models_are_the_baselines_bit_for_bit(driver, finished, tmp_path):
    """And those of a plain classification with the same seed: the method adds nothing but its loss."""
    pair = ["--method.models", "2", "--method.alpha", "0", "--method.baseline", "False"]
    arguments = [*TINY, *pair, "--data.val-fraction", "0.34"]
    _run(driver, tmp_path / "run", *arguments)
    assert "first model is model1, second model is model2" in (tmp_path / "run/report.html").read_text()

    def state(file: Path) -> dict[str, torch.Tensor]:
        return load(file).state_dict()

    zero = state(tmp_path / "run/weights/model2.safetensors")
    baseline, taught = (state(finished / f"weights/{name}.safetensors") for name in ("plain2", "model2"))
    assert all(torch.equal(value, baseline[name]) for name, value in zero.items())
    assert not torch.equal(zero["backbone.conv1.weight"], taught["backbone.conv1.weight"])

    config = driver.DRIVER.read_arguments(["demo", *arguments])
    datasets = load_datasets(config.data, config.seed)
    (stage,) = (stage for stage in driver.stages(config, datasets) if stage.name == "model2")

    def build(earlier) -> Classification:
        return Classification(KnowledgeTransfer(config.model.build(), 4), nn.CrossEntropyLoss())

    stage.build = build
    with RunFolder(tmp_path / "plain", config, facts={"data": datasets.facts()}) as run:
        found = state(run_stages([stage], run, config.engine)["model2"].path)
    assert all(torch.equal(value, found[name]) for name, value in zero.items())


def test_one_more_model_leaves_the_others_as_they_are(driver, tmp_path):
    _run(driver, tmp_path, *SHORT, "--method.models", "2")
    before = {name: (tmp_path / f"weights/{name}.safetensors").read_bytes() for name in ("model1", "model2")}
    times = {name: (tmp_path / f"weights/{name}.safetensors").stat().st_mtime_ns for name in before}
    _run(driver, tmp_path, *SHORT, "--method.models", "3", "--force-stage", "ensemble")
    assert {name: (tmp_path / f"weights/{name}.safetensors").read_bytes() for name in before} == before
    assert {name: (tmp_path / f"weights/{name}.safetensors").stat().st_mtime_ns for name in before} == times
    assert len(load(tmp_path / "weights/last.safetensors").members) == 3


def test_a_wholly_frozen_backbone_is_refused_before_anything_is_trained(driver):
    config = driver.DRIVER.read_arguments(["demo", *TINY, "--model.frozen-until", "all"])
    with pytest.raises(ValueError, match=r"knowledge transfer trains the backbone's last feature map"):
        driver.build_task(config, list("abcd"), {})
    config.method.alpha = 0.0
    assert driver.build_task(config, list("abcd"), {}).teachers == [], "cross-entropy alone needs no map"


def test_the_papers_recipe(driver):
    for preset in ("cub", "folder", "cars", "aircraft"):
        config = driver.DRIVER.read_arguments([preset, "--data.root", "x"])
        optim, method = config.optim, config.method
        assert (config.model.backbone, config.model.weights) == ("resnet50", "imagenet")
        assert (config.data.resize, config.data.crop, config.data.flip) == (600, 448, 0.5)
        assert (optim.lr, optim.new_layers_lr, optim.new_layers) == (0.001, 0.01, ("classifier",))
        assert (optim.momentum, optim.weight_decay, optim.schedule, optim.warmup_epochs) == (0.9, 5e-4, "cosine", 0)
        assert (optim.batch_size, optim.epochs) == (32, 100)
        assert (method.models, method.alpha, method.balance, method.teacher) == (5, 0.5, "absolute", "last")
        assert (method.head, method.average) == ("linear", "probabilities")


# ------------------------------------------------------------------ killed, and several processes


def _train(folder: Path, arm: Callable[..., None] | None = None, *point: Any) -> int:
    torch.set_num_threads(1)
    if arm is not None:
        arm(*point)
    arguments = [*SHORT, "--method.models", "3", "--engine.checkpoint-every", "1"]
    return load_driver(FILE).DRIVER.main(["demo", "--out", str(folder), *arguments])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = Child(folder / "output", _train, folder / "run").ended()
    assert code == 0, output
    return traces(folder / "run")


STEP = "fgvc_ext.training.attention_transfer.AttentionTransfer.step"
POINTS = {  # three steps an epoch
    "in the middle of model 2": (die_in_call, 5, STEP),
    "in the middle of model 3": (die_in_call, 8, STEP),
    "while the ensemble is evaluated": (die_in_call, 1, "fgvc_ext.training.ensembles.prefixes"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_at_its_model_and_leaves_the_others(point, undisturbed, tmp_path):
    code, output = Child(tmp_path / "output", _train, tmp_path / "run", *POINTS[point]).ended()
    assert code == -signal.SIGKILL, output
    weights = tmp_path / "run/weights"
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in weights.glob("model*.safetensors")}
    assert len(before) == {"2": 1, "3": 2}.get(point[-1], 3)
    code, output = Child(tmp_path / "output", _train, tmp_path / "run").ended()
    assert code == 0, output
    assert all((file.read_bytes(), file.stat().st_mtime_ns) == found for file, found in before.items())
    assert traces(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(undisturbed, tmp_path):
    chance, start = random.Random(0), time.perf_counter()
    code, _ = Child(tmp_path / "output", _train, tmp_path / "timed").ended()
    whole, killed = time.perf_counter() - start, 0
    assert code == 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        child = Child(tmp_path / "output", _train, folder)
        child.process.join(chance.uniform(0, whole))
        if child.process.exitcode is None:
            child.process.kill()
            killed += 1
        child.process.join()
        code, output = Child(tmp_path / "output", _train, folder).ended()
        assert code == 0, output
        assert traces(folder) == undisturbed
    assert killed >= 5


def test_two_processes_train_and_evaluate_what_one_does(tmp_path):
    """BatchNorm sees its own share of a batch, so that the weights differ; all else is the same: what is done, what is
    written, and that every image is counted once."""
    job.run(tmp_path / "output", 2, _train, tmp_path / "two")
    run = json.loads((tmp_path / "two/run.json").read_text())
    assert run["status"] == "finished"
    assert [entry["name"] for entry in run["stages"]] == ["model1", "model2", "model3", "ensemble"]
    measures = _stages(tmp_path / "two")["ensemble"]["measures"]["test"]
    assert all((16 * value).is_integer() for name, value in measures.items() if name.startswith(("single", "log")))
    assert {f"probabilities_{n}_accuracy" for n in (1, 2, 3)} <= set(measures)
    for n in (1, 2, 3):
        assert measures[f"single_{n}_accuracy"] == _stages(tmp_path / "two")[f"model{n}"]["accuracy"]["last"]
