"""Optimiser, learning-rate schedule, precision and moving average, all of them torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fgvc_ext.training.config import OptimConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> SGD:
    """SGD over parameter groups, each of which may set its own lr."""
    return SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def build_scheduler(optimizer: SGD, config: OptimConfig, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
    """The schedule, advanced after every step. Cosine ends at zero after the last epoch; warm-up comes before."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    steps = config.epochs * steps_per_epoch
    if warmup >= max(1, steps):
        raise ValueError(f"optim.warmup_epochs: expected less than {config.epochs}, got {config.warmup_epochs}")
    main: lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
    elif config.schedule == "step":
        main = lr_scheduler.StepLR(optimizer, config.step_epochs * steps_per_epoch, config.step_factor)
    else:
        main = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if warmup == 0:
        return main
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, main], milestones=[warmup])


def build_average(task: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the parameters; buffers are copied by `update_average`, never averaged."""
    if decay is None:
        return None
    if not 0.0 < decay < 1.0:
        raise ValueError(f"optim.ema_decay: expected 0 < decay < 1, got {decay}")
    return AveragedModel(task, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)


def update_average(average: AveragedModel | None, task: nn.Module) -> None:
    """One step of the moving average."""
    if average is not None:
        average.update_parameters(task)
        for mean, current in zip(average.module.buffers(), task.buffers(), strict=True):
            mean.copy_(current)
