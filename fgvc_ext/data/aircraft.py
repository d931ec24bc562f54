"""FGVC-Aircraft 2013b (Maji et al., Fine-Grained Visual Classification of Aircraft, 2013)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .dataset import BrokenImageError, ImageFiles
from .official import Official, find_folder, from_one_based, require_files
from .text_tables import Table, floats, lines

BANNER = 20
"""Height in pixels of the copyright notice at the bottom of every image, which the authors ask to remove."""
Level = Literal["variant", "family", "manufacturer"]
IMAGES = {"train": 6667, "test": 3333}
OFFICIAL = {
    "variant": Official("FGVC-Aircraft", 100, IMAGES, per_class={"train": (66, 67), "test": (33, 34)}),
    "family": Official("FGVC-Aircraft, families", 70, IMAGES),
    "manufacturer": Official("FGVC-Aircraft, manufacturers", 30, IMAGES),
}
NAMES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


class Aircraft(ImageFiles):
    """FGVC-Aircraft: `root` is the folder `fgvc-aircraft-2013b`, its folder `data`, or the folder that holds it.

    The split "train" is the official `trainval`, as papers use it. The lowest 20 pixels of every image, a banner with
    its source, are cut off. Classes stand in the order of `variants.txt`; ids are the official ones, leading zeros
    included; boxes, where `images_box.txt` is there, are xyxy pixels from 0.

    Args:
        level: what the classes are: "variant" (100, the usual one), "family" (70) or "manufacturer" (30).
        check_files: False allows missing image files, for work on the lists alone.

    Raises:
        DatasetError: with file and line, for a list that is missing or faulty, an unknown class, a box without area
            and a missing image. Other counts than the official ones give one warning with both numbers.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, level: Level = "variant", check_files: bool = True
    ) -> None:
        if level not in OFFICIAL:
            raise ValueError(f"level: expected one of {', '.join(OFFICIAL)}, got {level!r}")
        OFFICIAL[level].check_split(split)
        self.root = find_folder(Path(root), ("fgvc-aircraft-2013b/data", "data"), [NAMES[level]])
        names = self.root / NAMES[level]
        classes = [text for _, text in lines(names)]
        part = "trainval" if split == "train" else "test"
        listed = Table(self.root / f"images_{level}_{part}.txt", "image", str, str)
        listed.check_values(classes, level, names)
        ids = list(listed.rows)
        paths = [self.root / "images" / f"{image}.jpg" for image in ids]
        if check_files:
            require_files(listed.file, paths)
        super().__init__(
            "aircraft",
            split,
            classes,
            torch.tensor([classes.index(listed.rows[image]) for image in ids], dtype=torch.int64),
            ids,
            _read_boxes(self.root / "images_box.txt", ids),
            paths=paths,
        )
        self.counts = OFFICIAL[level].compare(self.root, split, self.classes, self.labels)

    def load(self, index: int) -> Tensor:
        """The image without its banner, as uint8 RGB [3,H-20,W]."""
        image = super().load(index)
        if image.shape[1] <= BANNER:
            cause = f"expected more than the {BANNER} lines of the banner, got {image.shape[1]}"
            raise BrokenImageError.of(self.paths[index], index, cause)
        return image[:, :-BANNER]


def _box(text: str) -> tuple[float, float, float, float]:
    x_min, y_min, x_max, y_max = floats(text, "xmin ymin xmax ymax")
    return from_one_based(x_min, y_min, x_max, y_max)


def _read_boxes(file: Path, ids: list[str]) -> Tensor | None:
    if not file.is_file():
        return None
    boxes = Table(file, "image", str, _box)
    boxes.require(ids)
    return torch.tensor([boxes.rows[image] for image in ids], dtype=torch.float32).reshape(-1, 4)
