"""One training step: forward, backward, update, moving average. It waits for nothing.

Whether a step is finite is decided on the device, in all processes alike. One that is not leaves parameters, optimiser
state, buffers (running means, class means) and moving average as they were; the schedule moves on. The host hears of
it when it looks (`look`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.training import distributed
from fgvc_ext.training.config import EngineConfig, OptimConfig
from fgvc_ext.training.device import choose_precision
from fgvc_ext.training.evaluation import add_sums
from fgvc_ext.training.health import Findings, Health
from fgvc_ext.training.optimisation import PRECISIONS, MovingAverage, build_optimizer, build_scheduler
from fgvc_ext.training.sampling import parts
from fgvc_ext.training.task import Task


class TrainingStep:
    """A task with its optimiser, schedule, scaler and moving average: `step(batch)` learns from a batch.

    Raises:
        ValueError: a parameter that requires a gradient is in no group of `task.param_groups`, a loss that is
            defined on a whole batch is to be accumulated, or a process would have too few images for a BatchNorm1d.
    """

    def __init__(
        self, task: Task, optim: OptimConfig, engine: EngineConfig, device: torch.device, steps_per_epoch: int
    ) -> None:
        self.task, self.optim, self.engine, self.device = task, optim, engine, device
        self.precision = choose_precision(engine, device)
        self._check_accumulation()
        self._check_shares()
        if engine.compile:
            torch._dynamo.reset()  # its limit of compilations is that of a function, which other stages have used
        self.parallel = distributed.data_parallel(task)
        self.forward = torch.compile(self.parallel) if engine.compile else self.parallel
        self.optimizer = build_optimizer(task.param_groups(optim), optim)
        self.check_optimizer()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scheduler = build_scheduler(self.optimizer, optim, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.average = MovingAverage(task, optim.ema_decay) if optim.ema_decay is not None else None
        self.health = Health(device, engine.max_skipped_steps)
        self._first = True

    @property
    def evaluated(self) -> Task:
        """The task that is evaluated and saved: the moving average where there is one."""
        return self.average.module if self.average is not None else self.task  # type: ignore[return-value]

    @property
    def rate(self) -> float:
        """The highest learning rate of the parameter groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def look(self) -> Findings:
        """Wait for the device and read what it has found: steps left out, and whether the training must stop."""
        return self.health.look()

    def leave_out(self) -> None:
        """A step of which nothing can be learnt: only the schedule moves on."""
        with warnings.catch_warnings():  # torch warns where no step of the optimiser came before
            warnings.simplefilter("ignore")
            self.scheduler.step()

    def __call__(self, batch: Batch, number: int, sizes: Sequence[int]) -> dict[str, Tensor]:
        """Forward, backward and one optimiser step.

        Args:
            batch: this process' share of the global batch, on the device.
            number: of the step, under which `look` names it.
            sizes: how many samples each process has.

        Returns:
            Sums over this process' samples, on the device; all zero where the step was left out.
        """
        buffers = self._buffers()
        before = [buffer.clone() for buffer in buffers]
        self.optimizer.zero_grad(set_to_none=True)
        self.task.batch_sizes = tuple(sizes)
        sums, loss = self._accumulate(batch, sizes)
        loss_is_finite = distributed.all_true(loss.isfinite())
        usable = self.health.note(number, loss, loss_is_finite, self._gradients_are_finite(), self._scale())
        self._update(usable)
        self._restore_buffers(buffers, before, usable)
        distributed.share_buffers(self.task)
        if self.average is not None:
            self.average.update(self.task, usable)
        return {name: torch.where(usable, value, torch.zeros_like(value)) for name, value in sums.items()}

    def _accumulate(self, batch: Batch, sizes: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward of the batch's parts; returns their sums, and the mean loss of this process' samples.

        The parts' gradients are exchanged once, with the last. DDP takes the mean over processes: of losses that are
        means over the own n of N samples, weighted by processes · n / N, it is the loss of the global batch, and so it
        is of losses that every process computes of the global batch.
        """
        own, total = len(batch["label"]), sum(sizes)
        sums: dict[str, Tensor] = {}
        pieces = parts(batch, self.optim.accumulate)
        for piece in pieces:
            last = piece is pieces[-1]
            with distributed.exchanging(self.parallel, last):
                with self._autocast():
                    answer = self.forward(piece)
                n, loss = answer["n"], answer["loss"]
                if n == 0:  # the mean of nothing is NaN
                    loss = loss.nan_to_num()
                self.scaler.scale(loss * (len(sizes) * n / total)).backward()
            logs = {**answer["logs"], "loss": loss.detach().double() * n, "n": torch.full((), n, device=loss.device)}
            add_sums(sums, logs)
        return sums, sums["loss"] / max(1, own)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def _gradients_are_finite(self) -> Tensor:
        """bool [] on the device. Clips where asked for; the gradients' common scale is taken out before."""
        if self._first:
            self._check_gradients()
        self.scaler.unscale_(self.optimizer)
        if self.optim.clip_grad_norm is not None:
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip_grad_norm).isfinite()
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).isfinite()

    def _scale(self) -> Tensor | None:
        return self.scaler._scale if self.scaler.is_enabled() else None  # get_scale() would wait for the device

    def _update(self, usable: Tensor) -> None:
        # What GradScaler.step does with fused optimisers, with a flag that also knows of the loss.
        self.optimizer.found_inf = (~usable).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        self.scheduler.step()

    def _buffers(self) -> list[Tensor]:
        """The buffers that a step may change: not those of frozen layers, which are in evaluation mode."""
        modules = [module for module in self.task.modules() if module.training]
        return [buffer for module in modules for buffer in module.buffers(recurse=False)]

    @torch.no_grad()
    def _restore_buffers(self, buffers: Sequence[Tensor], before: Sequence[Tensor], usable: Tensor) -> None:
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(usable, buffer, old))

    # ---------------------------------------------------------------- checks

    def _check_accumulation(self) -> None:
        whole = [name for name, module in self.task.named_modules() if getattr(module, "whole_batch", False)]
        if self.optim.accumulate > 1 and whole:
            raise ValueError(
                f"optim.accumulate: expected 1, got {self.optim.accumulate}: {whole[0] or 'the task'} "
                f"({type(self.task.get_submodule(whole[0])).__name__}) is a loss of the whole batch, not of its parts"
            )

    def _check_shares(self) -> None:
        shares = distributed.share_sizes(self.optim.batch_size)
        if min(shares) > 1:
            return
        for name, module in self.task.named_modules():
            if isinstance(module, nn.BatchNorm1d):
                raise ValueError(
                    f"optim.batch_size: expected at least {2 * len(shares)} images for {len(shares)} process(es), got "
                    f"{self.optim.batch_size}: {name} (BatchNorm1d) needs two images in each for its statistics"
                )

    def check_optimizer(self) -> None:
        """Raise ValueError for a parameter that requires a gradient and is not in the optimiser."""
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

    def _stateful(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the generators of random numbers."""
        found = {name: getattr(self, name) for name in ("task", "optimizer", "scheduler", "scaler", "health")}
        return found if self.average is None else {**found, "average": self.average}

    def state_dict(self) -> dict[str, Any]:
        """The state of a checkpoint."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self._first = False
