"""The engine: trains a stage from its last checkpoint to its end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fgvc_ext.training.config import EngineConfig
from fgvc_ext.training.cpu_memory import keep_freed_memory
from fgvc_ext.training.distributed import Process, current_process
from fgvc_ext.training.evaluation import add_sums, evaluate
from fgvc_ext.training.interruption import NonFiniteLoss, Preempted, StopRequest
from fgvc_ext.training.metrics import measures
from fgvc_ext.training.optimisation import PRECISIONS, build_average, build_optimizer, build_scheduler, update_average
from fgvc_ext.training.progress import Progress
from fgvc_ext.training.resuming import check_inputs, reopen_from
from fgvc_ext.training.run_folder import RunFolder
from fgvc_ext.training.sampling import (
    Batch,
    EpochBatches,
    Loader,
    Samples,
    derive_seed,
    evaluation_loader,
    parts,
    training_loader,
)
from fgvc_ext.training.state import (
    Checkpoints,
    load_checkpoint,
    load_weights_file,
    random_state,
    restore_random_state,
    save_weights,
)
from fgvc_ext.training.task import Stage, Task, accuracy


def run_stages(stages: Sequence[Stage], run: RunFolder, engine: EngineConfig) -> dict[str, Task]:
    """Train the stages one after the other, leaving out those that are done, and return their trained tasks.

    The last stage's weights are also written as `weights/last.safetensors`.

    Raises:
        Preempted: asked to stop by a signal; the state is saved. NonFiniteLoss: the run cannot go on.
        ConfigMismatch: a stage, done or not, builds on other files than it did.
    """
    tasks = {}
    choose_device(engine.device)
    for stage in stages:  # also of those that are done: their results are not to pass for those of other files
        check_inputs(stage, run)
    if run.starts_from is not None:
        reopen_from(run.starts_from, stages, run)
    run.begin()
    with StopRequest() as stop:
        for number, stage in enumerate(stages):
            trainer = Trainer(stage, run, engine, stop, is_last=number == len(stages) - 1)
            tasks[stage.name] = trainer.finished_task() if run.is_done(stage.name) else trainer.fit()
    return tasks


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine.device: {name} was asked for, but torch {torch.__version__} sees no GPU")
    return device


class Trainer:
    """One stage: position, state and the loop over epochs and steps."""

    def __init__(self, stage: Stage, run: RunFolder, engine: EngineConfig, stop: StopRequest, *, is_last: bool) -> None:
        self.stage, self.run, self.engine, self.stop, self.is_last = stage, run, engine, stop, is_last
        self.process: Process = current_process()
        self.device = choose_device(engine.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.workers = engine.workers if engine.workers >= 0 else (8 if self.device.type == "cuda" else 0)
        self.batches = EpochBatches(len(stage.train), stage.optim.batch_size, stage.seed)
        self.checkpoints = Checkpoints(run.checkpoints, stage.name)
        self.epoch = self.batch = self.step = 0  # the position: the next batch to train is number `batch` of `epoch`
        self.sums: dict[str, torch.Tensor] = {}  # of the epoch so far
        self.seconds = self.waited = 0.0  # of the epoch so far
        self.rate = 0.0  # highest learning rate of the epoch's first step
        self.skipped_in_a_row = 0
        self.best: dict[str, dict[str, float]] = {}
        self.last: dict[str, float | None] = {}
        self._saved_position: tuple[int, int] | None = None

    # ---------------------------------------------------------------- building

    def _build(self) -> None:
        seed = derive_seed(self.stage.seed, "initial weights")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        layout = torch.channels_last if self.engine.channels_last else torch.preserve_format
        optim = self.stage.optim
        self.task = self.stage.build().to(self.device).to(memory_format=layout)
        self.forward = torch.compile(self.task) if self.engine.compile else self.task
        self.optimizer = build_optimizer(self.task.param_groups(optim), optim)
        self.scheduler = build_scheduler(self.optimizer, optim, self.batches.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.engine.precision == "fp16")
        self.average = build_average(self.task, optim.ema_decay)

    @property
    def evaluated(self) -> Task:
        """The task that is evaluated and saved: the moving average where there is one."""
        return self.average.module if self.average is not None else self.task  # type: ignore[return-value]

    def finished_task(self) -> Task:
        """The task of a stage that is done, with the weights of its file."""
        self._build()
        state, _ = load_weights_file(self.run.weights / f"{self.stage.name}.safetensors")
        self.evaluated.load_model_state(state)
        return self.evaluated.eval()

    # ---------------------------------------------------------------- the loop

    def fit(self) -> Task:
        """Train to the end, from the last checkpoint where there is one."""
        self._build()
        self._restore_or_start()
        loader = training_loader(
            self.stage.train, self.batches, workers=self.workers, pin_memory=self.device.type == "cuda"
        )
        try:
            self._train(loader)
        finally:
            loader.close()
        self._finish()
        return self.evaluated.eval()

    def _train(self, loader: Loader) -> None:
        epochs = self.stage.optim.epochs
        with Progress(self.stage.name, epochs, len(self.stage.train), enabled=self.process.is_main) as progress:
            while self.epoch < epochs:
                self.task.start_epoch(self.epoch)
                self.task.train()
                with progress.epoch(self.epoch, self.batch * self.stage.optim.batch_size):
                    self._train_epoch(loader, progress)
                    row = self._finish_epoch(progress)
                progress.line(row)

    def _train_epoch(self, loader: Loader, progress: Progress) -> None:
        self.batches.start(self.epoch, self.batch)
        if self.batch == 0:
            self.rate = max(group["lr"] for group in self.optimizer.param_groups)
        clock = time.perf_counter()
        for batch in _waiting(loader, self):
            loss = self._train_step(self._to_device(batch))
            self.batch += 1
            self.step += 1
            now = time.perf_counter()
            self.seconds += now - clock
            clock = now
            progress.images(len(batch["label"]), loss)
            every = self.engine.checkpoint_every
            if every and self.step % every == 0 and self.batch < self.batches.steps_per_epoch:
                self._save()
            self._stop_if_asked()

    def _train_step(self, batch: Batch) -> float:
        """Forward, backward and one optimiser step; returns the loss."""
        n = len(batch["label"])
        if n < min(2, self.stage.optim.batch_size):  # broken images were left out, and a single one has no statistics
            add_sums(self.sums, {"broken": batch["skipped"]})
            return math.nan
        buffers = [b.clone() for b in self.task.buffers()] if self.engine.max_skipped_steps else []
        self.optimizer.zero_grad(set_to_none=True)
        loss, sums = 0.0, {"n": torch.tensor(n), "broken": batch["skipped"]}
        for part in parts(batch, self.stage.optim.accumulate):
            with torch.autocast(
                self.device.type, PRECISIONS[self.engine.precision], enabled=self.engine.precision != "fp32"
            ):
                result = self.forward(part)
            share = result["loss"] * (result["n"] / n)
            value = share.item()  # waits for the device: nothing non-finite may reach the weights
            loss += value
            if not math.isfinite(value):
                break
            self.scaler.scale(share).backward()
            add_sums(sums, result["logs"])
        if not math.isfinite(loss) or not self._gradients_are_usable():
            self._skip(batch, loss, buffers)
            return loss
        self._update()
        add_sums(self.sums, {**sums, "loss": torch.tensor(loss * n, dtype=torch.float64)})
        return loss

    def _gradients_are_usable(self) -> bool:
        """Clip where asked for; False for a non-finite norm. With fp16 the scaler looks for itself."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.step == 0:
            unused = [name for name, p in self.task.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                raise RuntimeError(f"the loss does not depend on {', '.join(unused)}: freeze or use these parameters")
        self.scaler.unscale_(self.optimizer)
        limit = self.stage.optim.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        return self.scaler.is_enabled() or bool(norm.isfinite())

    def _update(self) -> None:
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped_in_a_row = 0
        if self.scaler.get_scale() >= before:  # with fp16 a smaller scale means that the step was left out
            self.scheduler.step()
            update_average(self.average, self.task)

    def _skip(self, batch: Batch, loss: float, buffers: list[torch.Tensor]) -> None:
        """Leave out a step, as if its batch had not been there, or stop the run."""
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= self.engine.max_skipped_steps:
            for buffer, before in zip(self.task.buffers(), buffers, strict=True):
                buffer.copy_(before)
            add_sums(self.sums, {"skipped_steps": torch.tensor(1)})
            return
        ids = [self.stage.train.dataset.ids[i] for i in batch["index"].tolist()]
        good = next((str(m.with_suffix(".pt")) for m in self.checkpoints.manifests()), "none yet")
        what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        raise NonFiniteLoss(
            f"stage {self.stage.name}, epoch {self.epoch}, step {self.step}: {what}. "
            f"Last good checkpoint: {good}. Samples: {', '.join(ids)}"
        )

    # ---------------------------------------------------------------- ends of epochs and stages

    def _finish_epoch(self, progress: Progress) -> dict[str, Any]:
        """Evaluate, append the epoch's line to the metric files, save."""
        totals = {name: value.item() for name, value in self.sums.items()}
        n = max(1, totals.get("n", 0))
        row: dict[str, Any] = {
            "stage": self.stage.name,
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.rate,
            "train_loss": totals.get("loss", math.nan) / n,
            "train_accuracy": accuracy(self.sums),
            "images_per_second": totals.get("n", 0) / max(self.seconds, 1e-9),
            "data_wait": self.waited / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }
        row |= {name: totals[name] for name in ("broken", "skipped_steps") if totals.get(name)}
        last_epoch = self.epoch + 1 == self.stage.optim.epochs
        if last_epoch or (self.epoch + 1) % self.engine.eval_every == 0:
            for name, samples in self.stage.evaluations.items():
                row |= measures(name, self._evaluate(name, samples, progress))
                value = self.last[name] = row[f"{name}_accuracy"]
                if value is not None and value > self.best.get(name, {}).get("accuracy", -1.0):
                    self.best[name] = {"accuracy": value, "epoch": self.epoch + 1}
        self.run.metrics.append(row)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.seconds, self.waited = {}, 0.0, 0.0
        self._save()
        self.run.update_stage(self.stage.name, epoch=self.epoch, step=self.step, accuracy=self._accuracies())
        if self.epoch < self.stage.optim.epochs:
            self._stop_if_asked()
        return row

    def _evaluate(self, name: str, samples: Samples, progress: Progress) -> dict[str, torch.Tensor]:
        indices = list(self.process.shard(len(samples)))
        batch_size = max(1, self.engine.eval_batch_size // samples.crops)
        loader = evaluation_loader(samples, indices, batch_size, workers=self.workers)
        with progress.evaluation(name, len(indices)) as advance:

            def on_batch(count: int) -> None:
                advance(count)
                self._stop_if_asked()

            try:
                return evaluate(self.evaluated, loader, self._to_device, on_batch)
            finally:
                loader.close()

    def _accuracies(self) -> dict[str, float]:
        found = {"last": self.last.get("test"), "last_val": self.last.get("val")}
        found |= {f"best_{name}": entry["accuracy"] for name, entry in self.best.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _finish(self) -> None:
        """Last evaluations, weights, and the mark that the stage is done."""
        accuracies = self._accuracies()
        with Progress(self.stage.name, 0, 0, enabled=self.process.is_main) as progress:
            for name, samples in self.stage.final.items():
                value = accuracy(self._evaluate(name, samples, progress))
                accuracies |= {name: value} if value is not None else {}
        metadata = {**self.stage.metadata, "stage": self.stage.name, "config_hash": self.run.config_hash}
        outputs = {}
        for name in (self.stage.name, "last")[: 1 + self.is_last]:
            file = self.run.weights / f"{name}.safetensors"
            outputs[str(file.relative_to(self.run.path))] = save_weights(file, self.evaluated.model_state(), metadata)
        self.run.update_stage(self.stage.name, status="done", accuracy=accuracies, best=self.best, outputs=outputs)

    # ---------------------------------------------------------------- checkpoints

    def _restore_or_start(self) -> None:
        file = self.run.starts_from
        entry = self.run.stage(self.stage.name)
        check_inputs(self.stage, self.run)
        self.run.begin()
        found = None
        if file is not None and file.name.startswith(f"{self.stage.name}-e"):
            found = load_checkpoint(file), file
        elif entry is not None:
            found = self.checkpoints.load_latest()
        if entry is None:
            start = {"seed": self.stage.seed, "inputs": dict(self.stage.inputs), "offsets": self.run.metrics.offsets()}
            self.run.update_stage(self.stage.name, status="running", **start)
        if found is not None:
            self._load(*found)
        elif entry is not None:  # stopped before its first checkpoint
            self.run.metrics.truncate(entry["offsets"])

    def _load(self, state: dict[str, Any], file: Path) -> None:
        self.run.refuse_other(state["identity"], f"checkpoint {file}")
        self.checkpoints.discard_newer(file)
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.batch, self.step = state["position"]
        self.sums, self.best, self.last = state["sums"], state["best"], state["last"]
        self.seconds, self.waited, self.rate = state["seconds"], state["waited"], state["rate"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.run.metrics.truncate(state["offsets"])
        self.run.update_stage(self.stage.name, status="running")
        restore_random_state(state["random"])
        self._saved_position = (self.epoch, self.batch)

    def _save(self) -> Path | None:
        if self._saved_position == (self.epoch, self.batch):
            return None
        state = {
            "identity": self.run.identity,
            "stage": self.stage.name,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "position": [self.epoch, self.batch, self.step],
            "sums": self.sums,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "waited": self.waited,
            "rate": self.rate,
            "skipped_in_a_row": self.skipped_in_a_row,
            "offsets": self.run.metrics.offsets(),
            "random": random_state(),
        }
        file = self.checkpoints.save(state, epoch=self.epoch, step=self.step)
        self._saved_position = (self.epoch, self.batch)
        return file

    def _stop_if_asked(self) -> None:
        if self.stop.received is not None:
            self._save()
            raise Preempted(f"{self.stop.received.name} received; saved at epoch {self.epoch}, step {self.step}")

    def _to_device(self, batch: Batch) -> Batch:
        moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        if self.engine.channels_last and moved["image"].dim() == 4:
            moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
        return moved


def _waiting(loader: Loader, trainer: Trainer) -> Iterator[Batch]:
    """The loader's batches; the time that they are waited for goes to `trainer.waited`."""
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        trainer.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch
