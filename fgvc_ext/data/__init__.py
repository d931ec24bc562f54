"""Data sets of fine-grained images: the embedded synthetic birds, the benchmarks, and folders of your own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .aircraft import Aircraft
from .birds import SyntheticBirds
from .cars import Cars
from .check import Problem, check, verify_files
from .cub import CUB
from .dataset import BrokenImageError, DatasetError, ImageDataset, decode_image, split_validation, verify_image
from .dogs import Dogs
from .folder import ImageFolder
from .gtos import GTOSMobile
from .transforms import eval_transform, five_crop_transform, train_transform

__all__ = [
    "CUB",
    "Aircraft",
    "BrokenImageError",
    "Cars",
    "DatasetError",
    "Dogs",
    "GTOSMobile",
    "ImageDataset",
    "ImageFolder",
    "Problem",
    "SyntheticBirds",
    "check",
    "decode_image",
    "eval_transform",
    "five_crop_transform",
    "load_dataset",
    "split_validation",
    "train_transform",
    "verify_files",
    "verify_image",
]

_DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "synthetic": SyntheticBirds,
    "folder": ImageFolder,
    "cub": CUB,
    "cars": Cars,
    "aircraft": Aircraft,
    "dogs": Dogs,
    "gtos": GTOSMobile,
}


def load_dataset(
    name: str, root: str | os.PathLike[str] | None = None, split: str = "train", **options: Any
) -> ImageDataset:
    """The data set `name`: "synthetic", "folder", "cub", "cars", "aircraft", "dogs" or "gtos".

    `options` go to its class. "synthetic" is drawn and takes no root, the others need one. Raises ValueError for an
    unknown name or a missing root, `DatasetError` for data that is not as it should be.
    """
    if name not in _DATASETS:
        raise ValueError(f"data set: expected one of {', '.join(sorted(_DATASETS))}, got {name!r}")
    if name == "synthetic":
        if root is not None:
            raise ValueError(f"data set 'synthetic' is drawn and takes no root, got {os.fspath(root)!r}")
        return SyntheticBirds(split, **options)
    if root is None:
        raise ValueError(f"data set {name!r}: expected the folder that holds it as root, got None")
    return _DATASETS[name](root, split, **options)
