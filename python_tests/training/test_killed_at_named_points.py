"""Killed at a named point of a run, a driver's command ends, when given again, with what an undisturbed one leaves."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest
import toy_driver
from toy_driver import die_at_file, die_in_a_line, die_in_call
from toy_training import Child, traces

POINTS = {
    "half of a checkpoint": (die_at_file, "half", "first-e*.pt", 3),
    "a checkpoint without its manifest": (die_at_file, "after", "first-e*.pt", 3),
    "an old checkpoint not yet removed": (die_at_file, "after", "second-e*.json", 3),
    "a manifest written, run.json not": (die_at_file, "after", "first-e00001-*.json"),
    "half of run.json": (die_at_file, "half", "run.json", 4),
    "the first line in one of two metric files": (die_at_file, "after", "metrics.csv", 2),
    "a line in one of two metric files": (die_in_a_line, "metrics.jsonl", 1),
    "half a line of metrics.csv": (die_in_a_line, "metrics.csv", 2),
    "a line in both metric files, and no checkpoint": (die_at_file, "before", "first-e00002-*.pt"),
    "an evaluation": (die_in_call, 2, "toy_driver.ToyTask.eval_step"),
    "the weights written, the stage not done": (die_at_file, "after", "first.safetensors"),
    "an artefact written, not done": (die_at_file, "after", "table.safetensors"),
    "the weights that the run ships": (die_at_file, "half", "last.safetensors"),
    "figures of the report": (die_in_call, 1, "toy_driver.save_figure"),
    "the report's page": (die_at_file, "before", "report.html"),
}


def _run(folder: Path, *point) -> tuple[int, str]:
    return Child(folder / "output", toy_driver.run, ["--out", str(folder / "run")], *point).ended()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = _run(folder)
    assert code == 0, output
    return traces(folder / "run")


def _lines(run: Path) -> list[list[tuple[str, int]]]:
    """Stage and epoch of every line of both metric files."""
    with (run / "metrics.csv").open(newline="") as stream:
        table = [(row["stage"], int(row["epoch"])) for row in csv.DictReader(stream)]
    objects = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [table, [(row["stage"], row["epoch"]) for row in objects]]


@pytest.mark.parametrize("point", POINTS)
def test_the_same_command_ends_with_the_same_bytes(point, undisturbed, tmp_path):
    code, output = _run(tmp_path, *POINTS[point])
    assert code == -signal.SIGKILL, output
    code, output = _run(tmp_path)
    assert code == 0, output
    run = tmp_path / "run"
    assert _lines(run) == [[("first", 1), ("first", 2), ("second", 1), ("second", 2)]] * 2
    assert traces(run) == undisturbed
    assert (run / "report.html").stat().st_size > 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert not list(run.rglob("*unfinished")), "what the dead process was writing is removed"
