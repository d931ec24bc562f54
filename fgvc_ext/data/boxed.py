"""Images cut to boxes that were found once: kept by sample in a text file, cut before an image is resized."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DatasetError, ImageDataset
from .pipeline import Datasets

COLUMNS = ("split", "id", "x1", "y1", "x2", "y2")


class Boxed(ImageDataset):
    """The images of a data set, each cut to its box, at their own resolution.

    Args:
        dataset: the whole images. What it knows of places in them (true boxes, parts) is no part of this one.
        cut: float32 [N,4] xyxy in pixels of the upright image. A part holds every pixel that its box touches; a box
            is limited to the image, and at least one pixel remains.

    Raises:
        ValueError: another number of boxes than images, or a box with a coordinate that is not finite.
    """

    per_sample = (*ImageDataset.per_sample, "cut", "rows")

    def __init__(self, dataset: ImageDataset, cut: Tensor) -> None:
        super().__init__(dataset.name, dataset.split, dataset.classes, dataset.labels, dataset.ids)
        if tuple(cut.shape) != (len(dataset), 4):
            raise ValueError(f"Boxed: cut: expected [{len(dataset)},4], got {list(cut.shape)}")
        if not bool(cut.isfinite().all()):
            row = int((~cut.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"Boxed: cut: expected finite boxes, got {cut[row].tolist()} for {dataset.ids[row]}")
        self.whole, self.cut, self.rows = dataset, cut, list(range(len(dataset)))

    def load(self, index: int) -> Tensor:
        """The part of the image within its box: uint8 [3,h,w]. Raises `BrokenImageError`."""
        image = self.whole.load(self.rows[index])
        x1, y1, x2, y2 = self.cut[index].tolist()
        rows, columns = _pixels(y1, y2, image.shape[-2]), _pixels(x1, x2, image.shape[-1])
        return image[:, rows, columns]

    def content_key(self) -> str:
        boxes = hashlib.sha256(self.cut.contiguous().numpy().tobytes()).hexdigest()
        return f"{self.whole.content_key()} {boxes}"


def _pixels(low: float, high: float, length: int) -> slice:
    first = min(max(0, math.floor(low)), length - 1)
    return slice(first, min(length, max(first + 1, math.ceil(high))))


def boxed(datasets: Datasets, file: str | Path | None) -> Datasets:
    """All images cut to the boxes of a file (see `boxes_of`); None: to their true boxes.

    Raises:
        DatasetError: the file lacks a sample, or a data set has no true boxes.
    """

    def cut(split: str, dataset: ImageDataset) -> Boxed:
        boxes = dataset.boxes if file is None else boxes_of(file, dataset, split)
        if boxes is None:
            raise DatasetError(f"{dataset.name} {dataset.split}: the images have no true boxes")
        return Boxed(dataset, boxes)

    parts = {split: cut(split, dataset) for split, dataset in datasets.splits().items()}
    return Datasets(parts["train"], parts["test"], parts.get("val"))


def boxes_as_csv(boxes: Mapping[str, tuple[list[str], Tensor]]) -> bytes:
    """A table of boxes: split → (ids, float32 [N,4]); a line a sample, digits enough for the same float32."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # an id may hold any character
    writer.writerow(COLUMNS)
    for split, (ids, values) in boxes.items():
        writer.writerows(
            [split, name, *(float(f"{v:.9g}") for v in row)] for name, row in zip(ids, values.tolist(), strict=True)
        )
    return text.getvalue().encode("utf-8", "surrogateescape")


def boxes_of(file: str | Path, dataset: ImageDataset, split: str | None = None) -> Tensor:
    """The boxes float32 [N,4] of a data set's samples, in their order, from a file that `boxes_as_csv` has made.

    Args:
        split: under which its samples are listed; None: the data set's own.

    Raises:
        DatasetError: the file is none of these, or lacks a sample.
    """
    path, split = Path(file), dataset.split if split is None else split
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        reader = csv.reader(stream)
        if tuple(next(reader, ())) != COLUMNS:
            raise DatasetError.at(path, 1, f"expected the columns {', '.join(COLUMNS)}")
        try:
            known = {(line[0], line[1]): [float(value) for value in line[2:6]] for line in reader}
        except (ValueError, IndexError) as error:
            raise DatasetError.at(path, reader.line_num, f"expected {', '.join(COLUMNS)}: {error}") from None
    if missing := [name for name in dataset.ids if len(known.get((split, name), ())) != 4]:
        raise DatasetError.at(
            path, None, f"no box of {missing[0]!r} ({split}), nor of {len(missing) - 1} other samples"
        )
    return torch.tensor([known[split, name] for name in dataset.ids], dtype=torch.float32).reshape(-1, 4)


def intersection_over_union(boxes: Tensor, others: Tensor) -> Tensor:
    """Of each pair of boxes [N,4] xyxy, the area that both cover over the area that at least one covers: [N].

    Two boxes without area have 0.
    """
    low, high = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(part[:, 2:] - part[:, :2]).clamp(min=0).prod(1) for part in (boxes, others)]
    either = areas[0] + areas[1] - both
    return torch.where(either > 0, both / either.clamp(min=torch.finfo(either.dtype).tiny), 0.0)
