"""Several processes train what one trains: the same parameters, class means and counts at the same global batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import job
import pytest
import torch
from toy_training import ToyConfig, ToyImages, centre, open_run

from fgvc_ext import nn as fgvc_nn
from fgvc_ext.data.loading import Samples
from fgvc_ext.nn import class_mean
from fgvc_ext.training import Classification, EngineConfig, OptimConfig, Stage, Task, distributed, run_stages
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("several processes")  # one worker, which makes what they share once

RANKS = (2, 3)


class Embedding(torch.nn.Module):
    """Features with a frozen BatchNorm, an embedding, scores."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.embedding, self.classifier = torch.nn.Linear(8, 5), torch.nn.Linear(5, 3)

    def forward(self, images: torch.Tensor, seed: torch.Tensor | None = None) -> torch.Tensor:
        return self.classifier(self.embed(images))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        self.features[1].eval()
        return self.embedding(self.features(images).mean((2, 3)))

    def parameter_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {"features": list(self.features.parameters()), "classifier": list(self.classifier.parameters()),
                "embedding": list(self.embedding.parameters())}  # fmt: skip


class WithClassMeans(Classification):
    """Cross-entropy, which is a mean over samples, and the class-mean loss, which is one of the global batch."""

    def __init__(self) -> None:
        super().__init__(Embedding(), torch.nn.CrossEntropyLoss())
        self.class_means = fgvc_nn.ClassMeanLoss(3, 5, margin=2.0)

    def step(self, batch):
        embeddings = self.model.embed(batch["image"])
        scores = self.model.classifier(embeddings)
        means = self.class_means(embeddings, batch["label"], batch_sizes=self.batch_sizes)
        loss = self.loss(scores, batch["label"]) + 0.1 * means
        correct = (scores.detach().argmax(1) == batch["label"]).sum()
        return {"loss": loss, "logs": {"correct": correct}, "n": len(scores)}


@dataclass
class Case:
    """One training in one process or several; the epoch's last batch has 2 images or more."""

    images: int = 36
    batch_size: int = 12
    epochs: int = 7
    accumulate: int = 1
    means: bool = True
    clip: float | None = None


CASES = {
    "even": Case(),
    "uneven": Case(images=35, batch_size=7, epochs=4),
    "a last batch smaller than the ranks": Case(images=26, batch_size=8, epochs=5),
    "accumulated": Case(means=False, accumulate=2, clip=0.5),
    "uneven, without class means": Case(images=35, batch_size=7, epochs=2, means=False),
}


def train(folder: Path, case: Case) -> None:
    optim = OptimConfig(epochs=case.epochs, batch_size=case.batch_size, lr=0.05, schedule="constant",
                        accumulate=case.accumulate, clip_grad_norm=case.clip)  # fmt: skip
    config = ToyConfig(
        optim=optim, engine=EngineConfig(device="cpu", workers=0, broken_images="skip", eval_batch_size=33)
    )
    images, test = ToyImages(case.images, broken=(4,)), ToyImages(397, "test")

    def build(earlier) -> Task:
        torch.manual_seed(0)
        return WithClassMeans() if case.means else Classification(Embedding(), torch.nn.CrossEntropyLoss())

    stage = Stage(
        name="only",
        build=build,
        optim=optim,
        train=lambda earlier: Samples(images, centre, "skip"),
        evaluations=lambda earlier: {"test": Samples(test, centre)},
        seed=3,
    )
    with open_run(folder, config) as run:
        run_stages([stage], run, config.engine)


WRONG = {
    "gradients stay where they are": ("even", distributed, "data_parallel", lambda task: task),
    "every rank's mean counts the same": (
        "uneven, without class means",
        Trainer,
        "_sizes",
        lambda trainer, own: [own] * distributed.current_process().world_size,
    ),
    "class means of each rank's own": ("even", class_mean, "_world_size", lambda: 1),
}


def train_wrong(folder: Path) -> int:
    """The wrong variants: each a case with one function done as others do it."""
    for name, (case, owner, function, replacement) in WRONG.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, function, replacement)
            train(folder / name, CASES[case])
    return 0


def train_all(folder: Path) -> int:
    """All cases in one group of processes."""
    for name, case in CASES.items():
        train(folder / name, case)
    return 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train_all(folder)
    return folder


@pytest.fixture(scope="module", params=RANKS)
def together(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(f"of-{request.param}")
    job.run(folder / "output", request.param, train_all, folder)
    return folder


def _state(folder: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(folder / "checkpoints", "only").load_latest()
    assert found is not None
    return found[0]["step"]["task"]


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_class_means_are_those_of_one_process(name, alone, together):
    expected, found = _state(alone / name), _state(together / name)
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_so_are_the_metrics_and_the_counts_of_an_odd_number_of_images(name, alone, together):
    for expected, found in zip(_rows(alone / name), _rows(together / name), strict=True):
        assert list(found) == list(expected)
        assert found["test_accuracy"] * 397 == pytest.approx(expected["test_accuracy"] * 397, abs=1e-9)
        assert found["train_accuracy"] == expected["train_accuracy"]
        assert found["broken"] == expected["broken"] == 1
        for loss in ("train_loss", "test_loss", "test_class_accuracy"):
            assert found[loss] == pytest.approx(expected[loss], rel=1e-4)


def test_wrong_variants_differ(alone, tmp_path):
    job.run(tmp_path / "output", 2, train_wrong, tmp_path)
    for name, (case, *_) in WRONG.items():
        expected, found = _state(alone / case), _state(tmp_path / name)
        differences = [float((found[key] - value).abs().max()) for key, value in expected.items()]
        assert max(differences) > 1e-3, f"{name}: a comparison that this passes would say nothing"
