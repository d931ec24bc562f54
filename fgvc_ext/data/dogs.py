"""Stanford Dogs in its official layout (Khosla et al., Novel Dataset for Fine-Grained Image Categorization, 2011)."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from .dataset import DatasetError, ImageFiles
from .mat_files import label_of, read_mat
from .official import Official, find_folder, from_one_based, require_files

OFFICIAL = Official(
    "Stanford Dogs", 120, {"train": 12000, "test": 8580}, per_class={"train": (100, 100), "test": (48, 152)}
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Dogs(ImageFiles):
    """Stanford Dogs: `root` holds `Images/`, `train_list.mat` and `test_list.mat` (or is one folder above).

    Classes are the folders of the images ("n02085620-Chihuahua"), in the order of the official labels; ids are the
    official paths below `Images`. The images come from ImageNet, the test images among them: what a network
    that was pretrained there reaches flatters it.

    Args:
        with_boxes: also read `Annotation/` (20,580 small files): `boxes` is what encloses all dogs of an image, xyxy
            pixels from 0.
        check_files: False allows missing image files, for work on the lists alone.

    Raises:
        DatasetError: a list that is missing or faulty, a label with two folders, a missing image or annotation. Other
            counts than the official ones give one warning with both numbers.
        ValueError: scipy, which reads the lists, is not installed.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, with_boxes: bool = False, check_files: bool = True
    ) -> None:
        OFFICIAL.check_split(split)
        self.root = find_folder(Path(root), ("stanford_dogs", "StanfordDogs"), ("train_list.mat",))
        names: dict[int, str] = {}
        lists = {name: _read_list(self.root / f"{name}_list.mat", names) for name in OFFICIAL.images}
        classes = [names[number] for number in sorted(names)]
        position = {number: label for label, number in enumerate(sorted(names))}
        ids, numbers = lists[split]
        paths = [self.root / "Images" / place for place in ids]
        if check_files:
            require_files(self.root / f"{split}_list.mat", paths)
        boxes = [_enclosing_box(self.root / "Annotation" / Path(place).with_suffix("")) for place in ids if with_boxes]
        super().__init__(
            "dogs",
            split,
            classes,
            torch.tensor([position[number] for number in numbers], dtype=torch.int64),
            ids,
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) if with_boxes else None,
            paths=paths,
        )
        self.counts = OFFICIAL.compare(self.root, split, self.classes, self.labels)


def _read_list(file: Path, names: dict[int, str]) -> tuple[list[str], Sequence[int]]:
    """The paths of a list and their class numbers from 0; the folders of the classes go into `names`."""
    found = read_mat(file, ["file_list", "labels"])
    ids = [str(place) for place in found["file_list"]]
    if len(ids) != len(found["labels"]):
        raise DatasetError.at(file, None, f"{len(ids)} files, but {len(found['labels'])} labels")
    numbers = [label_of(file, entry, number, OFFICIAL.classes) for entry, number in enumerate(found["labels"], 1)]
    for entry, (place, number) in enumerate(zip(ids, numbers, strict=True), 1):
        folder = place.rpartition("/")[0]
        if names.setdefault(number, folder) != folder:
            raise DatasetError.at(
                file, None, f"entry {entry}: class {number + 1} is {names[number]!r} elsewhere, here {folder!r}"
            )
    return ids, numbers


def _enclosing_box(file: Path) -> tuple[float, float, float, float]:
    """The box around all objects of a file in Pascal VOC's format."""
    try:
        found = list(ElementTree.parse(file).iter("bndbox"))
        rows = [[float(box.findtext(corner) or "") for corner in CORNERS] for box in found]
        if not rows:
            raise ValueError("expected at least one bndbox")
        left, top, right, bottom = zip(*rows, strict=True)
        return from_one_based(min(left), min(top), max(right), max(bottom))
    except OSError as error:
        raise DatasetError.at(file, None, error.strerror or str(error)) from error
    except (ElementTree.ParseError, ValueError) as error:
        raise DatasetError.at(file, None, str(error)) from error
