"""The shape of knowledge transfer in miniature: models that learn from frozen earlier ones, then an ensemble."""

from __future__ import annotations

import gc
import json
import weakref

import torch
from toy_models import ToyClassifier, ToyEnsemble, loaded
from toy_training import ToyConfig, ToyImages, centre, jitter, open_run

from fgvc_ext.data.loading import Samples
from fgvc_ext.models import load
from fgvc_ext.ops import orthogonal_loss, spatial_attention_map
from fgvc_ext.training import Artefact, Classification, Frozen, OptimConfig, Stage, run_stages
from fgvc_ext.training.sampling import derive_seed

TRAIN, TEST = ToyImages(33), ToyImages(21, "test")
OPTIM = OptimConfig(epochs=2, batch_size=8, lr=0.05, schedule="cosine", ema_decay=0.5)
built: list[weakref.ref] = []


class KnowledgeTransfer(Classification):
    """Cross-entropy, and attention where the teachers do not look."""

    def __init__(self, teachers: list[ToyClassifier], alpha: float = 0.5) -> None:
        super().__init__(ToyClassifier(), torch.nn.CrossEntropyLoss())
        self.teachers, self.alpha = [Frozen(teacher) for teacher in teachers], alpha

    def step(self, batch):
        features = self.model.features(batch["image"])
        scores = self.model.classifier(features).mean((2, 3))
        loss = self.loss(scores, batch["label"])
        logs = {"correct": (scores.argmax(1) == batch["label"]).sum()}
        if self.teachers:
            maps = torch.stack([spatial_attention_map(t.features(batch["image"])) for t in self.teachers])
            shared = orthogonal_loss(spatial_attention_map(features), maps)
            loss, logs["orthogonal"] = loss + self.alpha * shared, shared.detach() * len(scores)
        return {"loss": loss, "logs": logs, "n": len(scores)}


def build(earlier) -> KnowledgeTransfer:
    task = KnowledgeTransfer([loaded(result) for result in earlier.values()])
    built.append(weakref.ref(task))
    return task


def stages(config: ToyConfig, models: int) -> list[Stage | Artefact]:
    names = [f"model{number}" for number in range(1, models + 1)]
    members = [
        Stage(
            name=name,
            needs=names[:number],
            build=build,
            optim=OPTIM,
            train=lambda earlier: Samples(TRAIN, jitter),
            evaluations=lambda earlier: {"test": Samples(TEST, centre)},
            seed=derive_seed(config.seed, name),
            config={},
        )
        for number, name in enumerate(names)
    ]
    ensemble = Artefact(
        name="ensemble", needs=names, make=lambda e: ToyEnsemble([loaded(result) for result in e.values()]), config={}
    )
    return [*members, ensemble]


def run(folder, models: int) -> dict:
    config = ToyConfig()
    with open_run(folder, config) as opened:
        return run_stages(stages(config, models), opened, config.engine)


def test_models_learn_from_frozen_teachers_and_make_an_ensemble(tmp_path):
    results = run(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(("train_orthogonal" in row) == (row["stage"] != "model1") for row in rows)
    ensemble = load(tmp_path / "weights/last.safetensors")
    for number, member in enumerate(ensemble.models, start=1):
        alone = load(results[f"model{number}"].path).state_dict()
        assert all(torch.equal(value, alone[name]) for name, value in member.state_dict().items()), (
            "and no teacher moved"
        )
    gc.collect()
    assert [reference() for reference in built] == [None] * len(built), "a finished task is gone, its memory with it"


def test_another_model_leaves_the_others_as_they_are(tmp_path):
    before = run(tmp_path, 2)
    files = {name: result.path.read_bytes() for name, result in before.items() if name != "ensemble"}
    facts = json.loads((tmp_path / "run.json").read_text())
    facts["stages"] = [entry for entry in facts["stages"] if entry["name"] != "ensemble"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    after = run(tmp_path, 3)
    assert all(after[name].path.read_bytes() == content for name, content in files.items())
    assert len(load(after["ensemble"].path).models) == 3
