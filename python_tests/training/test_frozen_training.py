"""Training above frozen layers: from cached features as from images, whatever interrupts it."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import job
import pytest
import torch
from torch import nn
from toy_training import Child, ToyImages, traces

from fgvc_ext.data import BrokenImageError, split_validation
from fgvc_ext.data.pipeline import DataConfig, Datasets, evaluation_samples, preprocessing, training_samples
from fgvc_ext.models import SubtleDifferences
from fgvc_ext.models.backbone import IMAGENET, Backbone
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training import Classification, EngineConfig, Frozen, OptimConfig, Preempted, RunFolder, Stage, run_stages
from fgvc_ext.training import features as engine_of_features
from fgvc_ext.training.stop_request import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Settings:
    """What the tests change of a training above frozen layers."""

    cache: Path
    features: str = "fp16"
    until: str | None = "two"
    evaluate_cached: bool = False
    flip: float = 0.5
    random_crop: bool = False
    epochs: int = 3
    seed: int = 7
    weights: int = 0
    images: int = 26
    broken: tuple[int, ...] = ()
    broken_images: str = "error"
    crop: int = 12
    val_fraction: float = 0.0
    checkpoint_every: int = 0
    workers: int = 0


def make_backbone(settings: Settings) -> Backbone:
    """Three groups of a convolution and a BatchNorm each; the frozen ones' weights follow from `settings.weights`."""
    layers: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.weights)
        for number, (group, width) in enumerate([("one", 6), ("two", 8), ("three", 10)]):
            before = (3, 6, 8)[number]
            layers[group] = nn.Sequential(
                nn.Conv2d(before, width, 3, 1 + number % 2, 1), nn.BatchNorm2d(width), nn.ReLU()
            )
            nn.init.normal_(layers[group][0].weight, std=0.4)  # large enough that scores differ from the first epoch on
    found = Backbone(layers, 10, lambda name: name.partition(".")[0]).freeze(settings.until)
    found.evaluate_cached = settings.evaluate_cached
    return found


def datasets_of(settings: Settings) -> Datasets:
    train, val = ToyImages(settings.images, broken=settings.broken), None
    if settings.val_fraction:
        train, val = split_validation(train, settings.val_fraction, settings.seed)
    return Datasets(train, ToyImages(15, "test"), val)


def stage(settings: Settings, **changes: Any) -> Stage:
    config = DataConfig(
        name="folder", resize=16, crop=settings.crop, flip=settings.flip, random_crop=settings.random_crop,
        features=settings.features, cache=settings.cache,
    )  # fmt: skip
    datasets, prepare = datasets_of(settings), preprocessing(config, IMAGENET)

    def build(earlier: Any) -> Classification:
        return Classification(SubtleDifferences(make_backbone(settings), 3, patch_size=2), nn.CrossEntropyLoss())

    whole = {
        "build": build,
        "train": lambda earlier: training_samples(datasets, config, prepare, settings.broken_images),
        "evaluations": lambda earlier: evaluation_samples(datasets, prepare),
        "optim": OptimConfig(epochs=settings.epochs, batch_size=8, lr=0.05, schedule="cosine", ema_decay=0.9),
    }
    return Stage(name="s", seed=settings.seed, config={"data": config}, **{**whole, **changes})


def engine_of(settings: Settings) -> EngineConfig:
    return EngineConfig(
        device="cpu", workers=settings.workers, checkpoint_every=settings.checkpoint_every,
        broken_images=settings.broken_images,
    )  # fmt: skip


def run(folder: Path, settings: Settings, stop: StopRequest | None = None, **changes: Any) -> list[dict[str, Any]]:
    """The lines of the run's metrics."""
    facts = {"data": {"train": datasets_of(settings).train.fingerprint()}}
    with RunFolder(folder, settings, facts=facts) as opened:
        run_stages([stage(settings, **changes)], opened, engine_of(settings), stop=stop)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(rows: list[dict[str, Any]]) -> list[float]:
    """Losses and accuracies of all epochs."""
    return [row[f"{split}_{name}"] for row in rows for split in ("train", "test") for name in ("loss", "accuracy")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights_file(folder / "weights/s.safetensors")[0]


def files(settings: Settings) -> list[str]:
    return sorted(file.name for file in settings.cache.glob("*.npy"))


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "cache")


# -------------------------------------------------------------------- the same training


@pytest.mark.parametrize("until", ["one", "two", "all"])
def test_cached_features_train_as_images_do(tmp_path, settings, until):
    found = {
        kind: run(tmp_path / kind, replace(settings, until=until, features=kind)) for kind in ("images", "fp32", "fp16")
    }
    assert len(files(settings)) == 3  # fp16 and fp32 of training, one of the test images
    exact, near = weights(tmp_path / "images"), weights(tmp_path / "fp16")
    for name, value in weights(tmp_path / "fp32").items():
        torch.testing.assert_close(value, exact[name], rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(near[name], exact[name], rtol=5e-2, atol=2e-3, msg=name)
    assert numbers(found["fp32"]) == pytest.approx(numbers(found["images"]), rel=1e-5)
    assert [row["train_loss"] for row in found["fp16"]] == pytest.approx(
        [row["train_loss"] for row in found["images"]], rel=1e-2
    )


def test_flips_count(tmp_path, settings):
    flipped = run(tmp_path / "flipped", settings)
    assert numbers(run(tmp_path / "plain", replace(settings, flip=0.0))) != numbers(flipped)
    assert numbers(run(tmp_path / "again", settings)) == numbers(flipped)


def test_the_frozen_part_is_shipped_as_it_was(tmp_path, settings):
    run(tmp_path / "run", settings)
    before = SubtleDifferences(make_backbone(settings), 3).state_dict()
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, before[name]) == name.startswith(("backbone.one", "backbone.two")), name


# -------------------------------------------------------------------- what is evaluated on


def test_the_last_epoch_is_evaluated_on_images(tmp_path, settings, monkeypatch):
    view = engine_of_features._Maker._view

    def forged(self: Any, batch: Any, images: Any, **options: Any) -> Any:  # features of test images are all zero
        return (images.dataset.split != "test") * view(self, batch, images, **options)

    monkeypatch.setattr(engine_of_features._Maker, "_view", forged)
    constant = replace(settings, until="all")
    rows = run(tmp_path / "run", constant)
    cached = run(tmp_path / "cached", replace(constant, evaluate_cached=True))
    images = run(tmp_path / "images", replace(constant, features="images"))
    assert [row["test_loss"] for row in rows[:-1]] == [row["test_loss"] for row in cached[:-1]]
    assert {row["test_accuracy"] for row in cached} == {5 / 15}  # the same scores for every image
    assert rows[-1]["test_loss"] == pytest.approx(images[-1]["test_loss"], rel=1e-3)
    assert rows[-1]["test_loss"] != pytest.approx(cached[-1]["test_loss"], rel=1e-3)


def test_cached_and_whole_evaluations_count_the_same(tmp_path, settings):
    images, cached = (run(tmp_path / str(kind), replace(settings, evaluate_cached=kind)) for kind in (False, True))
    for name in ("test_accuracy", "test_class_accuracy"):
        assert [row[name] for row in images] == [row[name] for row in cached]
    assert images[-1]["test_loss"] == pytest.approx(cached[-1]["test_loss"], rel=1e-5)


def test_features_that_nobody_reads_are_not_computed(tmp_path, settings):
    run(tmp_path / "run", replace(settings, epochs=1))
    assert len(files(settings)) == 1


# -------------------------------------------------------------------- what is computed anew


def test_one_cache_serves_all_runs_and_another_input_has_its_own(tmp_path, settings):
    rows = run(tmp_path / "first", settings)
    known = files(settings)
    changed = {file: (settings.cache / file).stat().st_mtime_ns for file in known}
    assert numbers(run(tmp_path / "again", settings)) == numbers(rows)
    run(tmp_path / "another seed", replace(settings, seed=8))
    assert files(settings) == known
    assert {file: (settings.cache / file).stat().st_mtime_ns for file in known} == changed
    for number, change in enumerate([{"weights": 1}, {"until": "one"}, {"crop": 14}]):
        run(tmp_path / str(number), replace(settings, **change))
        assert len(files(settings)) == len(known) + 2 * (number + 1), change  # of training and of the test
    for number, change in enumerate([{"images": 25}, {"features": "fp32"}, {"flip": 0.0}]):
        run(tmp_path / f"train {number}", replace(settings, **change))
        assert len(files(settings)) == len(known) + 6 + number + 1, change  # of training alone


def test_features_of_a_whole_serve_every_validation_share(tmp_path, settings):
    shared = replace(settings, val_fraction=0.3, epochs=2)
    for seed in (1, 2):
        rows = run(tmp_path / str(seed), replace(shared, seed=seed))
        images = run(tmp_path / f"images {seed}", replace(shared, seed=seed, features="images"))
        assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in images], rel=1e-2)
    assert len(files(settings)) == 4  # training, test, and each validation share


# -------------------------------------------------------------------- where images are needed


def test_images_are_used_where_augmentation_needs_them_and_a_line_says_why(tmp_path, settings, capsys):
    run(tmp_path / "run", replace(settings, random_crop=True))
    assert "s: frozen until two, trained on images because --data.random-crop True" in capsys.readouterr().out
    assert not settings.cache.exists()
    run(tmp_path / "open", replace(settings, until=None))
    assert "frozen" not in capsys.readouterr().out


@pytest.mark.parametrize(("teacher", "cached"), [(0, True), (1, False), (None, False)])
def test_a_teacher_must_look_through_the_same_frozen_layers(tmp_path, settings, capsys, teacher, cached):
    class Student(Classification):
        def step(self, batch):
            self.teacher(batch["image"])
            return super().step(batch)

    def build(earlier: Any) -> Classification:
        task = Student(SubtleDifferences(make_backbone(settings), 3, patch_size=2), nn.CrossEntropyLoss())
        sees = nn.Conv2d(3, 4, 1) if teacher is None else make_backbone(replace(settings, weights=teacher))
        task.teacher = Frozen(sees)
        return task

    run(tmp_path / "run", settings, build=build)
    assert ("because a teacher" in capsys.readouterr().out) != cached
    assert bool(files(settings) if settings.cache.exists() else []) == cached


def test_broken_images_are_counted_as_before(tmp_path, settings):
    skipping = replace(settings, broken=(3, 4), broken_images="skip")
    rows = run(tmp_path / "run", skipping)
    images = run(tmp_path / "images", replace(skipping, features="images"))
    assert [row["broken"] for row in rows] == [row["broken"] for row in images] == [2, 2, 2]
    assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in images], rel=1e-2)
    with pytest.raises(BrokenImageError, match=r"index 3"):
        run(tmp_path / "refused", replace(settings, broken=(3, 4), cache=tmp_path / "another"))
    assert not list((tmp_path / "another").glob("*.npy"))


def test_features_beyond_fp16_are_refused(tmp_path, settings, monkeypatch):
    view = engine_of_features._Maker._view
    monkeypatch.setattr(engine_of_features._Maker, "_view", lambda *args, **kwargs: 1e6 * view(*args, **kwargs))
    with pytest.raises(ValueError, match=r"more than fp16 can hold: --data.features fp32"):
        run(tmp_path / "run", settings)
    assert not files(settings)
    run(tmp_path / "another", replace(settings, features="fp32"))


# -------------------------------------------------------------------- interruptions


class StopAfter(StopRequest):
    """A signal that comes after so many questions whether one has come."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    @property
    def received(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None

    @received.setter
    def received(self, value):
        pass


@pytest.mark.parametrize("keep_cache", [True, False])
@pytest.mark.parametrize("stop_after", [6, 9, 12])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, settings, stop_after, keep_cache):
    saving = replace(settings, checkpoint_every=1)
    run(tmp_path / "whole", saving)
    with pytest.raises(Preempted):
        run(tmp_path / "stopped", saving, stop=StopAfter(stop_after))
    for file in [] if keep_cache else settings.cache.iterdir():
        file.unlink()
    run(tmp_path / "stopped", saving)
    assert traces(tmp_path / "stopped") == traces(tmp_path / "whole")


def slow_run(folder: Path, settings: Settings) -> int:
    """A training whose features take their time; every image that is loaded leaves a line."""
    torch.set_num_threads(1)
    load = ToyImages.load

    def slowly(self: ToyImages, index: int) -> torch.Tensor:
        with (folder / "loaded").open("a") as stream:
            stream.write(f"{self.split} {index}\n")
        time.sleep(0.01)
        return load(self, index)

    ToyImages.load = slowly
    run(folder / "run", settings)
    return 0


def test_killed_while_features_are_made(tmp_path, settings):
    child = Child(tmp_path / "output", slow_run, tmp_path, settings)
    deadline = time.monotonic() + 60
    while not list(settings.cache.glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.process.kill()
    child.ended()
    assert list(settings.cache.glob(".*.partial"))
    assert not files(settings)
    run(tmp_path / "run", settings)
    run(tmp_path / "whole", replace(settings, cache=tmp_path / "another"))
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")
    assert not list(settings.cache.glob(".*.partial"))


def test_two_runs_make_the_features_once(tmp_path, settings):
    once = replace(settings, evaluate_cached=True)
    children = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        children.append(Child(tmp_path / name / "output", partial(slow_run, tmp_path / name, once)))
    for child in children:
        assert child.ended()[0] == 0, child.text()
    kept = [
        file for name in ("a", "b") if (file := tmp_path / name / "loaded").exists()
    ]  # one may come when all is made
    loaded = [file.read_text().splitlines() for file in kept]
    probes = 4  # of each of two splits, the first image of each run, for its shape
    assert 26 + 15 <= sum(len(lines) for lines in loaded) <= 26 + 15 + probes
    assert traces(tmp_path / "a/run") == traces(tmp_path / "b/run")


def run_on_rank(folder: Path, settings: Settings) -> int:
    run(folder, settings)
    return 0


def test_two_ranks_read_what_one_of_them_makes(tmp_path, settings):
    head = replace(settings, until="all", images=24)  # no BatchNorm learns: it would see shares of the batches
    job.run(tmp_path / "output", 2, run_on_rank, tmp_path / "two", head)
    assert len(files(settings)) == 2
    assert "computing features of 24 images" in (tmp_path / "output.0").read_text()
    run(tmp_path / "one", replace(head, cache=tmp_path / "another"))
    one = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-5, msg=name)
