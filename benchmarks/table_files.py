"""What tables.py writes of its runs, and reads again: a section of a page, and a CSV file with a line for every run.

A line that stands in a CSV stays there until the same run (its arguments) has another result.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from results import table

from fgvc_ext.atomic_files import NO_LOCKS, write_atomically


class TableError(ValueError):
    """Something in a table's file, or in what it has to be given."""


@dataclass(frozen=True)
class Column:
    """A measure of a run: a path in a stage's entry of run.json, such as accuracy.last or measures.test.iou."""

    name: str
    measure: str
    stage: str | None = None
    percent: bool = False
    digits: int = 1

    def of(self, run: Mapping[str, Any]) -> float | None:
        """The value; None for a run that does not have it."""
        entries = [entry for entry in run["stages"] if self.stage in (None, entry["name"])]
        for entry in reversed(entries):
            value: Any = entry
            for name in self.measure.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                return 100.0 * value if self.percent else float(value)
        return None

    def told(self, values: Sequence[float], sign: str = "") -> str:
        """Mean ± sample deviation over the seeds; a single value stands alone."""
        if not values:
            return "–"
        mean = f"{np.mean(values):{sign}.{self.digits}f}"
        return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    name: str
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Table:
    """What a file says; see the top of this module."""

    name: str
    title: str
    driver: str
    arguments: tuple[str, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    about: str = ""
    compare: str | None = None


@dataclass(frozen=True)
class Line:
    """What is told of a finished run: a value a column (None: the run has none), its duration, and where it ran."""

    row: str
    seed: int
    values: tuple[float | None, ...]
    seconds: float
    arguments: str
    machine: Mapping[str, str]

    def as_read_again(self) -> Line:
        """Rounded, so that a page does not change with where its numbers come from."""
        values = tuple(None if value is None else float(f"{value:.6g}") for value in self.values)
        return replace(self, values=values, seconds=float(f"{self.seconds:.1f}"))


# -------------------------------------------------------------------- page


def section(shown: Table, lines: Iterable[Line], more: str = "") -> str:
    """The section of docs/results.md: heading, table, settings, machine.

    Args:
        lines: of the finished runs that it shows.
        more: further arguments of every run.
    """
    against = [f"against {shown.compare}"] if shown.compare else []
    rows = [["", *(column.name for column in shown.columns), *against, "seeds", "seconds a run", "arguments"]]
    of: dict[str, dict[int, Line]] = {row.name: {} for row in shown.rows}
    for line in lines:
        of[line.row][line.seed] = line
    for row in shown.rows:
        if own := of[row.name]:
            columns = zip(shown.columns, zip(*(line.values for line in own.values()), strict=True), strict=True)
            cells = [column.told([value for value in values if value is not None]) for column, values in columns]
            cells += [_against(shown, row, of)] if shown.compare else []
            seconds = statistics.median(line.seconds for line in own.values())
            words = f"`{shlex.join(row.arguments)}`" if row.arguments else ""
            rows.append([row.name, *cells, str(len(own)), f"{seconds:.0f}", words])
    spread = "Mean ± sample standard deviation over the seeds."
    if shown.compare:
        spread += f" Against {shown.compare}: mean and deviation of the differences seed by seed."
    command = " ".join([f"train/{shown.driver}.py", *shown.arguments, *([more] if more else [])])
    every = f"Every run: `{command}`, the row's arguments, `--seed`."
    machines = _machines(line for own in of.values() for line in own.values())
    parts = [f"## {shown.title}", shown.about.strip(), table(rows), spread, every, machines]
    return "\n\n".join(part for part in parts if part)


def _against(shown: Table, row: Row, of: Mapping[str, Mapping[int, Line]]) -> str:
    """Mean and deviation of a row's differences to the one that it is compared with; empty for that one itself."""
    assert shown.compare is not None
    base = of[shown.compare]
    if row.name == shown.compare:
        return ""
    pairs = [(line.values[0], base[seed].values[0]) for seed, line in of[row.name].items() if seed in base]
    known = [value - other for value, other in pairs if value is not None and other is not None]
    return shown.columns[0].told(known, sign="+") if known else ""


def _machines(done: Iterable[Line]) -> str:
    """On what the runs were made, a line for each kind of machine."""
    names = ("device", "cpu", "cores", "threads", "torch", "fgvc_ext")
    kinds: dict[str, list[str]] = {}
    for facts in (line.machine for line in done):
        text = " · ".join(f"{name}: {facts[name]}" for name in names if name in facts)
        kinds.setdefault(text, []).append(facts["date"][:10])
    return "\n".join(f"{text} · {' to '.join(sorted({min(dates), max(dates)}))}" for text, dates in kinds.items())


def replace_section(page: Path, name: str, text: str) -> None:
    """Put the text between the table's markers; at the end of the page, with markers, where there are none."""
    begin, end = f"<!-- benchmarks/tables.py writes {name} from here -->", f"<!-- to here: {name} -->"
    content = page.read_text() if page.exists() else ""
    if (content.count(begin), content.count(end)) == (0, 0):
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise TableError(f"{page}: expected the markers {begin!r} and {end!r}, each once")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    new = f"{before}{begin}\n{text}\n{end}{after}"
    write_atomically(page, lambda stream: stream.write(new.encode()))


# -------------------------------------------------------------------- CSV


def read_csv(file: Path, shown: Table) -> dict[str, Line]:
    """Its lines by arguments; none where there is no file. TableError for another table's, or something else."""
    if not file.exists():
        return {}
    try:
        with file.open(newline="") as stream:
            head, *lines = csv.reader(stream)
        cells = [dict(zip(head, line, strict=True)) for line in lines]
        columns = head[2 : head.index("seconds")]
        facts = head[head.index("arguments") + 1 :]
        found = {
            one["arguments"]: Line(
                one["row"],
                int(one["seed"]),
                tuple(float(one[name]) if one[name] else None for name in columns),
                float(one["seconds"]),
                one["arguments"],
                {name: one[name] for name in facts if one[name]},
            )
            for one in cells
        }
        if any("date" not in line.machine for line in found.values()):
            raise ValueError("a line without a date")
        if len(found) < len(cells):
            raise ValueError("two lines of the same arguments")
    except (ValueError, KeyError, csv.Error) as error:
        raise TableError(f"{file}: expected what --write leaves there, or no such file: {error}") from error
    if columns != [column.name for column in shown.columns]:
        raise TableError(
            f"{file}: expected the columns {', '.join(column.name for column in shown.columns)}, found "
            f"{', '.join(columns)}: rename those that are the same there, or move the file away"
        )
    return found


def write_csv(file: Path, shown: Table, found: Iterable[Line]) -> None:
    """A line for every run: those of the table's rows in their order, then others."""
    order = {row.name: number for number, row in enumerate(shown.rows)}
    lines = sorted(found, key=lambda line: (order.get(line.row, len(order)), line.row, line.seed))
    facts = list(dict.fromkeys(name for line in lines for name in line.machine))
    rows = [["row", "seed", *(column.name for column in shown.columns), "seconds", "arguments", *facts]]
    for line in lines:
        cells = ["" if value is None else f"{value:.6g}" for value in line.values]
        cells += [f"{line.seconds:.1f}", line.arguments, *(line.machine.get(name, "") for name in facts)]
        rows.append([line.row, str(line.seed), *cells])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(file, lambda stream: stream.write(text.getvalue().encode()))


@contextlib.contextmanager
def written_alone(*folders: Path) -> Iterator[None]:
    """Held by the one process that reads, merges and writes files in these folders."""
    with contextlib.ExitStack() as held:
        for folder in sorted({folder.resolve() for folder in folders}):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)  # the folder itself: a lock file would have to be explained to git
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS | {errno.EBADF, errno.EINVAL}:  # the last two: none for folders
                    raise
                print(f"{folder} cannot be locked: let no other table write there meanwhile", file=sys.stderr)
        yield
