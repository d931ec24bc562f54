"""metrics.csv and metrics.jsonl: the same numbers in both, whatever was interrupted, and in the order of the stages."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from fgvc_ext.training.metrics import COLUMNS, MetricFiles


def _row(stage: str, epoch: int, **more) -> dict:
    return {"stage": stage, "epoch": epoch, "step": 10 * epoch, "lr": 0.1 / epoch, **more}


def _table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def _objects(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _written(folder: Path, rows: list[dict]) -> MetricFiles:
    metrics = MetricFiles(folder)
    for row in rows:
        metrics.append(row)
    return metrics


def test_both_hold_every_number(tmp_path):
    rows = [_row("a", 1, train_loss=1.5), _row("a", 2, train_loss=0.123456789), _row("b", 1, test_iou=0.5)]
    _written(tmp_path, rows)
    assert _objects(tmp_path) == rows
    table = _table(tmp_path)
    assert list(table[0]) == [*COLUMNS, "train_loss", "test_iou"]
    assert [(row["stage"], row["epoch"], row["train_loss"], row["test_iou"]) for row in table] == [
        ("a", "1", "1.5", ""),
        ("a", "2", "0.123457", ""),
        ("b", "1", "", "0.5"),
    ]


def test_a_new_measure_gets_a_column_and_old_lines_stay(tmp_path):
    _written(tmp_path, [_row("a", 1), _row("a", 2, test_accuracy=1.0)])
    assert [row["test_accuracy"] for row in _table(tmp_path)] == ["", "1"]
    assert [row["lr"] for row in _table(tmp_path)] == ["0.1", "0.05"]


def test_a_stage_that_is_done_again_keeps_its_place(tmp_path):
    metrics = _written(tmp_path, [_row("a", 1), _row("a", 2), _row("b", 1)])
    metrics.drop("a", after=1)
    metrics.append(_row("a", 2, again=True))
    expected = [("a", 1), ("a", 2), ("b", 1)]
    assert [(row["stage"], row["epoch"]) for row in _objects(tmp_path)] == expected
    assert [(row["stage"], int(row["epoch"])) for row in _table(tmp_path)] == expected
    assert _objects(tmp_path)[1]["again"] is True


@pytest.mark.parametrize(("after", "left"), [(0, []), (1, [1]), (2, [1, 2]), (9, [1, 2, 3])])
def test_lines_behind_an_epoch_are_dropped_from_both(after, left, tmp_path):
    rows = [_row("a", 1), _row("a", 2), _row("a", 3), _row("ab", 1), _row("ab", 5)]
    _written(tmp_path, rows).drop("a", after=after)
    kept = [row for row in rows if row["stage"] == "ab" or row["epoch"] in left]
    assert _objects(tmp_path) == kept
    assert [(row["stage"], int(row["epoch"])) for row in _table(tmp_path)] == [(r["stage"], r["epoch"]) for r in kept]


@pytest.mark.parametrize("file", ["metrics.csv", "metrics.jsonl"])
def test_a_line_that_was_cut_short_is_dropped_from_its_file(file, tmp_path):
    metrics = _written(tmp_path, [_row("a", 1), _row("a", 2)])
    before = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(before + before.splitlines()[-1][:9])
    metrics.drop("b", after=0)
    assert (tmp_path / file).read_bytes() == before


def test_files_without_anything_to_drop_are_left_alone(tmp_path):
    metrics = _written(tmp_path, [_row("a", 1)])
    before = [(file.stat().st_ino, file.read_bytes()) for file in (metrics.csv, metrics.jsonl)]
    metrics.drop("a", after=1)
    metrics.drop("b", after=0)
    assert [(file.stat().st_ino, file.read_bytes()) for file in (metrics.csv, metrics.jsonl)] == before
    MetricFiles(tmp_path / "none").drop("a", after=0)
    assert not (tmp_path / "none").exists()


def test_numbers_that_are_none_stay_readable(tmp_path):
    _written(tmp_path, [_row("a", 1, train_loss=math.nan, note=None)])
    assert math.isnan(float(_table(tmp_path)[0]["train_loss"]))
    assert _table(tmp_path)[0]["note"] == ""
    assert math.isnan(_objects(tmp_path)[0]["train_loss"])
