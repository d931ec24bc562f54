"""Looks for what would spoil a training run or its result, before it starts."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .cub import CUB, OFFICIAL_PARTS
from .dataset import BrokenImageError, DatasetError, ImageDataset, ImageFiles, verify_image
from .official import Counts

DECODED_AT_MOST = 20_000
"""Images that `verify_files` decodes; of a larger data set it reads the headers alone."""


@dataclass(frozen=True)
class Problem:
    """One finding. `kind`: "broken image", "duplicate image", "image in two splits", "empty class", "few images",
    "class list", "box", "class counts" or "parts". `serious`: training on it fails or its result misleads.
    """

    kind: str
    message: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.serious else 'warning'}: {self.kind}: {self.message}"


def check(*datasets: ImageDataset) -> list[Problem]:
    """Check one split or several splits of a data set together: every image is decoded once.

    Reports broken images, the same image content twice in a split or in two of them, classes without images, very
    small classes, boxes outside their image, and splits whose class lists differ; for the benchmarks also classes of
    other sizes than the official ones, for CUB part files that are missing or faulty. Shows a progress bar on a
    terminal.
    """
    problems: list[Problem] = []
    seen: dict[str, list[tuple[ImageDataset, int]]] = defaultdict(list)
    for dataset in datasets:
        if dataset.classes != datasets[0].classes:
            problems.append(_different_classes(datasets[0], dataset))
        problems += _class_counts(dataset)
        problems += _official_problems(dataset)
        if isinstance(dataset, CUB):
            problems += _cub_problems(dataset)
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


def verify_files(dataset: ImageDataset, *, threads: int | None = None, decode_at_most: int = DECODED_AT_MOST) -> str:
    """Find broken image files now rather than in the middle of a run; returns a line that says what was looked at.

    Every file is decoded (a JPEG at an eighth of its size) in a few threads; of more than `decode_at_most` files only
    the headers are read. A data set that is not made of files has nothing to verify: the line is empty.

    Raises:
        BrokenImageError: names the first broken file, and how many there are.
    """
    if not isinstance(dataset, ImageFiles):
        return ""
    header_only = len(dataset) > decode_at_most
    found = broken_files(dataset, threads=threads, header_only=header_only)
    if found:
        first, where = found[0], f"{dataset.name} {dataset.split}"
        text = f"{first} ({len(found)} of {len(dataset)} images of {where} are broken)"
        raise BrokenImageError(text, path=first.path, index=first.index, cause=first.cause)
    how = f"the headers of {len(dataset):,} files can be read" if header_only else f"all {len(dataset):,} files decode"
    return f"{dataset.name} {dataset.split}: {how}"


def broken_files(
    dataset: ImageDataset, *, threads: int | None = None, header_only: bool = False
) -> list[BrokenImageError]:
    """What is wrong with each file of the data set that cannot be read, in a few threads; see `verify_image`."""
    if not isinstance(dataset, ImageFiles):
        return []

    def broken(item: tuple[int, Path]) -> BrokenImageError | None:
        try:
            verify_image(item[1], index=item[0], header_only=header_only)
        except BrokenImageError as error:
            return error
        return None

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return [error for error in pool.map(broken, enumerate(dataset.paths)) if error is not None]


def _official_problems(dataset: ImageDataset) -> list[Problem]:
    """Classes of other sizes than those of the benchmark, in the whole split that `dataset` is from."""
    counts = getattr(dataset, "counts", None)
    if not isinstance(counts, Counts) or not counts.difference():
        return []
    return [Problem("class counts", counts.difference(), counts.is_serious())]


def _cub_problems(dataset: CUB) -> list[Problem]:
    """The part files, for the whole split that `dataset` is from."""
    split = "train" if dataset.split == "val" else dataset.split
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the data set itself has warned already
        try:
            names = CUB(dataset.root, split, parts=True, check_files=False).part_names
        except DatasetError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)  # training does not need the parts
            return [Problem("parts", str(error), serious=not missing)]
    if len(names) == OFFICIAL_PARTS:
        return []
    return [Problem("parts", f"{split}: {len(names)} parts, expected {OFFICIAL_PARTS}", serious=False)]


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
