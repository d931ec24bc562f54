"""Evaluation by sums: every image exactly once, whatever the batch size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fgvc_ext.training.loop import Task
    from fgvc_ext.training.sampling import Batch


def add_sums(total: dict[str, torch.Tensor], part: dict[str, torch.Tensor]) -> None:
    """total += part; integers in int64, the rest in float64, so that the order of batches does not matter in print."""
    for name, value in part.items():
        wide = value.detach().to(torch.float64 if value.is_floating_point() else torch.int64)
        total[name] = total[name] + wide if name in total else wide


def evaluate(
    task: Task,
    batches: Iterable[Batch],
    to_device: Callable[[Batch], Batch],
    on_batch: Callable[[int], Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Sums of `task.eval_step` over all batches, on the CPU. The task's mode is put back afterwards.

    Args:
        on_batch: called after each batch with its number of images.
    """
    sums: dict[str, torch.Tensor] = {}
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
    return {name: value.cpu() for name, value in sums.items()}
