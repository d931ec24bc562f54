"""`fgvc-ext demo`: every driver's preset "demo", one after the other, and what came of them in one table and page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.explain.document import Report, read_json
from fgvc_ext.explain.palette import percent
from fgvc_ext.explain.report import read_rows

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


def demo_command(out: Path, seed: int) -> int:
    """Run the demos into folders below `out`, print the table, write `out`/index.html; the first exit code not 0."""
    runs: dict[str, Path] = {}
    for file in sorted(drivers_folder().glob("*.py")):
        driver = load_driver(file).DRIVER
        if "demo" not in driver.presets:
            continue
        print(f"--- {driver.title}", flush=True)
        runs[file.stem] = out / file.stem
        arguments = ["demo", "--out", str(out / file.stem), "--seed", str(seed)]
        code: int = driver.main(arguments, ["fgvc-ext", "train", file.stem])
        if code:
            return code
    lines = [line for paper, run in runs.items() for line in lines_of(paper, run)]
    plain = next((line for line in lines if line.stage == "plain"), None)
    table = [line.cells(plain) for line in lines]
    print(f"\n{as_text(HEADER, table)}\n\npage: {write_page(out, table, runs)}")
    return 0


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
