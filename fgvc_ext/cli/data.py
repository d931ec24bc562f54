"""`fgvc-ext data check`: everything that is wrong with a data set, before training starts."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..data import DatasetError, ImageDataset, ImageFolder, check, load_dataset


def check_command(dataset: str, root: Path | None = None) -> int:
    """Read, decode and compare all splits of a data set and print what was found.

    Returns 0 without serious problems, else 1. Raises ValueError for an unknown data set or a root that is missing.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            splits = _splits(dataset, root)
        except DatasetError as error:
            print(f"error: {error}")
            return 1
        problems = check(*splits)
    for part in splits:
        print(f"{part.name} {part.split}: {len(part):,} images, {len(part.classes)} classes")
    for warning in caught:
        print(f"warning: {warning.message}")
    for problem in problems:
        print(problem)
    serious = sum(problem.serious for problem in problems)
    print(
        f"{serious} errors, {len(problems) - serious + len(caught)} warnings"
        if problems or caught
        else "no problems found"
    )
    return 1 if serious else 0


def _splits(dataset: str, root: Path | None) -> list[ImageDataset]:
    train = load_dataset(dataset, root, "train")
    names = ["test"]
    if type(train) is ImageFolder:  # either will do for evaluation
        names = [name for name in ("val", "test") if (train.root / name).is_dir()] or ["test"]
        if names == ["val"]:
            print(f"{train.root}: no folder 'test': 'val' is what a model is evaluated on")
    return [train, *(load_dataset(dataset, root, name) for name in names)]
