"""Progress for people: a bar where there is a terminal, one line an epoch everywhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows images per second and time left while a stage trains; quiet without a terminal but for a line an epoch."""

    def __init__(self, stage: str, epochs: int, images: int, *, enabled: bool = True) -> None:
        self.stage, self.epochs, self.per_epoch, self.enabled = stage, epochs, images, enabled
        self._bar: tqdm | None = None
        self._first_epoch: int | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def _new_bar(self, total: int, label: str, initial: int = 0) -> tqdm:
        hidden = not (self.enabled and sys.stderr.isatty())
        return tqdm(total=total, initial=initial, desc=f"{self.stage} {label}", unit="img", leave=False, disable=hidden)

    @contextmanager
    def epoch(self, epoch: int, done: int) -> Iterator[None]:
        """The bar of an epoch, of which `done` images are trained already."""
        if self._first_epoch is None:
            self._first_epoch = epoch
        self._bar = self._new_bar(self.per_epoch, f"{epoch + 1}/{self.epochs}", min(done, self.per_epoch))
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None

    def images(self, count: int) -> None:
        """Advance the epoch's bar."""
        if self._bar is not None:
            self._bar.update(count)

    def loss(self, value: float) -> None:
        """Show the epoch's mean loss so far beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {value:.3f}", refresh=False)

    @contextmanager
    def evaluation(self, name: str, total: int) -> Iterator[Callable[[int], Any]]:
        """A bar for an evaluation; yields the function that advances it."""
        bar = self._new_bar(total, name)
        try:
            yield bar.update
        finally:
            bar.close()

    def line(self, row: dict[str, Any]) -> None:
        """One line for a finished epoch, with the time that the rest of the stage will take.

        `row` is the epoch's line of metrics.csv, and under "headline" the measure to show.
        """
        if not self.enabled:
            return
        done = row["epoch"] - (self._first_epoch or 0)
        left = (time.perf_counter() - self._start) / done * (self.epochs - row["epoch"])
        words = [f"{self.stage} {row['epoch']}/{self.epochs}", f"loss {row.get('train_loss', math.nan):.3f}"]
        headline = row["headline"] or "accuracy"
        for name in ("train", "val", "test"):
            value = row.get(f"{name}_{headline}")
            words += [f"{name} {_shown(headline, value)}"] if value is not None and math.isfinite(value) else []
        words += [f"{row['images_per_second']:.0f} img/s", f"{left:.0f} s left"]
        tqdm.write("  ".join(words), file=sys.stdout)
        sys.stdout.flush()


def _shown(measure: str, value: float) -> str:
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"{measure} {value:.4g}"
