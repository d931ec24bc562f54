"""The task that classifiers share, and the data sets of a classification run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fgvc_ext.data import (
    ImageDataset,
    eval_transform,
    five_crop_transform,
    load_dataset,
    split_validation,
    train_transform,
    verify_files,
)
from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fgvc_ext.training.config import EngineConfig, OptimConfig
from fgvc_ext.training.sampling import Batch, Samples, evenly_spaced
from fgvc_ext.training.task import Task


@dataclass
class DataConfig:
    """The images and how they are prepared."""

    name: Literal["synthetic", "folder", "cub"] = "synthetic"
    root: Path | None = None
    """Folder that holds the data; the synthetic birds need none."""
    resize: int = 600
    """Length of the shorter side before the crop, in pixels."""
    crop: int = 448
    """Side of the square that the network sees: random in training, the centre in evaluation."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    val_fraction: float = 0.0
    """Share of each class's training images that is held out for validation; a folder ROOT/val serves without it."""
    classes: int = 20
    """synthetic: number of classes."""
    train_per_class: int = 30
    """synthetic: training images of a class."""
    test_per_class: int = 20
    """synthetic: test images of a class."""
    image_size: int = 128
    """synthetic: side of the images that are drawn, in pixels."""


@dataclass
class Datasets:
    """The data of a run; `val` is None without a validation share or folder."""

    train: ImageDataset
    test: ImageDataset
    val: ImageDataset | None = None

    def facts(self) -> dict[str, Any]:
        """What run.json says of them, and what a continued run must find again."""
        facts: dict[str, Any] = {"name": self.train.name, "classes": self.train.classes}
        for name, dataset in (("train", self.train), ("test", self.test), ("val", self.val)):
            if dataset is not None:
                facts |= {f"{name}_images": len(dataset), f"{name}_fingerprint": dataset.fingerprint()}
        return facts


def load_datasets(
    config: DataConfig, seed: int, limit_train: int | None = None, limit_test: int | None = None
) -> Datasets:
    """Read both splits, hold out the validation share, apply the limits (which keep images evenly spread).

    Of an image folder, ROOT/val is the validation set; it is what is evaluated on where there is no ROOT/test. The
    files of what is evaluated on are decoded once: a broken one stops a run here, not in its first evaluation.
    """
    options: dict[str, Any] = {}
    if config.name == "synthetic":
        names = ("classes", "train_per_class", "test_per_class", "image_size")
        options = {name: getattr(config, name) for name in names}
    elif config.root is None:
        raise ValueError(f"data set {config.name!r} needs the folder that holds it: --data.root FOLDER")
    elif not config.root.is_dir():
        raise FileNotFoundError(f"--data.root: {config.root} is not a folder")
    tested, validated = _split_names(config)
    train, test = (load_dataset(config.name, config.root, split, **options) for split in ("train", tested))
    val = load_dataset(config.name, config.root, validated) if validated else None
    if config.val_fraction:
        train, val = split_validation(train, config.val_fraction, seed)
    train = train.subset(evenly_spaced(len(train), limit_train))
    datasets = Datasets(train, test.subset(evenly_spaced(len(test), limit_test)), val)
    for line in [verify_files(dataset) for dataset in (datasets.test, datasets.val) if dataset is not None]:
        if line:
            print(line, flush=True)
    return datasets


def _split_names(config: DataConfig) -> tuple[str, str | None]:
    """Which splits of the data set are evaluated on as "test" and as "val" (None: none, or a share of train)."""
    root = config.root
    if config.name != "folder" or root is None or not (root / "val").is_dir():
        return "test", None
    if not (root / "test").is_dir():
        print(f"{root}: no folder 'test': 'val' is evaluated on in its place", flush=True)
        return "val", None
    if config.val_fraction:
        raise ValueError(f"--data.val-fraction: {root / 'val'} is the validation set already: leave out one of the two")
    return "test", "val"


def preprocessing(config: DataConfig) -> dict[str, Any]:
    """What an image goes through before the network sees it in evaluation: kept with the weights."""
    return {"resize": config.resize, "crop": config.crop, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def training_samples(datasets: Datasets, config: DataConfig, engine: EngineConfig) -> Samples:
    transform = train_transform(config.resize, config.crop, flip=config.flip, jitter=config.jitter)
    return Samples(datasets.train, transform, engine.broken_images)


def evaluation_samples(datasets: Datasets, config: DataConfig) -> dict[str, Samples]:
    """Single-crop samples under "test", and "val" where there is one."""
    transform = eval_transform(config.resize, config.crop)
    found = {"test": datasets.test, "val": datasets.val}
    return {name: Samples(dataset, transform) for name, dataset in found.items() if dataset is not None}


def five_crop_samples(datasets: Datasets, config: DataConfig) -> Samples:
    """Test samples of five crops each, [5,3,h,w]: the task takes their mean score."""
    return Samples(datasets.test, five_crop_transform(config.resize, config.crop), crops=5)


class Classification(Task):
    """A classifier and its loss.

    Args:
        model: `forward(images, seed) -> scores [N,C]`, and `parameter_groups()` by group of layers.
        loss: scores [N,C], labels [N] → scalar; or a function of the epoch that returns it, see `loss_of_epoch`.
        loss_of_epoch: the loss for an epoch (counted from 0), for losses that begin later; None: always `loss`.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, loss_of_epoch: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.model, self.loss, self.loss_of_epoch = model, loss, loss_of_epoch

    def start_epoch(self, epoch: int) -> None:
        if self.loss_of_epoch is not None:
            self.loss = self.loss_of_epoch(epoch)

    def step(self, batch: Batch) -> dict[str, Any]:
        scores = self.model(batch["image"], batch["seed"])
        loss = self.loss(scores, batch["label"])
        correct = (scores.detach().argmax(1) == batch["label"]).sum()
        return {"loss": loss, "logs": {"correct": correct}, "n": len(scores)}

    def scores(self, images: Tensor) -> Tensor:
        """Scores [N,C] of images [N,3,H,W], or the mean score over the crops of [N,K,3,H,W].

        The crops go through the network one after the other: N images a pass, as without crops.
        """
        if images.dim() == 4:
            return self.model(images)
        return torch.stack([self.model(crop) for crop in images.unbind(1)]).mean(0)

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        scores, label = self.scores(batch["image"]), batch["label"]
        predicted, classes = scores.argmax(1), scores.shape[1]
        confusion = torch.bincount(label * classes + predicted, minlength=classes**2)
        return {
            "n": torch.tensor(len(label)),
            "correct": (predicted == label).sum(),
            "loss": nn.functional.cross_entropy(scores.float(), label, reduction="sum"),
            "confusion": confusion.reshape(classes, classes),
        }

    def param_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """One group at config.lr, one with the layers of config.new_layers at config.new_layers_lr."""
        groups: dict[str, list[nn.Parameter]] = self.model.parameter_groups()  # type: ignore[operator]
        if unknown := [name for name in config.new_layers if name not in groups]:
            raise ValueError(f"optim.new_layers: expected some of {', '.join(groups)}, got {unknown[0]!r}")
        old: list[nn.Parameter] = []
        new: list[nn.Parameter] = []
        for name, parameters in groups.items():
            (new if name in config.new_layers else old).extend(p for p in parameters if p.requires_grad)
        rate = config.lr if config.new_layers_lr is None else config.new_layers_lr
        return [{"params": old, "lr": config.lr}, {"params": new, "lr": rate}]

    def model_state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_model_state(self, state: Any) -> None:
        self.model.load_state_dict(state)
