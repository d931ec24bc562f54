"""A run as stages that build on each other's results: their order, what is done of them, and what is stale.

A stage's identity is what decides its result: its configuration, the data, and the hashes of what it builds on. It is
recorded when the stage begins. A stage that is done under the same identity is never repeated; one that was begun
under another is stale, and refused with the differences, unless it is named with `--force-stage`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fgvc_ext.atomic_files import file_sha256, write_atomically
from fgvc_ext.data.loading import Samples
from fgvc_ext.models.model import Model, describe
from fgvc_ext.models.weights_file import save_weights
from fgvc_ext.training import distributed
from fgvc_ext.training.checkpoints import load_checkpoint, stage_of
from fgvc_ext.training.config import ConfigMismatch, EngineConfig, OptimConfig, Precision, defaults, identity
from fgvc_ext.training.continuation import EPOCHS, is_moved, refusals, stage_hash
from fgvc_ext.training.device import choose_device, choose_precision, configure_backends, hint_of_bf16
from fgvc_ext.training.evaluation import reported
from fgvc_ext.training.random_state import seed_everything
from fgvc_ext.training.run_folder import RunFolder
from fgvc_ext.training.sampling import derive_seed
from fgvc_ext.training.stop_request import Preempted, StopRequest
from fgvc_ext.training.task import Task
from fgvc_ext.training.trainer import Trainer
from fgvc_ext.training.training import Training

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Result(NamedTuple):
    """What a stage or artefact has made: a file of the run folder, and its hash."""

    path: Path
    sha256: str

    @property
    def best(self) -> Path:
        """The weights of a stage's best epoch on validation images; there are none without such images."""
        return self.path.with_name(f"{self.path.stem}.best.safetensors")


Results = Mapping[str, Result]
"""The results of the stages that a stage needs, by their names, in the order of `needs`."""


@dataclass(kw_only=True)
class Stage:
    """One training within a run. Its result is the trained model, `weights/<name>.safetensors`.

    Attributes:
        name: unique in the run; it names the stage's files. Letters, digits, "_" and "-"; "last" is taken.
        needs: names of earlier stages and artefacts, whose results `build`, `train`, `evaluations` and `final` get.
        build: results → task; called with all generators seeded from `seed`.
        start: gives the built task the weights that training starts from, and returns a text that says so. Not called
            where a checkpoint is there to go on from: a run that has begun needs their file no more.
        train: results → training samples.
        evaluations: results → samples by name; of "test" and "val" run.json keeps the best epoch too.
        final: results → samples of evaluations for the last epoch only, such as five crops.
        config: what of the configuration this stage's result depends on, by group: {"data": …, "method": …}. `optim`,
            `seed` and the engine's settings are added. None: the whole configuration of the run.
        inputs: hashes of files from elsewhere that it builds on, such as pretrained weights.
        metadata: further entries of the weights file's metadata.
    """

    name: str
    build: Callable[[Results], Task]
    optim: OptimConfig
    train: Callable[[Results], Samples]
    evaluations: Callable[[Results], Mapping[str, Samples]]
    seed: int
    needs: Sequence[str] = ()
    start: Callable[[Any], str] = field(default=lambda task: "")
    final: Callable[[Results], Mapping[str, Samples]] = field(default=lambda earlier: {})
    config: Mapping[str, Any] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def training(self, earlier: Results, config_hash: str = "") -> Training:
        """The training that this stage is, once the results that it needs are there."""
        return Training(
            name=self.name,
            build=partial(self.build, earlier),
            start=self.start,
            optim=self.optim,
            train=self.train(earlier),
            evaluations=self.evaluations(earlier),
            final=self.final(earlier),
            seed=self.seed,
            metadata={**self.metadata, "stage": self.name, "config_hash": config_hash},
        )


@dataclass(kw_only=True)
class Artefact:
    """Something that is computed once from earlier results, without training: boxes, an ensemble, an export.

    Attributes:
        name, needs, config, inputs: as of a `Stage`.
        make: results → tensors by name (`artefacts/<name>.safetensors`), a model of `fgvc_ext.models`
            (`weights/<name>.safetensors`), or bytes (`artefacts/<name><suffix>`). Called in every process, with all
            generators seeded from `seed`: `evaluation.map_samples` gives each its share. The main process writes.
        measures: what was made → evaluation → measures, as {"test": {"accuracy": …}}, for run.json and the report; the
            first is the headline. Called in every process (`evaluation.evaluate_samples`).
        suffix: of the file that bytes are written to.
    """

    name: str
    make: Callable[[Results], Mapping[str, Tensor] | Model | bytes]
    needs: Sequence[str] = ()
    config: Mapping[str, Any] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    measures: Callable[[Any], Mapping[str, Mapping[str, float]]] = field(default=lambda made: {})
    suffix: str = ".bin"


def run_stages(
    stages: Sequence[Stage | Artefact],
    run: RunFolder,
    engine: EngineConfig,
    *,
    force: Sequence[str] = (),
    stop: StopRequest | None = None,
) -> dict[str, Result]:
    """Do what is not done of the stages, one after the other, and return the results of all.

    The model of the last one that made any is what the run ships: `weights/last.safetensors`.

    Args:
        force: names of stages to do again although they are done or stale.

    Raises:
        Preempted: asked to stop by a signal; the state is saved. NonFiniteLoss: the run cannot go on.
        ConfigMismatch: a stage was begun under another identity. ValueError: names or needs that cannot be.
    """
    distributed.check_joined()
    check_names(stages)
    if unknown := [name for name in force if name not in {stage.name for stage in stages}]:
        raise ValueError(f"--force-stage: expected some of {', '.join(s.name for s in stages)}, got {unknown[0]!r}")
    engine = _with_precision(engine, run)
    distributed.on_main(_check, stages, run, engine, force)
    run.begin(choose_device(engine.device))
    run.update(precision=engine.precision)
    run.data = distributed.on_main(_reopen, stages, run, engine, force)
    run.arrange([stage.name for stage in stages])
    results: dict[str, Result] = {}
    with stop or StopRequest() as asked, _lost_in_words(asked):
        for stage in stages:
            earlier = {name: results[name] for name in stage.needs}
            distributed.on_main(_refuse_stale, stage, run, engine, earlier)
            if not distributed.on_main(run.is_done, stage.name):
                _do(stage, earlier, run, engine, asked)
            results[stage.name] = result_of(stage.name, run)
            if distributed.any_process(asked.received is not None) and stage is not stages[-1]:
                name = asked.received.name if asked.received is not None else "a signal"
                raise Preempted(f"{name} received; {stage.name} is done")
    distributed.on_main(_ship, stages, results, run)
    return results


@contextmanager
def _lost_in_words(asked: StopRequest) -> Iterator[None]:
    """Where another process has ended: stopped, as this one is asked to be too, or failed, which it says itself."""
    try:
        yield
    except RuntimeError as error:
        if not (distributed.is_lost(error) or isinstance(error, distributed.OtherProcessFailed)):
            raise
        time.sleep(1)  # a signal to all processes reaches them at different moments
        if asked.received is not None:
            raise Preempted(f"{asked.received.name} received; it goes on from what was saved last") from error
        if isinstance(error, distributed.OtherProcessFailed):
            raise
        raise distributed.OtherProcessFailed("another process has ended, see its own message") from error


def _with_precision(engine: EngineConfig, run: RunFolder) -> EngineConfig:
    """The settings with "auto" resolved: to what the run began with, or to what the device has."""
    if engine.precision != "auto":
        return engine
    device = choose_device(engine.device)
    hint = hint_of_bf16(device)
    if "precision" not in run.data and hint is not None and distributed.is_main():
        print(hint, flush=True)
    began_with: Precision | None = run.data.get("precision")
    if began_with is None:
        began_with = distributed.on_main(choose_precision, engine, device)
    return dataclasses.replace(engine, precision=began_with)  # type: ignore[arg-type]  # the result of on_main


def check_names(stages: Sequence[Stage | Artefact]) -> None:
    """Raise ValueError for a name that cannot be a file's, is taken, or is needed before it is there."""
    seen: list[str] = []
    for stage in stages:
        if not _NAME.fullmatch(stage.name) or stage.name == "last":
            taken = " (weights/last.safetensors is what the run ships)" if stage.name == "last" else ""
            raise ValueError(f"stage: expected a name of letters, digits, _ and -, got {stage.name!r}{taken}")
        if stage.name in seen:
            raise ValueError(f"stage: two are called {stage.name!r}")
        if missing := [name for name in stage.needs if name not in seen]:
            raise ValueError(f"stage {stage.name} needs {missing[0]!r}, which is no stage before it")
        seen.append(stage.name)


def stage_identity(
    stage: Stage | Artefact, run: RunFolder, engine: EngineConfig, earlier: Results | None
) -> dict[str, Any]:
    """Everything that decides a stage's result, flat. `earlier` None: without the results that it needs."""
    found = identity(run.config if stage.config is None else dict(stage.config))
    if isinstance(stage, Stage):
        found |= identity({"optim": stage.optim, "engine": engine})
    found |= {"seed": stage.seed, **run.data_identity, **stage.inputs}
    return found | {f"result of {name}": result.sha256 for name, result in (earlier or {}).items()}


def result_of(name: str, run: RunFolder) -> Result:
    """The result of a stage that is done."""
    entry = run.entry(name)
    assert entry is not None
    ((file, sha256),) = entry["outputs"].items()
    return Result(run.path / file, sha256)


# -------------------------------------------------------------------- before anything is trained


def _check(stages: Sequence[Stage | Artefact], run: RunFolder, engine: EngineConfig, force: Sequence[str]) -> None:
    """Refuse what is stale already now: not after hours of training the stages before it."""
    results: dict[str, Result] = {}
    for stage in stages:
        known = {name: results[name] for name in stage.needs if name in results}
        if stage.name not in force:
            now = _refuse_stale(stage, run, engine, known)
            if run.is_done(stage.name) and not is_moved(run.identity_of(stage.name), now):
                results[stage.name] = result_of(stage.name, run)
    if run.starts_from is not None:
        owner = stage_of(run.starts_from)
        found = next((stage for stage in stages if stage.name == owner), None)
        if found is None:
            names = ", ".join(stage.name for stage in stages)
            raise ValueError(f"resume: {run.starts_from} is not a checkpoint of the stages {names}")
        load_checkpoint(run.starts_from)


def _refuse_stale(stage: Stage | Artefact, run: RunFolder, engine: EngineConfig, known: Results) -> dict[str, Any]:
    """ConfigMismatch, with the differences, where a stage was begun under another identity than it has now.

    `known`: the results that are there already. What was made of others, which are still to come, is not compared.
    """
    now = stage_identity(stage, run, engine, known)
    pending = {f"result of {name}" for name in stage.needs if name not in known}
    before = {name: value for name, value in run.identity_of(stage.name, now).items() if name not in pending}
    if lines := refusals(before, now, _defaults(stage, run, engine), _trained(stage, run)):
        raise ConfigMismatch(
            f"stage {stage.name} of the run in {run.path} builds on other settings or inputs:\n  "
            + "\n  ".join(lines)
            + f"\n--force-stage {stage.name} does it again, another --out starts anew"
        )
    return now


def _defaults(stage: Stage | Artefact, run: RunFolder, engine: EngineConfig) -> dict[str, Any]:
    found = defaults(run.config if stage.config is None else dict(stage.config))
    return found | defaults({"optim": stage.optim, "engine": engine}) if isinstance(stage, Stage) else found


def _trained(stage: Stage | Artefact, run: RunFolder) -> int | None:
    return run.epochs_of(stage.name) if isinstance(stage, Stage) else None


def _reopen(
    stages: Sequence[Stage | Artefact], run: RunFolder, engine: EngineConfig, force: Sequence[str]
) -> dict[str, Any]:
    """Make not done what is forced, what is to end at another epoch, and the stage that a checkpoint was named of.

    Returns what run.json then says, for all processes.

    A forced stage that is half done under its present identity goes on: so does a forced run that was interrupted.
    """
    for stage in stages:
        entry = run.entry(stage.name)
        if entry is None:
            continue
        known = {name: result_of(name, run) for name in stage.needs if run.is_done(name)}
        before, now = entry["identity"], stage_identity(stage, run, engine, known)
        if stage.name in force:
            stale = refusals(before, now, _defaults(stage, run, engine), _trained(stage, run))
            if entry.get("status") == "done" or stale:
                run.forget(stage.name)
                continue
        if isinstance(stage, Stage) and is_moved(before, now):
            run.update_entry(stage.name, status="running", identity={**before, EPOCHS: now[EPOCHS]})
    if run.starts_from is not None:
        owner = stage_of(run.starts_from)
        assert owner is not None
        run.checkpoints_of(owner).discard_newer(run.starts_from)
        if run.entry(owner) is not None:
            run.update_entry(owner, status="running")
    return run.data


# -------------------------------------------------------------------- doing a stage


def _do(stage: Stage | Artefact, earlier: Results, run: RunFolder, engine: EngineConfig, stop: StopRequest) -> None:
    run.compare_sessions()
    if run.entry(stage.name) is None:
        distributed.on_main(_clear, stage.name, run)
        now = stage_identity(stage, run, engine, earlier)
        run.update_entry(stage.name, status="running", config_hash=stage_hash(now), identity=now)
    config_hash = stage_hash(run.identity_of(stage.name))  # of the fields that there were when it was begun
    if isinstance(stage, Stage):
        Trainer(stage.training(earlier, config_hash), run, engine, stop).fit()
        return
    with stop.at_once(f"artefact {stage.name}"):
        configure_backends(engine)
        seed_everything(derive_seed(stage.seed, f"artefact {stage.name}"))
        made = stage.make(earlier)
        found = stage.measures(made)
        outputs = distributed.on_main(_write, stage, made, run, config_hash)
    run.update_entry(stage.name, status="done", outputs=outputs, **reported(found, found))


def _clear(name: str, run: RunFolder) -> None:
    """Remove what an earlier stage of this name has left: it is none of the new one's."""
    run.checkpoints_of(name).discard_newer(None)
    run.best_weights_of(name).unlink(missing_ok=True)
    run.metrics.drop(name, after=0)


def _write(
    artefact: Artefact, made: Mapping[str, Tensor] | Model | bytes, run: RunFolder, config_hash: str
) -> dict[str, str]:
    facts = {"stage": artefact.name, "config_hash": config_hash}
    if isinstance(made, bytes):
        file = run.artefacts / f"{artefact.name}{artefact.suffix}"
        file.parent.mkdir(exist_ok=True)
        sha256 = write_atomically(file, lambda stream: stream.write(made))[1]
    elif isinstance(made, Model):
        file = run.weights / f"{artefact.name}.safetensors"
        sha256 = save_weights(file, made.state_dict(), {**describe(made), **facts})
    else:
        file = run.artefacts / f"{artefact.name}.safetensors"
        sha256 = save_weights(file, made, facts)
    return {str(file.relative_to(run.path)): sha256}


def _ship(stages: Sequence[Stage | Artefact], results: Results, run: RunFolder) -> None:
    """Copy the last model to `weights/last.safetensors`."""
    models = [result for result in results.values() if result.path.parent == run.weights]
    last = run.weights / "last.safetensors"
    if models and not (last.is_file() and file_sha256(last) == models[-1].sha256):
        content = models[-1].path.read_bytes()
        write_atomically(last, lambda stream: stream.write(content))
