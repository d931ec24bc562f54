"""Features of frozen layers, computed once: a training reads them from a cache in the place of its images.

Every process that needs them asks for the cache's lock: the first computes, the others wait and find them there, be
they of this job or of other runs of the same table. Machines without a common folder each have a file of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fgvc_ext.data.features import FeatureCache, Features, FeatureSamples, size_of, told
from fgvc_ext.data.loading import Batch, Samples, Views, to_device
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.model import Model
from fgvc_ext.training import distributed
from fgvc_ext.training.config import EngineConfig
from fgvc_ext.training.device import choose_device, worker_count
from fgvc_ext.training.sampling import evaluation_loader
from fgvc_ext.training.stop_request import StopRequest
from fgvc_ext.training.task import Task
from fgvc_ext.training.teachers import frozen_in
from fgvc_ext.training.training import Training

FORMAT = 1
"""Counts changes of what the files hold."""
BATCH = {"cpu": 8, "cuda": 32}
"""Images at once. No setting: the last bits of a convolution may depend on it. On a CPU more are no faster, and 32 of
320 pixels take DenseNet-169 3.6 GB."""


def with_cached_features(training: Training, task: Task, engine: EngineConfig, stop: StopRequest) -> Training:
    """The training with features in its images' place, where frozen layers see the same images in every epoch.

    Its last evaluation stays that of the whole model on images, unless the backbone's `evaluate_cached` says otherwise;
    all do where the task `evaluates_images`.
    Where images are needed, it is unchanged, and a line says why. Called in every process of the job.

    Raises:
        OSError: the disk has no room for the features. ValueError: they exceed fp16.
        Preempted: asked to stop by a signal while they were computed.
    """
    backbone, reason = task.frozen_part(), "the method sees them through more than these layers"
    if backbone is not None:
        reason = _why_images(training, task, backbone)
    if backbone is None or reason:
        backbones = [module for module in task.modules() if isinstance(module, Backbone)]
        if frozen := [one.frozen_until for one in backbones if one.frozen_until]:
            print(f"{training.name}: frozen until {frozen[0]}, trained on images because {reason}", flush=True)
        return training
    assert isinstance(training.train.views, Views)
    maker, early = _Maker(backbone, engine, training.name, training.train.views.folder), training.evaluations
    with stop.at_once("the features of frozen layers"):
        train = distributed.on_each(maker.samples, training.train, training.train.dataset.split)
        if not task.evaluates_images and (backbone.evaluate_cached or engine.eval_every < training.optim.epochs):
            early = {name: distributed.on_each(maker.samples, one, name) for name, one in training.evaluations.items()}
    last = early if backbone.evaluate_cached else training.evaluations
    return replace(training, train=train, early=early, evaluations=last)


def cached_evaluations(
    name: str, evaluations: Mapping[str, Samples], models: Sequence[Model], engine: EngineConfig
) -> Mapping[str, Samples]:
    """The samples of models that answer together, with features in the images' place, where all look through the same
    frozen layers and features can stand in for the images; else as they are. Called in every process of the job."""
    backbones = [part for model in models if isinstance(part := getattr(model, "backbone", None), Backbone)]
    frozen = len(backbones) == len(models) and all(part.has_frozen_features for part in backbones)
    views = [samples.views for samples in evaluations.values() if isinstance(samples.views, Views)]
    if not frozen or len(views) < len(evaluations) or len({weights_hash(part) for part in backbones}) > 1:
        return evaluations
    layout = torch.channels_last if engine.channels_last else torch.preserve_format
    eye = backbones[0].to(choose_device(engine.device)).to(memory_format=layout).eval()
    return {
        split: distributed.on_each(_Maker(eye, engine, name, view.folder).samples, samples, split)
        for view, (split, samples) in zip(views, evaluations.items(), strict=True)
    }


def _why_images(training: Training, task: Task, backbone: Backbone) -> str:
    """Why features cannot stand in for images; empty where they can."""
    if not backbone.has_frozen_features:
        return "a part of a layer is frozen, whose output cannot be had"
    for samples in (training.train, *training.evaluations.values()):
        if isinstance(samples.views, str):
            return samples.views
    own = weights_hash(backbone)
    for teacher in frozen_in(task):
        eyes = [module for module in teacher.module.modules() if isinstance(module, Backbone)]
        if not eyes or any(weights_hash(eye) != own for eye in eyes):
            return "a teacher sees them through other layers"
    return ""


def weights_hash(backbone: Backbone) -> str:
    """sha256 of the layers of the frozen part and of their weights."""
    digest = hashlib.sha256(repr(sorted(backbone.settings().items())).encode())
    for name, value in sorted(backbone.frozen_state().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Maker:
    """Finds or computes the features of samples.

    Args:
        backbone: on the engine's device. name: of the stage that needs them. folder: of the cache; None: the usual one.
    """

    def __init__(self, backbone: Backbone, engine: EngineConfig, name: str, folder: Path | None) -> None:
        self.backbone, self.engine = backbone, engine
        self.device = choose_device(engine.device)
        self.name, self.folder, self.weights = name, folder, weights_hash(backbone)

    def samples(self, samples: Samples, split: str) -> FeatureSamples:
        """The samples with features in their images' place.

        Of what a validation share has left, the features are those of the whole: they serve every share.
        """
        views = samples.views
        assert isinstance(views, Views)
        whole, rows = samples.dataset.part_of or (samples.dataset, None)
        images = Samples(whole, views.plain, samples.broken_images, normalise=samples.normalise)
        cache = FeatureCache.of(self.folder, self._facts(images, views))
        features = cache.read()
        if features is None:
            shape = self._shape(images, views, split)
            self._tell(shape, views, split, cache.folder)  # by each process: who will hold the lock is open
            with cache.lock():
                features = cache.read() or self._make(cache, images, views, shape, split)
        return FeatureSamples(samples, features, flip=views.flip, rows=rows)

    def _facts(self, images: Samples, views: Views) -> dict[str, Any]:
        computed = {"torch": torch.__version__, "device": self.device.type}
        if self.device.type == "cuda":
            computed["tf32"] = str(self.engine.tf32)
        return {
            "format": FORMAT,
            "backbone": self.backbone.settings(),
            "weights": self.weights,
            "images": images.dataset.fingerprint(),
            "preprocessing": dict(views.recipe),
            "views": ["plain", "flipped"] if views.flip else ["plain"],
            "precision": views.precision,
            "computed": computed,
        }

    def _shape(self, images: Samples, views: Views, split: str) -> tuple[int, ...]:
        """[N,V,h,w,C], from the first image that can be read."""
        found = (images[index, 0] for index in range(len(images)))
        sample = next((sample for sample in found if sample is not None), None)
        if sample is None:
            raise ValueError(f"features: none of the {len(images)} images of {split} can be read")
        batch = {"image": sample["image"][None]}
        return (len(images), 1 + (views.flip > 0), *self._view(batch, images, mirrored=False).shape[1:])

    def _tell(self, shape: tuple[int, ...], views: Views, split: str, folder: Path) -> None:
        what = (
            f"{views.precision}, {'plain and flipped, ' if views.flip else ''}{told(size_of(shape, views.precision))}"
        )
        layers = f"{self.backbone.settings().get('name')} up to {self.backbone.frozen_until}"
        images = f"{self.name}: computing features of {shape[0]} images ({split}) once"
        print(f"{images}: {layers}; {what} in {folder}", flush=True)

    def _make(self, cache: FeatureCache, images: Samples, views: Views, shape: tuple[int, ...], split: str) -> Features:
        broken = set(range(len(images)))  # until an image has come
        size, workers = BATCH.get(self.device.type, 32), worker_count(self.engine)
        loader = evaluation_loader(images, range(len(images)), size, workers=workers)
        quiet = None if distributed.is_main() else True  # None: where no terminal is
        bar = tqdm(total=len(images), desc=f"features ({split})", unit="image", disable=quiet, leave=False)
        try:
            with bar, cache.writing(shape, views.precision, broken) as array:
                for batch in loader:
                    rows = batch["index"].numpy()
                    if len(rows):
                        for view in range(shape[1]):
                            array[rows, view] = _in_range(self._view(batch, images, mirrored=view == 1), array.dtype)
                    broken.difference_update(rows.tolist())
                    bar.update(len(rows))
        finally:
            loader.close()
        found = cache.read()
        if found is None:
            raise OSError(f"features: {cache.file} was written, and cannot be read")
        return found

    @torch.no_grad()
    def _view(self, batch: Batch, images: Samples, *, mirrored: bool) -> np.ndarray:
        """Features [n,h,w,C], float32."""
        pixels = {"image": batch["image"].flip(-1) if mirrored else batch["image"]}
        options: dict[str, Any] = {"normalise": images.normalise, "channels_last": self.engine.channels_last}
        features = self.backbone.frozen_features(to_device(pixels, self.device, **options)["image"])
        return features.permute(0, 2, 3, 1).float().cpu().numpy()


def _in_range(features: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """As numbers of this type. ValueError where they are too large for it."""
    with np.errstate(over="ignore"):
        found = features.astype(dtype, copy=False)
    if np.isinf(found).any() and not np.isinf(features).any():
        largest = float(np.abs(features).max())
        raise ValueError(f"features: up to {largest:.3g}, more than fp16 can hold: --data.features fp32 keeps them")
    return found
