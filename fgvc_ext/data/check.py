"""Looks for what would spoil a training run or its result, before it starts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from tqdm import tqdm

from .dataset import BrokenImageError, ImageDataset, ImageFiles


@dataclass(frozen=True)
class Problem:
    """One finding. `kind`: "broken image", "duplicate image", "image in two splits", "empty class", "few images",
    "class list" or "box". `serious`: training on it fails or its result misleads.
    """

    kind: str
    message: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.serious else 'warning'}: {self.kind}: {self.message}"


def check(*datasets: ImageDataset) -> list[Problem]:
    """Check one split or several splits of a data set together: every image is decoded once.

    Reports broken images, the same image content twice in a split or in two of them, classes without images, very
    small classes, boxes outside their image, and splits whose class lists differ. Shows a progress bar on a terminal.
    """
    problems: list[Problem] = []
    seen: dict[str, list[tuple[ImageDataset, int]]] = defaultdict(list)
    for dataset in datasets:
        if dataset.classes != datasets[0].classes:
            problems.append(_different_classes(datasets[0], dataset))
        problems += _class_counts(dataset)
        for index in tqdm(range(len(dataset)), f"checking {dataset.split}", unit="image", disable=None, leave=False):
            try:
                image = dataset.load(index)
            except BrokenImageError as error:
                problems.append(Problem("broken image", f"{dataset.split}: {error}"))
                continue
            problems += _box_problem(dataset, index, image.shape[1], image.shape[2])
            seen[hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).hexdigest()].append(
                (dataset, index)
            )
    for places in seen.values():
        problems += _same_content(places)
    return sorted(problems, key=lambda problem: not problem.serious)


def _name(dataset: ImageDataset, index: int) -> str:
    where = dataset.paths[index] if isinstance(dataset, ImageFiles) else dataset.ids[index]
    return f"{dataset.split} {where} (class {dataset.classes[int(dataset.labels[index])]})"


def _different_classes(first: ImageDataset, second: ImageDataset) -> Problem:
    only = sorted(set(first.classes) ^ set(second.classes))
    found = f"not in both: {', '.join(only[:5])}" if only else "same names in another order"
    return Problem(
        "class list", f"{first.split} has {len(first.classes)} classes, {second.split} {len(second.classes)}; {found}"
    )


def _class_counts(dataset: ImageDataset) -> list[Problem]:
    counts = dataset.labels.bincount(minlength=len(dataset.classes)).tolist()
    empty = [name for name, count in zip(dataset.classes, counts, strict=True) if count == 0]
    problems = []
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        text = f"{dataset.split}: {len(empty)} of {len(counts)} classes have no image: {shown}"
        problems.append(Problem("empty class", text, serious=dataset.split == "train"))
    single = [name for name, count in zip(dataset.classes, counts, strict=True) if count == 1]
    if single and dataset.split == "train":
        problems.append(
            Problem("few images", f"train: {len(single)} classes have one image: {', '.join(single[:5])}", False)
        )
    return problems


def _box_problem(dataset: ImageDataset, index: int, height: int, width: int) -> list[Problem]:
    if dataset.boxes is None:
        return []
    x0, y0, x1, y1 = dataset.boxes[index].tolist()
    if x0 < x1 and y0 < y1 and x0 < width and y0 < height and x1 > 0 and y1 > 0:
        return []
    text = f"{_name(dataset, index)}: box {x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f} lies outside its {width} x {height} image"
    return [Problem("box", text)]


def _same_content(places: list[tuple[ImageDataset, int]]) -> list[Problem]:
    problems = []
    first, first_index = places[0]
    for dataset, index in places[1:]:
        both = f"{_name(first, first_index)} = {_name(dataset, index)}"
        if dataset is not first:
            problems.append(Problem("image in two splits", both))
        else:
            labels = first.labels[first_index], dataset.labels[index]
            problems.append(Problem("duplicate image", both, serious=bool(labels[0] != labels[1])))
    return problems
