"""Evaluation by sums: every image exactly once, whatever the batch size and the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fgvc_ext.data.loading import Batch, Samples, to_device
from fgvc_ext.training import distributed
from fgvc_ext.training.config import EngineConfig
from fgvc_ext.training.device import choose_device, worker_count
from fgvc_ext.training.sampling import evaluation_loader
from fgvc_ext.training.task import Task, means


def add_sums(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """total += part; integers in int64, the rest in float64, so that the order of batches does not matter in print."""
    for name, value in part.items():
        wide = value.detach().to(torch.float64 if value.is_floating_point() else torch.int64)
        total[name] = total[name] + wide if name in total else wide


def evaluate(
    task: Task,
    batches: Iterable[Batch],
    to_device: Callable[[Batch], Batch],
    on_batch: Callable[[int], Any] | None = None,
) -> dict[str, Tensor]:
    """Sums of `task.eval_step` over all batches of all processes, on the CPU. The task's mode is put back afterwards.

    Args:
        batches: those of this process' own samples.
        on_batch: called after each batch with its number of images.
    """
    sums: dict[str, Tensor] = {}
    training = task.training
    task.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                add_sums(sums, task.eval_step(to_device(batch)))
                if on_batch is not None:
                    on_batch(len(batch["label"]))
    finally:
        task.train(training)
    return distributed.reduce_sums(sums)


class _Watched(Mapping[str, Tensor]):
    """A mapping that remembers which of its entries were looked at."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self.sums, self.seen = sums, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        value = self.sums[name]
        self.seen.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.sums

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def measured(task: Task, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The task's measures of these sums, and the mean over the samples of every sum that it did not look at."""
    watched = _Watched(sums)
    found = dict(task.measures(watched))
    rest = {name: value for name, value in means(sums).items() if name not in watched.seen and name not in found}
    return {**found, **rest}


def reported(last: Mapping[str, Mapping[str, float]], between: Collection[str]) -> dict[str, Any]:
    """What run.json says of the last evaluations: the headline's value in each, and all measures.

    Args:
        last: evaluation → measures, the first of which is the headline.
        between: the evaluations that earlier epochs had too; the others are of the end alone, such as five crops.
    """
    headline = next((next(iter(values)) for values in last.values() if values), None)
    if headline is None:
        return {}
    values = {name: measures[headline] for name, measures in last.items() if headline in measures}
    main = "test" if "test" in values else next(iter(values))
    found = {"last": values.pop(main)} | {f"last_{n}" if n in between else n: value for n, value in values.items()}
    return {"headline": headline, headline: found, "measures": last}


def evaluate_samples(task: Task, samples: Samples, engine: EngineConfig) -> dict[str, float]:
    """The task's measures over all samples, each evaluated once by one of the processes: an evaluation without a
    training, as of an `Artefact`. The task is moved to the engine's device, and stays there."""
    device, layout = choose_device(engine.device), engine.channels_last
    task.to(device).to(memory_format=torch.channels_last if layout else torch.preserve_format)
    batch_size, workers = max(1, engine.eval_batch_size // samples.crops), worker_count(engine)
    loader = evaluation_loader(samples, distributed.own_rows(len(samples)), batch_size, workers=workers)
    move = partial(to_device, device=device, normalise=samples.normalise, channels_last=layout)
    try:
        return measured(task, evaluate(task, loader, move))
    finally:
        loader.close()


def map_samples(
    function: Callable[[Tensor], Tensor], samples: Samples, engine: EngineConfig, *, batch_size: int | None = None
) -> Tensor:
    """`function(images [n,…]) -> rows [n,…]` of all samples, in the order of the data set: [len(samples),…] on the CPU.

    Each process computes its own rows and all get the whole, without gradients: what an `Artefact` such as the boxes of
    all images is made with. The function must be ready for images on the engine's device (`choose_device`).
    """
    device, rows = choose_device(engine.device), list[Tensor]()
    loader = evaluation_loader(
        samples,
        distributed.own_rows(len(samples)),
        batch_size or engine.eval_batch_size,
        workers=worker_count(engine),
    )
    try:
        with torch.no_grad():  # and not inference_mode: a training may use the rows
            for batch in loader:
                rows.append(function(to_device(batch, device, normalise=samples.normalise)["image"]).cpu())
    finally:
        loader.close()
    return distributed.gather_rows(torch.cat(rows) if rows else None, len(samples))
