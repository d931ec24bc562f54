"""The stage that most drivers are made of: a classifier's training, which starts from weights."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fgvc_ext.data.pipeline import Datasets, evaluation_samples, training_samples
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.training.config import RunConfig
from fgvc_ext.training.stages import Results, Stage
from fgvc_ext.training.task import Task


def classifier_stage(
    name: str,
    config: RunConfig,
    datasets: Datasets,
    build: Callable[[Results], Task],
    method: Any,
    *,
    prepare: Preprocessing | None = None,
    new_layers: Sequence[str] = (),
    from_weights: bool = True,
    depends: Mapping[str, Any] = types.MappingProxyType({}),
    **changes: Any,
) -> Stage:
    """A stage that trains on a run's images, from the weights that `config.model` names.

    Args:
        build: results → task. Its `model` is then given what its weights file says: the classes, and `prepare`.
        method: settings of the method on which the result depends, beside those of data and model.
        prepare: what an image goes through; None: as `config.data` says.
        new_layers: groups of layers that those weights may lack, beside `config.optim.new_layers`.
        from_weights: False for a stage that goes on from a result that it needs.
        depends: further groups of settings on which the result depends.
        changes: of `Stage`, in place of what is usual here.
    """
    seen = config.model.preprocessing(config.data) if prepare is None else prepare

    def built(earlier: Results) -> Task:
        task = build(earlier)
        model: Any = task.model
        model.classes, model.preprocessing = datasets.train.classes, seen
        return task

    def start(task: Any) -> str:
        return config.model.start(task.model, config.out, (*config.optim.new_layers, *new_layers))

    usual: dict[str, Any] = {
        "optim": config.optim,
        "train": lambda earlier: training_samples(datasets, config.data, seen, config.engine.broken_images),
        "evaluations": lambda earlier: evaluation_samples(datasets, seen),
        "seed": config.seed,
    }
    if from_weights:
        usual |= {"start": start, "inputs": config.model.inputs(config.out)}
    groups = {"data": config.data, "model": config.model, "method": method, **depends}
    return Stage(name=name, build=built, config=groups, **{**usual, **changes})
