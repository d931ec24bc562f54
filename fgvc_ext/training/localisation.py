"""Training a localiser on a classifier's own maps, the boxes that it finds, and how right they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc_ext.data.boxed import boxes_as_csv, intersection_over_union
from fgvc_ext.data.dataset import ImageDataset
from fgvc_ext.data.loading import Batch, Samples
from fgvc_ext.data.pipeline import Datasets
from fgvc_ext.models.localiser import Localiser
from fgvc_ext.training.config import EngineConfig
from fgvc_ext.training.device import choose_device
from fgvc_ext.training.evaluation import map_samples
from fgvc_ext.training.task import Task


class HeatMapRegression(Task):
    """A localiser learns the heat maps of a teacher: smooth L1 with β = 1, mean over batch and positions.

    The headline is that loss; the smaller, the better. The teacher's maps are resized bilinearly to the localiser's.

    Args:
        localiser: images [N,3,H,W] → heat maps [N,h,w].
        teacher: the same of a trained network, see `teachers.Frozen`.
    """

    higher_is_better = False

    def __init__(self, localiser: Localiser, teacher: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.teacher = localiser, teacher

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The localiser's heat maps and the teacher's, of the same size, in float32."""
        found, target = self.model(images).float(), self.teacher(images).float()
        return found, F.interpolate(target[:, None], found.shape[1:], mode="bilinear", align_corners=False)[:, 0]

    def step(self, batch: Batch) -> dict[str, Any]:
        return {"loss": F.smooth_l1_loss(*self._maps(batch["image"])), "logs": {}, "n": len(batch["label"])}

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        losses = F.smooth_l1_loss(*self._maps(batch["image"]), reduction="none").mean((1, 2))
        return {"n": torch.tensor(len(losses)), "smooth_l1": losses.sum()}


def find_boxes(localiser: Localiser, dataset: ImageDataset, engine: EngineConfig) -> Tensor:
    """The box float32 [N,4] of every image, in its pixels, found at its own resolution; every process has all of them.

    What `predict` sees of an image is cut to the same box. With `engine.broken_images` "skip", an image that cannot be
    read has a box of one pixel.
    """
    finder, nothing = localiser.to(choose_device(engine.device)).eval(), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    samples = Samples(dataset, _as_it_is, engine.broken_images, normalise=localiser.preprocessing.normalise)

    def boxes(image: Tensor) -> Tensor:
        return finder.boxes(image).float() if len(image) else nothing

    return map_samples(boxes, samples, engine, batch_size=1)  # images differ in size


def boxes_file(localiser: Localiser, datasets: Datasets, engine: EngineConfig) -> bytes:
    """The content of a file from which `data.boxed.boxed` cuts all images of a run."""
    return boxes_as_csv(
        {split: (images.ids, find_boxes(localiser, images, engine)) for split, images in datasets.splits().items()}
    )


def _as_it_is(image: Tensor) -> Tensor:
    return image


def localisation_accuracy(found: Mapping[str, Tensor], true: Tensor, *, at: float = 0.5) -> dict[str, dict[str, float]]:
    """Of each name's boxes [N,4], the share whose intersection over union with the true ones is at least `at`, and the
    mean of that ratio (ELoPE, Table 4)."""
    ratios = {name: intersection_over_union(boxes, true) for name, boxes in found.items()}
    return {
        name: {"accuracy": float((ratio >= at).double().mean()), "mean_iou": float(ratio.double().mean())}
        for name, ratio in ratios.items()
    }
