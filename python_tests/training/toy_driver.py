"""A driver as small as can be, and a process that runs its command line: two toy stages, an artefact, a report.

`run([…])` is what a child process runs. It dies at a named point where one is given: nothing in the package helps it.
"""

from __future__ import annotations

import itertools
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from toy_models import ToyClassifier
from toy_training import ToyImages, centre, jitter

from fgvc_ext.data.loading import Batch, Samples
from fgvc_ext.data.pipeline import DataConfig, Datasets
from fgvc_ext.explain.document import save_figure
from fgvc_ext.explain.figures import curves_figure
from fgvc_ext.explain.report import write_run_report  # noqa: F401 (imported before a child is forked)
from fgvc_ext.training import (
    Artefact,
    Classification,
    EngineConfig,
    OptimConfig,
    Results,
    RunConfig,
    Stage,
    metrics,
)
from fgvc_ext.training.driver import Driver


@dataclass
class Config(RunConfig):
    """Two stages and an artefact between them."""

    second_lr: float = 0.05


CONFIG = Config(
    data=DataConfig(classes=2, train_per_class=1, test_per_class=1, image_size=32),
    optim=OptimConfig(epochs=2, batch_size=8, lr=0.05, schedule="constant"),
    engine=EngineConfig(device="cpu", checkpoint_every=2),
    out=Path("runs/toy"),
)


class ToyTask(Classification):
    def eval_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        return super().eval_step(batch)  # a place to die at

    def step(self, batch: Batch) -> dict[str, Any]:
        return super().step(batch)


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    train, test = ToyImages(33), ToyImages(21, "test")

    def stage(name: str, optim: OptimConfig, needs: Sequence[str] = ()) -> Stage:
        return Stage(
            name=name,
            needs=needs,
            build=lambda earlier: ToyTask(ToyClassifier(), torch.nn.CrossEntropyLoss()),
            optim=optim,
            train=lambda earlier: Samples(train, jitter),
            evaluations=lambda earlier: {"test": Samples(test, centre)},
            seed=config.seed,
            config={"data": config.data},
        )

    return [
        stage("first", config.optim),
        Artefact(name="table", needs=["first"], make=lambda earlier: {"rows": torch.rand(3)}, config={}),
        stage("second", replace(config.optim, lr=config.second_lr), ["table"]),
    ]


def figures(config: Config, datasets: Datasets, results: Results) -> None:
    save_figure(config.out, "toy", curves_figure([]), title="A toy", caption="Nothing.")


DRIVER = Driver("Toy", {"toy": ("A toy.", CONFIG)}, stages, view=None, figures=figures)


# ------------------------------------------------------------------ dying at a named point


def die(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap_call(number: int, function: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace the call of this number of a function, given as "module.function" or "module.Class.function"."""
    owner, _, name = function.rpartition(".")
    usual, calls = pkgutil.resolve_name(function), itertools.count(1)

    def counted(*arguments: Any, **options: Any) -> Any:
        return (wrap(usual) if next(calls) == number else usual)(*arguments, **options)

    setattr(pkgutil.resolve_name(owner), name, counted)


def die_in_call(number: int, function: str) -> None:
    """When the function is called for the time of this number."""
    _wrap_call(number, function, lambda usual: die)


def sleep_in_call(number: int, function: str, marker: Path) -> None:
    """For a minute, when the function is called for the time of this number; `marker` appears then."""

    def slowly(usual: Callable) -> Callable:
        marker.touch()
        time.sleep(60)
        return usual

    _wrap_call(number, function, slowly)


def fail_in_call(number: int, function: str, error: Exception) -> None:
    """With this error, when the function is called for the time of this number."""

    def fail(usual: Callable) -> Callable:
        raise error

    _wrap_call(number, function, fail)


def die_at_file(when: str, pattern: str, number: int = 1) -> None:
    """ "before" or "after" the file of this number whose name matches gets its name, or with "half" of it written."""
    rename, calls = os.replace, itertools.count(1)

    def rename_or_die(source: Path, target: Path) -> None:
        it_is = fnmatch(Path(target).name, pattern) and next(calls) == number
        if it_is and when == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        if it_is and when != "after":
            die()
        rename(source, target)
        if it_is:
            die()

    os.replace = rename_or_die


def die_in_a_line(file: str, number: int) -> None:
    """With half of the line of this number appended to the file."""
    usual, calls = metrics._append, itertools.count(1)

    def append(path: Path, text: str) -> None:
        it_is = path.name == file and next(calls) == number
        usual(path, text[: len(text) // 2] if it_is else text)
        if it_is:
            die()

    metrics._append = append


def run(arguments: Sequence[str], arm: Callable[..., None] | None = None, *point: Any) -> int:
    """The command line `toy ARGUMENTS` in this process; `arm(*point)`, if given, decides where it dies."""
    torch.set_num_threads(1)
    if arm is not None:
        arm(*point)
    return DRIVER.main(["toy", *arguments], ["toy-driver"])
