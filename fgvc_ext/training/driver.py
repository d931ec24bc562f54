"""From a command line to an exit code: what all drivers share.

A driver is a `Driver`: a configuration with presets, and its stages as a function of configuration and data. `main`
reads the command line, finds the run's folder, trains, writes the report, and turns what went wrong into one line.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import tyro

from fgvc_ext.data.loading import make_loader, to_device
from fgvc_ext.data.pipeline import Datasets, load_datasets
from fgvc_ext.explain.view import ModelView, view_of
from fgvc_ext.models import Model, load
from fgvc_ext.training import distributed
from fgvc_ext.training.config import RunConfig, check_limits, digest, load_config
from fgvc_ext.training.device import choose_device
from fgvc_ext.training.messages import (
    OutOfMemory,
    ReportFailed,
    is_out_of_memory,
    is_told_in_one_line,
    warnings_in_one_line,
)
from fgvc_ext.training.run_folder import RunFolder, read_run
from fgvc_ext.training.stages import Artefact, Result, Results, Stage, check_names, run_stages
from fgvc_ext.training.stop_request import EXIT_PREEMPTED, Preempted, StopRequest

if TYPE_CHECKING:  # it needs matplotlib, and only a report does
    from fgvc_ext.explain.document import Section

Config = TypeVar("Config", bound=RunConfig)
EXIT_INTERRUPTED = 130
"""Exit code of a run that a second Ctrl-C has ended at once: what a shell reports of SIGINT."""


@dataclass(frozen=True)
class Driver(Generic[Config]):
    """One paper's pipeline.

    Attributes:
        title: heading of report and help.
        presets: name → (one line for the help, configuration); all of one class derived from `RunConfig`.
        stages: configuration and data → stages and artefacts in their order.
        view: a trained model → what the report shows of it: a model for which it returns None is not shown. By default
            what the model itself explains; None: no pictures of models.
        figures: draws a paper's own figures into the run folder (`explain.document.save_figure`), before the report,
            and returns sections of its own for it.
    """

    title: str
    presets: Mapping[str, tuple[str, Config]]
    stages: Callable[[Config, Datasets], Sequence[Stage | Artefact]]
    view: Callable[[Any], ModelView | None] | None = view_of
    figures: Callable[[Config, Datasets, Results], Sequence[Section] | None] | None = None

    def main(self, arguments: Sequence[str] | None = None, program: Sequence[str] | None = None) -> int:
        """Read the configuration, train, report; returns the exit code: 0 done, 75 preempted, 130 a second Ctrl-C, 1 an
        error that is told in one line. A bug is raised, and with --debug every error.

        Args:
            arguments: of the command line; None: this process' own.
            program: the words before them in a command that starts this driver again.
        """
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        program = [sys.executable, sys.argv[0]] if program is None else list(program)
        debug = False
        try:
            config = self.read_arguments(arguments)
            debug = config.debug
            with warnings_in_one_line(), distributed.joined(), distributed.one_voice():
                return self._run(config, arguments)
        except Preempted as stop:
            if distributed.is_main():
                print(f"{stop}. To go on: {command_to_go_on(program, arguments)}")
            return 0 if distributed.current_process().launched else EXIT_PREEMPTED
        except KeyboardInterrupt:
            print(f"interrupted; what is saved stays. To go on: {command_to_go_on(program, arguments)}")
            return EXIT_INTERRUPTED
        except distributed.OtherProcessFailed as error:  # that one says it; the main one sums up
            if distributed.is_main():
                print(f"error: {error}", file=sys.stderr)
            return 1
        except Exception as error:
            if debug or not is_told_in_one_line(error, self._file()):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1

    def _kind(self) -> type[Config]:
        return type(next(iter(self.presets.values()))[1])

    def _file(self) -> str | None:
        return getattr(sys.modules.get(self._kind().__module__), "__file__", None)

    def read_arguments(self, arguments: Sequence[str]) -> Config:
        """A preset and changes to it, or --config FILE and changes to that."""
        markers = (tyro.conf.FlagConversionOff,)
        if list(arguments[:1]) == ["--config"]:
            if len(arguments) < 2:
                raise ValueError("--config: expected the config.json of a run")
            kind = self._kind()
            base = load_config(kind, arguments[1])
            config = tyro.cli(kind, default=base, args=arguments[2:], config=markers)
        else:
            ways = "Give a preset and changes to it, or repeat a run: --config RUN/config.json [changes]."
            config = tyro.extras.overridable_config_cli(
                dict(self.presets), args=list(arguments), config=markers, description=f"{self.title}.\n\n{ways}"
            )
        check_limits(config)
        if distributed.current_process().restarts:  # the attempt before has done what was forced, and begun the run
            config = dataclasses.replace(config, resume="auto", force_stage=())
        return config

    def _run(self, config: Config, arguments: Sequence[str]) -> int:
        limits, broken_images = (config.limit_train, config.limit_test), config.engine.broken_images
        datasets = load_datasets(config.data, config.seed, *limits, broken_images=broken_images)
        _check_same(datasets.facts())
        facts = {"title": self.title, "data": datasets.facts(), "seed": config.seed}

        def wanted(folder: Path) -> RunFolder:
            weights = config.model.facts(folder, download=False)
            return RunFolder(folder, config, facts={**facts, "weights": weights})

        if not any(word.partition("=")[0] == "--out" for word in arguments):
            config = dataclasses.replace(config, out=distributed.on_main(choose_folder, config, wanted))
        if config.dry_run:
            show_plan(config, self.stages(config, datasets))
            return 0
        facts["weights"] = distributed.on_main(config.model.facts, config.out)
        distributed.on_each(config.model.facts, config.out)  # another machine may have to download them for itself
        stages = self.stages(config, datasets)
        with RunFolder(config.out, config, resume=config.resume, facts=facts) as run, StopRequest() as stop:
            try:
                results = run_stages(stages, run, config.engine, force=config.force_stage, stop=stop)
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfMemory(_at_work(run), config) from error
                raise
            if distributed.is_main():
                for name in results:  # a folder may hold stages that this run no longer has
                    print(_summary(name, run.entry(name) or {}))
                if config.report:
                    with stop.at_once("the report"):
                        print(f"report: {self._written_report(config, datasets, results)}")
        return 0

    def _written_report(self, config: Config, datasets: Datasets, results: Mapping[str, Result]) -> Path:
        try:
            return self._report(config, datasets, results)
        except Preempted:
            raise
        except Exception as error:
            raise ReportFailed(
                f"the training is done, but not its report: {str(error) or type(error).__name__}. "
                "The same command writes it, without training"
            ) from error

    def _report(self, config: Config, datasets: Datasets, results: Mapping[str, Result]) -> Path:
        """Figures of the test images, seen by every trained model, and report.html; returns its path."""
        from fgvc_ext.explain.comparison import explain_models
        from fgvc_ext.explain.crop import CentreCrop
        from fgvc_ext.explain.report import write_run_report

        models = _models(results, choose_device(config.engine.device)) if self.view is not None else {}
        found = {name: self.view(model) for name, model in models.items()} if self.view is not None else {}
        views = {name: view for name, view in found.items() if view is not None}
        if views:
            prepare = models[next(reversed(views))].preprocessing
            explain_models(
                config.out,
                datasets.test,
                views,
                prepare=prepare.transform(),
                frame=CentreCrop(prepare.resize, prepare.crop, prepare.keep_ratio),
                seed=config.seed,
            )
        sections = self.figures(config, datasets, results) if self.figures is not None else None
        return write_run_report(config.out, sections or ())


def _check_same(data: Mapping[str, Any]) -> None:
    """ValueError where processes do not see the same images: their epochs would differ in length."""
    seen = distributed.gather_objects(digest(data))
    if others := [rank for rank, found in enumerate(seen) if found != seen[0]]:
        raise ValueError(f"data: processes {others} see other images than process 0: each needs the same data set")


def _models(results: Mapping[str, Result], device: torch.device) -> dict[str, Model]:
    files = {name: path for name, (path, _) in results.items() if path.parent.name == "weights"}
    return {name: load(path, device) for name, path in files.items()}


def _at_work(run: RunFolder) -> str:
    return next((entry["name"] for entry in run.data["stages"] if entry.get("status") == "running"), "?")


def _summary(name: str, entry: Mapping[str, Any]) -> str:
    """ "ours: last 71.2 %, best_test 72.0 %" """
    headline = entry.get("headline")
    if headline is None:
        return f"{name}: {entry.get('status')}"
    values = entry[headline].items()
    if headline == "accuracy":
        return f"{name}: " + ", ".join(f"{kind} {100 * value:.1f} %" for kind, value in values)
    return f"{name}: " + ", ".join(f"{kind} {headline} {value:.4g}" for kind, value in values)


def choose_folder(config: RunConfig, wanted: Callable[[Path], RunFolder]) -> Path:
    """The folder of a run whose --out is a default: the one to go on with, or the next number that is free.

    A run that is unfinished and has this configuration goes on. Others are left alone, unless the command asks for a
    run that is there (--resume must, --force-stage): then it is the one with the highest number.

    Args:
        wanted: a folder → the run that this command would be there: a run knows the weights that it began with.
    """
    if config.resume not in ("auto", "must", "never"):
        return Path(config.resume).parent.parent
    folder, newest, number = config.out, config.out, 1
    while (folder / "run.json").exists():
        newest = folder
        try:
            found = read_run(folder / "run.json")
        except ValueError:  # damaged: none to go on with
            found = {}
        mine = found.get("status") != "finished" and wanted(folder).is_of(found)
        if mine and config.resume != "never":
            return folder
        number += 1
        folder = config.out.with_name(f"{config.out.name}-{number}")
    return newest if config.resume == "must" or config.force_stage else folder


def command_to_go_on(program: Sequence[str], arguments: Sequence[str]) -> str:
    """The command that continues a run from its newest checkpoint, ready for a shell."""
    kept, skip = [], False
    for argument in arguments:
        if argument.startswith("--"):  # with its values it is left out: what was forced has begun
            skip = argument.partition("=")[0] in ("--resume", "--force-stage")
        if not skip:
            kept.append(argument)
    return shlex.join([*program, *kept, "--resume", "auto"])


def show_plan(config: RunConfig, stages: Sequence[Stage | Artefact]) -> None:
    """--dry-run: the resolved configuration, the stages, and one image through those that need no other."""
    check_names(stages)
    for name, value in dataclasses.asdict(config).items():
        print(f"{name}: {value}")
    for stage in stages:
        if stage.needs or isinstance(stage, Artefact):
            print(f"{stage.name}: {type(stage).__name__.lower()}, needs {', '.join(stage.needs) or 'nothing'}")
            continue
        train, task = stage.train({}), stage.build({})
        shapes = f"{stage.name}: {len(train)} images"
        samples, model = next(iter(stage.evaluations({}).values()), None), getattr(task, "model", None)
        if samples is not None and isinstance(model, Model):
            (batch,) = make_loader(samples, [[(0, 0)]], workers=0)
            image = to_device(batch, torch.device("cpu"), normalise=samples.normalise)["image"][0]
            with torch.no_grad():
                maps = model.eval().explain(image[None]).maps
            shapes += f" {list(image.shape)} -> " + ", ".join(
                f"maps {list(value.shape)} ({name})" for name, value in maps.items()
            )
        print(shapes)
