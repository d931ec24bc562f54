"""What the official benchmarks share: known numbers of classes and images, 1-based boxes, lists of files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .dataset import DatasetError


@dataclass(frozen=True)
class Official:
    """The numbers that a whole copy of a benchmark has.

    Attributes:
        title: its name, for people.
        classes: number of classes.
        images: split → number of images.
        per_class: split → the least and the most images of a class.
    """

    title: str
    classes: int
    images: Mapping[str, int]
    per_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def check_split(self, split: str) -> None:
        """Raise ValueError for a split that the benchmark does not have."""
        if split not in self.images:
            raise ValueError(f"split: expected {' or '.join(map(repr, self.images))}, got {split!r}")

    def compare(self, root: Path, split: str, classes: Sequence[str], labels: Tensor) -> Counts:
        """One warning with both numbers where a copy has others: somebody may want a part of the data."""
        expected = self.images[split]
        if (len(classes), len(labels)) != (self.classes, expected):
            warnings.warn(
                f"{self.title} at {root}: {len(classes)} classes and {len(labels):,} {split} images; "
                f"the official data set has {self.classes} and {expected:,}",
                stacklevel=3,
            )
        counts = labels.bincount(minlength=len(classes)).tolist()
        return Counts(self, split, dict(zip(classes, counts, strict=True)))


@dataclass(frozen=True)
class Counts:
    """How many images of each class a whole split has, beside what it should have: `counts` of a benchmark here.

    A part of the split (`subset`) keeps those of the whole.
    """

    official: Official
    split: str
    per_class: Mapping[str, int]

    def difference(self) -> str:
        """What differs from the official split, for people; empty where nothing does."""
        if self.split not in self.official.per_class:
            images, expected = sum(self.per_class.values()), self.official.images[self.split]
            differs = f"{self.split}: {images:,} images, the official split has {expected:,}"
            return "" if images == expected else differs
        low, high = self.official.per_class[self.split]
        other = [f"{name} ({count})" for name, count in self.per_class.items() if not low <= count <= high]
        if not other:
            return ""
        shown = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
        return f"{self.split}: {len(other)} classes have not {low} to {high} images as the official split has: {shown}"

    def is_serious(self) -> bool:
        """Whether what differs misleads: a part may be what somebody wants, a whole with another split is not."""
        return len(self.per_class) == self.official.classes


def find_folder(root: Path, names: Sequence[str], marks: Sequence[str]) -> Path:
    """`root` or its folder of one of these names, whichever holds one of the files `marks`; DatasetError if none."""
    for folder in (root, *(root / name for name in names)):
        if any((folder / mark).is_file() for mark in marks):
            return folder
    found = f"found no {' or '.join(marks)} there" if root.is_dir() else "found no such folder"
    raise DatasetError(f"{root}: expected the folder {names[0]} ({marks[0]}) or the folder that holds it, {found}")


def require_files(source: Path, paths: Sequence[Path]) -> None:
    """Raise DatasetError where images that `source` lists are not there."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DatasetError(f"{source}: no file {missing[0]} ({len(missing)} of {len(paths)} images are missing)")


def from_one_based(x_min: float, y_min: float, x_max: float, y_max: float) -> tuple[float, float, float, float]:
    """A box whose first and last pixels count from 1 → xyxy: what lies between its edges, from 0.

    Raises ValueError for a box without area.
    """
    box = (max(x_min - 1, 0), max(y_min - 1, 0), x_max, y_max)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"expected xmin ymin xmax ymax of a box with an area, got {x_min} {y_min} {x_max} {y_max}")
    return box
