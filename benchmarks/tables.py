"""Runs a table of trainings, rows × seeds, and writes it: ``python benchmarks/tables.py benchmarks/tables/NAME.toml``.

Each run is the driver's command line in a folder of its own. What is finished is not repeated, what was interrupted
goes on, so the same command continues a table, and a row that was added is all that is run. Results: a section of
docs/results.md between the table's own markers, and benchmarks/results/table-NAME.csv with the values of every seed
(table_files.py). A run with the same arguments that stands there, from any machine, is not repeated either, even where
a driver's defaults have changed since: ``--afresh`` repeats it.

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
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from results import machine
from table_files import (
    Column,
    Line,
    Row,
    Table,
    TableError,
    read_csv,
    replace_section,
    section,
    write_csv,
    written_alone,
)

from fgvc_ext.atomic_files import write_json

ROOT = Path(__file__).parent.parent
PREEMPTED = 75
"""What a driver returns that was asked to stop and can go on."""


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
    words = [row.arguments for row in found.rows]
    if twice := [row.name for row in found.rows if words.count(row.arguments) > 1]:
        raise TableError(f"{file}: two rows have the same arguments: {', '.join(twice)}")
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


@dataclass(eq=False)
class Run:
    """A row with a seed, in its folder; beside that a file with what was run, for how long, and where."""

    table: Table
    row: Row
    seed: int
    runs: Path
    more: Sequence[str] = ()
    known: Mapping[str, Line] = field(default_factory=dict)  # by arguments: what the CSV holds

    def __post_init__(self) -> None:
        self.folder = self.runs / self.table.name / self.row.folder / f"seed-{self.seed}"
        self.file = self.folder.with_suffix(".json")

    @property
    def words(self) -> list[str]:
        """The arguments as the table has them, without what is this machine's."""
        return [*self.table.arguments, *self.row.arguments, *self.more, "--seed", str(self.seed)]

    @property
    def facts(self) -> dict[str, Any]:
        """What was run in the folder, for how long, and where. TableError for a file that says something else."""
        try:
            found = json.loads(self.file.read_text())
            return {"seconds": float(found["seconds"]), **found}
        except FileNotFoundError:
            return {"seconds": 0.0}
        except (ValueError, TypeError, KeyError) as error:
            raise TableError(
                f"{self.file}: expected what this script leaves there, or no such file: {error}"
            ) from error

    @property
    def line(self) -> Line | None:
        """Of a finished run of these arguments, from its folder or else from the CSV; None where it is to be run."""
        try:
            found = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            found = None
        facts, words = self.facts, shlex.join(self.words)
        known = self.known.get(words)
        if isinstance(found, dict) and found.get("status") == "finished" and facts.get("words") == self.words:
            values = tuple(column.of(found) for column in self.table.columns)
            own = Line(self.row.name, self.seed, values, facts["seconds"], words, facts["machine"]).as_read_again()
            # A run that was repeated elsewhere since has the later date.
            if known is None or own.machine["date"] >= known.machine["date"]:
                return own
        return known and replace(known, row=self.row.name)

    def do(self, given: Mapping[str, str]) -> int:
        """Run or go on; the driver's exit code."""
        driver = ROOT / "train" / f"{self.table.driver}.py"
        own = ["--out", str(self.folder), "--report", "False"]
        command = [sys.executable, str(driver), *filled(self.words, given), *own]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.table.name}: {self.row.name}, seed {self.seed}", flush=True)
        before, start = self.facts, time.monotonic()
        code = -1
        try:
            code = subprocess.run(command, check=False).returncode
        finally:
            seconds = before["seconds"] + time.monotonic() - start
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if code == 0:
                write_json(self.file, {"words": self.words, "seconds": seconds, "machine": machine(device)})
            elif "words" not in before:  # else the driver refused what it cannot go on with: the folder holds that run
                write_json(self.file, {**before, "seconds": seconds})
        return code


def run_all(runs: Sequence[Run], given: Mapping[str, str]) -> int:
    """Do what is not done. The first preemption ends it; failures are counted and the other runs done."""
    failed = []
    for run in runs:
        if run.line is not None:
            continue
        code = run.do(given)
        if code == PREEMPTED:
            print("stopped; the same command goes on", file=sys.stderr)
            return PREEMPTED
        if code or run.line is None:
            failed.append(f"{run.row.name}, seed {run.seed}: exit code {code}, see {run.folder}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


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


def runs_of(shown: Table, args: argparse.Namespace, known: Mapping[str, Line]) -> list[Run]:
    """Every row with every seed of the file and of the command."""
    seeds, more = list(dict.fromkeys([*shown.seeds, *(args.seeds or [])])), shlex.split(args.more)
    return [Run(shown, row, seed, args.runs, more, known) for row in shown.rows for seed in seeds]


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
        known = read_csv(file, shown)
        rows, seeds = args.only or names, args.seeds or shown.seeds
        chosen = [run for run in runs_of(shown, args, {} if args.afresh else known) if run.row.name in rows]
        code = 0 if args.show else run_all([run for run in chosen if run.seed in seeds], given)
        # Hours later: others may have written meanwhile.
        with written_alone(args.page.parent, file.parent):
            known = read_csv(file, shown)
            lines = [line for run in runs_of(shown, args, known) if (line := run.line) is not None]
            text = section(shown, lines, args.more)
            print(text)
            if args.write:
                write_csv(file, shown, {**known, **{line.arguments: line for line in lines}}.values())
                replace_section(args.page, shown.name, text)  # last: it can be written again from the CSV
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
