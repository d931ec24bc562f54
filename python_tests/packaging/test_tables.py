"""The table runner: which runs it starts, what it reads of them, and what it writes. Its driver here is a toy."""

import csv
import json
import shutil
import statistics
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import PACKAGE

FOLDER = PACKAGE.parent / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the sources are not here"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read by Python 3.11"),
]

# Notes its arguments; the accuracy follows from row and seed. It stops where a file says so, once.
DRIVER = """
import json, pathlib, sys
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
out = pathlib.Path(value("--out"))
out.mkdir(parents=True, exist_ok=True)
with (pathlib.Path(__file__).parent / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
stop = pathlib.Path(__file__).parent / "stop"
if stop.exists():
    code = int(stop.read_text())
    stop.unlink()
    if code == 1:
        sys.exit("refused: the folder holds a run of other settings")
    (out / "run.json").write_text(json.dumps({"status": "preempted", "stages": []}))
    sys.exit(code)
accuracy = float(value("--quality")) + 0.01 * int(value("--seed")) ** 2
stages = [
    {"name": "first", "accuracy": {"last": 0.25}, "measures": {"test": {"iou": 0.5}}},
    {"name": "second", "accuracy": {"last": accuracy}, "measures": {"test": {"accuracy": accuracy}}},
    {"name": "boxes", "status": "done"},
]
(out / "run.json").write_text(json.dumps({"status": "finished", "stages": stages}))
"""

TABLE = """
title = "A toy"
about = "Nothing is learnt."
driver = "toy"
arguments = ["demo", "--root", "${TOY_ROOT}"]
seeds = [0, 1, 2]
compare = "plain"
columns = [
  {name = "test, %", measure = "accuracy.last", percent = true},
  {name = "iou", measure = "measures.test.iou", stage = "first", digits = 2},
  {name = "lacking", measure = "measures.val.accuracy"},
]
[[rows]]
name = "plain"
arguments = ["--quality", "0.5"]
[[rows]]
name = "p {p}, G {g}"
arguments = ["--quality", "{p}", "--g", "{g}"]
each = {p = [0.6, 0.7], g = [1, 2]}
"""


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import tables

    (tmp_path / "train").mkdir()
    (tmp_path / "train/toy.py").write_text(DRIVER)
    (tmp_path / "toy.toml").write_text(TABLE)
    (tmp_path / "page.md").write_text("# Results\n\nA text.\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "machine", lambda device: {"device": device, "torch": "1.2", "date": "2020-01-02T03"})
    monkeypatch.setenv("TOY_ROOT", "/toy")
    yield tables
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def call(tables: ModuleType, folder: Path, *more: str) -> int:
    common = ["--runs", str(folder / "runs"), "--page", str(folder / "page.md"), "--csv", str(folder / "toy.csv")]
    return tables.main([str(folder / "toy.toml"), *common, *more])


def calls(folder: Path) -> list[list[str]]:
    file = folder / "train/calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows_of(page: Path) -> dict[str, list[str]]:
    lines = [line.strip("| ").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_every_row_runs_with_every_seed_in_a_folder_of_its_own(tables, tmp_path):
    assert call(tables, tmp_path) == 0
    found = calls(tmp_path)
    assert len(found) == 5 * 3
    assert found[0] == [
        "demo", "--root", "/toy", "--quality", "0.5", "--seed", "0",
        "--out", str(tmp_path / "runs/toy/plain/seed-0"), "--report", "False",
    ]  # fmt: skip
    assert len({words[words.index("--out") + 1] for words in found}) == 15
    assert {(words[4], words[6]) for words in found if "--g" in words} == {
        (p, g) for p in ("0.6", "0.7") for g in ("1", "2")
    }
    assert (tmp_path / "page.md").read_text() == "# Results\n\nA text.\n"  # written on demand alone


def test_mean_and_spread_are_right(tables, tmp_path):
    assert call(tables, tmp_path, "--write") == 0
    rows = rows_of(tmp_path / "page.md")
    assert list(rows) == ["plain", "p 0.6, G 1", "p 0.6, G 2", "p 0.7, G 1", "p 0.7, G 2"]
    values = [100 * (0.5 + 0.01 * seed**2) for seed in (0, 1, 2)]
    expected = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert expected == "51.7 ± 2.1"
    assert rows["plain"][:5] == [expected, "0.50 ± 0.00", "–", "", "3"]
    assert rows["p 0.7, G 2"][:5] == ["71.7 ± 2.1", "0.50 ± 0.00", "–", "+20.0 ± 0.0", "3"]
    assert rows["p 0.7, G 2"][6] == "`--quality 0.7 --g 2`"
    page = (tmp_path / "page.md").read_text()
    for text in ("## A toy", "Nothing is learnt.", "--root ${TOY_ROOT}", "torch: 1.2", "2020-01-02"):
        assert text in page
    assert "/toy`" not in page  # no path of this machine
    with (tmp_path / "toy.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 15
    one = next(line for line in lines if (line["row"], line["seed"]) == ("p 0.6, G 1", "2"))
    assert (one["test, %"], one["iou"], one["lacking"], one["torch"]) == ("64", "0.5", "", "1.2")


def test_a_single_seed_has_no_spread(tables, tmp_path):
    assert call(tables, tmp_path, "--write", "--seeds", "2", "--only", "plain") == 0
    assert rows_of(tmp_path / "page.md") == {"plain": ["54.0", "0.50", "–", "", "1", "0", "`--quality 0.5`"]}


def test_what_is_finished_is_not_repeated_and_what_was_added_is_run(tables, tmp_path):
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0", "1") == 0
    assert call(tables, tmp_path, "--only", "plain") == 0
    assert [words[words.index("--seed") + 1] for words in calls(tmp_path)] == ["0", "1", "2"]
    file = tmp_path / "toy.toml"
    file.write_text(file.read_text() + '[[rows]]\nname = "new"\narguments = ["--quality", "0.9"]\n')
    assert call(tables, tmp_path, "--only", "plain", "--only", "new") == 0
    assert len(calls(tmp_path)) == 6
    file.write_text(file.read_text().replace('"0.9"', '"0.8"'))  # another run: no result of the old one is shown
    assert call(tables, tmp_path, "--show", "--write") == 0
    assert list(rows_of(tmp_path / "page.md")) == ["plain"]


def test_a_preempted_run_stops_the_table_and_goes_on(tables, tmp_path):
    (tmp_path / "train/stop").write_text("75")
    assert call(tables, tmp_path, "--only", "plain") == 75
    assert len(calls(tmp_path)) == 1
    facts = json.loads((tmp_path / "runs/toy/plain/seed-0.json").read_text())
    assert call(tables, tmp_path, "--only", "plain") == 0
    assert [words[words.index("--seed") + 1] for words in calls(tmp_path)] == ["0", "0", "1", "2"]
    again = json.loads((tmp_path / "runs/toy/plain/seed-0.json").read_text())
    assert again["seconds"] > facts["seconds"] > 0


def test_a_failed_run_is_told_and_the_others_are_done(tables, tmp_path, capsys):
    (tmp_path / "train/stop").write_text("1")
    assert call(tables, tmp_path, "--only", "plain", "--write") == 1
    assert len(calls(tmp_path)) == 3
    assert "failed: plain, seed 0: exit code 1" in capsys.readouterr().err
    assert rows_of(tmp_path / "page.md")["plain"][4] == "2"


def test_an_earlier_result_is_not_shown_for_arguments_that_were_refused(tables, tmp_path):
    only = ("--only", "plain", "--seeds", "0", "--write")
    assert call(tables, tmp_path, *only) == 0
    file = tmp_path / "toy.toml"
    file.write_text(TABLE.replace('"0.5"', '"0.4"'))
    for _ in range(2):
        (tmp_path / "train/stop").write_text("1")
        assert call(tables, tmp_path, *only) == 1
        assert "plain" not in rows_of(tmp_path / "page.md")
    file.write_text(TABLE)
    assert call(tables, tmp_path, *only) == 0
    assert rows_of(tmp_path / "page.md")["plain"][0] == "50.0"
    assert len(calls(tmp_path)) == 3


def test_the_csv_carries_results_to_another_machine(tables, tmp_path, monkeypatch):
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0", "1", "--write") == 0
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(tables, "machine", lambda device: {"device": "gpu", "memory": "8", "date": "2021-01-02T03"})
    assert call(tables, tmp_path, "--only", "plain", "--write") == 0
    assert [words[words.index("--seed") + 1] for words in calls(tmp_path)] == ["0", "1", "2"]
    assert rows_of(tmp_path / "page.md")["plain"][:5] == ["51.7 ± 2.1", "0.50 ± 0.00", "–", "", "3"]
    assert "device: cpu · torch: 1.2 · 2020-01-02\ndevice: gpu · 2021-01-02" in (tmp_path / "page.md").read_text()
    with (tmp_path / "toy.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["seed"], line["device"], line["torch"], line["memory"]) for line in lines] == [
        ("0", "cpu", "1.2", ""), ("1", "cpu", "1.2", ""), ("2", "gpu", "", "8"),
    ]  # fmt: skip


def lines_of(file: Path) -> list[tuple[str, str, str]]:
    with file.open() as stream:
        return [(line["row"], line["seed"], line["test, %"]) for line in csv.DictReader(stream)]


THREE = [("plain", "0", "50"), ("plain", "1", "51"), ("plain", "2", "54")]


def test_afresh_repeats_what_only_the_csv_holds_and_keeps_the_others(tables, tmp_path):
    assert call(tables, tmp_path, "--only", "plain", "--write") == 0
    shutil.rmtree(tmp_path / "runs")
    assert call(tables, tmp_path, "--only", "plain", "--afresh", "--seeds", "0", "--write") == 0
    assert len(calls(tmp_path)) == 4
    assert lines_of(tmp_path / "toy.csv") == THREE
    assert rows_of(tmp_path / "page.md")["plain"][4] == "3"


@pytest.mark.parametrize("words", [["--afresh", "--show"], ["--afresh", "--only", "plain"]])
def test_a_run_that_does_not_come_about_loses_no_line(tables, tmp_path, words):
    assert call(tables, tmp_path, "--only", "plain", "--write") == 0
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "train/stop").write_text("75")
    assert call(tables, tmp_path, *words, "--write") == (0 if "--show" in words else 75)
    assert lines_of(tmp_path / "toy.csv") == THREE
    assert rows_of(tmp_path / "page.md")["plain"][4] == "3"


def test_lines_of_other_seeds_and_arguments_stay_in_the_csv(tables, tmp_path):
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0", "7", "--write") == 0
    assert call(tables, tmp_path, "--only", "plain", "--more", "--x 1", "--seeds", "0", "--write") == 0
    assert call(tables, tmp_path, "--show", "--write") == 0
    assert lines_of(tmp_path / "toy.csv") == [("plain", "0", "50"), ("plain", "0", "50"), ("plain", "7", "99")]
    assert rows_of(tmp_path / "page.md")["plain"][4] == "1"


def test_two_at_once_keep_each_other_s_results(tables, tmp_path, monkeypatch):
    """With folders of their own, as on two machines: one writes while the other still trains."""
    usual, folders = tables.run_all, [tmp_path / "there"]

    def meanwhile(runs, given):
        code = usual(runs, given)
        while folders:
            folder = str(folders.pop())
            assert call(tables, tmp_path, "--runs", folder, "--only", "p 0.6, G 1", "--seeds", "0", "--write") == 0
        return code

    monkeypatch.setattr(tables, "run_all", meanwhile)
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0", "--write") == 0
    assert lines_of(tmp_path / "toy.csv") == [("plain", "0", "50"), ("p 0.6, G 1", "0", "60")]
    assert list(rows_of(tmp_path / "page.md")) == ["plain", "p 0.6, G 1"]


def test_a_folder_that_is_older_than_the_csv_s_line_does_not_take_its_place(tables, tmp_path, monkeypatch):
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0", "--write") == 0
    monkeypatch.setattr(tables, "machine", lambda device: {"device": device, "date": "2021-01-02T03"})
    driver = tmp_path / "train/toy.py"
    driver.write_text(driver.read_text().replace('float(value("--quality"))', '0.1 + float(value("--quality"))'))
    there = ("--runs", str(tmp_path / "there"))
    assert call(tables, tmp_path, *there, "--only", "plain", "--seeds", "0", "--afresh", "--write") == 0
    assert lines_of(tmp_path / "toy.csv") == [("plain", "0", "60")]
    assert call(tables, tmp_path, "--only", "p 0.6, G 1", "--seeds", "0", "--write") == 0
    assert lines_of(tmp_path / "toy.csv") == [("plain", "0", "60"), ("p 0.6, G 1", "0", "70")]


def test_who_writes_waits_for_who_is_writing(tables, tmp_path):
    with tables.written_alone(tmp_path):
        waiting = threading.Thread(target=call, args=(tables, tmp_path, "--only", "plain", "--seeds", "0", "--write"))
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
        assert not (tmp_path / "toy.csv").exists()
    waiting.join(20)
    assert lines_of(tmp_path / "toy.csv") == [("plain", "0", "50")]


def test_a_call_that_is_interrupted_keeps_its_seconds(tables, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(tables, tmp_path, "--only", "plain", "--seeds", "0")
    assert json.loads((tmp_path / "runs/toy/plain/seed-0.json").read_text())["seconds"] > 0


def test_a_csv_of_other_columns_is_told_and_kept(tables, tmp_path, capsys):
    assert call(tables, tmp_path, "--only", "plain", "--write") == 0
    file, before = tmp_path / "toy.toml", (tmp_path / "toy.csv").read_text()
    file.write_text(TABLE.replace('name = "iou"', 'name = "overlap"'))
    assert call(tables, tmp_path, "--show", "--write") == 1
    assert "expected the columns test, %, overlap, lacking, found test, %, iou, lacking" in capsys.readouterr().err
    assert (tmp_path / "toy.csv").read_text() == before


def test_a_loss_that_is_no_number_is_told_as_such(tables, tmp_path):
    (tmp_path / "train/toy.py").write_text(DRIVER.replace('{"iou": 0.5}', '{"iou": float("nan")}'))
    assert call(tables, tmp_path, "--only", "plain", "--write") == 0
    assert rows_of(tmp_path / "page.md")["plain"][:2] == ["51.7 ± 2.1", "nan ± nan"]
    shutil.rmtree(tmp_path / "runs")
    assert call(tables, tmp_path, "--show", "--write") == 0
    assert rows_of(tmp_path / "page.md")["plain"][:2] == ["51.7 ± 2.1", "nan ± nan"]


def test_files_of_a_run_that_are_something_else(tables, tmp_path, capsys):
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0") == 0
    (tmp_path / "runs/toy/plain/seed-0/run.json").write_text("[]")
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0") == 0
    assert len(calls(tmp_path)) == 2
    (tmp_path / "runs/toy/plain/seed-0.json").write_text('{"words": ["de')
    assert call(tables, tmp_path, "--show") == 1
    assert "seed-0.json: expected what this script leaves there, or no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "row,seed\n",
        'row,seed,"test, %",iou,lacking,seconds,arguments\nplain,0,1\n',
        'row,seed,"test, %",iou,lacking,seconds,arguments,date\nplain,0,1,,,2,demo,\n',
        'row,seed,"test, %",iou,lacking,seconds,arguments,date\nplain,0,\0,,,2,demo,2020-01-01\n',
        'row,seed,"test, %",iou,lacking,seconds,arguments,date\n' + 2 * "plain,0,1,,,2,demo,2020-01-01\n",
    ],
)
def test_a_csv_of_something_else_is_told(tables, tmp_path, capsys, text):
    (tmp_path / "toy.csv").write_text(text)
    assert call(tables, tmp_path, "--only", "plain") == 1
    assert "toy.csv: expected what --write leaves there" in capsys.readouterr().err
    assert not calls(tmp_path)


def test_the_section_is_replaced_and_the_rest_of_the_page_kept(tables, tmp_path):
    page = tmp_path / "page.md"
    assert call(tables, tmp_path, "--write", "--only", "plain", "--seeds", "0") == 0
    page.write_text(page.read_text() + "\nMore text.\n")
    assert call(tables, tmp_path, "--write", "--only", "plain", "--seeds", "1") == 0
    text = page.read_text()
    assert text.startswith("# Results\n\nA text.\n")
    assert text.endswith("\nMore text.\n")
    assert text.count("## A toy") == 1
    assert rows_of(page)["plain"][0] == "50.5 ± 0.7"
    page.write_text(text.replace("to here: toy", "gone"))
    assert call(tables, tmp_path, "--write", "--show") == 1
    assert "gone" in page.read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('driver = "toy"', 'driver = "joy"', "there is no train/joy.py"),
        ('name = "plain"', 'name = "simple"', "compare: expected the name of a row"),
        ('compare = "plain"', 'compare = "plain"\nextra = 1', "extra"),
        ("seeds = [0, 1, 2]", "", "seeds"),
        ("p = [0.6, 0.7]", "p = [0.6, 0.6]", "two rows would share the folder 'p-0.6-G-1'"),
        (
            '"--quality", "{p}", "--g", "{g}"',
            '"--quality", "{p}"',
            "two rows have the same arguments: p 0.6, G 1, p 0.6",
        ),
        ("title =", "title", "toy.toml"),
    ],
)
def test_a_mistake_in_the_file_is_told(tables, tmp_path, capsys, old, new, message):
    file = tmp_path / "toy.toml"
    file.write_text(TABLE.replace(old, new))
    assert call(tables, tmp_path) == 1
    assert message in capsys.readouterr().err
    assert not calls(tmp_path)


def test_what_a_command_lacks_is_told(tables, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TOY_ROOT")
    assert call(tables, tmp_path) == 1
    assert "${TOY_ROOT}: give it with --set TOY_ROOT=VALUE" in capsys.readouterr().err
    assert call(tables, tmp_path, "--only", "plane") == 1
    assert "--only: expected some of plain, p 0.6, G 1" in capsys.readouterr().err
    assert call(tables, tmp_path, "--only", "plain", "--seeds", "0", "--set", "TOY_ROOT=/given") == 0
    assert calls(tmp_path)[0][2] == "/given"


def _shipped() -> list[Any]:
    return sorted((FOLDER / "tables").glob("*.toml")) if FOLDER.is_dir() else []


@pytest.mark.parametrize("file", _shipped(), ids=lambda file: file.stem)
def test_the_tables_here_are_command_lines_of_their_drivers(tables, monkeypatch, file):
    from fgvc_ext.cli.train import load_driver

    monkeypatch.setattr(tables, "ROOT", FOLDER.parent)
    found = tables.read_table(file)
    driver = load_driver(FOLDER.parent / "train" / f"{found.driver}.py").DRIVER
    given = dict.fromkeys(("CUB50", "DENSENET169", "RESNET18"), "x")
    for row in found.rows:
        config = driver.read_arguments(tables.filled([*found.arguments, *row.arguments], given))
        if "val" in found.columns[0].measure:
            assert config.data.val_fraction > 0, row.name


@pytest.mark.parametrize("file", _shipped(), ids=lambda file: file.stem)
def test_the_page_tells_what_the_csv_holds(tables, tmp_path, monkeypatch, capsys, file):
    monkeypatch.setattr(tables, "ROOT", FOLDER.parent)
    page = (FOLDER.parent / "docs/results.md").read_text()
    if f"writes {file.stem} from here" not in page and not (FOLDER / "results" / f"table-{file.stem}.csv").exists():
        pytest.skip("it has not been run")
    assert tables.main([str(file), "--show", "--runs", str(tmp_path)]) == 0
    mark = f"<!-- benchmarks/tables.py writes {file.stem} from here -->\n"
    assert page.partition(mark)[2].partition(f"<!-- to here: {file.stem} -->")[0] == capsys.readouterr().out
