"""Stages that build on each other: what is done, what is stale, what cannot be."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from toy_models import ToyClassifier, loaded
from toy_training import Child, ToyConfig, ToyImages, centre, jitter, open_run, traces

from fgvc_ext.data.loading import Samples
from fgvc_ext.training import (
    Artefact,
    Classification,
    ConfigMismatch,
    OptimConfig,
    Preempted,
    Stage,
    evaluate_samples,
    run_stages,
)
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.stages import check_names
from fgvc_ext.training.step import TrainingStep
from fgvc_ext.training.stop_request import StopRequest


def _stage(name: str, needs: tuple[str, ...] = (), lr: float = 0.05, **options) -> Stage:
    def build(earlier) -> Classification:
        model = ToyClassifier()
        for result in earlier.values():
            if result.path.parent.name == "weights":
                model.load_state_dict(loaded(result).state_dict())
        return Classification(model, torch.nn.CrossEntropyLoss())

    return Stage(
        name=name,
        needs=needs,
        build=build,
        optim=OptimConfig(epochs=2, batch_size=8, lr=lr, schedule="constant"),
        train=lambda earlier: Samples(ToyImages(17), jitter),
        evaluations=lambda earlier: {"test": Samples(ToyImages(9, "test"), centre)},
        seed=3,
        config={},
        **options,
    )


def _numbers(earlier) -> dict[str, torch.Tensor]:
    return {name: loaded(result).classifier.weight for name, result in earlier.items()}


def _chain(**rates: float) -> list[Stage | Artefact]:
    return [
        _stage("first", lr=rates.get("first", 0.05)),
        Artefact(name="numbers", needs=["first"], make=_numbers, config={}),
        _stage("second", ("first", "numbers"), rates.get("second", 0.05)),
        _stage("apart", lr=rates.get("apart", 0.05)),
    ]


def _run(folder: Path, stages: list[Stage | Artefact], **options):
    config = ToyConfig()
    with open_run(folder, config) as run:
        return run_stages(stages, run, config.engine, **options)


def _steps(folder: Path) -> dict[str, int]:
    return {entry["name"]: entry.get("step") for entry in json.loads((folder / "run.json").read_text())["stages"]}


def test_a_later_stages_rate_leaves_the_earlier_ones_done(tmp_path):
    before = _run(tmp_path, _chain())
    content = (tmp_path / "run.json").read_bytes()
    with pytest.raises(
        ConfigMismatch, match=r"stage second of .*\n  optim\.lr: 0\.05 in the run, 0\.2 now\n--force-stage"
    ):
        _run(tmp_path, _chain(second=0.2))
    assert (tmp_path / "run.json").read_bytes() == content, "refused before anything was done"
    after = _run(tmp_path, _chain(second=0.2), force=["second"])
    assert {name for name in after if after[name] != before[name]} == {"second"}
    assert _steps(tmp_path) == {"first": 4, "numbers": None, "apart": 4, "second": 4}


def test_what_is_done_is_not_done_again(tmp_path):
    before = _run(tmp_path, _chain())
    stages = _chain()
    for stage in stages:
        if isinstance(stage, Artefact):
            stage.make = lambda earlier: pytest.fail("makes an artefact that is there")
        else:
            stage.build = lambda earlier: pytest.fail("builds what is trained")
    assert _run(tmp_path, stages) == before


def test_what_builds_on_a_stage_that_was_done_again_is_stale(tmp_path):
    before = _run(tmp_path, _chain())
    with pytest.raises(
        ConfigMismatch, match=r'artefact numbers|stage numbers .*\n  result of first: "[0-9a-f]{64}" in'
    ):
        _run(tmp_path, _chain(first=0.2), force=["first"])
    after = _run(tmp_path, _chain(first=0.2), force=["numbers", "second"])
    assert {name for name in after if after[name] != before[name]} == {"first", "numbers", "second"}
    assert after == _run(tmp_path, _chain(first=0.2))


def test_a_forced_stage_that_gives_the_same_leaves_the_others_done(tmp_path):
    _run(tmp_path, _chain())
    before = traces(tmp_path)
    _run(tmp_path, _chain(), force=["first"])
    after = traces(tmp_path)
    for file in ("metrics.csv", "metrics.jsonl"):  # the lines of what was done again stand last
        assert sorted(eval(after.pop(file)), key=repr) == sorted(eval(before.pop(file)), key=repr)
    assert after == before


def test_a_stage_that_is_done_again_keeps_its_place(tmp_path):
    """Reports and tables take the last stage of run.json for the result of a run."""
    _run(tmp_path, _chain())
    names = [stage.name for stage in _chain()]
    for name in names:
        _run(tmp_path, _chain(), force=[name])
        assert [entry["name"] for entry in json.loads((tmp_path / "run.json").read_text())["stages"]] == names
    _run(tmp_path, _chain()[:1])  # a run that has fewer stages now
    shown = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert [entry["name"] for entry in shown] == [*names[1:], names[0]]


class _StopAtTheSecondQuestion(StopRequest):
    questions = 0

    @property
    def received(self):
        self.questions += 1
        return signal.SIGTERM if self.questions >= 2 else None

    @received.setter
    def received(self, value) -> None:
        pass


def test_a_forced_stage_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    expected = _run(tmp_path / "whole", _chain(first=0.2))
    _run(tmp_path / "run", _chain())
    with pytest.raises(Preempted, match="saved at epoch 0, step 2"):
        _run(tmp_path / "run", _chain(first=0.2), force=["first"], stop=_StopAtTheSecondQuestion())
    trained, learn = [], TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda step, *args: trained.append(1) or learn(step, *args))
    with pytest.raises(ConfigMismatch, match="numbers"):
        _run(tmp_path / "run", _chain(first=0.2), force=["first"])
    assert len(trained) == 2, "the two steps that were left"
    assert (tmp_path / "run/weights/first.safetensors").read_bytes() == expected["first"].path.read_bytes()


def test_a_stage_of_other_data_is_stale(tmp_path):
    _run(tmp_path, [_stage("first")])
    config = ToyConfig(images=34)
    with pytest.raises(ConfigMismatch, match="data set: train_fingerprint"), open_run(tmp_path, config) as run:
        run_stages([_stage("first")], run, config.engine)


def test_without_a_configuration_of_its_own_a_stage_depends_on_the_whole(tmp_path):
    def whole() -> Stage:
        stage = _stage("first")
        stage.config = None
        return stage

    _run(tmp_path, [whole()])
    config = ToyConfig(nan_at=99)  # anything
    with pytest.raises(ConfigMismatch, match="nan_at: -1 in the run, 99 now"), open_run(tmp_path, config) as run:
        run_stages([whole()], run, config.engine)


def test_a_damaged_artefact_is_made_again(tmp_path):
    before = _run(tmp_path, _chain())
    before["numbers"].path.write_bytes(b"other")
    assert _run(tmp_path, _chain()) == before


def test_what_an_artefact_makes_decides_where_it_goes(tmp_path):
    stages = [
        _stage("net"),
        Artefact(name="export", needs=["net"], make=lambda earlier: b"program", suffix=".pt2", config={}),
        Artefact(name="table", make=lambda earlier: {"rows": torch.rand(3)}, seed=1, config={}),
    ]
    results = _run(tmp_path / "a", stages)
    files = {name: str(result.path.relative_to(tmp_path / "a")) for name, result in results.items()}
    assert files == {
        "net": "weights/net.safetensors",
        "export": "artefacts/export.pt2",
        "table": "artefacts/table.safetensors",
    }
    assert (tmp_path / "a/weights/last.safetensors").read_bytes() == results["net"].path.read_bytes()
    torch.rand(5)
    assert _run(tmp_path / "b", stages)["table"].sha256 == results["table"].sha256, "it is seeded"


def test_what_an_artefact_measures_stands_in_the_run_file_as_a_stages_does(tmp_path):
    def measures(model) -> dict[str, dict[str, float]]:
        task = Classification(model, torch.nn.CrossEntropyLoss())
        found = evaluate_samples(task, Samples(ToyImages(9, "test"), centre), ToyConfig().engine)
        return {"val": {"accuracy": 0.25, "loss": 2.0}, "test": found}

    copied = Artefact(name="copied", needs=["net"], make=lambda e: loaded(e["net"]), measures=measures, config={})
    _run(tmp_path, [_stage("net"), copied])
    stage, artefact = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert artefact["headline"] == stage["headline"] == "accuracy"
    assert artefact["accuracy"] == {"last": stage["accuracy"]["last"], "last_val": 0.25}
    assert artefact["measures"]["test"] == stage["measures"]["test"]
    assert artefact["measures"]["val"] == {"accuracy": 0.25, "loss": 2.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["last"], "got 'last' .*is what the run ships"),
        (["a", "a"], "two are called 'a'"),
        (["a/b"], "letters, digits, _ and -, got 'a/b'"),
        ([".a"], "got '.a'"),
        ([""], "got ''"),
        (["a.b"], "got 'a.b'"),
    ],
)
def test_names_that_cannot_be_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check_names([_stage(name) for name in names])


def test_a_need_must_come_before(tmp_path):
    with pytest.raises(ValueError, match="stage b needs 'c', which is no stage before it"):
        check_names([_stage("a"), _stage("b", ("a", "c")), _stage("c")])
    with pytest.raises(ValueError, match="--force-stage: expected some of a, got 'x'"):
        _run(tmp_path, [_stage("a")], force=["x"])


def test_names_that_begin_like_others_do_not_meet(tmp_path):
    stages = [_stage(name, lr=0.01 * number) for number, name in enumerate(("model", "model-e", "model-e00001"), 1)]
    results = _run(tmp_path, stages)
    assert len({result.sha256 for result in results.values()}) == 3
    assert {len(Checkpoints(tmp_path / "checkpoints", stage.name).manifests()) for stage in stages} == {2}
    assert _run(tmp_path, stages) == results


def test_checkpoints_that_a_lost_run_file_has_left_are_not_taken_for_new_ones(tmp_path):
    before = _run(tmp_path, [_stage("first")])
    (tmp_path / "run.json").unlink()
    (tmp_path / "weights/first.safetensors").unlink()
    after = _run(tmp_path, [_stage("first", lr=0.2)])
    assert after["first"].sha256 != before["first"].sha256
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def _make_slowly(folder: Path) -> int:
    def make(earlier) -> dict[str, torch.Tensor]:
        (folder / "making").touch()
        time.sleep(60)
        return {}

    try:
        _run(folder, [Artefact(name="slow", make=make, config={})])
    except Preempted as stop:
        print(stop)
        return 75
    return 0


def test_sigterm_stops_an_artefact_at_once(tmp_path):
    child = Child(tmp_path / "output", _make_slowly, tmp_path / "run")
    end = time.monotonic() + 60
    while not (tmp_path / "run/making").exists():
        assert child.process.is_alive(), child.text()
        assert time.monotonic() < end
        time.sleep(0.02)
    child.process.terminate()
    code, output = child.ended(20)
    assert code == 75, output
    assert "artefact slow will be made anew" in output
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "preempted"
