"""`fgvc-ext demo`: one table of all drivers' demos, from what their runs have left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fgvc_ext.cli import demo, main


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


def _command(code: int = 0, wait: bool = False, asked: str = 'sys.exit(print("saved") or 75)') -> list[str]:
    """Of a driver that says some lines, waits if it is to, writes what it got, and does `asked` on SIGTERM."""
    text = f"""
import os, pathlib, signal, sys, time
def told(number, frame):
    (out / "told").touch()
    {asked}
signal.signal(signal.SIGTERM, told)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "number").write_text(str(os.getpid()))
(out / "got").write_text(" ".join(sys.argv[1:]) + " " + os.environ["OMP_NUM_THREADS"])
(out / "kept").write_text(os.environ.get("KEPT", ""))
print("begun")
sys.stderr.buffer.write(b"not utf-8: \\xff\\n")
sys.stderr.flush()
time.sleep(60 * {int(wait)})
print("done")
sys.exit({code})
"""
    return [sys.executable, "-c", text]


def _with(monkeypatch, tmp_path: Path, commands: dict[str, list[str]], threads: int = 2) -> None:
    (tmp_path / "train").mkdir()
    for name in [*commands, "no_demo"]:
        (tmp_path / "train" / f"{name}.py").touch()
    monkeypatch.setattr(demo, "drivers_folder", lambda: tmp_path / "train")
    driver = type("Driver", (), {"presets": {"demo": ("", None)}})
    other = type("Driver", (), {"presets": {"cub": ("", None)}})
    module = {"no_demo": type("Module", (), {"DRIVER": other})}
    monkeypatch.setattr(demo, "load_driver", lambda file: module.get(file.stem, type("Module", (), {"DRIVER": driver})))
    monkeypatch.setattr(demo, "driver_words", commands.get)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


def _got(tmp_path: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in sorted((tmp_path / "out").glob("*/got"))}


def test_every_driver_is_run_and_compared_with_the_plain_network(monkeypatch, tmp_path, capfd):
    _with(monkeypatch, tmp_path, {"a": _command(), "bb": _command()})
    monkeypatch.setenv("KEPT", "this")
    _leave_a_run(tmp_path / "out/a", {"first": 0.5, "ensemble": 0.65})
    _leave_a_run(tmp_path / "out/bb", {"plain": 0.6, "ours": 0.625})
    assert demo.demo_command(tmp_path / "out", 3) == 0
    out = capfd.readouterr().out
    said = ["begun", "done", "not utf-8: �"]
    assert sorted(out.splitlines()[:6]) == [f"{name:<2}  {text}" for name in ("a", "bb") for text in said]
    lines = [line.split() for line in out.splitlines()]
    assert ["a", "first", "50.0", "%", "-10.0", "5", "0.7", "±", "0.1", "–", "1.5", "±", "0.5"] in lines
    assert ["a", "ensemble", "65.0", "%", "+5.0", "–", "–", "–", "–"] in lines
    assert ["bb", "plain", "60.0", "%", "5", "0.7", "±", "0.1", "–", "1.5", "±", "0.5"] in lines
    assert ["bb", "ours", "62.5", "%", "+2.5", "5", "–", "–", "–"] in lines
    words = {name: f"demo --out {tmp_path}/out/{name} --seed 3 --engine.workers 1 1" for name in ("a", "bb")}
    assert _got(tmp_path) == words
    assert (tmp_path / "out/a/kept").read_text() == "this"
    page = (tmp_path / "out/index.html").read_text()
    assert "62.5" in page
    assert "bb/report.html" in page


@pytest.mark.parametrize(
    ("threads", "jobs", "share"), [(16, None, 5), (2, None, 1), (1, None, 1), (16, 1, 16), (2, 3, 1)]
)
def test_the_threads_are_shared_among_the_drivers_of_a_time(monkeypatch, tmp_path, threads, jobs, share):
    _with(monkeypatch, tmp_path, {name: _command() for name in "abc"}, threads)
    for name in "abc":
        _leave_a_run(tmp_path / "out" / name, {"plain": 0.5})
    assert demo.demo_command(tmp_path / "out", 0, jobs) == 0
    workers = [] if jobs == 1 or (threads == 1 and jobs is None) else ["--engine.workers", str(share)]
    assert [text.split()[5:] for text in _got(tmp_path).values()] == [[*workers, str(share)]] * 3


def test_a_gpu_is_not_shared_unless_it_is_asked_for(monkeypatch, tmp_path):
    _with(monkeypatch, tmp_path, {"a": _command(75), "b": _command()}, threads=8)
    monkeypatch.setattr(demo, "choose_device", lambda name: torch.device("cuda:0"))
    assert demo.demo_command(tmp_path / "out", 0) == 75
    assert list(_got(tmp_path)) == ["a"], "the other was to come after it"


def test_as_many_run_at_a_time_as_are_asked_for(tmp_path):
    """Each waits until the other has begun: alone, none would end."""
    text = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists(): time.sleep(0.01)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    words = {"a": [sys.executable, "-c", text, a, b], "b": [sys.executable, "-c", text, b, a]}
    assert demo.run_together(words, 2, {}) == 0


@pytest.mark.parametrize(("code", "told"), [(75, 75), (1, 1), (-9, 137)])
def test_a_demo_that_stops_is_named_and_no_other_begun(monkeypatch, tmp_path, capfd, code, told):
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    _with(monkeypatch, tmp_path, {"a": killed if code < 0 else _command(code), "b": _command()}, threads=1)
    assert demo.demo_command(tmp_path / "out", 0) == told
    assert "b" not in _got(tmp_path)
    assert not (tmp_path / "out/index.html").exists()
    assert capfd.readouterr().out.endswith(f"a: ended with exit code {told}, see above\n")


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Ctrl-C is heard, also where a shell began the tests in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _signals_once_two_run(tmp_path: Path, *numbers: int) -> threading.Thread:
    """Sends them to this process, which waits for the drivers, each once both drivers know of the one before."""

    def two(name: str) -> bool:
        end = time.monotonic() + 60
        while len(list((tmp_path / "out").glob(f"*/{name}"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        return time.monotonic() < end

    def send() -> None:
        for number, known in zip(numbers, ("got", "told"), strict=False):
            if two(known):
                os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_drivers_save_and_begins_no_other(monkeypatch, tmp_path, capfd, number):
    _with(monkeypatch, tmp_path, {name: _command(wait=True) for name in "abc"})
    before = signal.getsignal(signal.SIGTERM)
    sender = _signals_once_two_run(tmp_path, number)
    assert demo.demo_command(tmp_path / "out", 0) == 75
    sender.join()
    assert capfd.readouterr().out.count("saved") == 2
    assert sorted(_got(tmp_path)) == ["a", "b"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_drivers_that_end_all_the_same_do_not_make_a_stopped_demo_a_whole_one(monkeypatch, tmp_path):
    _with(monkeypatch, tmp_path, dict.fromkeys("abc", _command(wait=True, asked="sys.exit(0)")))
    sender = _signals_once_two_run(tmp_path, signal.SIGTERM)
    assert demo.demo_command(tmp_path / "out", 0) == 75
    sender.join()
    assert sorted(_got(tmp_path)) == ["a", "b"]


@pytest.mark.usefixtures("interrupted")
def test_a_second_interruption_waits_for_nobody(monkeypatch, tmp_path):
    """The drivers of this test ignore what asks them to stop, until they are killed."""
    _with(monkeypatch, tmp_path, dict.fromkeys("ab", _command(wait=True, asked="pass")))
    sender = _signals_once_two_run(tmp_path, signal.SIGINT, signal.SIGINT)
    try:
        assert demo.demo_command(tmp_path / "out", 0) == 130
        sender.join()
    except KeyboardInterrupt:
        pytest.fail("the second interruption went through")
    finally:
        for file in (tmp_path / "out").glob("*/number"):
            os.kill(int(file.read_text()), signal.SIGKILL)


def test_nothing_is_begun_once_nobody_reads(monkeypatch, tmp_path):
    _with(monkeypatch, tmp_path, {name: _command() for name in "abc"}, threads=1)

    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        demo.demo_command(tmp_path / "out", 0)
    assert list(_got(tmp_path)) == ["a"]


def test_a_driver_is_run_with_this_package_wherever_it_is_called(tmp_path):
    """A folder `fgvc_ext` lies in the current one, as in a clone beside an installed package."""
    (tmp_path / "fgvc_ext").mkdir()
    (tmp_path / "fgvc_ext/__init__.py").write_text("raise ImportError('not this one')")
    words = [*demo.driver_words("elope"), "--help"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "demo" in shown.stdout


def test_the_command_line_is_passed_on(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "demo_command", lambda *arguments: seen.append(arguments) or 0)
    assert main(["demo", "--out", str(tmp_path), "--seed", "4", "--jobs", "3"]) == 0
    assert main(["demo"]) == 0
    assert seen == [(tmp_path, 4, 3), (Path("runs/demo"), 0, None)]


def test_jobs_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--jobs", "0"])
    assert "--jobs: expected at least 1, got 0" in capsys.readouterr().err
