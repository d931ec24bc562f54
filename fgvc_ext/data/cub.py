"""CUB-200-2011 in its official layout and split (Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .dataset import DatasetError, ImageFiles

OFFICIAL_CLASSES = 200
OFFICIAL_IMAGES = {"train": 5994, "test": 5794}
OFFICIAL_PER_CLASS = {"train": (29, 30), "test": (11, 30)}
OFFICIAL_PARTS = 15

Value = TypeVar("Value")


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
        if split not in OFFICIAL_IMAGES:
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        self.root = _find_root(Path(root))
        names = _Table(self.root / "classes.txt", "class", str)
        images = _Table(self.root / "images.txt", "image", str)
        labels = _Table(self.root / "image_class_labels.txt", "image", int, images.rows)
        splits = _Table(self.root / "train_test_split.txt", "image", _split_name, images.rows)
        boxes = _Table(self.root / "bounding_boxes.txt", "image", _box, images.rows)
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
        _warn_of_other_counts(self.root, split, len(names.rows), len(ids))


class _Table(Generic[Value]):
    """A text file with one row an id: `rows` by id, and the line each row came from.

    With `expected`, the ids must be exactly those.
    """

    def __init__(
        self, file: Path, kind: str, parse: Callable[[str], Value], expected: Collection[int] | None = None
    ) -> None:
        self.file, self.kind = file, kind
        self.rows: dict[int, Value] = {}
        self.lines: dict[int, int] = {}
        for number, text in _lines(file):
            first, _, rest = text.partition(" ")
            row = _parsed(file, number, int, first, f"{kind} id")
            if row in self.rows:
                raise DatasetError.at(file, number, f"{kind} id {row} is a duplicate of line {self.lines[row]}")
            if expected is not None and row not in expected:
                raise DatasetError.at(file, number, f"{kind} id {row} is unknown: images.txt has no such id")
            self.rows[row] = _parsed(file, number, parse, rest.strip(), f"the fields of {kind} {row}")
            self.lines[row] = number
        missing = [] if expected is None else [row for row in expected if row not in self.rows]
        if missing:
            raise DatasetError.at(
                file, None, f"{kind} id {missing[0]} is missing ({len(missing)} of {len(expected or ())} are)"
            )
        if not self.rows:
            raise DatasetError.at(file, None, "the file has no lines")

    def check_values(self, known: Collection[Value], what: str, source: Path) -> None:
        for row, value in self.rows.items():
            if value not in known:
                raise DatasetError.at(self.file, self.lines[row], f"{what} {value} is unknown: not in {source.name}")


def _find_root(root: Path) -> Path:
    for folder in (root, root / "CUB_200_2011"):
        if (folder / "images.txt").is_file():
            return folder
    raise DatasetError(
        f"{root}: expected the folder CUB_200_2011 (images.txt, classes.txt, images/) or the folder that holds it, "
        f"{'found no images.txt there' if root.is_dir() else 'found no such folder'}"
    )


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers; blank ones are left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DatasetError.at(file, None, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise DatasetError.at(file, None, f"not a text file ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _parsed(file: Path, line: int, parse: Callable[[str], Value], text: str, what: str) -> Value:
    try:
        if not text:
            raise ValueError("nothing there")
        return parse(text)
    except ValueError as error:
        raise DatasetError.at(file, line, f"cannot read {what} from {text!r}: {error}") from error


def _split_name(text: str) -> str:
    if text not in ("0", "1"):
        raise ValueError("expected 1 (train) or 0 (test)")
    return "train" if text == "1" else "test"


def _floats(text: str, names: str) -> list[float]:
    values = [float(field) for field in text.split()]
    if len(values) != len(names.split()) or not all(map(math.isfinite, values)):
        raise ValueError(f"expected {len(names.split())} finite numbers: {names}")
    return values


def _box(text: str) -> tuple[float, float, float, float]:
    x, y, width, height = _floats(text, "x y width height")
    if width <= 0 or height <= 0:
        raise ValueError("expected a width and a height above 0")
    return x, y, x + width, y + height


def _check_files(images: _Table[str], ids: list[int], paths: list[Path]) -> None:
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
    names = _Table(folder / "parts.txt", "part", str)
    columns = {part: column for column, part in enumerate(sorted(names.rows))}
    positions = {image: row for row, image in enumerate(ids)}
    parts = torch.full((len(ids), len(columns), 3), math.nan)
    file = folder / "part_locs.txt"
    seen: dict[tuple[int, int], int] = {}
    rows: list[tuple[int, int]] = []
    values: list[tuple[float, float, float]] = []
    for number, text in _lines(file):
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


def _warn_of_other_counts(root: Path, split: str, classes: int, images: int) -> None:
    expected = OFFICIAL_IMAGES[split]
    if (classes, images) != (OFFICIAL_CLASSES, expected):
        warnings.warn(
            f"CUB at {root}: {classes} classes and {images:,} {split} images; "
            f"the official data set has {OFFICIAL_CLASSES} and {expected:,}",
            stacklevel=3,
        )
