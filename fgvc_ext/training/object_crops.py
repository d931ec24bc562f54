"""Training on objects alone: what finds them once a classifier of whole images is trained, and the images cut to them.

The stages are classifier → localiser → boxes → classifiers of crops (ELoPE, section 5).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fgvc_ext.data.boxed import boxed, boxes_of
from fgvc_ext.data.loading import Samples
from fgvc_ext.data.pipeline import Datasets, evaluation_samples, training_samples
from fgvc_ext.models import LocalisationModule, MeanFeatureMap, load
from fgvc_ext.models.localiser import Localiser
from fgvc_ext.training.classifier_stage import classifier_stage
from fgvc_ext.training.config import OptimConfig, RunConfig, at_least, only
from fgvc_ext.training.localisation import HeatMapRegression, boxes_file, find_boxes, localisation_accuracy
from fgvc_ext.training.stages import Artefact, Results, Stage
from fgvc_ext.training.task import Task
from fgvc_ext.training.teachers import Frozen


@dataclass
class LocalisationConfig:
    """What finds objects, and how much of an image they are."""

    localisation: Literal["off", "module", "mean", "true"] = "module"
    """What crops images: nothing, the localisation module, the classifier's mean feature map, the data's true boxes."""
    threshold: float = at_least(0, 0.3)
    """τ: share of a heat map's range above which the object is."""
    min_size: float = at_least(0, 10.0)
    """Smallest side of a box, in pixels of the image; below it, the whole image."""
    localiser_rotation: float = at_least(0, 30.0)
    """Largest angle by which the localisation module's training images are turned, in degrees."""


BOXES = ("localisation", "threshold", "min_size")
"""The settings on which boxes, and what is trained on them, depend."""
FINDERS = {"module": "localiser", "mean": "classifier"}
"""Localisation → the stage whose model finds the boxes."""


class ObjectCrops:
    """Images and stages of a run with a localisation; `earlier` are the results of what a stage needs.

    Attributes:
        boxes: what a stage of crops needs: what finds the boxes, and the boxes. Nothing where they are known, or none.

    Args:
        method: the settings; of a class of the driver's own, its others are left out of what a stage depends on.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(self, config: RunConfig, datasets: Datasets, method: LocalisationConfig) -> None:
        self.config, self.datasets, self.method, data = config, datasets, method, config.data
        self.finder = FINDERS.get(method.localisation)
        self.boxes = [] if self.finder is None else [self.finder, "boxes"]
        if self.finder is not None and data.resize < 2 * data.crop:
            raise ValueError(
                f"--data.resize: expected at least {2 * data.crop}, twice the crop, with --method.localisation "
                f"{method.localisation}, got {data.resize}: boxes are cut of images of that size"
            )
        # A classifier gets images and crops in its own size; what is evaluated finds the object in larger ones.
        given = config.model.preprocessing(data)
        self.whole, self.large = replace(given, resize=given.crop), replace(given, crop=given.resize)

    # ---------------------------------------------------------------- stages

    def classifier(
        self,
        name: str,
        build: Callable[[Results], Task],
        settings: Iterable[str],
        needs: Sequence[str] = (),
        **more: Any,
    ) -> Stage:
        """A classifier's stage, on crops where it needs "boxes", which depends on these settings of the method."""
        prepare, method = self.large if "boxes" in needs else self.whole, only(self.method, settings)
        more |= {"needs": needs, "train": self.train, "evaluations": self.evaluations}
        return classifier_stage(name, self.config, self.datasets, build, method, prepare=prepare, **more)

    def localisation(self, optim: OptimConfig) -> list[Stage | Artefact]:
        """What comes between "classifier" and the stages of crops, as far as there is anything to find.

        Args:
            optim: of the localisation module.
        """
        found: list[Stage | Artefact] = []
        if self.finder == "localiser":
            found.append(
                Stage(
                    name="localiser",
                    needs=["classifier"],
                    build=self.regression,
                    optim=optim,
                    train=self.train_localiser,
                    evaluations=self.evaluations,
                    seed=self.config.seed,
                    config=self.depends("localiser_rotation"),
                )
            )
        if self.finder is not None:
            found.append(self.artefact("boxes", self.found_boxes, self.boxes[:1], *BOXES, suffix=".csv"))
            if self.datasets.test.boxes is not None:
                needs = ["classifier", "boxes"]
                told = {"suffix": ".json", "measures": _measures}
                found.append(self.artefact("localisation", self.accuracy, needs, *BOXES, **told))
        return found

    def artefact(self, name: str, make: Any, needs: Sequence[str], *settings: str, **more: Any) -> Artefact:
        """One that depends on these settings of the method."""
        return Artefact(name=name, make=make, needs=needs, config=self.depends(*settings), **more)

    def depends(self, *settings: str) -> dict[str, Any]:
        return {"data": self.config.data, "model": self.config.model, "method": only(self.method, settings)}

    # ---------------------------------------------------------------- images

    def images(self, earlier: Results) -> Datasets:
        """What classifiers are trained on: after the first stage crops, unless nothing localises."""
        if self.method.localisation == "true":
            return boxed(self.datasets, None)
        return boxed(self.datasets, earlier["boxes"].path) if "boxes" in earlier else self.datasets

    def train(self, earlier: Results) -> Samples:
        skip = self.config.engine.broken_images
        return training_samples(self.images(earlier), self.config.data, self.whole, skip)

    def train_localiser(self, earlier: Results) -> Samples:
        data = replace(self.config.data, rotation=self.method.localiser_rotation, lighting=0.0, flip=0.0)
        return training_samples(self.datasets, data, self.whole, self.config.engine.broken_images)

    def evaluations(self, earlier: Results) -> Mapping[str, Samples]:
        """By the whole inference path on images, where there is one."""
        if "boxes" in earlier:
            return evaluation_samples(self.datasets, self.large)
        return evaluation_samples(self.images(earlier), self.whole)

    # ---------------------------------------------------------------- what finds objects

    def localiser(self, earlier: Results) -> Localiser | None:
        """What finds the boxes, with this run's threshold; None in what comes before it."""
        if self.finder is None or self.finder not in earlier:
            return None
        if self.finder == "classifier":
            return self.mean_map(earlier)
        found: Any = load(earlier[self.finder].path)
        found.threshold, found.min_size = self.method.threshold, self.method.min_size
        return found

    def mean_map(self, earlier: Results) -> MeanFeatureMap:
        """The trained classifier's."""
        classifier: Any = load(earlier["classifier"].path)
        return MeanFeatureMap(classifier.backbone, self.config.data.crop, **self._box())

    def regression(self, earlier: Results) -> HeatMapRegression:
        mean = self.mean_map(earlier)
        return HeatMapRegression(LocalisationModule(mean.backbone, **self._box()), Frozen(mean))

    def found_boxes(self, earlier: Results) -> bytes:
        localiser = self.localiser(earlier)
        assert localiser is not None
        return boxes_file(localiser, self.datasets, self.config.engine)

    def accuracy(self, earlier: Results) -> bytes:
        """Table 4 on the test images: the boxes that are cut, and those of the classifier's mean feature map."""
        test = self.datasets.test
        found = {"mean feature map": find_boxes(self.mean_map(earlier), test, self.config.engine)}
        if self.method.localisation == "module":
            found["localisation module"] = boxes_of(earlier["boxes"].path, test, "test")
        assert test.boxes is not None
        return json.dumps(localisation_accuracy(found, test.boxes), indent=2).encode()

    def _box(self) -> dict[str, float]:
        return {"threshold": self.method.threshold, "min_size": self.method.min_size}


def _measures(table: bytes) -> dict[str, dict[str, float]]:
    """Table 4 as measures of the run: "localisation_module_accuracy", "mean_feature_map_mean_iou", …"""
    rows = reversed(json.loads(table).items())  # what cuts the images is last in the table, and the headline
    return {"test": {f"{name} {what}".replace(" ", "_"): value for name, row in rows for what, value in row.items()}}
