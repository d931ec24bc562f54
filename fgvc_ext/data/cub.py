"""CUB-200-2011 in its official layout and split (Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .dataset import DatasetError, ImageFiles
from .official import Official
from .text_tables import Table, floats, lines

OFFICIAL = Official("CUB", 200, {"train": 5994, "test": 5794}, per_class={"train": (29, 30), "test": (11, 30)})
OFFICIAL_PARTS = 15


class CUB(ImageFiles):
    """CUB-200-2011: `root` is the folder `CUB_200_2011` itself or the folder that holds it.

    The text files are joined by image id, never by line order. Ids are the official ones, as strings, in ascending
    order; classes keep their official names ("001.Black_footed_Albatross"); boxes are xyxy pixels.

    Parameters
    ----------
    parts : also read the part locations: `parts` float32 [N,P,3] (x, y, visible) and `part_names`.
    check_files : False allows missing image files, for work on the text files alone.

    Raises `DatasetError` with file, line and cause for a missing file and for every malformed line, duplicate, missing
    or unknown id, box without area, and missing image. Other counts of classes or images than the official ones (a
    part of the data set) give one warning with both numbers.
    """

    per_sample = (*ImageFiles.per_sample, "parts")

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, parts: bool = False, check_files: bool = True
    ) -> None:
        OFFICIAL.check_split(split)
        self.root = _find_root(Path(root))
        names = Table(self.root / "classes.txt", "class", int, str)
        images = Table(self.root / "images.txt", "image", int, str)
        labels = Table(self.root / "image_class_labels.txt", "image", int, int, images.rows)
        splits = Table(self.root / "train_test_split.txt", "image", int, _split_name, images.rows)
        boxes = Table(self.root / "bounding_boxes.txt", "image", int, _box, images.rows)
        labels.check_values(names.rows, "class id", names.file)
        position = {class_id: label for label, class_id in enumerate(sorted(names.rows))}
        ids = sorted(image for image, name in splits.rows.items() if name == split)
        paths = [self.root / "images" / images.rows[image] for image in ids]
        if check_files:
            _check_files(images, ids, paths)
        super().__init__(
            "cub",
            split,
            [names.rows[class_id] for class_id in sorted(names.rows)],
            torch.tensor([position[labels.rows[image]] for image in ids], dtype=torch.int64),
            [str(image) for image in ids],
            torch.tensor([boxes.rows[image] for image in ids], dtype=torch.float32).reshape(-1, 4),
            paths=paths,
        )
        self.parts: Tensor | None = None
        self.part_names: list[str] = []
        if parts:
            self.part_names, self.parts = _read_parts(self.root, ids, images.rows)
        self.counts = OFFICIAL.compare(self.root, split, self.classes, self.labels)


def _find_root(root: Path) -> Path:
    for folder in (root, root / "CUB_200_2011"):
        if (folder / "images.txt").is_file():
            return folder
    raise DatasetError(
        f"{root}: expected the folder CUB_200_2011 (images.txt, classes.txt, images/) or the folder that holds it, "
        f"{'found no images.txt there' if root.is_dir() else 'found no such folder'}"
    )


def _split_name(text: str) -> str:
    if text not in ("0", "1"):
        raise ValueError("expected 1 (train) or 0 (test)")
    return "train" if text == "1" else "test"


def _box(text: str) -> tuple[float, float, float, float]:
    x, y, width, height = floats(text, "x y width height")
    if width <= 0 or height <= 0:
        raise ValueError("expected a width and a height above 0")
    return x, y, x + width, y + height


def _check_files(images: Table[int, str], ids: list[int], paths: list[Path]) -> None:
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        first = missing[0]
        raise DatasetError.at(
            images.file,
            images.lines[ids[first]],
            f"image id {ids[first]}: no file {paths[first]} ({len(missing)} of {len(ids)} images are missing)",
        )


def _read_parts(root: Path, ids: list[int], known: Mapping[int, str]) -> tuple[list[str], Tensor]:
    """Names and locations [N,P,3]; official place: the folder parts/, also accepted: beside the other files."""
    folder = root / "parts" if (root / "parts").is_dir() else root
    names = Table(folder / "parts.txt", "part", int, str)
    columns = {part: column for column, part in enumerate(sorted(names.rows))}
    positions = {image: row for row, image in enumerate(ids)}
    parts = torch.full((len(ids), len(columns), 3), math.nan)
    file = folder / "part_locs.txt"
    seen: dict[tuple[int, int], int] = {}
    rows: list[tuple[int, int]] = []
    values: list[tuple[float, float, float]] = []
    for number, text in lines(file):
        try:  # 177 thousand lines: parsed in place
            image_text, part_text, *fields = text.split()
            x, y, visible = map(float, fields)
            key = int(image_text), int(part_text)
        except ValueError as error:
            raise DatasetError.at(file, number, f"expected '<image> <part> <x> <y> <visible>', got {text!r}") from error
        if key[0] not in known or key[1] not in columns:
            raise DatasetError.at(file, number, f"image id {key[0]} or part id {key[1]} is unknown")
        if not math.isfinite(x + y) or visible not in (0, 1):
            raise DatasetError.at(file, number, f"expected finite x and y and visible 0 or 1, got {text!r}")
        if key in seen:
            raise DatasetError.at(file, number, f"part {key[1]} of image {key[0]} is a duplicate of line {seen[key]}")
        seen[key] = number
        if key[0] in positions:
            rows.append((positions[key[0]], columns[key[1]]))
            values.append((x, y, visible))
    if rows:
        parts[tuple(torch.tensor(rows).T)] = torch.tensor(values)
    missing = parts.isnan().any(-1).nonzero().tolist()
    if missing:
        image, part = ids[missing[0][0]], sorted(columns)[missing[0][1]]
        raise DatasetError.at(file, None, f"part {part} of image {image} is missing ({len(missing)} locations are)")
    return [names.rows[part] for part in sorted(names.rows)], parts
