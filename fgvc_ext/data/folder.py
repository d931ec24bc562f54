"""Your own images: one folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .dataset import DatasetError, ImageFiles

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder(ImageFiles):
    """`root/train/<class>/*.jpg`, `root/test/<class>/*.jpg`, and `root/val/...` where it exists.

    The classes are the folders under `root/train`, in ASCII order, for every split. Images are found at any depth
    below their class, by the endings in `EXTENSIONS`; hidden files and folders are left out. Ids are paths relative to
    `root`, with "/".

    Raises `DatasetError` for a missing root or split, a class folder without images, a class that stands in another
    split but not in train, and images that lie beside the class folders.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        root = Path(root)
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        classes = _class_names(root, "train")
        found = classes if split == "train" else _class_names(root, split)
        unknown = [name for name in found if name not in set(classes)]
        if unknown:
            raise DatasetError(
                f"{root / split}: class folders that {root / 'train'} lacks: {', '.join(map(repr, unknown))}; "
                "a model cannot learn what is only tested"
            )
        paths: list[Path] = []
        labels: list[int] = []
        for name in found:
            images = _images_below(root / split / name)
            if not images:
                raise DatasetError(
                    f"{root / split / name}: class folder without images, expected {' '.join(EXTENSIONS)}"
                )
            paths += images
            labels += [classes.index(name)] * len(images)
        ids = [path.relative_to(root).as_posix() for path in paths]
        super().__init__("folder", split, classes, torch.tensor(labels, dtype=torch.int64), ids, paths=paths)
        self.root = root


def _class_names(root: Path, split: str) -> list[str]:
    layout = f"expected {root}/train/<class>/<image>.jpg and {root}/test/<class>/<image>.jpg"
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; {layout}")
    if not (root / split).is_dir():
        raise DatasetError(f"{root}: no folder '{split}'; {layout}")
    entries = [entry for entry in (root / split).iterdir() if not entry.name.startswith(".")]
    stray = sorted(entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in EXTENSIONS)
    if stray:
        raise DatasetError(f"{root / split / stray[0]}: image beside the class folders ({len(stray)} such); {layout}")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DatasetError(f"{root / split}: no class folders; {layout}")
    return names


def _images_below(folder: Path) -> list[Path]:
    images = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [
            Path(place, name) for name in files if not name.startswith(".") and name.lower().endswith(EXTENSIONS)
        ]
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())
