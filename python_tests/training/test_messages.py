"""What a driver says when something is wrong: one line for what its user can mend, a traceback for a bug."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_driver

import fgvc_ext.training.run_folder
from fgvc_ext.training import OptimConfig, RunConfig
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.messages import OutOfMemory, is_out_of_memory, warnings_in_one_line
from fgvc_ext.training.stages import check_names

DATA = ["--data.classes", "2", "--data.train-per-class", "1", "--data.test-per-class", "1", "--data.image-size", "32"]


def _driver(stages, kind: type[RunConfig] = RunConfig) -> Driver:
    return Driver("Toy", {"demo": ("Demo", kind(optim=OptimConfig(epochs=1)))}, stages)


def _bug_in_python(config, datasets):
    return int("not a number")


def _bug_in_torch(config, datasets):
    return torch.zeros(2).view(3)


def _bug_of_another_type(config, datasets):
    raise KeyError("a bug")


def _bug_in_what_calls_the_package(config, datasets):
    raise ValueError("raised by nobody's file")


def _bug_as_a_broken_rule(config, datasets):
    assert not datasets.train.classes, "a broken rule"


BUGS = [_bug_in_python, _bug_in_torch, _bug_of_another_type, _bug_in_what_calls_the_package, _bug_as_a_broken_rule]


@pytest.mark.parametrize("stages", BUGS)
def test_a_bug_shows_its_traceback(stages, tmp_path):
    with pytest.raises((ValueError, RuntimeError, KeyError, AssertionError)):
        _driver(stages).main(["demo", *DATA, "--out", str(tmp_path)])


def _bad_name(config, datasets):
    check_names([replace(stage, name="last") for stage in toy_driver.stages(toy_driver.CONFIG, datasets)])


def _no_disk(config, datasets):
    Path("/no/such/folder/file").write_text("")


class _Own(RunConfig):
    """A configuration of this file: what this file raises is then an answer of a driver."""


@pytest.mark.parametrize(
    ("stages", "kind", "message"),
    [
        (_bad_name, RunConfig, "stage: expected a name of letters"),
        (_no_disk, RunConfig, "[Errno 2] No such file or directory: '/no/such/folder/file'"),
        (_bug_in_what_calls_the_package, _Own, "raised by nobody's file"),
    ],
)
def test_an_answer_is_one_line(stages, kind, message, tmp_path, capsys):
    assert _driver(stages, kind).main(["demo", *DATA, "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_what_python_raises_in_a_drivers_file_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="invalid literal"):
        _driver(_bug_in_python, _Own).main(["demo", *DATA, "--out", str(tmp_path)])
    with pytest.raises(AssertionError):
        _driver(_bug_as_a_broken_rule, _Own).main(["demo", *DATA, "--out", str(tmp_path)])


def test_debug_shows_the_traceback_of_an_answer(tmp_path):
    with pytest.raises(ValueError, match="stage: expected a name of letters"):
        _driver(_bad_name).main(["demo", *DATA, "--out", str(tmp_path), "--debug", "True"])


def test_devices_that_are_not_there_are_answered(capsys, tmp_path):
    for device, message in (("gpu", "expected auto, cpu, cuda or cuda:NUMBER, got 'gpu'"), ("cuda:99", "GPU")):
        arguments = ["toy", "--out", str(tmp_path / "run"), "--engine.device", device]
        assert toy_driver.DRIVER.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: engine.device: ")
        assert message in line


# ------------------------------------------------------------------ memory


def test_allocators_that_find_no_memory_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


def test_no_memory_is_told_with_what_decides_it(tmp_path, capsys, monkeypatch):
    usual = toy_driver.ToyTask.step
    monkeypatch.setattr(toy_driver.ToyTask, "step", lambda task, batch: torch.empty(2**50) and usual(task, batch))
    arguments = ["toy", "--out", str(tmp_path / "run"), "--optim.accumulate", "2", "--engine.eval-batch-size", "9"]
    assert toy_driver.DRIVER.main([*arguments, "--data.crop", "224"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: out of memory in stage first, with --optim.batch-size 8, --optim.accumulate 2 (so 4 "
    )
    for words in (
        "--data.crop 224",
        "--engine.eval-batch-size 9",
        "--optim.accumulate 4 halves",
        "--force-stage first",
    ):
        assert words in line
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["status"] == "failed"
    assert run["error"].startswith("OutOfMemory: out of memory in stage first")
    with pytest.raises(OutOfMemory) as caught:
        toy_driver.DRIVER.main([*arguments, "--data.crop", "224", "--debug", "True"])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_parts_of_one_image_are_not_halved():
    config = RunConfig(optim=OptimConfig(batch_size=3, accumulate=2))
    assert "2 images at once" in str(OutOfMemory("a", config))
    assert "halves" not in str(OutOfMemory("a", config))


# ------------------------------------------------------------------ warnings


def test_our_own_warnings_are_one_line():
    def shown(category: type[Warning], file: str) -> str:
        return warnings.formatwarning("look", category, file, 3, "the_line()")

    usual = shown(UserWarning, __file__)
    with warnings_in_one_line():
        assert shown(UserWarning, fgvc_ext.training.run_folder.__file__) == "warning: look\n"
        assert shown(UserWarning, __file__) == usual, "that of another package keeps its place"
        assert "run_folder.py:3" in shown(DeprecationWarning, fgvc_ext.training.run_folder.__file__)
    assert "run_folder.py:3" in shown(UserWarning, fgvc_ext.training.run_folder.__file__)


def test_other_means_are_one_line_of_the_driver(tmp_path):
    """In a process of its own: pytest shows warnings its own way."""
    from toy_training import Child

    arguments = ["--out", str(tmp_path / "run"), "--report", "False"]
    where = "toy_driver.ToyTask.eval_step"
    code, _ = Child(tmp_path / "first", toy_driver.run, arguments, toy_driver.die_in_call, 1, where).ended()
    assert code == -9
    file = Path(tmp_path / "run/run.json")
    run = json.loads(file.read_text())
    run["sessions"][0]["versions"]["torch"] = "2.0.1"
    file.write_text(json.dumps(run))
    code, output = Child(tmp_path / "second", toy_driver.run, arguments).ended()
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if "since the last session" in line]
    assert line.startswith(
        f"warning: {tmp_path}/run: since the last session, torch was 2.0.1 and is {torch.__version__}:"
    )
    assert "compare_sessions" not in output
