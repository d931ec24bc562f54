"""One training step: forward, backward, update, moving average, and what a step that is not finite leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fgvc_ext.data.loading import Batch
from fgvc_ext.training import distributed
from fgvc_ext.training.config import EngineConfig, OptimConfig
from fgvc_ext.training.evaluation import add_sums
from fgvc_ext.training.optimisation import PRECISIONS, build_average, build_optimizer, build_scheduler, update_average
from fgvc_ext.training.sampling import parts
from fgvc_ext.training.task import Task


@dataclass
class StepResult:
    """What a step gave: the loss, the sums over its samples, and why nothing was learnt from it (None: it was)."""

    loss: float
    sums: dict[str, Tensor] = field(default_factory=dict)
    problem: str | None = None


class TrainingStep:
    """A task with its optimiser, schedule, scaler and moving average: `step(batch)` learns from a batch.

    Raises:
        ValueError: a parameter that requires a gradient is in no group of `task.param_groups`.
    """

    def __init__(
        self, task: Task, optim: OptimConfig, engine: EngineConfig, device: torch.device, steps_per_epoch: int
    ) -> None:
        self.task, self.optim, self.engine, self.device = task, optim, engine, device
        self.forward = torch.compile(task) if engine.compile else task
        self.optimizer = build_optimizer(task.param_groups(optim), optim)
        self._check_optimizer()
        self.scheduler = build_scheduler(self.optimizer, optim, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=engine.precision == "fp16")
        self.average = build_average(task, optim.ema_decay)
        self._first = True

    @property
    def evaluated(self) -> Task:
        """The task that is evaluated and saved: the moving average where there is one."""
        return self.average.module if self.average is not None else self.task  # type: ignore[return-value]

    @property
    def rate(self) -> float:
        """The highest learning rate of the parameter groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def __call__(self, batch: Batch) -> StepResult:
        """Forward, backward and one optimiser step."""
        n = len(batch["label"])
        buffers = [b.clone() for b in self.task.buffers()] if self.engine.max_skipped_steps else []
        self.optimizer.zero_grad(set_to_none=True)
        result = StepResult(0.0, {"n": torch.tensor(n)})
        for part in parts(batch, self.optim.accumulate):
            with torch.autocast(
                self.device.type, PRECISIONS[self.engine.precision], enabled=self.engine.precision != "fp32"
            ):
                answer = self.forward(part)
            share = answer["loss"] * (answer["n"] / n)
            value = share.item()  # waits for the device: nothing non-finite may reach the weights
            result.loss += value
            if distributed.any_process(not math.isfinite(value)):
                return self._undone(result, f"the loss is {result.loss}", buffers)
            self.scaler.scale(share).backward()
            add_sums(result.sums, answer["logs"])
        if distributed.any_process(not self._gradients_are_usable()):
            return self._undone(result, "a gradient is not finite", buffers)
        self._update()
        add_sums(result.sums, {"loss": torch.tensor(result.loss * n, dtype=torch.float64)})
        return result

    def _gradients_are_usable(self) -> bool:
        """Clip where asked for; False for a non-finite norm. With fp16 the scaler looks for itself."""
        if self._first:
            self._check_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler.unscale_(self.optimizer)
        limit = self.optim.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        return self.scaler.is_enabled() or bool(norm.isfinite())

    def _update(self) -> None:
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # with fp16 a smaller scale means that the step was left out
            self.scheduler.step()
            update_average(self.average, self.task)

    def _undone(self, result: StepResult, problem: str, buffers: list[Tensor]) -> StepResult:
        """The step is left out, as if its batch had not been there."""
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.task.buffers(), buffers, strict=False):
            buffer.copy_(before)
        return StepResult(result.loss, problem=problem)

    # ---------------------------------------------------------------- checks

    def _check_optimizer(self) -> None:
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if left := [n for n, p in self.task.named_parameters() if p.requires_grad and id(p) not in known]:
            raise ValueError(
                f"{type(self.task).__name__}.param_groups leaves out {', '.join(left)}: these would never be trained"
            )

    def _check_gradients(self) -> None:
        self._first = False
        if unused := [name for name, p in self.task.named_parameters() if p.requires_grad and p.grad is None]:
            raise RuntimeError(f"the loss does not depend on {', '.join(unused)}: freeze or use these parameters")

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the generators of random numbers."""
        return {
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._first = False
