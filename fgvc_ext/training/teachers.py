"""Networks that a training uses and does not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Frozen:
    """A module that gives numbers to a training and takes none: no gradient, always in evaluation mode.

    It is no module, so a task that keeps it as an attribute (alone, or in a list, tuple or dictionary) does not
    register it: its weights are in no optimiser, checkpoint, moving average or gradient exchange, and `train()` does
    not reach it. The engine moves it to the task's device and memory layout; what it computes in a step, it computes
    in the step's precision.

    >>> task.teachers = [Frozen(models.load(path)) for path, _ in earlier.values()]
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False).eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # no_grad and not inference_mode, whose tensors could not be saved for the student's backward pass
        with torch.no_grad():
            return self.module.eval()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Methods and parts of the module, such as `features`, under the same conditions."""
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        value = getattr(self.module.eval(), name)
        if isinstance(value, nn.Module):
            return Frozen(value)
        return torch.no_grad()(value) if callable(value) else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self  # a moving average of the task needs no second copy of what never changes

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format) -> Frozen:
        """Move the module; its parameters keep their dtype, autocast rules as in the task itself."""
        self.module.to(device).to(memory_format=memory_format)
        return self


def frozen_in(task: nn.Module) -> Iterator[Frozen]:
    """Everything frozen that a task or one of its modules keeps."""
    for module in task.modules():
        for value in vars(module).values():
            yield from _frozen(value)


def _frozen(value: Any) -> Iterator[Frozen]:
    if isinstance(value, Frozen):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _frozen(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _frozen(item)
