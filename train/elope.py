"""Train ELoPE (WACV 2020): localisation module, k-max pooling and embedding layer, four stages to one network.

python train/elope.py demo
python train/elope.py cub --data.root CUB_200_2011
python train/elope.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/elope.py demo --method.localisation off --method.weights False --method.embedding-loss within

From an installed package: fgvc-ext train elope demo
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fgvc_ext.data.boxed import boxed, boxes_of
from fgvc_ext.data.loading import Samples
from fgvc_ext.data.pipeline import DataConfig, Datasets, evaluation_samples, training_samples
from fgvc_ext.models import ELoPE, LocalisationModule, MeanFeatureMap, load
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.localiser import Localiser
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.nn import ClassMeanLoss
from fgvc_ext.training import Artefact, Frozen, OptimConfig, Results, RunConfig, Stage, at_least
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.embedding import EmbeddingClassification, FineTunedPooling, mean_embeddings
from fgvc_ext.training.localisation import HeatMapRegression, boxes_file, find_boxes, localisation_accuracy
from fgvc_ext.training.presets import demo, demo_data

if TYPE_CHECKING:  # it needs matplotlib, and only a report does
    from fgvc_ext.explain.document import Section


@dataclass
class MethodConfig:
    """The paper's parts: every row of its Table 5 is a setting of these."""

    pooling: Literal["gap", "gmp", "gkmp"] = "gkmp"
    """Mean, maximum, or mean of the k largest values of a feature map (equation 3)."""
    k: int = at_least(1, 4)
    """K of gkmp."""
    weights: bool = True
    """Stage 4: learn weights of the k values (equation 4)."""
    embedding_dim: int = at_least(1, 512)
    """Width of the embedding layer."""
    embedding_loss: Literal["none", "within", "within+between", "centre", "dff"] = "within+between"
    """L_w, L_w + L_b (equations 5–12), or the losses that they are compared with: centre loss, Deep Fisher Faces."""
    loss_weight: float = at_least(0, 2.0)
    """λ: weight of the embedding loss beside cross-entropy."""
    alpha: float = at_least(0, 0.5)
    """Learning rate of the class means."""
    margin: float = at_least(0, 0.75)
    """m: squared distance that two class means should have."""
    gamma: float = at_least(0, 16.0)
    """Weight of the between-class loss."""
    variant: Literal["paper", "official"] = "paper"
    """official: the class-mean loss of the authors' public code."""
    localisation: Literal["off", "module", "mean", "true"] = "module"
    """What crops images: nothing, the localisation module, the classifier's mean feature map, the data's true boxes."""
    threshold: float = at_least(0, 0.3)
    """τ: share of a heat map's range above which the object is."""
    min_size: float = at_least(0, 10.0)
    """Smallest side of a box, in pixels of the image; below it, the whole image."""
    localiser_rotation: float = at_least(0, 30.0)
    """Largest angle by which the localisation module's training images are turned, in degrees."""


def _localiser_recipe() -> OptimConfig:
    return OptimConfig(epochs=45, batch_size=16, lr=0.003, weight_decay=0.001, step_epochs=15, new_layers=())


def _pooling_recipe() -> OptimConfig:
    return OptimConfig(epochs=30, batch_size=14, lr=0.001, weight_decay=0.001, step_epochs=20)


@dataclass
class Config(RunConfig):
    """ELoPE: efficient localisation, pooling, embedding. `optim` trains the classifier, on images and on crops."""

    method: MethodConfig = field(default_factory=MethodConfig)
    localiser: OptimConfig = field(default_factory=_localiser_recipe)
    """Stage 2, the localisation module."""
    fine_tuning: OptimConfig = field(default_factory=_pooling_recipe)
    """Stage 4: its rate is that of the pooling weights; all else goes on at the classifier's last rate."""
    k_runs: tuple[Path, ...] = ()
    """Folders of finished runs, whose accuracies over K the report draws beside this one's."""


def _paper(name: Any, threshold: float = 0.3) -> Config:
    """The recipe of section 6, and of the public code where the paper is silent."""
    augmentation: dict[str, Any] = {"jitter": 0.4, "rotation": 20.0, "lighting": 0.1}
    return Config(
        data=DataConfig(name=name, resize=896, crop=448, keep_ratio=False, **augmentation),
        model=ModelConfig(weights="imagenet"),
        method=MethodConfig(threshold=threshold),
        optim=OptimConfig(epochs=90, batch_size=14, lr=0.003, weight_decay=0.001, step_epochs=30),
        out=Path(f"runs/elope-{name}"),
    )


PRESETS = {
    "demo": (
        "Synthetic birds on a CPU, in less than a minute: all four stages.",
        demo(
            Config,
            "elope",
            data=demo_data(image_size=224, resize=224, keep_ratio=False),
            method=MethodConfig(embedding_dim=128, threshold=0.5, localiser_rotation=0.0),
            localiser=OptimConfig(epochs=6, batch_size=30, lr=0.01, schedule="cosine", new_layers=()),
            fine_tuning=OptimConfig(epochs=2, batch_size=30, lr=0.01, schedule="constant", weight_decay=5e-4),
        ),
    ),
    "folder": ("Your own images: ROOT/train/<class>/*.jpg and ROOT/test/<class>/*.jpg.", _paper("folder")),
    "cub": ("CUB-200-2011 with the paper's recipe: ResNet-50, 448 px, 90 epochs.", _paper("cub")),
    "cars": ("Stanford Cars with the paper's recipe, τ = 0.2.", _paper("cars", 0.2)),
    "aircraft": ("FGVC-Aircraft with the paper's recipe, τ = 0.2.", _paper("aircraft", 0.2)),
}

NETWORK = ("pooling", "k", "embedding_dim")
LOSSES = ("embedding_loss", "loss_weight", "alpha", "margin", "gamma", "variant")
BOXES = ("localisation", "threshold", "min_size")
FINDERS = {"module": "localiser", "mean": "classifier"}
"""Localisation → the stage whose model finds the boxes."""


class Pipeline:
    """What the stages do with a configuration and its images; `earlier` are the results of what a stage needs.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(self, config: Config, datasets: Datasets) -> None:
        self.config, self.datasets, self.method, data = config, datasets, config.method, config.data
        self.finder = FINDERS.get(self.method.localisation)
        self.last = "classifier" if self.method.localisation == "off" else "crops"
        if self.method.weights and self.method.pooling != "gkmp":
            raise ValueError(
                f"--method.weights: expected False with --method.pooling {self.method.pooling}: only gkmp has some"
            )
        if self.finder is not None and data.resize < 2 * data.crop:
            raise ValueError(
                f"--data.resize: expected at least {2 * data.crop}, twice the crop, with --method.localisation "
                f"{self.method.localisation}, got {data.resize}: boxes are cut of images of that size"
            )
        # The classifier gets images and crops in its own size; what is evaluated finds the object in larger ones.
        given = config.model.preprocessing(data)
        self.whole, self.large = replace(given, resize=given.crop), replace(given, crop=given.resize)

    # ---------------------------------------------------------------- images

    def images(self, earlier: Results) -> Datasets:
        """What the classifier is trained on: after the first stage crops, unless nothing localises."""
        if self.method.localisation == "true":
            return boxed(self.datasets, None)
        return boxed(self.datasets, earlier["boxes"].path) if "boxes" in earlier else self.datasets

    def train(self, earlier: Results) -> Samples:
        skip = self.config.engine.broken_images
        return training_samples(self.images(earlier), self.config.data, self.whole, skip)

    def train_localiser(self, earlier: Results) -> Samples:
        data = replace(self.config.data, rotation=self.method.localiser_rotation, lighting=0.0)
        return training_samples(self.datasets, data, self.whole, self.config.engine.broken_images)

    def evaluations(self, earlier: Results) -> Mapping[str, Samples]:
        """By the whole inference path on images, where there is one."""
        if "boxes" in earlier:
            return evaluation_samples(self.datasets, self.large)
        return evaluation_samples(self.images(earlier), self.whole)

    # ---------------------------------------------------------------- networks and their losses

    def localiser(self, earlier: Results) -> Localiser | None:
        """What finds the boxes, with this run's threshold; None in what comes before it."""
        if self.finder is None or self.finder not in earlier:
            return None
        found: Any = load(earlier[self.finder].path)
        return self.mean_map(found) if isinstance(found, ELoPE) else self._with_threshold(found)

    def mean_map(self, classifier: Any) -> MeanFeatureMap:
        return self._with_threshold(MeanFeatureMap(classifier.backbone, self.config.data.crop))

    def _with_threshold(self, localiser: Any) -> Any:
        localiser.threshold, localiser.min_size = self.method.threshold, self.method.min_size
        return localiser

    def network(self, earlier: Results, weighted: bool = False) -> ELoPE:
        finds, classes = self.localiser(earlier), self.datasets.train.classes
        options: dict[str, Any] = {name: getattr(self.method, name) for name in NETWORK}
        options |= {"size": self.config.data.crop, "localiser": finds, "weighted": weighted}
        model = ELoPE(self.config.model.build(), len(classes), **options)
        model.classes, model.preprocessing = classes, self.whole if finds is None else self.large
        return model

    def losses(self, optim: OptimConfig) -> dict[str, Any]:
        """Cross-entropy, and the embedding loss of a row of Table 5."""
        method, name = self.method, self.method.embedding_loss
        found = {"loss": nn.CrossEntropyLoss(label_smoothing=optim.label_smoothing), "weight": method.loss_weight}
        if name == "none":
            return {**found, "embedding_loss": None}
        gamma, ours = 0.0 if name == "within" else method.gamma, name.startswith("within")
        options: dict[str, Any] = {"alpha": method.alpha, "margin": method.margin, "gamma": gamma, "normalize": ours}
        options["variant"] = method.variant if ours else name
        return {
            **found,
            "embedding_loss": ClassMeanLoss(len(self.datasets.train.classes), method.embedding_dim, **options),
        }

    def classification(self, earlier: Results) -> EmbeddingClassification:
        return EmbeddingClassification(self.network(earlier), **self.losses(self.config.optim))

    def start(self, task: EmbeddingClassification) -> str:
        """On images and on crops, the classifier starts from the same weights."""
        new = (*self.config.optim.new_layers, "localiser", "embedding")
        return self.config.model.start(task.model, self.config.out, new)

    def regression(self, earlier: Results) -> HeatMapRegression:
        classifier: Any = load(earlier["classifier"].path)
        module = self._with_threshold(LocalisationModule(classifier.backbone))
        return HeatMapRegression(module, Frozen(self.mean_map(classifier)))

    def weighted(self, earlier: Results) -> FineTunedPooling:
        """The trained network with pooling weights of one, and the class means that its embeddings have."""
        model = self.network(earlier, weighted=True)
        model.load_state_dict({**model.state_dict(), **load(earlier[self.last].path).state_dict()})
        task = FineTunedPooling(model, before=self.config.optim, **self.losses(self.config.fine_tuning))
        if "means" in earlier:
            task.losses["embedding"].class_means = load_weights_file(earlier["means"].path)[0]["means"]
        return task

    # ---------------------------------------------------------------- artefacts

    def boxes(self, earlier: Results) -> bytes:
        localiser = self.localiser(earlier)
        assert localiser is not None
        return boxes_file(localiser, self.datasets, self.config.engine)

    def localisation(self, earlier: Results) -> bytes:
        """Table 4 on the test images: the boxes that are cut, and those of the classifier's mean feature map."""
        test, mean = self.datasets.test, self.mean_map(load(earlier["classifier"].path))
        found = {"mean feature map": find_boxes(mean, test, self.config.engine)}
        if self.method.localisation == "module":
            found["localisation module"] = boxes_of(earlier["boxes"].path, test, "test")
        assert test.boxes is not None
        return json.dumps(localisation_accuracy(found, test.boxes), indent=2).encode()

    def means(self, earlier: Results) -> dict[str, Tensor]:
        model: Any = load(earlier[self.last].path)
        model.localiser = None  # its images are cut already
        crop, engine = self.whole.eval_crop(), self.config.engine
        samples = Samples(self.images(earlier).train, crop, engine.broken_images, normalise=self.whole.normalise)
        ours = self.method.embedding_loss.startswith("within")
        return {"means": mean_embeddings(model, samples, len(model.classes), engine, normalize=ours)}


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    """classifier → localiser → boxes → crops → (class means →) weighted, as far as the method has them."""
    run, method, found = Pipeline(config, datasets), config.method, list[Stage | Artefact]()

    def depends(*names: str, **more: Any) -> dict[str, Any]:
        """What a stage depends on: of the method these settings, the others are left at their defaults."""
        chosen = {name: getattr(method, name) for name in names}
        return {"data": config.data, "model": config.model, "method": replace(MethodConfig(), **chosen), **more}

    def stage(name: str, build: Any, optim: OptimConfig, settings: Any, needs: Sequence[str] = (), **more: Any) -> None:
        options = {"train": run.train, "evaluations": run.evaluations, **more}
        found.append(
            Stage(name=name, needs=needs, build=build, optim=optim, seed=config.seed, config=settings, **options)
        )

    def artefact(name: str, make: Any, needs: Sequence[str], suffix: str, *names: str) -> None:
        found.append(Artefact(name=name, make=make, needs=needs, suffix=suffix, config=depends(*names)))

    begins: dict[str, Any] = {"start": run.start, "inputs": config.model.inputs(config.out)}
    boxes = [run.finder, "boxes"] if run.finder is not None else []
    if method.localisation != "true":
        stage("classifier", run.classification, config.optim, depends(*NETWORK, *LOSSES), **begins)
    if method.localisation == "module":
        settings = depends("localiser_rotation")
        stage("localiser", run.regression, config.localiser, settings, ["classifier"], train=run.train_localiser)
    if run.finder is not None:
        artefact("boxes", run.boxes, boxes[:1], ".csv", *BOXES)
        if datasets.test.boxes is not None:
            artefact("localisation", run.localisation, ["classifier", "boxes"], ".json", *BOXES)
    if run.last == "crops":
        stage("crops", run.classification, config.optim, depends(*NETWORK, *LOSSES, *BOXES), boxes, **begins)
    if method.weights:
        means = [] if method.embedding_loss == "none" else ["means"]
        if means:
            artefact("means", run.means, [*boxes[1:], run.last], "", "localisation", "embedding_loss")
        settings = depends(*NETWORK, *LOSSES, *BOXES, "weights", classifier=config.optim)
        needs = list(dict.fromkeys([*boxes, run.last, *means]))
        stage("weighted", run.weighted, config.fine_tuning, settings, needs)
    return found


def figures(config: Config, datasets: Datasets, results: Results) -> list[Section]:
    """The paper's Figures 2, 4, 6 and 7, its Tables 3 and 4."""
    from fgvc_ext.explain import elope
    from fgvc_ext.explain.document import read_json

    run, test = Pipeline(config, datasets), datasets.test
    if run.finder is not None:
        finder: Any = run.localiser(results)
        teacher, boxes = run.mean_map(load(results["classifier"].path)), boxes_of(results["boxes"].path, test, "test")
        elope.save_localisation(config.out, test, teacher, finder, boxes)
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
