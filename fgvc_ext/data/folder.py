"""Your own images: one folder a class."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path

import torch

from .dataset import DatasetError, ImageFiles

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder(ImageFiles):
    """`root/train/<class>/*.jpg`, `root/test/<class>/*.jpg`, and `root/val/...` where it exists.

    The classes are the folders under `root/train`, in ASCII order, for every split. Images are found at any depth
    below their class, by the endings in `EXTENSIONS`; hidden files and folders are left out. Ids are paths relative to
    `root`, with "/". Files of other endings are left out with one warning that counts them. Links to folders are
    followed; one that leads back to a folder in which it lies is left out with a warning.

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
        others: Counter[str] = Counter()
        for name in found:
            images, left_out = _files_below(root / split / name)
            if not images:
                there = f", found {_counted(left_out)}" if left_out else ""
                raise DatasetError(
                    f"{root / split / name}: class folder without images, expected {' '.join(EXTENSIONS)}{there}"
                )
            others += left_out
            paths += images
            labels += [classes.index(name)] * len(images)
        ids = [path.relative_to(root).as_posix() for path in paths]
        super().__init__("folder", split, classes, torch.tensor(labels, dtype=torch.int64), ids, paths=paths)
        self.root = root
        if others:
            warnings.warn(
                f"{root / split}: {others.total()} files left out for their endings: {_counted(others)}; "
                f"images end in {' '.join(EXTENSIONS)}",
                stacklevel=2,
            )


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
    names = sorted(path.name for path in _without_loops([entry for entry in entries if entry.is_dir()]))
    if not names:
        raise DatasetError(f"{root / split}: no class folders; {layout}")
    return names


def _files_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images at any depth, and how many files of which other endings lie between them."""
    images, others = [], Counter[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        below = [Path(place, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in _without_loops(below)]
        for file in (Path(place, name) for name in files if not name.startswith(".")):
            if file.suffix.lower() in EXTENSIONS:
                images.append(file)
            else:
                others[file.suffix.lower() or "no ending"] += 1
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix()), others


def _without_loops(folders: list[Path]) -> list[Path]:
    """The folders but for links to one in which they lie: these would bring the same images again, or other classes.

    Each one that is left out is warned of.
    """
    kept = []
    for folder in folders:
        around = [parent.resolve() for parent in folder.parents] if folder.is_symlink() else []
        target = folder.resolve()
        if any(target == parent or target in parent.parents for parent in around):
            warnings.warn(f"{folder}: left out, the link leads back to {target}, in which it lies", stacklevel=4)
        else:
            kept.append(folder)
    return kept


def _counted(endings: Counter[str]) -> str:
    most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:8]
    shown = ", ".join(f"{ending} ({count})" for ending, count in most)
    return shown + (", ..." if len(endings) > 8 else "")
