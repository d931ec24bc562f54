"""The files that a run's numbers are written to, epoch by epoch."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgvc_ext.atomic_files import write_atomically

COLUMNS = ("stage", "epoch", "step", "lr", "seconds", "images_per_second", "data_wait")
"""The first columns of metrics.csv. Those of the measures follow, `<split>_<measure>`, as they first appear."""


class MetricFiles:
    """`metrics.csv` and `metrics.jsonl`: the same numbers, one line a stage and epoch.

    Where TensorBoard is installed, the numbers also go to event files under `tensorboard/<stage>`.
    """

    def __init__(self, folder: Path) -> None:
        self.csv, self.jsonl = folder / "metrics.csv", folder / "metrics.jsonl"
        self.events = EventFiles(folder / "tensorboard")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one epoch to both and sync them, so that a checkpoint never knows of a line that is not there.

        It stands behind the lines of its own stage, also where a stage is done again that others have followed.
        """
        lines, columns = self._lines(), self._columns()
        new = [name for name in row if name not in columns]
        if new or not lines or lines[-1]["stage"] != row["stage"]:
            _replace(self.csv, _csv_text([*columns, *new], _with_row(lines, row)))
            rows = _with_row(self._objects(), row)
            _replace(self.jsonl, "".join(json.dumps(dict(line)) + "\n" for line in rows))
        else:
            _append(self.csv, _csv_text(columns, [row], header=False))
            _append(self.jsonl, json.dumps(dict(row)) + "\n")
        self.events.append(row)

    def drop(self, stage: str, after: int) -> None:
        """Remove the lines of a stage behind epoch `after` (0: all of them), and one that was cut short.

        What a run that goes on from a checkpoint finds behind it will be written again.
        """
        for file, text in (
            (self.csv, _csv_text(self._columns(), [row for row in self._lines() if _stays(row, stage, after)])),
            (self.jsonl, "".join(json.dumps(row) + "\n" for row in self._objects() if _stays(row, stage, after))),
        ):
            if file.exists() and text != file.read_text(encoding="utf-8"):
                _replace(file, text)

    def _columns(self) -> list[str]:
        if not self.csv.exists():
            return list(COLUMNS)
        with open(self.csv, newline="", encoding="utf-8") as stream:
            return next(csv.reader(stream), list(COLUMNS))

    def _lines(self) -> list[dict[str, str]]:
        return list(csv.DictReader(_whole_lines(self.csv.read_text(encoding="utf-8")))) if self.csv.exists() else []

    def _objects(self) -> list[dict[str, Any]]:
        lines = _whole_lines(self.jsonl.read_text(encoding="utf-8")) if self.jsonl.exists() else []
        return [json.loads(line) for line in lines]


def _with_row(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    own = [number for number, other in enumerate(rows) if other["stage"] == row["stage"]]
    place = own[-1] + 1 if own else len(rows)
    return [*rows[:place], row, *rows[place:]]


def _whole_lines(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _stays(row: Mapping[str, Any], stage: str, after: int) -> bool:
    return row["stage"] != stage or int(row["epoch"]) <= after


def _csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _replace(file: Path, text: str) -> None:
    write_atomically(file, lambda stream: stream.write(text.encode()))


def _append(file: Path, text: str) -> None:
    with open(file, "ab") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _short(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


class EventFiles:
    """TensorBoard's event files, one folder a stage; nothing at all where TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}

    def append(self, row: Mapping[str, Any]) -> None:
        """Write an epoch's numbers; those of later epochs, left by a run that was interrupted, are hidden."""
        stage, epoch = row["stage"], row["epoch"]
        if stage not in self._writers:
            self._writers[stage] = _event_writer(self.folder / stage, epoch)
        writer = self._writers[stage]
        if writer is None:
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "epoch" and math.isfinite(value):
                writer.add_scalar(name, value, epoch)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            if writer is not None:
                writer.close()
        self._writers.clear()


def _event_writer(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # missing, or at odds with another package: curves are in metrics.csv all the same
        return None
    return SummaryWriter(str(folder), purge_step=first_epoch)
