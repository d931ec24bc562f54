"""The shape of dual attention in miniature: student and teacher trained together, distillation, five measures."""

from __future__ import annotations

import csv
import json

import torch
from toy_models import ToyClassifier, ToyEnsemble
from toy_training import ToyConfig, ToyImages, centre, jitter, open_run

from fgvc_ext.data.loading import Samples
from fgvc_ext.explain.report import write_run_report
from fgvc_ext.nn import ClassMeanLoss
from fgvc_ext.training import OptimConfig, Stage, Task, run_stages

MEASURES = ("accuracy", "student_accuracy", "teacher_accuracy", "agreement", "confidence")


class Distillation(Task):
    """The student learns from labels and from the teacher, the teacher from labels; their mean is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ToyEnsemble([ToyClassifier(), ToyClassifier()])
        self.compactness = ClassMeanLoss(3, 3)  # a loss with a buffer
        self.temperature = torch.nn.Parameter(torch.zeros(()))  # and one with a parameter

    def step(self, batch):
        student, teacher = (member(batch["image"]) for member in self.model.models)
        label, entropy = batch["label"], torch.nn.functional.cross_entropy
        soft = entropy(student * self.temperature.exp(), teacher.detach().softmax(1))
        parts = {"hard": entropy(student, label), "teacher": entropy(teacher, label), "soft": soft}
        parts["compact"] = self.compactness(student, label)
        logs = {name: value.detach() * len(label) for name, value in parts.items()}
        return {"loss": sum(parts.values()), "logs": logs, "n": len(label)}

    def eval_step(self, batch):
        student, teacher = (member(batch["image"]) for member in self.model.models)
        fused, label = self.model(batch["image"]), batch["label"]
        return {
            "n": torch.tensor(len(label)),
            "accuracy": (fused.argmax(1) == label).sum(),
            "student_accuracy": (student.argmax(1) == label).sum(),
            "teacher_accuracy": (teacher.argmax(1) == label).sum(),
            "agreement": (student.argmax(1) == teacher.argmax(1)).sum(),
            "confidence": fused.exp().amax(1).sum(),
        }


def stages(config: ToyConfig) -> list[Stage]:
    optim = OptimConfig(epochs=2, batch_size=8, lr=0.05, schedule="cosine", ema_decay=0.9)
    return [
        Stage(
            name="dual",
            build=lambda earlier: Distillation(),
            optim=optim,
            train=lambda earlier: Samples(ToyImages(33), jitter),
            evaluations=lambda earlier: {"test": Samples(ToyImages(21, "test"), centre)},
            seed=config.seed,
            config={},
        )
    ]


def test_five_measures_reach_metrics_run_file_and_report(tmp_path):
    config = ToyConfig()
    with open_run(tmp_path, config) as run:
        run_stages(stages(config), run, config.engine)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in (*(f"test_{measure}" for measure in MEASURES), *(f"train_{p}" for p in ("hard", "teacher", "soft"))):
        assert [float(row[name]) for row in rows] == [float(f"{line[name]:.6g}") for line in lines], name
    entry = json.loads((tmp_path / "run.json").read_text())["stages"][0]
    assert entry["headline"] == "accuracy"
    assert tuple(entry["measures"]["test"]) == MEASURES
    assert entry["accuracy"]["last"] == lines[-1]["test_accuracy"]
    page = write_run_report(tmp_path).read_text()
    assert all(f"<td>{measure}</td>" in page for measure in MEASURES)


def test_losses_with_parameters_and_buffers_are_trained_and_saved(tmp_path):
    config = ToyConfig()
    with open_run(tmp_path, config) as run:
        run_stages(stages(config), run, config.engine)
    first, last = (torch.load(file, weights_only=True)["step"]["task"] for file in sorted(tmp_path.rglob("*.pt")))
    assert not torch.equal(first["compactness.class_means"], last["compactness.class_means"])
    assert first["temperature"] != 0
    assert first["temperature"] != last["temperature"]
