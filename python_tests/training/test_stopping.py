"""Signals to the process of a driver: what the first and the second do while it trains, and while it reports."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import toy_driver
from toy_driver import fail_in_call, sleep_in_call
from toy_training import Child, traces

from fgvc_ext.training import Preempted
from fgvc_ext.training.stop_request import StopRequest

STEP, FIGURES = "toy_driver.ToyTask.step", "toy_driver.save_figure"


def _start(folder: Path, *point) -> Child:
    return Child(folder / "output", toy_driver.run, ["--out", str(folder / "run")], *point)


def _finish(folder: Path) -> dict[str, str]:
    code, output = _start(folder).ended()
    assert code == 0, output
    assert _run_json(folder)["status"] == "finished"
    assert (folder / "run/report.html").exists()
    return traces(folder / "run")


def _run_json(folder: Path) -> dict:
    return json.loads((folder / "run/run.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    return _finish(tmp_path_factory.mktemp("undisturbed"))


def _send_when(marker: Path, child: Child, *numbers: signal.Signals) -> tuple[int, str]:
    end = time.monotonic() + 60
    while not marker.exists():
        assert child.process.is_alive(), child.text()
        assert time.monotonic() < end
        time.sleep(0.01)
    for number in numbers:
        time.sleep(0.3)  # so that the one before has been seen
        os.kill(child.process.pid, number)
    return child.ended(40)  # less than the minute that it sleeps


def _touch_and_go_on(number: int, function: str, marker: Path) -> None:
    """As `sleep_in_call`, but for two seconds: long enough to be sent a signal."""
    toy_driver.time.sleep = lambda seconds, usual=time.sleep: usual(min(seconds, 2))
    sleep_in_call(number, function, marker)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves(number, undisturbed, tmp_path):
    child = _start(tmp_path, _touch_and_go_on, 3, STEP, tmp_path / "marker")
    code, output = _send_when(tmp_path / "marker", child, number)
    assert code == 75, output
    run = tmp_path / "run"
    assert f"{number.name} received; saved at epoch 0, step 3. To go on: toy-driver toy --out {run}" in output
    assert "Traceback" not in output
    assert _run_json(tmp_path)["status"] == "preempted"
    assert (run / "checkpoints/first-e00000-s000000003.pt").exists()
    assert _finish(tmp_path) == undisturbed


def test_a_second_ctrl_c_ends_it_at_once(undisturbed, tmp_path):
    child = _start(tmp_path, sleep_in_call, 3, STEP, tmp_path / "marker")
    code, output = _send_when(tmp_path / "marker", child, signal.SIGINT, signal.SIGINT)
    assert code == 130, output
    assert f"To go on: toy-driver toy --out {tmp_path / 'run'}" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run/checkpoints/first-e00000-s000000003.pt").exists(), "nothing was saved"
    assert _run_json(tmp_path)["status"] == "failed"
    assert _finish(tmp_path) == undisturbed


def test_a_second_sigterm_does_not_end_it_at_once(tmp_path):
    """Schedulers send several: it is saving already."""
    child = _start(tmp_path, _touch_and_go_on, 3, STEP, tmp_path / "marker")
    code, output = _send_when(tmp_path / "marker", child, signal.SIGTERM, signal.SIGTERM)
    assert code == 75, output
    assert "saved at epoch 0, step 3" in output


# ------------------------------------------------------------------ while it reports


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_report_which_the_same_command_writes(number, undisturbed, tmp_path):
    child = _start(tmp_path, sleep_in_call, 1, FIGURES, tmp_path / "marker")
    code, output = _send_when(tmp_path / "marker", child, number)
    assert code == 75, output
    assert f"{number.name} received; the report will be made anew. To go on: " in output
    run = _run_json(tmp_path)
    assert (run["status"], {stage["status"] for stage in run["stages"]}) == ("preempted", {"done"})
    assert not (tmp_path / "run/report.html").exists()
    assert _finish(tmp_path) == undisturbed


def test_the_folder_is_locked_while_the_report_is_written(tmp_path):
    child = _start(tmp_path, sleep_in_call, 1, FIGURES, tmp_path / "marker")
    while not (tmp_path / "marker").exists():
        assert child.process.is_alive(), child.text()
        time.sleep(0.01)
    try:
        code, output = Child(tmp_path / "second", toy_driver.run, ["--out", str(tmp_path / "run")]).ended()
        assert code == 1
        assert f"is in use by process {child.process.pid}" in output
        assert _run_json(tmp_path)["status"] == "running"
    finally:
        child.process.kill()
        child.ended()


@pytest.mark.parametrize(
    ("error", "text", "shown"),
    [
        (OSError("no space left"), "no space left", False),
        (TypeError("a bug"), "a bug", True),
        (KeyError(), "KeyError", True),
    ],
)
def test_a_report_that_fails_does_not_lose_the_run(error, text, shown, undisturbed, tmp_path):
    code, output = _start(tmp_path, fail_in_call, 1, FIGURES, error).ended()
    assert code == 1
    assert f"the training is done, but not its report: {text}. The same command" in output
    assert ("Traceback" in output) == shown, "a bug shows where it is"
    run = _run_json(tmp_path)
    assert (run["status"], {stage["status"] for stage in run["stages"]}) == ("failed", {"done"})
    assert run["error"].startswith("ReportFailed: ")
    assert (tmp_path / "run/weights/last.safetensors").exists()
    assert _finish(tmp_path) == undisturbed
    assert "error" not in _run_json(tmp_path)


# ------------------------------------------------------------------ the request itself


def test_what_a_signal_did_before_is_put_back():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        with stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == stop._note, "the inner context leaves the outer one's in place"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_first_ctrl_c_is_noted_and_the_second_raised():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_is_made_anew_stops_where_the_signal_arrives():
    with StopRequest() as stop:
        with stop.at_once("the table"):
            pass
        with pytest.raises(Preempted, match="SIGTERM received; the table will be made anew"), stop.at_once("the table"):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted, match="SIGTERM received; the page will be made anew"), stop.at_once("the page"):
            pytest.fail("it began, though it was asked to stop before")
        signal.raise_signal(signal.SIGTERM)  # outside again: noted, not raised


def test_outside_the_main_thread_nothing_is_caught():
    found = []

    def work() -> None:
        with StopRequest() as stop:
            found.append((stop.received, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
