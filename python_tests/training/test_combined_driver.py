"""train/combined.py from its command line to its report, in miniature."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job
import pytest
import torch
from toy_driver import die_in_call
from toy_training import Child, kill_at_random_moments, steps_and_weights, traces

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data.loading import make_loader, to_device
from fgvc_ext.data.pipeline import evaluation_samples, load_datasets
from fgvc_ext.models import Combined, Ensemble, build_backbone, load
from fgvc_ext.training import EngineConfig, EnsembleAccuracy
from fgvc_ext.training.features import cached_evaluations

pytestmark = pytest.mark.xdist_group("combined driver")  # one worker, which makes what they share once

FILE = drivers_folder() / "combined.py"
TINY = [
    *("--data.classes", "4", "--data.train-per-class", "6", "--data.test-per-class", "4", "--data.image-size", "48"),
    *("--data.resize", "48", "--data.crop", "40", "--optim.epochs", "1", "--optim.batch-size", "8"),
    *("--optim.warmup-epochs", "0", "--engine.workers", "0", "--engine.device", "cpu"),
    *("--method.embedding.embedding-dim", "8"),
]
FROZEN = ["--data.random-crop", "False", "--model.evaluate-cached", "True", "--report", "False"]


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
    """Two models, the second taught by the first."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, _run(driver, folder)


# ---------------------------------------------------------------- the whole recipe


@torch.no_grad()
def test_two_models_answer_together_and_every_average_is_measured(driver, finished):
    folder, stages = finished
    assert list(stages) == ["model1", "model2", "ensemble"]
    config = driver.DRIVER.read_arguments(["--config", str(folder / "config.json")])
    ensemble = load(folder / "weights/last.safetensors")
    samples = evaluation_samples(load_datasets(config.data, config.seed), ensemble.preprocessing)["test"]
    (batch,) = make_loader(samples, [[(index, 0) for index in range(16)]], workers=0)
    batch = to_device(batch, torch.device("cpu"), normalise=samples.normalise)

    def accuracy(answer: torch.Tensor) -> float:
        return float((answer.argmax(1) == batch["label"]).double().mean())

    members = [load(folder / f"weights/{name}.safetensors") for name in ("model1", "model2")]
    probabilities = []
    for name, member in zip(("model1", "model2"), members, strict=True):
        assert isinstance(member, Combined)
        heads, measures = member.head_scores(member.backbone(batch["image"]))[0], stages[name]["measures"]["test"]
        probabilities.append(sum(scores.softmax(1) for scores in heads.values()) / 2)
        assert {head: measures[f"{head}_accuracy"] for head in heads} == {h: accuracy(heads[h]) for h in heads}
        assert measures["accuracy"] == measures["probabilities_accuracy"] == accuracy(probabilities[-1])
        assert measures["logits_accuracy"] == accuracy(sum(heads.values()))
    assert isinstance(ensemble, Ensemble)
    torch.testing.assert_close(ensemble(batch["image"]).softmax(1), sum(probabilities) / 2)
    measures = stages["ensemble"]["measures"]["test"]
    assert measures["accuracy"] == measures["probabilities_2_accuracy"] == accuracy(sum(probabilities))
    torch.testing.assert_close(
        ensemble.explain(batch["image"]).maps["member 2"][:, 0], members[1].attention(batch["image"])
    )


def test_the_second_model_learns_from_the_first(finished):
    folder, _ = finished
    with (folder / "metrics.csv").open(newline="") as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    assert {name: row["train_orthogonal"] != "" for name, row in rows.items()} == {"model1": False, "model2": True}
    assert all(row["train_within"] for row in rows.values())


def test_the_report_shows_the_members_side_by_side(finished):
    page = (finished[0] / "report.html").read_text()
    for title in (
        "Every model, and the first n together",
        "Where the members look",
        "How differently the members look",
    ):
        assert f"<h2>{title}</h2>" in page, title
    assert "Evidence for the class: teacher and first student" in page


@pytest.mark.parametrize(
    ("words", "first", "second", "ensemble"),
    [
        (["--method.average", "logits"], True, True, False),
        (["--method.members.average", "logits"], False, False, True),
        (["--method.members.balance", "relative"], False, True, False),
        (["--method.members.alpha", "0.25"], False, True, False),
        (["--method.members.teacher", "best_val"], False, True, True),
        (["--method.embedding.k", "3"], True, True, False),
        (["--method.maps.patch-size", "2"], True, True, False),
    ],
)
def test_each_result_depends_on_the_settings_that_made_it_and_no_others(driver, words, first, second, ensemble):
    common = ["--data.val-fraction", "0.5"]
    before, after = _plan(driver, *common), _plan(driver, *common, *words)
    changed = {name: dict(before[name].config) != dict(after[name].config) for name in before}
    assert changed == {"model1": first, "model2": second, "ensemble": ensemble}


# ---------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("words", "heads", "losses"),
    [
        ([], ["embedding", "maps"], {"main", "first", "entropy", "embedding"}),
        (["--method.map-head", "False"], ["embedding"], {"main", "entropy", "embedding"}),
        (["--method.embedding-head", "False"], ["maps"], {"main", "first"}),
        (["--method.maps.gce", "False"], ["embedding", "maps"], {"main", "entropy", "embedding"}),
        (["--method.embedding.embedding-loss", "none"], ["embedding", "maps"], {"main", "first", "entropy"}),
    ],
)
def test_every_part_is_a_switch(words, heads, losses, driver):
    plan = _plan(driver, *words)
    task, method = plan["model1"].build({}), plan["model1"].config["method"]
    assert (list(task.model.classifier), set(task.losses)) == (heads, losses)
    assert {name for name in ("embedding", "maps") if method[name] is not None} == set(heads), "and no more decides it"
    batch = {"image": torch.randn(6, 3, 40, 40), "label": torch.arange(6) % 4, "seed": torch.arange(6)}
    task.step(batch)["loss"].backward()
    assert all(p.grad is not None for p in task.model.classifier.parameters())


def test_settings_reach_heads_and_losses(driver):
    given = ["--method.embedding.k", "2", "--method.embedding.alpha", "0.3", "--method.embedding.loss-weight", "1.5"]
    given += ["--method.maps.alpha", "0.4", "--method.maps.p-peak", "0.25", "--method.maps.k", "3"]
    given += ["--method.maps.gce-from-epoch", "2", "--method.average", "logits", "--method.members.alpha", "0.7"]
    task = _plan(driver, *given)["model1"].build({})
    block = task.model.map_head.diversification
    assert (task.model.embedding_head.pooling.k, task.losses["embedding"].alpha, task.weight) == (2, 0.3, 1.5)
    assert (block.alpha, block.p_peak, block.p_patch, block.patch_size) == (0.4, 0.25, 0.2, 1), "3 × 3 cells"
    assert (task.model.average, task.alpha, task.from_epoch) == ("logits", 0.7, 2)
    task.start_epoch(2)
    assert task.loss.k == 3
    off = _plan(driver, "--method.maps.diversification", "False")["model1"].build({})
    assert off.model.map_head.diversification is None


def test_switches_decide_who_teaches(driver):
    def needs(*words: str) -> dict[str, list[str]]:
        return {name: list(stage.needs) for name, stage in _plan(driver, *words).items()}

    assert needs() == {"model1": [], "model2": ["model1"], "ensemble": ["model1", "model2"]}
    assert needs("--method.members.alpha", "0")["model2"] == []
    assert needs("--method.members.models", "1") == {"model1": [], "ensemble": ["model1"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method.embedding-head", "False", "--method.map-head", "False"],
            "expected embedding-head or map-head or both to be True",
        ),
        (["--optim.label-smoothing", "0.1"], "expected 0 with --method.maps.gce True"),
        (["--method.members.no-teachers", "model3"], "--method.members.no-teachers: expected some of model1, model2"),
        (["--method.members.teacher", "best_val"], "--method.members.teacher best_val: expected validation images"),
        (["--method.members.alpha", "nan"], "--method.members.alpha: expected at least 0, got nan"),
        (["--model.frozen-until", "all"], "knowledge transfer trains the backbone's last feature map"),
    ],
)
def test_errors_are_one_line_with_the_flag_that_there_is(words, message, driver, tmp_path, capsys):
    assert driver.DRIVER.main(["demo", "--out", str(tmp_path / "x"), *TINY, *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line


def test_presets(driver):
    for preset in ("cub", "folder", "cars", "aircraft"):
        config = driver.DRIVER.read_arguments([preset, "--data.root", "x"])
        optim, method = config.optim, config.method
        assert (config.model.backbone, config.model.weights) == ("resnet50", "imagenet")
        assert (config.data.name, config.data.resize, config.data.crop) == (preset, 600, 448)
        assert (optim.lr, optim.new_layers_lr, optim.new_layers) == (0.001, 0.01, ("classifier",))
        assert (optim.epochs, optim.batch_size, optim.schedule, optim.weight_decay) == (100, 32, "cosine", 5e-4)
        assert (method.embedding_head, method.map_head, method.average) == (True, True, "probabilities")
        assert (method.members.models, method.members.alpha, method.maps.gce, method.maps.k) == (2, 0.5, True, 15)
        assert (method.embedding.k, method.embedding.embedding_loss, method.embedding.loss_weight) == (
            4,
            "within+between",
            2.0,
        )


# ---------------------------------------------------------------- above frozen layers


@pytest.mark.parametrize(("until", "alpha"), [("all", "0"), ("layer3", "0.5")])
def test_both_heads_of_both_models_learn_on_cached_features(until, alpha, driver, tmp_path, capsys, monkeypatch):
    words = [*FROZEN, "--model.frozen-until", until, "--method.members.alpha", alpha]
    words += ["--data.cache", str(tmp_path / "cache")]
    seen = []
    whole = EnsembleAccuracy.eval_step
    monkeypatch.setattr(
        EnsembleAccuracy, "eval_step", lambda task, batch: seen.append(batch["image"].shape[1]) or whole(task, batch)
    )
    stages = _run(driver, tmp_path / "run", *words)
    assert seen
    assert 3 not in seen, "the ensemble too sees features"
    measures = stages["ensemble"]["measures"]["test"]
    assert [measures[f"single_{n}_accuracy"] for n in (1, 2)] == [
        stages[f"model{n}"]["accuracy"]["last"] for n in (1, 2)
    ]
    assert "computing features of 24 images (train) once" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2, "both models share them"
    members = load(tmp_path / "run/weights/last.safetensors").members
    first, second = (member.state_dict() for member in members)
    frozen = [name for name in first if name.startswith("backbone.") and (until == "all" or "layer4" not in name)]
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    assert not torch.equal(first["classifier.maps.classifier.weight"], second["classifier.maps.classifier.weight"])


def test_members_that_look_through_other_layers_are_evaluated_on_images(driver):
    config = driver.DRIVER.read_arguments(["demo", *TINY, "--data.random-crop", "False"])
    samples = evaluation_samples(load_datasets(config.data, 0), config.model.preprocessing(config.data))
    engine = EngineConfig(device="cpu", workers=0)
    members = [Combined(build_backbone("resnet10_narrow", frozen_until="all"), 4) for _ in range(2)]
    assert cached_evaluations("ensemble", samples, members, engine) is samples
    members = [Combined(build_backbone("resnet10_narrow"), 4)] * 2
    assert cached_evaluations("ensemble", samples, members, engine) is samples


# ---------------------------------------------------------------- killed, and several processes


def _train(folder: Path, arm: Callable[..., None] | None = None, *point: Any) -> int:
    torch.set_num_threads(1)
    if arm is not None:
        arm(*point)
    arguments = [*TINY, "--report", "False", "--engine.checkpoint-every", "1"]
    return load_driver(FILE).DRIVER.main(["demo", "--out", str(folder), *arguments])


def test_a_killed_run_goes_on_at_its_model_to_the_same_bytes(tmp_path):
    code, output = Child(tmp_path / "output", _train, tmp_path / "whole").ended()
    assert code == 0, output
    # three steps an epoch: in the second of model 2
    point = (die_in_call, 5, "fgvc_ext.training.attention_transfer.AttentionTransfer.step")
    code, output = Child(tmp_path / "output", _train, tmp_path / "run", *point).ended()
    assert code == -signal.SIGKILL, output
    weights = tmp_path / "run/weights"
    before = {file.name: file.stat().st_mtime_ns for file in weights.glob("model*.safetensors")}
    assert set(before) == {"model1.safetensors"}
    code, output = Child(tmp_path / "output", _train, tmp_path / "run").ended()
    assert code == 0, output
    assert {name: (weights / name).stat().st_mtime_ns for name in before} == before
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")


def _train_longer(folder: Path) -> int:
    torch.set_num_threads(1)
    arguments = [*TINY, "--report", "False", "--engine.checkpoint-every", "1", "--optim.epochs", "2"]
    return load_driver(FILE).DRIVER.main(["demo", "--out", str(folder), *arguments])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    kill_at_random_moments(tmp_path, _train_longer, steps_and_weights({"model1": 6, "model2": 6, "ensemble": 0}))


def test_two_processes_finish_and_count_every_image_once(tmp_path):
    job.run(tmp_path / "output", 2, _train, tmp_path / "two")
    run = json.loads((tmp_path / "two/run.json").read_text())
    assert (run["status"], [entry["name"] for entry in run["stages"]]) == ("finished", ["model1", "model2", "ensemble"])
    measures = run["stages"][0]["measures"]["test"]
    accuracies = {name: value for name, value in measures.items() if name.endswith("_accuracy") and name[:5] != "class"}
    assert set(accuracies) == {f"{n}_accuracy" for n in ("embedding", "maps", "probabilities", "logits")}
    assert all((16 * value).is_integer() for value in accuracies.values())
    assert run["stages"][2]["measures"]["test"]["single_1_accuracy"] == measures["accuracy"]
