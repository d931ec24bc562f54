"""What an epoch is measured by, and the files it is written to."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fgvc_ext.training.task import accuracy

COLUMNS = (
    "stage", "epoch", "step", "lr", "train_loss", "train_accuracy", "test_accuracy", "val_accuracy",
    "test_loss", "val_loss", "test_class_accuracy", "val_class_accuracy", "images_per_second", "data_wait", "seconds",
)  # fmt: skip


def measures(name: str, sums: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
    """Accuracy, mean loss and mean class accuracy of an evaluation, those of them that its sums give."""
    found = {f"{name}_accuracy": accuracy(sums)}
    n = int(sums.get("n", 0))
    if n and "loss" in sums:
        found[f"{name}_loss"] = float(sums["loss"]) / n
    if n and "confusion" in sums:
        found[f"{name}_class_accuracy"] = mean_class_accuracy(sums["confusion"])
    return found


def mean_class_accuracy(confusion: torch.Tensor) -> float:
    """Mean, over the classes that occur, of the share of correct images; rows of `confusion` [C,C] are the labels."""
    images = confusion.sum(1).double()
    correct = confusion.diagonal().double()
    return float((correct[images > 0] / images[images > 0]).mean())


class MetricFiles:
    """`metrics.csv` (fixed columns) and `metrics.jsonl` (everything), one line an epoch and stage.

    Where TensorBoard is installed, the numbers also go to event files under `tensorboard/<stage>`.
    """

    def __init__(self, folder: Path) -> None:
        self.csv, self.jsonl = folder / "metrics.csv", folder / "metrics.jsonl"
        self.events = EventFiles(folder / "tensorboard")

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one epoch to both and sync them, so that a checkpoint never knows of a line that is not there."""
        line = io.StringIO()
        columns = self._columns_there()
        writer = csv.DictWriter(line, columns or COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        if not columns:
            writer.writeheader()
        writer.writerow({name: _short(value) for name, value in row.items()})
        for file, text in ((self.csv, line.getvalue()), (self.jsonl, json.dumps(dict(row)) + "\n")):
            with open(file, "ab") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
        self.events.append(row)

    def _columns_there(self) -> list[str]:
        """The file's own columns: a run that an earlier version began goes on with those."""
        if not self.csv.exists():
            return []
        with open(self.csv, newline="", encoding="utf-8") as stream:
            return next(csv.reader(stream), [])

    def offsets(self) -> dict[str, int]:
        """Sizes in bytes, to be kept in a checkpoint."""
        return {file.name: file.stat().st_size if file.exists() else 0 for file in (self.csv, self.jsonl)}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Remove the lines that were written after `offsets` was taken."""
        for file in (self.csv, self.jsonl):
            if file.exists() and file.stat().st_size > offsets[file.name]:
                os.truncate(file, offsets[file.name])


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
