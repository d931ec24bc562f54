"""The lists of mutants fit the sources; six of them are caught, each by the tests it names."""

import csv
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .mutant import ROOT, Mutant, files_of, mutants
from .run import RESULTS, Preloaded, Results, alone, choose, main, needs_emulation, report

MUTANTS = mutants()
# Of one operator with few tests and small objects: its kernel, its host side, its public function, its reference.
QUICK = (
    "boxes-threshold-inclusive", "boxes-last-column", "boxes-bottom",
    "boxes-strides-swapped", "boxes-py-threshold-one", "reference-boxes-edge",
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_it_applies(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert mutant.applied(text) != text
    assert list(files_of(mutant.selection)), f"{mutant.selection} are no tests"
    for argument in mutant.selection:
        if argument.startswith("python_tests/"):
            assert (ROOT / argument.split("::")[0]).exists(), argument


def test_there_are_enough_with_names_of_their_own() -> None:
    assert [name for name, times in Counter(mutant.id for mutant in MUTANTS).items() if times > 1] == []
    assert sum(mutant.file.startswith(("csrc/", "fgvc_ext/ops/", "fgvc_ext/reference/")) for mutant in MUTANTS) >= 60
    assert set(QUICK) <= {mutant.id for mutant in MUTANTS}


def test_operators_that_have_some_have_them_on_the_cpu_and_in_python() -> None:
    """An operator without any is none's business here: a new one needs no entry in a shared list."""
    files = {mutant.file for mutant in MUTANTS}
    operators = [path.stem for path in (ROOT / "fgvc_ext" / "ops").glob("[a-z]*.py")]
    assert half_covered(operators, files) == []
    assert half_covered(["of_tomorrow", "one"], {"csrc/cpu/one.cpp", "fgvc_ext/reference/one.py"}) == []
    assert half_covered(["one"], {"csrc/cpu/one.cpp"}) == ["one"]
    assert half_covered(["one"], {"csrc/cuda/one.cuh", "fgvc_ext/reference/one.py"}) == ["one"]


def half_covered(operators: list[str], files: set[str]) -> list[str]:
    found = []
    for name in operators:
        own = {file for file in files if Path(file).name.split(".")[0] == name}
        complete = any(file.startswith("csrc/cpu/") for file in own) and f"fgvc_ext/reference/{name}.py" in own
        if own and not complete:
            found.append(name)
    return found


def test_a_change_that_does_not_apply_is_an_error() -> None:
    mutant = Mutant("twice", "x", "y", file="here")
    assert mutant.applied("axb") == "ayb"
    for text in ("", "xx"):
        with pytest.raises(ValueError, match=f"twice: stands {len(text)} times in here"):
            mutant.applied(text)


def test_another_mutant_source_or_test_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_tests.mutants.mutant.ROOT", tmp_path)
    (tmp_path / "source.py").write_text("a = 1")
    (tmp_path / "test_it.py").write_text("assert True")
    mutant = Mutant("one", "1", "2", tests=("test_it.py",), file="source.py")
    keys = [mutant.key, Mutant("one", "1", "3", tests=("test_it.py",), file="source.py").key]
    (tmp_path / "test_it.py").write_text("assert False")
    keys.append(mutant.key)
    (tmp_path / "source.py").write_text("b = 1")
    keys.append(mutant.key)
    assert len(set(keys)) == 4


def test_a_survivor_is_listed_and_a_share_below_95_percent_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [Mutant(f"number-{number}", "", "", survives="It is 0." * (number == 0)) for number in range(20)]
    path = tmp_path / "results.csv"
    path.write_text("id,result,by,seconds,key\nnumber-0,survived,,3,k\nnumber-1,timed out,after 60 s,60,k\n")
    with path.open("a") as file:
        csv.writer(file).writerows((mutant.id, "caught", "a test", 1, "k") for mutant in chosen[2:])
    results = Results(path, {mutant.id for mutant in chosen})
    assert report(chosen, results, [])
    assert "19 of 20 caught (95.0 %)\nsurvived: number-0 (): It is 0.\n" in capsys.readouterr().out
    assert not report(chosen, results, chosen[:1])
    assert not report(chosen[:19], results, [])


def test_kernels_are_tried_in_the_library_that_emulates_them() -> None:
    shared = Mutant("one", "", "", file="csrc/common/normal.h", tests=("python_tests/ops/test_emulation.py::test_it",))
    assert needs_emulation(shared)
    assert needs_emulation(Mutant("one", "", "", file="csrc/cuda/diversify.cuh"))
    assert not needs_emulation(Mutant("one", "", "", file="csrc/cpu/diversify.h"))


def test_two_runs_do_not_share_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_tests.mutants.run.WORK", tmp_path / "copies")
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "^none of them$"])
    with alone(), pytest.raises(SystemExit, match="expected no other run of the mutants"):
        main()
    with alone():
        pass


def test_they_are_chosen_by_id_file_and_list() -> None:
    quick = f"^({'|'.join(QUICK)})$"
    assert sorted(mutant.id for mutant in choose(MUTANTS, quick, "")) == sorted(QUICK)
    assert {mutant.area for mutant in choose(MUTANTS, quick, "cpu")} == {"cpu_losses"}
    assert {mutant.file for mutant in choose(MUTANTS, "vector.h$", "")} == {"csrc/cpu/vector.h"}
    assert choose(MUTANTS, "", "") == MUTANTS


def test_the_committed_results_are_of_mutants_that_exist() -> None:
    known = {mutant.id for mutant in MUTANTS}
    rows = csv.DictReader(RESULTS.read_text().splitlines())
    assert [row["id"] for row in rows if row["id"] not in known] == []


def test_a_preloaded_process_runs_the_sources_as_they_are_then(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("from source import one\ndef test_one(): assert one == 1\n")
    preloaded = Preloaded(tmp_path)
    for source, limit, expected in (
        ("one = 1", 60, 0),
        ("one = 2", 60, 1),
        ("import time; time.sleep(60)", 1, None),
        ("import os; os.abort()", 60, -signal.SIGABRT),
        ("one = 1", 60, 0),
    ):
        (tmp_path / "source.py").write_text(source)
        status, output = preloaded.run(["-q", "-p", "no:cacheprovider", "test_it.py"], limit)
        assert status == expected, output
        assert ("1 passed" in output) == (status == 0)
    preloaded.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_of_them_are_caught(tmp_path: Path) -> None:
    """In the runner's own build, which stays: the first run compiles the CPU library."""
    command = [sys.executable, "-m", "python_tests.mutants.run", "--only", f"^({'|'.join(QUICK)})$", "--again"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "results.csv")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 caught" in done.stdout
