"""The shape of ELoPE in miniature: classifier → localiser → boxes → classifier of crops → weights → one model."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import torch
from toy_models import ToyClassifier, ToyCrops, ToyEnsemble, ToyLocaliser, loaded
from toy_training import Child, ToyConfig, ToyImages, centre, open_run, traces

from fgvc_ext.data.loading import Samples
from fgvc_ext.models import load
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.ops import heatmap_to_boxes
from fgvc_ext.training import Artefact, Classification, Frozen, OptimConfig, Results, Stage, Task, run_stages
from fgvc_ext.training.evaluation import map_samples

TRAIN, TEST = ToyImages(33), ToyImages(21, "test")
OPTIM = OptimConfig(epochs=2, batch_size=8, lr=0.05, schedule="constant")


class Localisation(Task):
    """The module learns the frozen classifier's mean feature map. The smaller the difference, the better."""

    higher_is_better = False

    def __init__(self, classifier: ToyClassifier) -> None:
        super().__init__()
        self.model, self.classifier = ToyLocaliser(), Frozen(classifier)

    def step(self, batch):
        target = self.classifier.features(batch["image"]).mean(1, keepdim=True)
        loss = torch.nn.functional.smooth_l1_loss(self.model(batch["image"]), target)
        return {"loss": loss, "logs": {}, "n": len(target)}

    def eval_step(self, batch):
        target = self.classifier.features(batch["image"]).mean(1, keepdim=True)
        difference = (self.model(batch["image"]) - target).abs().mean((1, 2, 3))
        return {"n": torch.tensor(len(target)), "difference": difference.sum()}


def stages(config: ToyConfig) -> list[Stage | Artefact]:
    common = {"optim": OPTIM, "seed": config.seed, "config": {}}

    def samples(earlier: Results):
        return {"test": Samples(TEST, centre)}

    def crops(images: ToyImages, earlier: Results) -> Samples:
        boxes = load_weights_file(earlier["boxes"].path)[0]
        return Samples(ToyCrops(images, boxes[images.split]), centre)

    def find_boxes(earlier: Results) -> dict[str, torch.Tensor]:
        localiser = loaded(earlier["localiser"])

        def boxes(images: torch.Tensor) -> torch.Tensor:
            return heatmap_to_boxes(localiser(images)[:, 0], threshold=0.3, image_size=12, min_size=4)

        return {i.split: map_samples(boxes, Samples(i, centre), config.engine) for i in (TRAIN, TEST)}

    def weighted(earlier: Results) -> Classification:
        model = ToyClassifier(weighted=True)
        model.load_state_dict(loaded(earlier["crops"]).state_dict(), strict=False)
        return Classification(model, torch.nn.CrossEntropyLoss())

    on_crops = {"train": lambda e: crops(TRAIN, e), "evaluations": lambda e: {"test": crops(TEST, e)}}
    whole = {"train": lambda e: Samples(TRAIN, centre), "evaluations": samples}
    classifier = {"build": lambda e: Classification(ToyClassifier(), torch.nn.CrossEntropyLoss())}
    return [
        Stage(name="classifier", **classifier, **whole, **common),
        Stage(
            name="localiser",
            needs=["classifier"],
            build=lambda earlier: Localisation(loaded(earlier["classifier"])),
            **whole,
            **{**common, "optim": OptimConfig(epochs=3, batch_size=8, lr=0.2, schedule="constant", new_layers=())},
        ),
        Artefact(name="boxes", needs=["localiser"], make=find_boxes, config={}),
        Stage(name="crops", needs=["boxes"], **classifier, **on_crops, **common),
        Stage(name="weights", needs=["boxes", "crops"], build=weighted, **on_crops, **common),
        Artefact(
            name="model",
            needs=["classifier", "weights"],
            make=lambda earlier: ToyEnsemble([loaded(result) for result in earlier.values()]),
            config={},
        ),
    ]


def run(folder: Path) -> dict:
    config = ToyConfig(resume="auto")
    with open_run(folder, config) as opened:
        return run_stages(stages(config), opened, config.engine)


def test_every_stage_builds_on_the_ones_before(tmp_path):
    results = run(tmp_path)
    facts = {entry["name"]: entry for entry in json.loads((tmp_path / "run.json").read_text())["stages"]}
    assert list(facts) == ["classifier", "localiser", "boxes", "crops", "weights", "model"]
    assert all(entry["status"] == "done" for entry in facts.values())
    assert facts["boxes"]["identity"]["result of localiser"] == results["localiser"].sha256
    assert facts["localiser"]["headline"] == "difference"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    differences = [row["test_difference"] for row in rows if row["stage"] == "localiser"]
    assert facts["localiser"]["difference"] == {"last": differences[-1], "best_test": min(differences)}
    boxes = load_weights_file(results["boxes"].path)[0]
    assert (boxes["train"].shape, boxes["test"].shape) == ((33, 4), (21, 4))
    assert isinstance(load(tmp_path / "weights/last.safetensors"), ToyEnsemble), "the last model is the one that ships"
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert run(tmp_path) == results
    assert all(file.read_bytes() == content for file, content in before.items()), "nothing was done again"


def train(folder: Path) -> int:
    torch.set_num_threads(1)
    run(folder)
    return 0


# named points of the run: at the end of a training, before and after the artefact, in the middle of what builds on it
MOMENTS = (
    "weights/classifier.safetensors",
    "checkpoints/localiser-e00003-*.json",
    "artefacts/boxes.safetensors",
    "checkpoints/crops-e00001-*.json",
    "weights/weights.safetensors",
)


def test_killed_at_every_stage_it_ends_with_the_same_bytes(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert Child(tmp_path / "output", train, whole).ended() == (0, (tmp_path / "output").read_text())
    for file in MOMENTS:
        child = Child(tmp_path / "output", train, folder)
        while child.process.is_alive() and not list(folder.glob(file)):
            time.sleep(0.001)
        child.process.kill()
        assert child.ended()[0] == -signal.SIGKILL, f"it ended before {file} was there: {child.text()}"
    assert Child(tmp_path / "output", train, folder).ended()[0] == 0
    assert traces(folder) == traces(whole)
    boxes = "artefacts/boxes.safetensors"
    assert (folder / boxes).read_bytes() == (whole / boxes).read_bytes()
