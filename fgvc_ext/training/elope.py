"""ELoPE's settings and stages (sections 4 and 5 of the paper): a classifier of whole images, what finds objects, a
classifier of crops, and the weights of its pooling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from fgvc_ext.data.loading import Samples
from fgvc_ext.data.pipeline import Datasets
from fgvc_ext.models import ELoPE, load
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training.config import OptimConfig, RunConfig
from fgvc_ext.training.embedding import EmbeddingClassification, EmbeddingConfig, FineTunedPooling, mean_embeddings
from fgvc_ext.training.object_crops import BOXES, LocalisationConfig, ObjectCrops
from fgvc_ext.training.stages import Artefact, Results, Stage


@dataclass
class ELoPEConfig(LocalisationConfig, EmbeddingConfig):
    """The paper's parts: every row of its Table 5 is a setting of these."""

    weights: bool = True
    """Stage 4: learn weights of the k values (equation 4)."""


class ELoPEStages(ObjectCrops):
    """What the stages train and compute; `earlier` are the results of what a stage needs.

    Args:
        config: of the run; its `optim` trains the classifiers.
        method: the run's.
        fine_tuning: of stage 4; its rate is that of the pooling weights.

    Raises:
        ValueError: settings that do not go together.
    """

    method: ELoPEConfig

    def __init__(self, config: RunConfig, datasets: Datasets, method: ELoPEConfig, fine_tuning: OptimConfig) -> None:
        super().__init__(config, datasets, method)
        self.fine_tuning = fine_tuning
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
        task = FineTunedPooling(model, before=self.config.optim, **self.losses(self.fine_tuning))
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

    def stages(self, localiser: OptimConfig) -> list[Stage | Artefact]:
        """classifier → localiser → boxes → crops → (class means →) weighted, as far as the method has them.

        Args:
            localiser: of the localisation module.
        """
        method, found = self.method, list[Stage | Artefact]()
        head = [entry.name for entry in fields(EmbeddingConfig)]
        new = {"new_layers": ("embedding",)}  # images and crops start from the same weights
        if method.localisation != "true":
            found.append(self.classifier("classifier", self.classification, head, **new))
        found += self.localisation(localiser)
        if method.localisation != "off":
            found.append(self.classifier("crops", self.classification, [*head, *BOXES], self.boxes, **new))
        if not method.weights:
            return found
        needs = [*self.boxes, self.last]
        if method.embedding_loss != "none":
            trained = [*self.boxes[1:], self.last]
            found.append(self.artefact("means", self.means, trained, "localisation", "embedding_loss"))
            needs.append("means")
        more = {"optim": self.fine_tuning, "depends": {"classifier": self.config.optim}, "from_weights": False}
        return [*found, self.classifier("weighted", self.weighted, [*head, *BOXES, "weights"], needs, **more)]
