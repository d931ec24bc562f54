"""What a run that was begun may go on with: a newer version's fields, more epochs, other means of computing."""

from __future__ import annotations

import dataclasses
import json
import signal
import warnings
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path

import job
import pytest
import torch
from toy_training import ToyConfig, open_run, toy_stages, traces, train

from fgvc_ext.training import (
    Artefact,
    ConfigMismatch,
    EngineConfig,
    OptimConfig,
    Preempted,
    RunConfig,
    load_config,
    run_stages,
    save_config,
)  # fmt: skip
from fgvc_ext.training.config import MACHINE_FIELDS, defaults, differences, identity
from fgvc_ext.training.driver import choose_folder
from fgvc_ext.training.run_folder import RunFolder
from fgvc_ext.training.step import TrainingStep
from fgvc_ext.training.stop_request import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")


def _config(epochs: int = 3, schedule: str = "step", **changes) -> ToyConfig:
    optim = OptimConfig(
        epochs=epochs, batch_size=8, lr=0.05, schedule=schedule, step_epochs=2, warmup_epochs=0.5, ema_decay=0.9
    )
    return ToyConfig(optim=replace(optim, **changes), stages=1)


def _run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


# ------------------------------------------------------------------ fields that a newer version has added


@dataclass
class _NewerOptim(OptimConfig):
    sharpness: float = 0.0
    scales: tuple[float, ...] = field(default_factory=lambda: (0.9, 0.99))


@dataclass
class _Extra:
    balanced: bool = False


@dataclass
class _NewerConfig(ToyConfig):
    extra: _Extra = field(default_factory=_Extra)


def _newer(config: ToyConfig, **optim) -> _NewerConfig:
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    values["optim"] = _NewerOptim(**vars(config.optim), **optim)
    return _NewerConfig(**values)


class _StopAt(StopRequest):
    def __init__(self, question: int) -> None:
        super().__init__()
        self.left = question

    @property
    def received(self):
        self.left -= 1
        return None if self.left > 0 else signal.SIGTERM

    @received.setter
    def received(self, value) -> None:
        pass


def _interrupt(folder: Path, config: ToyConfig, at: int = 7) -> None:
    with pytest.raises(Preempted), open_run(folder, config) as run:
        run_stages(toy_stages(config), run, config.engine, stop=_StopAt(at))


def _trained_steps(monkeypatch) -> list[int]:
    steps, learn = [], TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda step, *given: steps.append(1) or learn(step, *given))
    return steps


def test_a_run_of_an_older_version_goes_on_with_the_same_bits(tmp_path):
    config = _config()
    train(tmp_path / "whole", config)
    _interrupt(tmp_path / "run", config)
    train(tmp_path / "run", _newer(config))
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")


def test_a_finished_run_of_an_older_version_is_left_alone(tmp_path, monkeypatch):
    train(tmp_path, _config())
    before, steps = traces(tmp_path), _trained_steps(monkeypatch)
    train(tmp_path, _newer(_config()))
    assert (traces(tmp_path), steps) == (before, [])


def test_a_new_field_that_is_set_is_a_difference(tmp_path):
    _interrupt(tmp_path, _config())
    with pytest.raises(ConfigMismatch, match=r"optim\.sharpness: 0\.0 in the run, 0\.5 now\n--force"):
        train(tmp_path, _newer(_config(), sharpness=0.5))
    with pytest.raises(ConfigMismatch, match=r"optim\.scales: \[0\.9, 0\.99\] in the run, \[0\.9\] now\n--force"):
        train(tmp_path, _newer(_config(), scales=(0.9,)))


def test_a_field_that_is_gone_is_a_difference(tmp_path):
    """What it stood for is done by nothing any more, whatever its value was."""
    _interrupt(tmp_path, _newer(_config()))
    with pytest.raises(ConfigMismatch, match=r"extra\.balanced: false in the run, absent now"):
        train(tmp_path, _config())


def test_a_default_says_nothing_of_a_field_that_the_run_has():
    config = OptimConfig(lr=0.5)
    old = {**identity(config), "lr": 0.25}
    assert differences(old, identity(config), defaults(config)) == ["lr: 0.25 in the run, 0.5 now"]
    assert differences(old, identity(OptimConfig()), defaults(config)) == ["lr: 0.25 in the run, 0.001 now"]


def test_defaults_are_those_of_the_classes_and_look_like_identities():
    found = defaults({"optim": _NewerOptim(epochs=3), "method": {"inner": _Extra(True), "plain": 3}, "seed": 5})
    assert found["optim.epochs"] == 150
    assert found["optim.scales"] == [0.9, 0.99]
    assert found["method.inner.balanced"] is False
    assert "seed" not in found
    assert "method.plain" not in found
    needed = make_dataclass("Needed", [("must", int), ("path", Path, field(default=Path("a")))])
    assert defaults(needed(must=1)) == {"path": "a"}
    assert set(identity(RunConfig())) <= set(defaults(RunConfig()))


def test_a_default_folder_is_found_again_after_an_upgrade(tmp_path):
    out = tmp_path / "run"
    old, new = _config(), _newer(_config())
    _interrupt(out, old)
    facts = {"data": json.loads((out / "run.json").read_text())["data"]}
    for config, name in ((new, "run"), (_newer(_config(), sharpness=0.5), "run-2")):
        config.out, config.force_stage = out, ()
        assert choose_folder(config, lambda folder, config=config: RunFolder(folder, config, facts=facts)).name == name


def test_an_older_configuration_file_loads(tmp_path):
    file = tmp_path / "config.json"
    save_config(RunConfig(seed=3, engine=EngineConfig(workers=2)), file)
    values = json.loads(file.read_text())
    del values["optim"]["clip_grad_norm"], values["debug"], values["model"], values["engine"]["compile"]
    values["optim"]["lr"] = 0.5
    file.write_text(json.dumps(values))
    loaded = load_config(RunConfig, file)
    assert loaded == RunConfig(seed=3, optim=OptimConfig(lr=0.5), engine=EngineConfig(workers=2))


OTHER = {"out": Path("b"), "resume": "must", "force_stage": ("a",), "dry_run": True, "report": False, "debug": True}
OTHER |= {
    "data.root": Path("b"),
    "data.cache": Path("b"),
    "model.weights": "b",
    "engine.device": "cuda",
    "engine.workers": 5,
}
OTHER |= {"engine.checkpoint_every": 5, "engine.eval_batch_size": 5, "engine.look_every": 5}
OTHER |= {"engine.max_skipped_steps": 5}


@pytest.mark.parametrize("name", OTHER)
def test_where_things_are_and_how_fast_they_go_is_no_difference(name):
    assert set(OTHER) == set(MACHINE_FIELDS)
    group, _, last = name.rpartition(".")
    config = RunConfig()
    setattr(getattr(config, group) if group else config, last, OTHER[name])
    assert not differences(identity(RunConfig()), identity(config))


@pytest.mark.parametrize("name", ["seed", "limit_test", "optim.lr", "data.crop", "model.backbone", "engine.compile"])
def test_what_decides_the_result_is_one(name):
    assert name in identity(RunConfig())


# ------------------------------------------------------------------ other epochs


@pytest.mark.parametrize("schedule", ["step", "constant"])
def test_a_finished_run_goes_on_to_more_epochs(schedule, tmp_path, monkeypatch):
    train(tmp_path / "whole", _config(5, schedule))
    train(tmp_path / "run", _config(3, schedule))
    steps = _trained_steps(monkeypatch)
    train(tmp_path / "run", _config(5, schedule))
    assert len(steps) == 2 * 4
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")
    assert _run_json(tmp_path / "run")["stages"] == _run_json(tmp_path / "whole")["stages"]
    train(tmp_path / "run", _config(5, schedule))
    assert len(steps) == 2 * 4, "it is done with 5"


def test_an_extended_run_that_is_interrupted_goes_on(tmp_path):
    train(tmp_path / "whole", _config(5))
    train(tmp_path / "run", _config(3))
    _interrupt(tmp_path / "run", _config(5), at=3)
    assert _run_json(tmp_path / "run")["stages"][0]["status"] == "running"
    train(tmp_path / "run", _config(5))
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")


@pytest.mark.parametrize("epochs", [2, 5])
def test_a_half_trained_run_goes_on_to_another_end(epochs, tmp_path):
    """7 questions: four steps and an evaluation's batch of the first epoch, its end, one step of the second."""
    train(tmp_path / "whole", _config(epochs))
    _interrupt(tmp_path / "run", _config(3), at=7)
    train(tmp_path / "run", _config(epochs))
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")


def test_fewer_epochs_than_are_trained_are_refused(tmp_path):
    train(tmp_path, _config(3))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigMismatch, match=r"optim\.epochs: 3 in the run, 2 now: 3 are trained already\n"):
        train(tmp_path, _config(2))
    assert (tmp_path / "run.json").read_bytes() == before


def test_an_end_within_what_a_checkpoint_has_behind_it_is_refused(tmp_path):
    """Killed between a checkpoint and run.json: the checkpoint knows of one epoch more."""
    _interrupt(tmp_path, _config(3), at=14)
    run = _run_json(tmp_path)
    assert run["stages"][0]["epoch"] == 2
    run["stages"][0]["epoch"] = 1
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigMismatch, match="3 in the run, 2 now: 2 are trained already"):
        train(tmp_path, _config(2))


def test_with_rates_that_depend_on_the_end_more_epochs_are_refused(tmp_path, monkeypatch):
    train(tmp_path, _config(3, "cosine"))
    steps = _trained_steps(monkeypatch)
    with pytest.raises(ConfigMismatch, match=r"epochs: 3 in the run, 5 now: the rates of optim\.schedule cosine"):
        train(tmp_path, _config(5, "cosine"))
    assert not steps


def test_more_epochs_with_another_rate_are_refused(tmp_path):
    train(tmp_path, _config(3))
    with pytest.raises(ConfigMismatch, match=r"optim\.epochs: 3 in the run, 5 now\n  optim\.lr: 0\.05 in the run"):
        train(tmp_path, _config(5, lr=0.1))


def _with_artefact(toy: ToyConfig, **options) -> list:
    table = Artefact(name="table", make=lambda earlier: {"rows": torch.rand(3)}, **{"config": {}, **options})
    return [*toy_stages(toy), table]


def _run_all(folder: Path, config: ToyConfig, stages: list, **options):
    with open_run(folder, config) as run:
        return run_stages(stages, run, config.engine, **options)


def test_what_builds_on_an_extended_stage_is_stale(tmp_path):
    before = _run_all(tmp_path, _config(3), _with_artefact(_config(3), needs=["first"]))
    more = _config(5)
    with pytest.raises(ConfigMismatch, match=r"stage table .*\n  result of first"):
        _run_all(tmp_path, more, _with_artefact(more, needs=["first"]))
    assert _run_json(tmp_path)["stages"][0]["epoch"] == 5, "the extended stage is done"
    after = _run_all(tmp_path, more, _with_artefact(more, needs=["first"]), force=["table"])
    assert after["first"] != before["first"]


def test_what_does_not_build_on_it_stays_done(tmp_path):
    before = _run_all(tmp_path, _config(3), _with_artefact(_config(3)))
    assert _run_all(tmp_path, _config(5), _with_artefact(_config(5)))["table"] == before["table"]


def test_an_artefact_of_the_whole_configuration_has_no_epochs_of_its_own(tmp_path):
    _run_all(tmp_path, _config(3), _with_artefact(_config(3), config=None))
    with pytest.raises(ConfigMismatch, match=r"stage table .*\n  optim\.epochs: 3 in the run, 5 now\n"):
        _run_all(tmp_path, _config(5), _with_artefact(_config(5), config=None))


def test_a_forced_stage_begins_anew_with_fewer_epochs(tmp_path, monkeypatch):
    train(tmp_path, _config(3))
    steps = _trained_steps(monkeypatch)
    _run_all(tmp_path, _config(2), toy_stages(_config(2)), force=["first"])
    assert len(steps) == 2 * 4


def _run_on_a_rank(folder: Path, config: ToyConfig, force: tuple[str, ...] = ()) -> int:
    with open_run(folder, config) as run:
        results = run_stages(_with_artefact(config), run, config.engine, force=force)
        assert {name: run.is_done(name) for name in results} == {"first": True, "table": True}
    return 0


def test_processes_agree_on_what_is_done_again(tmp_path):
    """Whether a stage is forced, or ends elsewhere, is found by the main process: the others must hear of it."""
    job.run(tmp_path / "a", 2, _run_on_a_rank, tmp_path / "run", _config(2))
    job.run(tmp_path / "b", 2, _run_on_a_rank, tmp_path / "run", _config(3), ("table",))
    job.run(tmp_path / "c", 2, _run_on_a_rank, tmp_path / "run", _config(2), ("first",))
    assert [entry["status"] for entry in _run_json(tmp_path / "run")["stages"]] == ["done", "done"]


def test_a_checkpoint_of_other_settings_is_refused_but_not_one_of_fewer_epochs(tmp_path):
    """The checkpoint itself knows what it is of, also where run.json does not."""
    for name, config in (("more", _config(5)), ("other", _config(3, lr=0.1))):
        _interrupt(tmp_path / name, config)
        _interrupt(tmp_path / "run" / name, _config(3))
        checkpoints = tmp_path / "run" / name / "checkpoints"
        for file in checkpoints.iterdir():
            file.unlink()
        for file in (tmp_path / name / "checkpoints").iterdir():
            (checkpoints / file.name).write_bytes(file.read_bytes())
    train(tmp_path / "run/more", _config(3))
    with pytest.raises(ConfigMismatch, match="was written under another configuration"):
        train(tmp_path / "run/other", _config(3))


# ------------------------------------------------------------------ other means


def _change_last_session(folder: Path, group: str, name: str, value) -> None:
    run = _run_json(folder)
    run["sessions"][-1][group][name] = value
    (folder / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("versions", "torch", "2.0.1", f"torch was 2.0.1 and is {torch.__version__}: the run goes on"),
        ("machine", "threads", 64, "number of threads was 64 and is 1: the run goes on"),
        ("machine", "device", "cuda (A)", f"was cuda (A) and is cpu ({torch.backends.cpu.get_cpu_capability()}): the"),
        ("machine", "device", None, "device was unknown and is cpu"),
    ],
)
def test_other_means_are_warned_of_in_one_line(group, name, value, message, tmp_path):
    _interrupt(tmp_path, _config())
    _change_last_session(tmp_path, group, name, value)
    with pytest.warns(UserWarning, match="since the last session") as caught:
        train(tmp_path, _config())
    (text,) = [str(warning.message) for warning in caught if "since the last session" in str(warning.message)]
    assert message in text
    assert text.count(" and is ") == 1
    assert "\n" not in text


def test_the_same_means_are_not_warned_of(tmp_path):
    _interrupt(tmp_path, _config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path, _config())


def test_other_means_do_not_matter_where_nothing_is_computed(tmp_path):
    train(tmp_path, _config())
    _change_last_session(tmp_path, "machine", "threads", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path, _config())


def test_many_stages_are_warned_of_once(tmp_path):
    config = replace(_config(), stages=2)
    _interrupt(tmp_path, config)
    _change_last_session(tmp_path, "machine", "threads", 64)
    with pytest.warns(UserWarning, match="since the last session") as caught:
        train(tmp_path, config)
    assert len([1 for warning in caught if "since the last session" in str(warning.message)]) == 1
