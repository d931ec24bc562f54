"""Writes what was measured: pipe tables for people (a terminal or Markdown), CSV for machines."""

import csv
import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import FLOOR, OURS, Measured, Verdict
from timing import Times

import fgvc_ext
from fgvc_ext.atomic_files import write_atomically

BEGIN, END = "<!-- benchmarks/run.py writes from here -->", "<!-- to here -->"

LEGEND = """\
- Times are medians in milliseconds. Ratios are medians of the rounds' own ratios, so not quite quotients of the times.
- fgvc_ext: our operator through its public function, on the widest instruction set unless named.
- eager: plain PyTorch as one would write it (`plain` in `python_tests/ops/specs/<op>.py`). torch.compile: the same,
  compiled for static shapes (in the sweep once, for dynamic shapes).
- reference: the package's own PyTorch reference, with all edge cases and, for diversify, the counter-based random
  stream. Slower than eager; for information. cross_entropy: torch's own, another loss; for information.
- read once: `x.sum()` of the same tensor. read and write once: also `zero_()` of a warm tensor of its size.
- floor: an operator that does nothing, called as ours are. ours − floor: what our argument checks and work take.
- backward: the raw backward operator on what forward saves, beside plain PyTorch's backward of a graph that is kept.
- small shapes (eager takes less than 5 floors): no slower than eager, beside no slower than the slower of eager and
  torch.compile, which holds everywhere."""


@dataclass(frozen=True)
class Result:
    case: Measured
    times: Times

    @property
    def verdicts(self) -> list[Verdict]:
        return self.case.verdicts(self.times)


def machine(device: str) -> dict[str, str]:
    facts = fgvc_ext.info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "instruction_set": facts["instruction set"],
        "torch": torch.__version__,
        "fgvc_ext": fgvc_ext.__version__,
        "compiler": facts["compiler"],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A pipe table, aligned; the first row is the head, the first ``left`` columns stand left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * width if n < left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(_line(line, widths, left) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    sized = zip(cells, widths, strict=True)
    padded = [cell.ljust(width) if n < left else cell.rjust(width) for n, (cell, width) in enumerate(sized)]
    return f"| {' | '.join(padded)} |"


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def times_table(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result.times.samples))
    rows = [["ms", *names, "ours − floor"]]
    for result in results:
        times = result.times
        cells = [milliseconds(times.median(name)) if name in times.samples else "" for name in names]
        rows.append([str(result.case), *cells, milliseconds(times.median(OURS) - times.median(FLOOR))])
    return table(rows)


def verdicts_table(results: Sequence[Result]) -> str:
    rows = [["case", "ratio", "measured", "wanted", ""]]
    for result in results:
        for verdict in result.verdicts:
            outcome = "pass" if verdict.passed else "FALL SHORT"
            rows.append([str(result.case), verdict.what, verdict.measured, verdict.wanted, outcome])
    return table(rows, left=2)


def sections(results: Sequence[Result], device: str) -> dict[str, str]:
    """By operator (and GPU): on what it was measured, and its tables. Of the sweep: how many pass, and the others."""
    of = machine(device)
    facts = " · ".join(f"{name.replace('_', ' ')}: {value}" for name, value in of.items())
    where = "" if device == "cpu" else f" on {of['device']}"  # no device takes the place of another's tables
    found = {}
    for op in dict.fromkeys(result.case.op for result in results):
        headline = [result for result in results if result.case.op == op and not result.case.sweep]
        swept = [result for result in results if result.case.op == op and result.case.sweep]
        parts = [facts]
        if headline:
            parts += [times_table(headline), verdicts_table(headline)]
        if swept:
            short = [result for result in swept if not all(verdict.passed for verdict in result.verdicts)]
            parts.append(f"Sweep: {len(swept) - len(short)} of {len(swept)} cases pass.")
            if short:
                parts += ["Those that fall short:", times_table(short), verdicts_table(short)]
        found[op + where] = "\n\n".join(parts)
    return found


def document(found: Mapping[str, str]) -> str:
    """The operators' sections in the order of their names, below what the words mean."""
    return "\n\n".join([LEGEND, *(f"### {op}\n\n{found[op]}" for op in sorted(found))]) + "\n"


def replace_sections(path: Path, found: Mapping[str, str]) -> None:
    """Puts the sections between the two markers of a Markdown file, where those of other operators stay."""
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path}: expected the markers {BEGIN!r} and {END!r}, each once")
    before, rest = page.split(BEGIN)
    block, after = rest.split(END)
    there = dict(section.split("\n", 1) for section in re.split("^### ", block, flags=re.MULTILINE)[1:])
    text = document({**{op: section.strip() for op, section in there.items()}, **found})
    new = f"{before}{BEGIN}\n\n{text}\n{END}{after}"
    write_atomically(path, lambda stream: stream.write(new.encode()))


class CsvFile:
    """One line per case and contender, written when the case has been measured; times in microseconds."""

    COLUMNS = ("op", "shape", "dtype", "layout", "direction", "sweep", "contender")
    MEASURED = ("median_us", "p10_us", "p90_us", "repeats", "calls_per_repeat", "ratio_to_ours")

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.facts = path, machine(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write([[*self.COLUMNS, *self.MEASURED, *self.facts]], "w")

    def append(self, result: Result) -> None:
        case, times, rows = result.case, result.times, []
        for name in times.samples:
            seconds = times.median(name), *times.spread(name)
            rows.append([
                case.op, "x".join(map(str, case.case.shape)), case.dtype_name, case.case.layout, case.direction,
                int(case.sweep), name, *[f"{value * 1e6:.3f}" for value in seconds], times.rounds(), times.calls[name],
                f"{times.ratio(name, OURS):.4f}", *self.facts.values(),
            ])  # fmt: skip
        self._write(rows, "a")

    def _write(self, rows: list[list[object]], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerows(rows)


def summary(results: Sequence[Result]) -> str:
    verdicts = [verdict for result in results for verdict in result.verdicts]
    return f"{sum(verdict.passed for verdict in verdicts)} of {len(verdicts)} targets met"
