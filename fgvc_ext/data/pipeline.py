"""The images of a run: their configuration, the splits of the data set, and the samples that training sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import load_dataset
from .check import broken_files, verify_files
from .dataset import DatasetError, ImageDataset, split_validation
from .loading import Samples, Views
from .transforms import Preprocessing


@dataclass
class DataConfig:
    """The images and how they are prepared."""

    name: Literal["synthetic", "folder", "cub", "cars", "aircraft", "dogs", "gtos"] = "synthetic"
    root: Path | None = None
    """Folder that holds the data; the synthetic birds need none."""
    resize: int = 600
    """Length of the shorter side before the crop, in pixels."""
    crop: int = 448
    """Side of the square that the network sees: random in training, the centre in evaluation."""
    keep_ratio: bool = True
    """False: an image is squeezed so that both of its sides have `resize` pixels, before the crop."""
    random_crop: bool = True
    """False: the centre in training too."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    rotation: float = 0.0
    """Largest angle by which a training image is turned, in degrees."""
    lighting: float = 0.0
    """Standard deviation of the noise along the principal components of ImageNet's colours."""
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
    species: int = 0
    """synthetic: seed from which the species and their images are drawn."""
    features: Literal["fp16", "fp32", "images"] = "fp16"
    """What a training reads above frozen layers (--model.frozen-until) where only flips augment: their output, computed
    once into --data.cache in fp16 or fp32, or the images, in every epoch."""
    cache: Path | None = None
    """Folder of those features; left out: that of the drawn birds ($FGVC_EXT_CACHE, else ~/.cache/fgvc_ext)."""


@dataclass
class Datasets:
    """The data of a run; `val` is None without a validation share or folder."""

    train: ImageDataset
    test: ImageDataset
    val: ImageDataset | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    """Images that cannot be read and are left out of "test" and "val", where there are any."""

    def splits(self) -> dict[str, ImageDataset]:
        """Those that there are: "train", "test" and perhaps "val"."""
        found = {"train": self.train, "test": self.test}
        return found if self.val is None else {**found, "val": self.val}

    def facts(self) -> dict[str, Any]:
        """What run.json says of them, and what a continued run must find again."""
        facts: dict[str, Any] = {"name": self.train.name, "classes": self.train.classes}
        for name, dataset in (("train", self.train), ("test", self.test), ("val", self.val)):
            if dataset is not None:
                facts |= {f"{name}_images": len(dataset), f"{name}_fingerprint": dataset.fingerprint()}
        return facts | {f"{name}_images_left_out": count for name, count in self.left_out.items()}


def load_datasets(
    config: DataConfig,
    seed: int,
    limit_train: int | None = None,
    limit_test: int | None = None,
    *,
    broken_images: Literal["error", "skip"] = "error",
) -> Datasets:
    """Read both splits, hold out the validation share, apply the limits (which keep images evenly spread).

    Of an image folder, ROOT/val is the validation set; it is what is evaluated on where there is no ROOT/test. The
    files of what is evaluated on are decoded once: a broken one stops a run here, not in its first evaluation. With
    `broken_images` "skip" it is left out instead, of every evaluation alike, and the counts say so.
    """
    options: dict[str, Any] = {}
    if config.name == "synthetic":
        names = ("classes", "train_per_class", "test_per_class", "image_size")
        options = {name: getattr(config, name) for name in names} | {"seed": config.species}
    elif config.root is None:
        raise ValueError(f"data set {config.name!r} needs the folder that holds it: --data.root FOLDER")
    elif not config.root.is_dir():
        raise FileNotFoundError(f"--data.root: {config.root} is not a folder")
    tested, validated = _split_names(config)
    train, test = (load_dataset(config.name, config.root, split, **options) for split in ("train", tested))
    val = load_dataset(config.name, config.root, validated) if validated else None
    if config.val_fraction:
        train, val = split_validation(train, config.val_fraction, seed)
    if limit_train is not None and limit_train < len(train):
        train = train.subset(evenly_spaced(len(train), limit_train))
    datasets = Datasets(train, test.subset(evenly_spaced(len(test), limit_test)), val)
    if broken_images == "skip":
        datasets.test = _without_broken(datasets, "test", datasets.test)
        datasets.val = None if datasets.val is None else _without_broken(datasets, "val", datasets.val)
        return datasets
    for line in [verify_files(dataset) for dataset in (datasets.test, datasets.val) if dataset is not None]:
        if line:
            print(line, flush=True)
    return datasets


def _without_broken(datasets: Datasets, name: str, dataset: ImageDataset) -> ImageDataset:
    """The data set without the images that cannot be read, which are counted and named."""
    broken = broken_files(dataset)
    if not broken:
        return dataset
    if len(broken) == len(dataset):
        raise DatasetError(
            f"{dataset.name} {dataset.split}: none of the {len(dataset)} images can be read: {broken[0]}"
        )
    datasets.left_out[name] = len(broken)
    counts = f"{len(broken)} of {len(dataset)} images cannot be read and are left out"
    print(
        f"WARNING: {dataset.name} {dataset.split}: {counts}: what is measured on {name} is of the others",
        *broken[:10],
        *(["..."] if len(broken) > 10 else []),
        sep="\n  ",
        flush=True,
    )
    left_out = {error.index for error in broken}
    return dataset.subset([index for index in range(len(dataset)) if index not in left_out])


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


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices, spread evenly, so that a list sorted by class keeps all of its classes."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit: expected a positive number of images, got {limit}")
    return [i * count // limit for i in range(limit)]


def preprocessing(config: DataConfig, backbone: Mapping[str, Any]) -> Preprocessing:
    """What an image goes through before the network sees it: this run's sizes, and what the backbone's weights expect.

    Args:
        backbone: mean, std and interpolation, see `models.backbone_preprocessing`.
    """
    return Preprocessing(resize=config.resize, crop=config.crop, keep_ratio=config.keep_ratio, **backbone)


def training_samples(
    datasets: Datasets, config: DataConfig, prepare: Preprocessing, broken_images: Literal["error", "skip"] = "error"
) -> Samples:
    """The training images, augmented as `config` says; features may stand in for them where only flips do that."""
    names = ("flip", "jitter", "rotation", "lighting", "random_crop")
    crop = prepare.train_crop(**{name: getattr(config, name) for name in names})
    views = _training_views(config, prepare)
    return Samples(datasets.train, crop, broken_images, normalise=prepare.normalise, views=views)


_ONLY_FLIPS = {"random_crop": False, "jitter": 0.0, "rotation": 0.0, "lighting": 0.0}
"""What a configuration says where nothing but flips augments the images."""


def _training_views(config: DataConfig, prepare: Preprocessing) -> Views | str:
    if config.features == "images":
        return "--data.features says so"
    for name, needed in _ONLY_FLIPS.items():
        if (value := getattr(config, name)) != needed:
            return f"--data.{name.replace('_', '-')} {value} shows others in every epoch (features need {needed})"
    plain = prepare.train_crop(flip=0.0, jitter=0.0, random_crop=False)
    recipe = {"crop": "training", **prepare.options()}
    return Views(plain, recipe, flip=config.flip, precision=config.features, folder=config.cache)


def evaluation_samples(datasets: Datasets, prepare: Preprocessing) -> dict[str, Samples]:
    """Single-crop samples under "test", and "val" where there is one."""
    found, crop = {"test": datasets.test, "val": datasets.val}, prepare.eval_crop()
    views = Views(crop, {"crop": "evaluation", **prepare.options()})
    return {
        name: Samples(dataset, crop, normalise=prepare.normalise, views=views)
        for name, dataset in found.items()
        if dataset is not None
    }


def five_crop_samples(datasets: Datasets, prepare: Preprocessing) -> Samples:
    """Test samples of five crops each, [5,3,h,w]: the task takes their mean score."""
    return Samples(datasets.test, prepare.five_crops(), crops=5, normalise=prepare.normalise)
