"""`fgvc-ext demo`: every driver's preset "demo", several at a time, and what came of them in one table and page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.explain.document import Report, read_json
from fgvc_ext.explain.palette import percent
from fgvc_ext.explain.report import read_rows
from fgvc_ext.training.device import choose_device
from fgvc_ext.training.driver import EXIT_INTERRUPTED
from fgvc_ext.training.stop_request import EXIT_PREEMPTED

MEASURES = ("share in box", "area used", "parts touched")
"""Columns of a run's measures.csv: where its models look."""
_ABOUT = (
    "Synthetic birds: species that differ in small parts, drawn on this machine. Every network is fine-tuned from the "
    "same small backbone, pretrained on other synthetic species. One seed: differences of a point or two are noise, "
    "docs/results.md has five seeds."
)


@dataclass(frozen=True)
class Line:
    """A trained model or ensemble of a run."""

    paper: str
    stage: str
    accuracy: float
    seconds: float | None
    """Of its training; None for what is not trained itself, such as an ensemble."""
    looks: tuple[str, ...]

    def cells(self, plain: Line | None) -> list[str]:
        gain = "" if plain is None or plain is self else f"{100 * (self.accuracy - plain.accuracy):+.1f}"
        seconds = "–" if self.seconds is None else f"{self.seconds:.0f}"
        return [self.paper, self.stage, percent(self.accuracy, 1), gain, seconds, *self.looks]


HEADER = ["paper", "model", "accuracy", "against plain", "seconds", *MEASURES]


def demo_command(out: Path, seed: int, jobs: int | None = None) -> int:
    """Run the demos into folders below `out`, print the table, write `out`/index.html; the first exit code not 0.

    Args:
        jobs: drivers that train at the same time, each in a process of its own that has its share of torch's threads;
            None: as many as there are threads, and one where there is a GPU. Small networks gain more from a thread
            each than from many for one.
    """
    files = sorted(drivers_folder().glob("*.py"))
    runs = {file.stem: out / file.stem for file in files if "demo" in load_driver(file).DRIVER.presets}
    threads = torch.get_num_threads()
    if jobs is None:
        jobs = threads if choose_device("auto").type == "cpu" else 1
    jobs = min(jobs, len(runs))
    share = str(max(1, threads // jobs))
    more = ["--engine.workers", share] if jobs > 1 else []
    words = {
        paper: [*driver_words(paper), "demo", "--out", str(run), "--seed", str(seed), *more]
        for paper, run in runs.items()
    }
    environment = {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "PYTHONUNBUFFERED": "1"}
    if code := run_together(words, jobs, environment):
        return code
    lines = [line for paper, run in runs.items() for line in lines_of(paper, run)]
    plain = next((line for line in lines if line.stage == "plain"), None)
    table = [line.cells(plain) for line in lines]
    print(f"\n{as_text(HEADER, table)}\n\npage: {write_page(out, table, runs)}")
    return 0


def driver_words(paper: str) -> list[str]:
    """The command that runs a driver of this very package: `-m` would look for one in the current folder first."""
    start = f"import sys; sys.path[:] = {sys.path!r}; from fgvc_ext.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, "train", paper]


def run_together(words: Mapping[str, list[str]], jobs: int, environment: Mapping[str, str]) -> int:
    """Run drivers by name, `jobs` at a time, their lines after their names; the first exit code that is not 0.

    After one, or a signal, no other is begun. On SIGTERM and the first Ctrl-C those that run save what they have, and
    the same command goes on: the exit code is then theirs, `EXIT_PREEMPTED`. A second Ctrl-C does not wait for them.
    """
    codes, running, stopped = dict[str, int](), list[subprocess.Popen[str]](), threading.Event()
    width = max(map(len, words), default=0)
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace",
        "env": {**os.environ, **environment},
    }  # fmt: skip

    def run(name: str) -> None:
        if stopped.is_set():
            return
        code = 1  # of an error in these lines, such as a terminal that is gone
        try:
            with subprocess.Popen(words[name], **options) as process:
                running.append(process)
                if stopped.is_set():  # while it was begun
                    process.terminate()
                for line in process.stdout or ():
                    print(f"{name:<{width}}  {line}", end="", flush=True)
            code = process.returncode
        finally:
            if code:
                codes[name] = code if code > 0 else 128 - code
                stopped.set()

    def stop(*_: object) -> None:
        stopped.set()
        for process in running:
            process.terminate()  # also those that Ctrl-C has reached: twice is once

    with _handled(signal.SIGTERM, stop):
        try:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    list(pool.map(run, words))
                except KeyboardInterrupt:
                    stop()
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
    for name, code in codes.items():
        print(f"{name}: ended with exit code {code}, see above")
    return next(iter(codes.values()), EXIT_PREEMPTED if stopped.is_set() else 0)


@contextmanager
def _handled(number: int, handler: Callable[[int, object], None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def lines_of(paper: str, run: Path) -> list[Line]:
    """One for each stage of a run that has an accuracy, in the order of the stages."""
    looks = {row["model"]: row for row in read_rows(run / "measures.csv")}
    seconds: dict[str, float] = {}
    for row in read_rows(run / "metrics.csv"):
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + float(row["seconds"])
    found = []
    for stage in read_json(run / "run.json").get("stages", []):
        if stage.get("headline") == "accuracy":
            name, seen = stage["name"], looks.get(stage["name"], {})
            measures = tuple(seen.get(measure, "–") for measure in MEASURES)
            found.append(Line(paper, name, stage["accuracy"]["last"], seconds.get(name), measures))
    return found


def as_text(header: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def write_page(out: Path, table: list[list[str]], runs: dict[str, Path]) -> Path:
    """`out`/index.html: the table, and where the models of each run look."""
    report = Report("fgvc_ext: demo", "every method on the embedded synthetic birds")
    report.section("Result").text(_ABOUT).table(HEADER, table, caption="On the test images, after the last epoch.")
    for paper, run in runs.items():
        section = report.section(paper)
        section.text(f"Everything about this run: {paper}/report.html")
        captions = read_json(run / "figures" / "captions.json")
        for name in list(captions)[:1]:
            section.figure(run / "figures" / name, str(captions[name].get("caption", "")))
    return report.write(out / "index.html")
