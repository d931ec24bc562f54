"""A table whose driver is a toy, for the tests of the table runner."""

import csv
import json
from pathlib import Path
from types import ModuleType

# Notes its arguments; the accuracy follows from row and seed. It stops where a file says so, once.
DRIVER = """
import json, pathlib, sys
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
out = pathlib.Path(value("--out"))
out.mkdir(parents=True, exist_ok=True)
with (pathlib.Path(__file__).parent / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
stop = pathlib.Path(__file__).parent / "stop"
if stop.exists():
    code = int(stop.read_text())
    stop.unlink()
    if code == 1:
        sys.exit("refused: the folder holds a run of other settings")
    (out / "run.json").write_text(json.dumps({"status": "preempted", "stages": []}))
    sys.exit(code)
accuracy = float(value("--quality")) + 0.01 * int(value("--seed")) ** 2
stages = [
    {"name": "first", "accuracy": {"last": 0.25}, "measures": {"test": {"iou": 0.5}}},
    {"name": "second", "accuracy": {"last": accuracy}, "measures": {"test": {"accuracy": accuracy}}},
    {"name": "boxes", "status": "done"},
]
(out / "run.json").write_text(json.dumps({"status": "finished", "stages": stages}))
"""

TABLE = """
title = "A toy"
about = "Nothing is learnt."
driver = "toy"
arguments = ["demo", "--root", "${TOY_ROOT}"]
seeds = [0, 1, 2]
compare = "plain"
columns = [
  {name = "test, %", measure = "accuracy.last", percent = true},
  {name = "iou", measure = "measures.test.iou", stage = "first", digits = 2},
  {name = "lacking", measure = "measures.val.accuracy"},
]
[[rows]]
name = "plain"
arguments = ["--quality", "0.5"]
[[rows]]
name = "p {p}, G {g}"
arguments = ["--quality", "{p}", "--g", "{g}"]
each = {p = [0.6, 0.7], g = [1, 2]}
"""


def call(tables: ModuleType, folder: Path, *more: str) -> int:
    common = ["--runs", str(folder / "runs"), "--page", str(folder / "page.md"), "--csv", str(folder / "toy.csv")]
    return tables.main([str(folder / "toy.toml"), *common, *more])


def calls(folder: Path) -> list[list[str]]:
    file = folder / "train/calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows_of(page: Path) -> dict[str, list[str]]:
    lines = [line.strip("| ").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def lines_of(file: Path) -> list[tuple[str, str, str]]:
    with file.open() as stream:
        return [(line["row"], line["seed"], line["test, %"]) for line in csv.DictReader(stream)]
