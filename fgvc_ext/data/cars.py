"""Stanford Cars in both of its layouts (Krause et al., 3D Object Representations for Fine-Grained
Categorization, 2013)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .dataset import DatasetError, ImageFiles
from .mat_files import label_of, read_mat, require_fields
from .official import Official, find_folder, from_one_based, require_files

OFFICIAL = Official(
    "Stanford Cars", 196, {"train": 8144, "test": 8041}, per_class={"train": (24, 68), "test": (24, 68)}
)
CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")  # by name: the devkit's README lists them in another order
WITH_LABELS = "cars_test_annos_withlabels.mat"


class Cars(ImageFiles):
    """Stanford Cars: `root` is the folder `stanford_cars` itself or the folder that holds it.

    Two layouts are known: `devkit/*.mat` with `cars_train/` and `cars_test/` (the labels of the test images, which
    `cars_test_annos.mat` lacks, come from `cars_test_annos_withlabels.mat`, beside the devkit or in it), and
    `cars_annos.mat` with `car_ims/`. Their numbering of the images differs. Classes keep their official names, "/"
    included; ids are paths relative to `root`; boxes are xyxy pixels from 0.

    Args:
        check_files: False allows missing image files, for work on the lists alone.

    Raises:
        DatasetError: a list that is missing or faulty, a class that there is not, a box without area, a missing image.
            Other counts than the official ones give one warning with both numbers.
        ValueError: scipy, which reads the lists, is not installed.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, *, check_files: bool = True) -> None:
        OFFICIAL.check_split(split)
        marks = ("devkit/cars_train_annos.mat", "cars_annos.mat")
        self.root = find_folder(Path(root), ("stanford_cars", "cars"), marks)
        in_devkit = (self.root / marks[0]).is_file()
        file, classes, rows = (_devkit if in_devkit else _one_list)(self.root, split)
        name = "fname" if in_devkit else "relative_im_path"
        require_fields(file, rows, (*CORNERS, "class", name))
        ids = [f"cars_{split}/{row[name]}" if in_devkit else str(row[name]) for row in rows]
        paths = [self.root / place for place in ids]
        if check_files:
            require_files(file, paths)
        labels = [label_of(file, entry, row["class"], len(classes)) for entry, row in enumerate(rows, 1)]
        boxes = [_box(file, entry, row) for entry, row in enumerate(rows, 1)]
        super().__init__(
            "cars",
            split,
            classes,
            torch.tensor(labels, dtype=torch.int64),
            ids,
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            paths=paths,
        )
        self.counts = OFFICIAL.compare(self.root, split, self.classes, self.labels)


def _devkit(root: Path, split: str) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """The list file, the class names and the entries of a split."""
    file = root / "devkit" / "cars_train_annos.mat"
    if split == "test":
        places = [folder / WITH_LABELS for folder in (root, root / "devkit")]
        found = [place for place in places if place.is_file()]
        if not found:
            raise DatasetError(
                f"{places[0]}: no such file, nor {places[1]}: cars_test_annos.mat has no classes of the test images"
            )
        file = found[0]
    names = read_mat(root / "devkit" / "cars_meta.mat", ["class_names"])["class_names"]
    return file, [str(name) for name in names], read_mat(file, ["annotations"])["annotations"]


def _one_list(root: Path, split: str) -> tuple[Path, list[str], list[dict[str, Any]]]:
    file = root / "cars_annos.mat"
    found = read_mat(file, ["annotations", "class_names"])
    require_fields(file, found["annotations"], ("test",))
    rows = [row for row in found["annotations"] if int(row["test"]) == (split == "test")]
    return file, [str(name) for name in found["class_names"]], rows


def _box(file: Path, entry: int, row: dict[str, Any]) -> tuple[float, float, float, float]:
    try:
        x_min, y_min, x_max, y_max = (float(row[corner]) for corner in CORNERS)
        return from_one_based(x_min, y_min, x_max, y_max)
    except (TypeError, ValueError) as error:
        raise DatasetError.at(file, None, f"entry {entry}: {error}") from error
