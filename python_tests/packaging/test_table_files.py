"""What the table runner writes and reads again: no line is lost, whatever is repeated, stopped or written beside it."""

import csv
import json
import shutil
import sys
import threading

import pytest

from .conftest import BENCHMARKS
from .toy_table import DRIVER, TABLE, call, calls, lines_of, rows_of

pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the sources are not here"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read by Python 3.11"),
]


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
