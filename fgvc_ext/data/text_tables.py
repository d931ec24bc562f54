"""Text files with one row an id, as benchmarks keep their lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from .dataset import DatasetError

Key = TypeVar("Key", int, str)
Value = TypeVar("Value")


class Table(Generic[Key, Value]):
    """A text file with one row an id: `rows` by id, and the line each row came from.

    The id ends at the first space; `key` reads it and `parse` the rest. With `expected`, the ids must be exactly those.
    """

    def __init__(
        self,
        file: Path,
        kind: str,
        key: Callable[[str], Key],
        parse: Callable[[str], Value],
        expected: Collection[Key] | None = None,
    ) -> None:
        self.file, self.kind = file, kind
        self.rows: dict[Key, Value] = {}
        self.lines: dict[Key, int] = {}
        for number, text in lines(file):
            first, _, rest = text.partition(" ")
            row = parsed(file, number, key, first, f"{kind} id")
            if row in self.rows:
                raise DatasetError.at(file, number, f"{kind} id {row} is a duplicate of line {self.lines[row]}")
            if expected is not None and row not in expected:
                raise DatasetError.at(file, number, f"{kind} id {row} is unknown: images.txt has no such id")
            self.rows[row] = parsed(file, number, parse, rest.strip(), f"the fields of {kind} {row}")
            self.lines[row] = number
        self.require(expected or ())
        if not self.rows:
            raise DatasetError.at(file, None, "the file has no lines")

    def require(self, ids: Collection[Key]) -> None:
        """Raise DatasetError where one of these has no row."""
        missing = [row for row in ids if row not in self.rows]
        if missing:
            text = f"{self.kind} id {missing[0]} is missing ({len(missing)} of {len(ids)} are)"
            raise DatasetError.at(self.file, None, text)

    def check_values(self, known: Collection[Value], what: str, source: Path) -> None:
        """Raise DatasetError for a row whose value is not known, which `source` lists."""
        for row, value in self.rows.items():
            if value not in known:
                raise DatasetError.at(self.file, self.lines[row], f"{what} {value} is unknown: not in {source.name}")


def lines(file: Path) -> Iterator[tuple[int, str]]:
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


def parsed(file: Path, line: int, parse: Callable[[str], Value], text: str, what: str) -> Value:
    """What `parse` makes of a text; its ValueError becomes the DatasetError of that line."""
    try:
        if not text:
            raise ValueError("nothing there")
        return parse(text)
    except ValueError as error:
        raise DatasetError.at(file, line, f"cannot read {what} from {text!r}: {error}") from error


def floats(text: str, names: str) -> list[float]:
    """As many finite numbers as there are names; ValueError for another text."""
    values = [float(field) for field in text.split()]
    if len(values) != len(names.split()) or not all(map(math.isfinite, values)):
        raise ValueError(f"expected {len(names.split())} finite numbers: {names}")
    return values
