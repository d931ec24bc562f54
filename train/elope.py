"""Train ELoPE (WACV 2020): localisation module, k-max pooling and embedding layer, four stages to one network.

python train/elope.py demo
python train/elope.py cub --data.root CUB_200_2011
python train/elope.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/elope.py demo --method.localisation off --method.weights False --method.embedding-loss within

From an installed package: fgvc-ext train elope demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fgvc_ext.data.boxed import boxes_of
from fgvc_ext.data.loading import Samples
from fgvc_ext.data.pipeline import DataConfig, Datasets
from fgvc_ext.models import ELoPE, load
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training import Artefact, OptimConfig, Results, RunConfig, Stage
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.embedding import EmbeddingClassification, EmbeddingConfig, FineTunedPooling, mean_embeddings
from fgvc_ext.training.object_crops import BOXES, LocalisationConfig, ObjectCrops
from fgvc_ext.training.presets import demo, demo_data, presets

if TYPE_CHECKING:  # it needs matplotlib, and only a report does
    from fgvc_ext.explain.document import Section


@dataclass
class MethodConfig(LocalisationConfig, EmbeddingConfig):
    """The paper's parts: every row of its Table 5 is a setting of these."""

    weights: bool = True
    """Stage 4: learn weights of the k values (equation 4)."""


LOCALISER = partial(OptimConfig, epochs=45, batch_size=16, lr=0.003, weight_decay=0.001, step_epochs=15, new_layers=())
POOLING = partial(OptimConfig, epochs=30, batch_size=14, lr=0.001, weight_decay=0.001, step_epochs=20)


@dataclass
class Config(RunConfig):
    """ELoPE: efficient localisation, pooling, embedding. `optim` trains the classifier, on images and on crops."""

    method: MethodConfig = field(default_factory=MethodConfig)
    localiser: OptimConfig = field(default_factory=LOCALISER)
    """Stage 2, the localisation module."""
    fine_tuning: OptimConfig = field(default_factory=POOLING)
    """Stage 4: its rate is that of the pooling weights; all else goes on at the classifier's last rate."""
    k_runs: tuple[Path, ...] = ()
    """Folders of other, finished runs, whose accuracies over K the report draws."""


def recipe(name: Any) -> Config:
    """The recipe of section 6, and of the public code where the paper is silent."""
    augmentation: dict[str, Any] = {"jitter": 0.4, "rotation": 20.0, "lighting": 0.1}
    return Config(
        data=DataConfig(name=name, resize=896, crop=448, keep_ratio=False, **augmentation),
        model=ModelConfig(weights="imagenet"),
        method=MethodConfig(threshold=0.2 if name in ("cars", "aircraft") else 0.3),
        optim=OptimConfig(epochs=90, batch_size=14, lr=0.003, weight_decay=0.001, step_epochs=30),
        out=Path("runs") / f"elope-{name}",
    )


PRESETS = presets(
    (
        "Synthetic birds on a CPU, in less than a minute: all four stages.",
        demo(
            Config,
            "elope",
            data=demo_data(image_size=224, resize=224, keep_ratio=False),
            method=MethodConfig(embedding_dim=128, localiser_rotation=0.0),
            localiser=OptimConfig(epochs=6, batch_size=30, lr=0.01, schedule="cosine", new_layers=()),
            fine_tuning=OptimConfig(epochs=2, batch_size=30, lr=0.01, schedule="constant", weight_decay=5e-4),
        ),
    ),
    recipe,
    cub="CUB-200-2011 with the paper's recipe: ResNet-50, 448 px, 90 epochs.",
    cars="Stanford Cars with the paper's recipe, τ = 0.2.",
    aircraft="FGVC-Aircraft with the paper's recipe, τ = 0.2.",
)


class Pipeline(ObjectCrops):
    """What the stages train and compute; `earlier` are the results of what a stage needs."""

    config: Config
    method: MethodConfig

    def __init__(self, config: Config, datasets: Datasets) -> None:
        super().__init__(config, datasets, config.method)
        self.last = "classifier" if self.method.localisation == "off" else "crops"
        if self.method.weights and self.method.pooling != "gkmp":
            raise ValueError(
                f"--method.weights: expected False with --method.pooling {self.method.pooling}: only gkmp has some"
            )
        # Now, and not after hours of the stages before:
        if self.method.threshold > 1 or self.method.localiser_rotation > 180:
            raise ValueError(
                "--method: expected a threshold of at most 1 and a localiser-rotation of at most 180 degrees, got "
                f"{self.method.threshold} and {self.method.localiser_rotation}"
            )

    def network(self, earlier: Results, weighted: bool = False) -> ELoPE:
        backbone, classes, finds = self.config.model.build(), len(self.datasets.train.classes), self.localiser(earlier)
        size = self.config.data.crop
        return ELoPE(backbone, classes, **self.method.head(), weighted=weighted, size=size, localiser=finds)

    def losses(self, optim: OptimConfig) -> dict[str, Any]:
        return self.method.losses(len(self.datasets.train.classes), optim.label_smoothing)

    def classification(self, earlier: Results) -> EmbeddingClassification:
        return EmbeddingClassification(self.network(earlier), **self.losses(self.config.optim))

    def weighted(self, earlier: Results) -> FineTunedPooling:
        """The trained network with pooling weights of one, and the class means that its embeddings have."""
        model = self.network(earlier, weighted=True)
        model.load_state_dict({**model.state_dict(), **load(earlier[self.last].path).state_dict()})
        task = FineTunedPooling(model, before=self.config.optim, **self.losses(self.config.fine_tuning))
        if "means" in earlier:
            task.losses["embedding"].class_means = load_weights_file(earlier["means"].path)[0]["means"]
        return task

    def means(self, earlier: Results) -> dict[str, Tensor]:
        model: Any = load(earlier[self.last].path)
        model.localiser = None  # its images are cut already
        crop, engine = self.whole.eval_crop(), self.config.engine
        samples = Samples(self.images(earlier).train, crop, engine.broken_images, normalise=self.whole.normalise)
        found = mean_embeddings(model, samples, len(model.classes), engine, normalize=self.method.normalize)
        has_length_one = self.method.normalize and self.method.variant == "official"
        return {"means": nn.functional.normalize(found) if has_length_one else found}


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    """classifier → localiser → boxes → crops → (class means →) weighted, as far as the method has them."""
    run, method, found = Pipeline(config, datasets), config.method, list[Stage | Artefact]()
    head = [entry.name for entry in fields(EmbeddingConfig)]
    new = {"new_layers": ("embedding",)}  # images and crops start from the same weights
    if method.localisation != "true":
        found.append(run.classifier("classifier", run.classification, head, **new))
    found += run.localisation(config.localiser)
    if method.localisation != "off":
        found.append(run.classifier("crops", run.classification, [*head, *BOXES], run.boxes, **new))
    if not method.weights:
        return found
    needs = [*run.boxes, run.last]
    if method.embedding_loss != "none":
        trained = [*run.boxes[1:], run.last]
        found.append(run.artefact("means", run.means, trained, "localisation", "embedding_loss"))
        needs.append("means")
    more = {"optim": config.fine_tuning, "depends": {"classifier": config.optim}, "from_weights": False}
    return [*found, run.classifier("weighted", run.weighted, [*head, *BOXES, "weights"], needs, **more)]


def figures(config: Config, datasets: Datasets, results: Results) -> list[Section]:
    """The paper's Figures 2, 4, 6 and 7, its Tables 3 and 4."""
    from fgvc_ext.explain import elope
    from fgvc_ext.explain.document import read_json

    run, test = Pipeline(config, datasets), datasets.test
    if run.finder is not None:
        finder: Any = run.localiser(results)
        boxes = boxes_of(results["boxes"].path, test, "test")
        elope.save_localisation(config.out, test, run.mean_map(results), finder, boxes)
    if config.k_runs:
        elope.save_accuracy_over_k(config.out, config.k_runs)
    shipped = [result.path for result in results.values() if result.path.parent.name == "weights"][-1]
    network: Any = load(shipped)
    sections = [elope.cost_section(network, config.data.crop)]
    if "localisation" in results:
        sections.append(elope.localisation_section(read_json(results["localisation"].path)))
    return sections


DRIVER = Driver("ELoPE", PRESETS, stages, figures=figures)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
