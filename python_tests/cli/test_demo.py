"""`fgvc-ext demo`: one table of all drivers' demos, from what their runs have left."""

from __future__ import annotations

import json
from pathlib import Path

from fgvc_ext.cli import demo

PRESETS = {"demo": ("", None)}


def _leave_a_run(folder: Path, accuracies: dict[str, float]) -> None:
    """What a driver leaves that the table reads."""
    folder.mkdir(parents=True)
    stages = [{"name": name, "headline": "accuracy", "accuracy": {"last": value}} for name, value in accuracies.items()]
    stages.append({"name": "boxes", "status": "done"})
    (folder / "run.json").write_text(json.dumps({"stages": stages}))
    trained = [name for name in accuracies if name != "ensemble"]
    rows = [f"{name},{epoch},2.5" for name in trained for epoch in (1, 2)]
    (folder / "metrics.csv").write_text("\n".join(["stage,epoch,seconds", *rows]) + "\n")
    (folder / "measures.csv").write_text(f"model,share in box,parts touched\n{trained[0]},0.7 ± 0.1,1.5 ± 0.5\n")


class _Driver:
    title, presets = "A paper", PRESETS

    def __init__(self, accuracies: dict[str, float], code: int = 0) -> None:
        self.accuracies, self.code, self.seen = accuracies, code, list[list[str]]()

    def main(self, arguments: list[str], program: list[str]) -> int:
        self.seen.append(arguments)
        _leave_a_run(Path(arguments[arguments.index("--out") + 1]), self.accuracies)
        return self.code


def _with(monkeypatch, drivers: dict[str, _Driver], tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in drivers:
        (tmp_path / "train" / f"{name}.py").touch()
    monkeypatch.setattr(demo, "drivers_folder", lambda: tmp_path / "train")
    monkeypatch.setattr(demo, "load_driver", lambda file: type("Module", (), {"DRIVER": drivers[file.stem]}))


def test_every_driver_is_run_and_compared_with_the_plain_network(monkeypatch, tmp_path, capsys):
    drivers = {"a": _Driver({"first": 0.5, "ensemble": 0.65}), "b": _Driver({"plain": 0.6, "ours": 0.625})}
    _with(monkeypatch, drivers, tmp_path)
    assert demo.demo_command(tmp_path / "out", 3) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["a", "first", "50.0", "%", "-10.0", "5", "0.7", "±", "0.1", "–", "1.5", "±", "0.5"] in lines
    assert ["a", "ensemble", "65.0", "%", "+5.0", "–", "–", "–", "–"] in lines
    assert ["b", "plain", "60.0", "%", "5", "0.7", "±", "0.1", "–", "1.5", "±", "0.5"] in lines
    assert ["b", "ours", "62.5", "%", "+2.5", "5", "–", "–", "–"] in lines
    assert drivers["a"].seen == [["demo", "--out", str(tmp_path / "out/a"), "--seed", "3"]]
    page = (tmp_path / "out/index.html").read_text()
    assert "62.5" in page
    assert "b/report.html" in page


def test_a_demo_that_stops_stops_all(monkeypatch, tmp_path):
    drivers = {"a": _Driver({"first": 0.5}, code=75), "b": _Driver({"plain": 0.6})}
    _with(monkeypatch, drivers, tmp_path)
    assert demo.demo_command(tmp_path / "out", 0) == 75
    assert not drivers["b"].seen
