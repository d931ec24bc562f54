"""Optimiser and learning-rate schedule, which are torch's own, and a moving average that can leave out a step."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from fgvc_ext.training.config import OptimConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """The optimiser over parameter groups, each of which may set its own lr.

    It is the fused one: its step can be left out by a flag on the device, `optimizer.found_inf`.
    """
    if config.nesterov and not config.momentum:
        raise ValueError("optim.nesterov: expected a momentum above 0, got momentum 0")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"optim.betas: expected two numbers from 0 to below 1, got {config.betas}")
    if config.clip_grad_norm == 0:
        raise ValueError("optim.clip_grad_norm: expected more than 0, or None for no limit, got 0")
    if config.label_smoothing >= 1:
        raise ValueError(f"optim.label_smoothing: expected less than 1, got {config.label_smoothing}")
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    optimizer = SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:  # else the first step makes it, and were that one left out, it would hold anything
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_scheduler(optimizer: Optimizer, config: OptimConfig, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
    """The schedule, advanced after every step. Cosine ends at zero after the last epoch; warm-up comes before.

    Parameter groups with an entry "constant" that is true keep their rate.
    """
    schedule = _schedule(optimizer, config, steps_per_epoch)
    is_mixed = any(group.get("constant") for group in optimizer.param_groups)
    return _ButForConstantGroups(optimizer, schedule) if is_mixed else schedule


def last_factor(config: OptimConfig) -> float:
    """What is left of the learning rate when the last epoch begins; warm-up is not looked at."""
    if config.schedule == "step":
        reductions = (config.epochs - 1) // config.step_epochs
        return config.step_factor ** (reductions if config.step_times is None else min(reductions, config.step_times))
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (config.epochs - 1) / config.epochs)) / 2
    return 1.0


class _ButForConstantGroups(lr_scheduler.LRScheduler):
    """A schedule, and groups that it does not reach."""

    def __init__(
        self, optimizer: Optimizer, schedule: lr_scheduler.LRScheduler
    ) -> None:  # its steps are the schedule's
        self.optimizer, self.schedule = optimizer, schedule
        self._put_back()

    def step(self, epoch: int | None = None) -> None:
        self.schedule.step()
        self._put_back()

    def _put_back(self) -> None:
        for group in self.optimizer.param_groups:
            if group.get("constant"):
                group["lr"] = group["initial_lr"]

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)


def _schedule(optimizer: Optimizer, config: OptimConfig, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
    warmup = round(config.warmup_epochs * steps_per_epoch)
    steps = config.epochs * steps_per_epoch
    if warmup >= max(1, steps):
        raise ValueError(f"optim.warmup_epochs: expected less than {config.epochs}, got {config.warmup_epochs}")
    main: lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
    elif config.schedule == "step":
        every = config.step_epochs * steps_per_epoch
        if config.step_times is None:
            main = lr_scheduler.StepLR(optimizer, every, config.step_factor)
        else:  # whatever the number of epochs: a run that goes on beyond its end takes these from its checkpoint
            milestones = [every * number for number in range(1, config.step_times + 1)]
            main = lr_scheduler.MultiStepLR(optimizer, milestones, config.step_factor)
    else:
        main = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if warmup == 0:
        return main
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, main], milestones=[warmup])


class MovingAverage(nn.Module):
    """Exponential moving average of a task's parameters; buffers are copied, never averaged.

    Args:
        decay: weight of the average so far, between 0 and 1. The first update takes the parameters as they are.
    """

    updates: Tensor

    def __init__(self, task: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise ValueError(f"optim.ema_decay: expected 0 < decay < 1, got {decay}")
        self.module, self.decay = copy.deepcopy(task), decay
        first = next(task.parameters())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=first.device))

    @torch.no_grad()
    def update(self, task: nn.Module, usable: Tensor) -> None:
        """One step of the average; none where `usable`, bool [] on the device, is False."""
        weight = torch.where(self.updates == 0, 1.0, 1.0 - self.decay) * usable
        for mean, current in zip(self.module.parameters(), task.parameters(), strict=True):
            mean.lerp_(current, weight.to(mean.dtype))
        for copied, buffer in zip(self.module.buffers(), task.buffers(), strict=True):
            copied.copy_(buffer)
        self.updates += usable
