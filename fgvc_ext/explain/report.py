"""From a run folder to its report.

`write_run_report` can be called at any time and as often as wanted, also on the folder of a run that stopped half-way:
what is not there is left out. Figures that a run draws are kept with `save_figure`; the report reads them.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgvc_ext.explain.comparison import MEASURES
from fgvc_ext.explain.document import Report, Section, png, read_json, save_figure, save_table
from fgvc_ext.explain.figures import curves_figure
from fgvc_ext.explain.palette import percent

__all__ = ["Report", "Section", "read_rows", "save_figure", "save_table", "write_run_report"]

_KINDS = {
    "last": "last",
    "five_crop": "last, five crops",
    "best_val": "best on validation",
    "best_test": "best on test",
}
_BEST_ON_TEST = (
    "“Best on test” picks the epoch by looking at the test images, so it is an optimistic number and no result. "
    "It is shown to be compared with work that reports it; the headline is the last epoch."
)


def write_run_report(run: Path, sections: Sequence[Section] = ()) -> Path:
    """Makes `curves.png` and `report.html` from what a run folder holds, and returns the report's path.

    Reads `run.json`, `config.json`, `metrics.csv`, what `explain_models` writes (`measures.csv`, `confusions.csv`), and
    `tables/*.csv` and `figures/*.png` with their `captions.json`. A missing, empty or damaged one is left out.
    `sections` follow the curves, in their order, before the tables and figures.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"run folder {run} does not exist")
    facts, config = read_json(run / "run.json"), read_json(run / "config.json")
    rows = read_rows(run / "metrics.csv")
    report = Report(str(facts.get("title") or facts.get("name") or run.resolve().name), _subtitle(facts))
    _headline(report, facts)
    _result(report.section("Result"), facts, rows)
    if rows:
        measures = {str(stage.get("name")): _main_measure(stage) for stage in _stages(facts)}
        (run / "curves.png").write_bytes(png(curves_figure(rows, measures)))
        _curves(report.section("Training curves"), run, rows)
    for section in sections:
        report.add(section)
    _measures(report.section("Where the models look, measured"), read_rows(run / "measures.csv"))
    _tables(report, run / "tables")
    _figures(report, run / "figures")
    _confusions(report.section("Most confused classes"), read_rows(run / "confusions.csv"))
    _reproduce(report.section("How to reproduce"), facts)
    _configuration(report.section("Configuration"), config)
    return report.write(run / "report.html")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file by column; none where the file is missing. A line that was cut short is left out."""
    try:
        with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
            return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    except (OSError, csv.Error):
        return []


def _group(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    group = facts.get(name)
    return group if isinstance(group, dict) else {}


def _stages(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = facts.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _main_measure(stage: Mapping[str, Any]) -> str:
    return str(stage.get("headline", "accuracy"))


def _value(stage: Mapping[str, Any], kind: str) -> float | None:
    """A stage's main measure: "last", "best_test", "five_crop", …"""
    found = stage.get(_main_measure(stage))
    found = found.get(kind) if isinstance(found, dict) else None
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


def _shown(measure: str, value: float | None) -> str | None:
    """Accuracies as percent, other measures as numbers."""
    if value is None or not math.isfinite(value):
        return None
    return percent(value, 1) if measure.endswith("accuracy") else f"{value:.4g}"


def _number(value: Any) -> str | None:
    """A count that may be given as a number or as the list of what is counted."""
    if isinstance(value, (list, dict)):
        return f"{len(value):,}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None


def _subtitle(facts: Mapping[str, Any]) -> str:
    status, started = facts.get("status"), facts.get("started")
    words = [_group(facts, "data").get("name"), f"status: {status}" if status else None, started]
    return " · ".join(str(word) for word in words if word)


def _headline(report: Report, facts: Mapping[str, Any]) -> None:
    finished = [stage for stage in _stages(facts) if _value(stage, "last") is not None]
    if finished:
        stage, measure = finished[-1], _main_measure(finished[-1])
        name = f" of “{stage['name']}”" if stage.get("name") and len(_stages(facts)) > 1 else ""
        epoch = ", last epoch" if "epoch" in stage else ""  # an artefact has none
        crop = ", single crop" if measure == "accuracy" else ""
        report.headline(_shown(measure, _value(stage, "last")) or "–", f"test {measure}{name}{epoch}{crop}")
        if (five := _value(stage, "five_crop")) is not None:
            report.headline(_shown(measure, five) or "–", "the same with five crops")
    data = _group(facts, "data")
    classes = _number(data.get("classes"))
    if classes and classes != "0":
        report.headline(f"{100 / int(classes.replace(',', '')):.3g} %", f"chance level ({classes} classes)")
    train, test = _number(data.get("train_images")), _number(data.get("test_images"))
    if train and test:
        left_out = _number(data.get("test_images_left_out"))
        rest = f" ({left_out} more that cannot be read are left out)" if left_out else ""
        report.headline(f"{train} / {test}", f"training / test images{rest}")


def _result(section: Section, facts: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> None:
    status = facts.get("status")
    if status not in (None, "finished", "done", "completed"):
        section.note(f"This run is not finished (status: {status}); what follows is what it holds so far.")
    stages = _stages(facts)
    named = [*_KINDS, *(kind for stage in stages for kind in _group(stage, _main_measure(stage)))]
    kinds = [kind for kind in dict.fromkeys(named) if any(_value(stage, kind) is not None for stage in stages)]
    if stages:
        header = ["stage", "status", "measure", *(_KINDS.get(kind, kind.replace("_", " ")) for kind in kinds)]
        lines = [
            [
                stage.get("name"),
                stage.get("status"),
                _main_measure(stage) if _value(stage, "last") is not None else None,
                *(_shown(_main_measure(stage), _value(stage, kind)) for kind in kinds),
            ]
            for stage in stages
        ]
        section.table(header, lines, caption="On the test images; one crop where nothing else is said.")
    if "best_test" in kinds:
        section.note(_BEST_ON_TEST)
    if lines := [line for stage in stages for line in _all_measures(stage, rows)]:
        section.table(["stage", "evaluation", "measure", "last epoch"], lines, fold="All measures")
    notes = facts.get("notes")
    for note in notes if isinstance(notes, list) else []:
        section.note(str(note))


def _all_measures(stage: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> list[list[str | None]]:
    """One line for each measure of each evaluation; those of training are in the last line of metrics.csv."""
    last: Mapping[str, str] = next((row for row in reversed(rows) if row.get("stage") == stage.get("name")), {})
    trained = {
        name.removeprefix("train_"): value for name, value in last.items() if name.startswith("train_") and value
    }
    lines = []
    for evaluation, values in {**_group(stage, "measures"), "train": trained}.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            lines.append([stage.get("name"), evaluation, str(name), _shown(str(name), _float(value))])
    return lines


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _curves(section: Section, run: Path, rows: Sequence[Mapping[str, str]]) -> None:
    section.figure(
        run / "curves.png",
        "Training and test images after each epoch, and the learning rate; accuracies as errors. In training it is "
        "measured on augmented images while the network trains, so its error may lie above the one of the test.",
        alt="Measures of training and test over epochs",
    )
    speeds: dict[str, list[float]] = {}
    for row in rows:
        try:
            speed = float(row["images_per_second"])
        except (KeyError, ValueError):
            continue
        speeds.setdefault(row.get("stage", ""), []).append(speed)
    if speeds:
        parts = (f"{stage} {sorted(values)[len(values) // 2]:,.0f}" for stage, values in speeds.items())
        section.text(f"Speed, images per second (median of the epochs): {', '.join(parts)}.")


def _measures(section: Section, rows: Sequence[Mapping[str, str]]) -> None:
    if rows:
        section.table(list(rows[0]), [list(row.values()) for row in rows], caption=MEASURES)


def _tables(report: Report, folder: Path) -> None:
    for name, entry in read_json(folder / "captions.json").items():
        rows = read_rows(folder / Path(name).name)
        if rows and isinstance(entry, dict):
            section = report.section(str(entry.get("title")))
            section.table(list(rows[0]), [list(row.values()) for row in rows], caption=str(entry.get("caption", "")))


def _figures(report: Report, folder: Path) -> None:
    captions = read_json(folder / "captions.json")
    names = [*captions, *sorted(path.name for path in folder.glob("*.png") if path.name not in captions)]
    for name in names:
        entry = captions.get(name, {})
        entry = entry if isinstance(entry, dict) else {"caption": str(entry)}
        title = str(entry.get("title") or Path(name).stem.replace("_", " ").capitalize())
        try:
            content = png(folder / Path(name).name)
        except (OSError, ValueError):
            continue
        report.section(title).figure(content, str(entry.get("caption", "")), alt=title)


def _confusions(section: Section, rows: Sequence[Mapping[str, str]]) -> None:
    columns = ("class_a", "class_b", "a_as_b", "b_as_a", "count", "share")
    lines = []
    for row in rows[:50]:
        try:
            share = percent(float(row["share"]), 1)
            lines.append([*(row[column] for column in columns[:-1]), share])
        except (KeyError, ValueError):
            continue
    if lines:
        header = ("class a", "class b", "a called b", "b called a", "both", "of their images")
        section.table(header, lines[:10])
    if len(lines) > 10:
        section.table(header, lines[10:], fold=f"The next {len(lines) - 10} pairs")


def _reproduce(section: Section, facts: Mapping[str, Any]) -> None:
    sessions = facts.get("sessions")
    sessions = [entry for entry in sessions if isinstance(entry, dict)] if isinstance(sessions, list) else []
    first = sessions[0] if sessions else {}
    if command := first.get("command"):
        section.code(shlex.join(map(str, command)) if isinstance(command, list) else str(command))
    if len(sessions) > 1:
        starts = ", ".join(str(entry.get("started")) for entry in sessions)
        section.text(f"The run was started {len(sessions)} times: {starts}. What follows is that of the first.")
    data, known = _group(facts, "data"), []
    seeds = {name: facts[name] for name in ("seed", "seeds") if facts.get(name) is not None}
    fingerprints = {f"{name} of the data": value for name, value in data.items() if "fingerprint" in name}
    groups = {name: _group(first, name) for name in ("versions", "machine")}
    for name, value in {**seeds, **fingerprints, **groups["versions"], **groups["machine"]}.items():
        if value not in (None, "", {}, []):
            known.append([name, value if isinstance(value, str) else json.dumps(value, default=str)])
    if known:
        section.table(("what", "value"), known)


def _configuration(section: Section, config: Mapping[str, Any]) -> None:
    lines = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in _flat(config)]
    if lines:
        section.table(("field", "value"), lines, fold=f"All {len(lines)} fields of config.json")


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = []
    for name, value in config.items():
        fields += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return fields
