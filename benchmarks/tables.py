"""Runs a table of trainings, rows × seeds, and writes it: ``python benchmarks/tables.py benchmarks/tables/NAME.toml``.

Each run is the driver's command line in a folder of its own. What is finished is not repeated, what was interrupted
goes on, so the same command continues a table, and a row that was added is all that is run. Results: a section of
docs/results.md between the table's own markers, and benchmarks/results/table-NAME.csv with the values of every seed;
a run with the same arguments that stands there, from any machine, is not repeated either (``--afresh`` repeats it).

The file (TOML) holds:

    title = "…"                       # heading of the section
    about = "…"                       # what is measured, in words; optional
    driver = "subtle_differences"     # a file of train/
    arguments = ["cub", "--data.root", "${CUB50}"]     # of every run: preset first; ${NAME}: --set or the environment
    seeds = [0, 1, 2]
    compare = "plain"                 # optional: paired differences to this row, in the first column
    columns = [{name = "test", measure = "accuracy.last", percent = true}]
                                      # a path in the stage's entry of run.json; stage = "…", the last one unless named
    [[rows]]
    name = "block, p {p}"
    arguments = ["--method.p-patch", "{p}"]
    each = {p = [0.2, 0.5]}           # optional: a row for every combination
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import machine, table

from fgvc_ext.atomic_files import write_atomically, write_json

ROOT = Path(__file__).parent.parent
PREEMPTED = 75
"""What a driver returns that was asked to stop and can go on."""


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
        mean = f"{statistics.mean(values):{sign}.{self.digits}f}"
        return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{self.digits}f}"


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


def read_table(file: Path) -> Table:
    """TableError for what the file should not have or lacks."""
    import tomllib  # Python 3.11; only this script needs it

    try:
        values = tomllib.loads(file.read_text())
        rows = tuple(row for entry in values.pop("rows") for row in _rows(**entry))
        columns = tuple(Column(**entry) for entry in values.pop("columns"))
        lists = {name: tuple(values.pop(name)) for name in ("arguments", "seeds")}
        found = Table(file.stem, rows=rows, columns=columns, **lists, **values)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise TableError(f"{file}: {type(error).__name__}: {error}") from error
    names = [row.folder for row in found.rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TableError(f"{file}: two rows would share the folder {twice[0]!r}")
    if found.compare is not None and found.compare not in [row.name for row in rows]:
        raise TableError(f"{file}: compare: expected the name of a row, got {found.compare!r}")
    if not (ROOT / "train" / f"{found.driver}.py").is_file():
        raise TableError(f"{file}: driver: there is no train/{found.driver}.py")
    return found


def _rows(name: str, arguments: Sequence[str] = (), each: Mapping[str, Sequence[Any]] | None = None) -> list[Row]:
    """One row, or one for every combination of the values of `each`."""
    each = each or {}
    combinations = [dict(zip(each, values, strict=True)) for values in itertools.product(*each.values())]
    return [Row(name.format(**one), tuple(word.format(**one) for word in arguments)) for one in combinations]


def filled(words: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """The words with ${NAME} replaced. TableError names what is missing."""

    def value(match: re.Match[str]) -> str:
        if (found := given.get(match[1], os.environ.get(match[1]))) is None:
            raise TableError(f"${{{match[1]}}}: give it with --set {match[1]}=VALUE or in the environment")
        return found

    return [re.sub(r"\$\{(\w+)\}", value, word) for word in words]


# -------------------------------------------------------------------- running


@dataclass(frozen=True)
class Result:
    """What is told of a finished run: a value a column (None: the run has none), its duration, and where it ran."""

    values: tuple[float | None, ...]
    seconds: float
    machine: Mapping[str, Any]


@dataclass(eq=False)
class Run:
    """A row with a seed, in its folder; beside that a file with what was run, for how long, and where."""

    table: Table
    row: Row
    seed: int
    runs: Path
    more: Sequence[str] = ()
    known: Mapping[str, Result] = field(default_factory=dict)  # by arguments: what the CSV holds
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.runs / self.table.name / self.row.folder / f"seed-{self.seed}"
        self.file = self.folder.with_suffix(".json")
        self.facts = json.loads(self.file.read_text()) if self.file.exists() else {"seconds": 0.0}

    @property
    def words(self) -> list[str]:
        """The arguments as the table has them, without what is this machine's."""
        return [*self.table.arguments, *self.row.arguments, *self.more, "--seed", str(self.seed)]

    @property
    def result(self) -> Result | None:
        """Of a finished run of these arguments, from its folder or else from the CSV; None where it is to be run."""
        try:
            found = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            found = {}
        if found.get("status") == "finished" and self.facts.get("words") == self.words:
            values = tuple(column.of(found) for column in self.table.columns)
            return Result(values, self.facts["seconds"], self.facts["machine"])
        return self.known.get(shlex.join(self.words))

    def do(self, given: Mapping[str, str]) -> int:
        """Run or go on; the driver's exit code."""
        driver = ROOT / "train" / f"{self.table.driver}.py"
        own = ["--out", str(self.folder), "--report", "False"]
        command = [sys.executable, str(driver), *filled(self.words, given), *own]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.table.name}: {self.row.name}, seed {self.seed}", flush=True)
        start = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        seconds = self.facts["seconds"] + time.monotonic() - start
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if code == 0:
            self.facts = {"words": self.words, "seconds": seconds, "machine": machine(device)}
        elif "words" in self.facts:  # the driver refused what it cannot go on with: the folder holds the earlier run
            return code
        else:
            self.facts = {**self.facts, "seconds": seconds}
        write_json(self.file, self.facts)
        return code


def run_all(runs: Sequence[Run], given: Mapping[str, str]) -> int:
    """Do what is not done. The first preemption ends it; failures are counted and the other runs done."""
    failed = []
    for run in runs:
        if run.result is not None:
            continue
        code = run.do(given)
        if code == PREEMPTED:
            print("stopped; the same command goes on", file=sys.stderr)
            return PREEMPTED
        if code or run.result is None:
            failed.append(f"{run.row.name}, seed {run.seed}: exit code {code}, see {run.folder}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


# -------------------------------------------------------------------- writing


def section(shown: Table, runs: Sequence[Run]) -> str:
    """The section of docs/results.md: heading, table, settings, machine."""
    done = {run: result for run in runs if (result := run.result) is not None}
    against = [f"against {shown.compare}"] if shown.compare else []
    lines = [["", *(column.name for column in shown.columns), *against, "seeds", "seconds a run", "arguments"]]
    for row in shown.rows:
        if own := {run: result for run, result in done.items() if run.row == row}:
            columns = zip(shown.columns, zip(*(result.values for result in own.values()), strict=True), strict=True)
            cells = [column.told([value for value in values if value is not None]) for column, values in columns]
            cells += [_against(shown, own, done)] if shown.compare else []
            seconds = statistics.median(result.seconds for result in own.values())
            words = f"`{shlex.join(row.arguments)}`" if row.arguments else ""
            lines.append([row.name, *cells, str(len(own)), f"{seconds:.0f}", words])
    spread = "Mean ± sample standard deviation over the seeds."
    if shown.compare:
        spread += f" Against {shown.compare}: mean and deviation of the differences seed by seed."
    more = runs[0].more if runs else ()
    command = (
        f"Every run: `train/{shown.driver}.py {' '.join([*shown.arguments, *more])}`, the row's arguments, `--seed`."
    )
    parts = [f"## {shown.title}", shown.about.strip(), table(lines), spread, command, _machines(done.values())]
    return "\n\n".join(part for part in parts if part)


def _against(shown: Table, own: Mapping[Run, Result], done: Mapping[Run, Result]) -> str:
    """Mean and deviation of a row's differences to the one that it is compared with; empty for that one itself."""
    base = {run.seed: result.values[0] for run, result in done.items() if run.row.name == shown.compare}
    pairs = [(result.values[0], base.get(run.seed)) for run, result in own.items() if run.row.name != shown.compare]
    known = [value - other for value, other in pairs if value is not None and other is not None]
    return shown.columns[0].told(known, sign="+") if known else ""


def _machines(done: Iterable[Result]) -> str:
    """On what the runs were made, a line for each kind of machine."""
    names = ("device", "cpu", "cores", "threads", "torch", "fgvc_ext")
    kinds: dict[str, list[str]] = {}
    for facts in (result.machine for result in done):
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


def write_csv(file: Path, shown: Table, runs: Sequence[Run]) -> None:
    """A line for every run that is finished."""
    done = {run: result for run in runs if (result := run.result) is not None}
    facts = list(dict.fromkeys(name for result in done.values() for name in result.machine))
    lines = [["row", "seed", *(column.name for column in shown.columns), "seconds", "arguments", *facts]]
    for run, result in done.items():
        cells = ["" if value is None else f"{value:.6g}" for value in result.values]
        cells += [f"{result.seconds:.1f}", shlex.join(run.words), *(result.machine.get(name, "") for name in facts)]
        lines.append([run.row.name, str(run.seed), *cells])
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda stream: stream.write(text.getvalue().encode()))


def read_csv(file: Path, shown: Table) -> dict[str, Result]:
    """What `write_csv` left, by arguments; nothing where the table has other columns. TableError for other files."""
    if not file.exists():
        return {}
    try:
        with file.open(newline="") as stream:
            head, *lines = csv.reader(stream)
        values = slice(2, head.index("seconds"))
        if head[values] != [column.name for column in shown.columns]:
            return {}
        found = {}
        for line in lines:
            told = dict(zip(head, line, strict=True))
            facts = {name: told[name] for name in head[head.index("arguments") + 1 :] if told[name]}
            measured = tuple(float(value) if value else None for value in line[values])
            found[told["arguments"]] = Result(measured, float(told["seconds"]), facts)
    except (ValueError, KeyError) as error:
        raise TableError(f"{file}: expected what --write leaves there, or no such file: {error}") from error
    return found


# -------------------------------------------------------------------- command line


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="benchmarks/tables/NAME.toml")
    parser.add_argument("--only", action="append", metavar="ROW", help="run this row alone; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", help="run these seeds alone, also ones that the file lacks")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a value for ${NAME}")
    parser.add_argument("--more", default="", metavar="ARGUMENTS", help="further arguments of every run, in one word")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tables", help="folder of the runs")
    parser.add_argument("--afresh", action="store_true", help="repeat what only the CSV holds")
    parser.add_argument("--show", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--write", action="store_true", help="write page and CSV, not only print")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/table-NAME.csv")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    try:
        shown = read_table(args.file)
        if wrong := [item for item in args.set if "=" not in item]:
            raise TableError(f"--set: expected NAME=VALUE, got {wrong[0]!r}")
        given = dict(item.split("=", 1) for item in args.set)
        names = [row.name for row in shown.rows]
        if unknown := [name for name in args.only or [] if name not in names]:
            raise TableError(f"--only: expected some of {', '.join(names)}, got {unknown[0]!r}")
        file = args.csv or ROOT / "benchmarks" / "results" / f"table-{shown.name}.csv"
        known = {} if args.afresh else read_csv(file, shown)
        seeds = list(dict.fromkeys([*shown.seeds, *(args.seeds or [])]))
        runs = [Run(shown, row, seed, args.runs, shlex.split(args.more), known) for row in shown.rows for seed in seeds]
        wanted = (args.only or names, args.seeds or shown.seeds)
        chosen = [run for run in runs if run.row.name in wanted[0] and run.seed in wanted[1]]
        code = 0 if args.show else run_all(chosen, given)
        text = section(shown, runs)
        print(text)
        if args.write:
            replace_section(args.page, shown.name, text)
            write_csv(file, shown, runs)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
