"""The table runner: which runs it starts, what it reads of them, and what it writes. Its driver here is a toy."""

import csv
import json
import statistics
import sys
from typing import Any

import pytest

from .conftest import BENCHMARKS as FOLDER
from .toy_table import TABLE, call, calls, rows_of

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the sources are not here"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read by Python 3.11"),
]


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
