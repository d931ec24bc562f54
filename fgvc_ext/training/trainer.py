"""One training, from its last checkpoint to its end: epochs, evaluations, metrics, checkpoints, weights."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fgvc_ext.data.loading import Batch, Loader, Samples, to_device
from fgvc_ext.models.weights_file import load_weights_file, save_weights
from fgvc_ext.training import distributed
from fgvc_ext.training.checkpoints import load_checkpoint
from fgvc_ext.training.config import ConfigMismatch, EngineConfig
from fgvc_ext.training.cpu_memory import keep_freed_memory
from fgvc_ext.training.device import choose_device, configure_backends, worker_count
from fgvc_ext.training.evaluation import add_sums, evaluate, measured, reported
from fgvc_ext.training.features import with_cached_features
from fgvc_ext.training.health import Findings
from fgvc_ext.training.position import Position
from fgvc_ext.training.progress import Progress
from fgvc_ext.training.random_state import random_state, restore_random_state, seed_everything
from fgvc_ext.training.run_folder import RunFolder
from fgvc_ext.training.sampling import EpochBatches, derive_seed, evaluation_loader, training_loader
from fgvc_ext.training.step import TrainingStep
from fgvc_ext.training.stop_request import Preempted, StopRequest
from fgvc_ext.training.teachers import frozen_in
from fgvc_ext.training.training import Training


class NonFiniteLoss(FloatingPointError):  # noqa: N818 (says what happened)
    """A loss or gradient that is NaN or infinite."""


class Trainer:
    """Trains, evaluates and saves. Every decision that processes must share goes through `distributed`."""

    def __init__(self, training: Training, run: RunFolder, engine: EngineConfig, stop: StopRequest) -> None:
        self.training, self.run, self.engine, self.stop = training, run, engine, stop
        self.name = training.name
        self.device = choose_device(engine.device)
        configure_backends(engine)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.workers = worker_count(engine)
        self.look_every = engine.look_every or (1 if self.device.type == "cpu" else 20)
        labels = training.train.dataset.labels if training.optim.balanced else None
        self.batches = EpochBatches(len(training.train), training.optim.batch_size, training.seed, labels=labels)
        self.checkpoints = run.checkpoints_of(self.name)
        self.at = Position()
        self._found = Findings()
        self._saved: tuple[int, int] | None = None
        self._evaluation_loaders: dict[Samples, Loader] = {}
        self._build()

    def _build(self) -> None:
        seed_everything(derive_seed(self.training.seed, "initial weights"))
        layout = torch.channels_last if self.engine.channels_last else torch.preserve_format
        task = self.training.build()
        if not distributed.on_main(self.checkpoints.manifests):  # else its weights are those of a checkpoint
            self._say(distributed.on_each(self.training.start, task))
        self.task = task.to(self.device).to(memory_format=layout)
        if self.engine.sync_batch_norm:
            self.task = distributed.with_shared_batch_norm(self.task, self.device)
        for frozen in frozen_in(self.task):
            frozen.to(self.device, layout)
        self.step = TrainingStep(self.task, self.training.optim, self.engine, self.device, self.batches.steps_per_epoch)
        if not distributed.is_main():  # the same weights, but dropout of its own
            rank = distributed.current_process().rank
            seed_everything(derive_seed(self.training.seed, f"random numbers of process {rank}"))

    def _say(self, text: str) -> None:
        if text and distributed.is_main():
            print(text, flush=True)

    # ---------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Train to the end, from the last checkpoint where there is one, and record the result."""
        self._restore()
        if self.at.epoch < self.training.optim.epochs:
            self.training = with_cached_features(self.training, self.task, self.engine, self.stop)
        loader = training_loader(
            self.training.train, self.batches, workers=self.workers, pin_memory=self.device.type == "cuda"
        )
        try:
            self._train(loader)
        finally:
            for one in (loader, *self._evaluation_loaders.values()):
                one.close()
        self._finish()

    def _train(self, loader: Loader) -> None:
        epochs = self.training.optim.epochs
        with Progress(self.name, epochs, len(self.training.train), enabled=distributed.is_main()) as progress:
            while self.at.epoch < epochs:
                self.task.train()
                self._start_epoch()
                with progress.epoch(self.at.epoch, self.at.batch * self.training.optim.batch_size):
                    self._train_epoch(loader, progress)
                    row = self._finish_epoch(progress)
                progress.line(row)

    def _start_epoch(self) -> None:
        for task in (self.task, *([self.step.evaluated] if self.step.average is not None else [])):
            task.start_epoch(self.at.epoch)
        self.step.check_optimizer()  # what an epoch unfreezes must have been in the optimiser from the beginning

    def _train_epoch(self, loader: Loader, progress: Progress) -> None:
        self.batches.start(self.at.epoch, self.at.batch)
        if self.at.batch == 0:
            self.at.rate = self.step.rate
        clock = time.perf_counter()
        for batch in self._waiting(loader):
            self._learn(batch)
            self.at.batch += 1
            self.at.step += 1
            now = time.perf_counter()
            self.at.seconds += now - clock
            clock = now
            progress.images(self.batches.size_of(self.at.batch - 1))
            every = self.engine.checkpoint_every
            if every and self.at.step % every == 0 and self.at.batch < self.batches.steps_per_epoch:
                self._save()
            if self.at.step % self.look_every == 0:
                self._look(progress)
            self._stop_if_asked()
        self._check_health()  # waits for the device, so that its time is the epoch's
        self.at.seconds += time.perf_counter() - clock

    def _learn(self, batch: Batch) -> None:
        """A step with this batch, if there is anything to learn from it."""
        if not len(batch["label"]):
            batch["image"] = self._no_images()
        sizes = self._sizes(len(batch["label"]))
        self.at.count("broken", self.batches.size_of(self.at.batch) - sum(sizes))
        if sum(sizes) < min(2, self.training.optim.batch_size):
            self.step.leave_out()  # broken images were left out, and a single one has no statistics
            self.at.count("left_out", sum(sizes))
            return
        add_sums(self.at.sums, self.step(self._to_device(batch, self.training.train), self.at.step, sizes))

    def _sizes(self, own: int) -> list[int]:
        """How many samples of the present batch each process has."""
        if self.engine.broken_images == "skip":
            return distributed.gather_objects(own)
        return distributed.share_sizes(self.batches.size_of(self.at.batch))

    def _no_images(self) -> torch.Tensor:
        """[0,…] for a process that has no sample of a batch, with the size that images have here."""
        samples = (self.training.train[index, 0] for index in range(len(self.training.train)))
        sample = next((sample for sample in samples if sample is not None), None)
        if sample is None:
            raise ValueError(f"stage {self.name}: none of its {len(self.training.train)} training images can be read")
        return sample["image"][None, ...][:0]

    def _look(self, progress: Progress) -> None:
        """Wait for the device, and read what it has found."""
        self._check_health()
        if "loss" in self.at.sums:
            progress.loss(float(self.at.sums["loss"]) / max(1.0, float(self.at.sums["n"])))

    def _check_health(self) -> None:
        found = self.step.look()
        if found.failed_at is not None:
            raise NonFiniteLoss(self._where(found.failed_at, found.problem))
        self.at.count("skipped_steps", found.skipped - self._found.skipped)
        self.at.count("overflows", found.overflows - self._found.overflows)
        self._found = found

    def _where(self, step: int, problem: str) -> str:
        epoch, batch = divmod(step, self.batches.steps_per_epoch)
        ids = [self.training.train.dataset.ids[index] for index in self.batches.samples_of(epoch, batch)]
        good = next((str(manifest.with_suffix(".pt")) for manifest in self.checkpoints.manifests()), "none yet")
        return (
            f"stage {self.name}, epoch {epoch}, step {step}: {problem}. "
            f"Last good checkpoint: {good}. Samples: {', '.join(ids)}"
        )

    # ---------------------------------------------------------------- ends of epochs and of the training

    def _finish_epoch(self, progress: Progress) -> dict[str, Any]:
        """Evaluate, append the epoch's line to the metric files, save."""
        at = self.at
        sums = distributed.reduce_sums(at.sums)
        images = float(sums["n"]) if "n" in sums else 0.0
        row: dict[str, Any] = {
            "stage": self.name,
            "epoch": at.epoch + 1,
            "step": at.step,
            "lr": at.rate,
            "seconds": at.seconds,
            "images_per_second": images / max(at.seconds, 1e-9),
            "data_wait": at.waited / max(at.seconds, 1e-9),
            **_columns("train", measured(self.task, sums)),
            **at.counts,
        }
        is_last = at.epoch + 1 == self.training.optim.epochs
        evaluations = self.training.evaluations if self.training.early is None else self.training.early
        if is_last:
            evaluations = {**self.training.evaluations, **self.training.final}
        if is_last or (at.epoch + 1) % self.engine.eval_every == 0:
            for name, samples in evaluations.items():
                values = self._evaluate(name, samples, progress)
                row |= _columns(name, values)
                self._compare(name, values)
        distributed.on_main(self.run.metrics.append, row)
        at.next_epoch()
        self._save()
        self.run.update_entry(self.name, epoch=at.epoch, step=at.step, **self._results())
        if not is_last:
            self._stop_if_asked()
        return {**row, "headline": self._headline()}

    def _evaluate(self, name: str, samples: Samples, progress: Progress) -> dict[str, float]:
        indices = distributed.own_rows(len(samples))
        batch_size = max(1, self.engine.eval_batch_size // samples.crops)
        if samples not in self._evaluation_loaders:  # whose processes stay for the next evaluation
            pin, workers = self.device.type == "cuda", self.workers
            loader = evaluation_loader(samples, indices, batch_size, workers=workers, pin_memory=pin)
            self._evaluation_loaders[samples] = loader
        rounds = -(-distributed.largest_share(len(samples)) // batch_size)
        batches = self._stoppable(self._evaluation_loaders[samples], rounds)
        with progress.evaluation(name, len(indices)) as advance:
            to_device = partial(self._to_device, samples=samples)
            return measured(self.step.evaluated, evaluate(self.step.evaluated, batches, to_device, advance))

    def _stoppable(self, loader: Loader, rounds: int) -> Iterator[Batch]:
        """The loader's batches, and after each the question whether to stop: as often in every process."""
        asked = 0
        for batch in loader:
            yield batch
            self._stop_if_asked()
            asked += 1
        for _ in range(rounds - asked):
            self._stop_if_asked()

    def _compare(self, name: str, values: dict[str, float]) -> None:
        """Keep an evaluation's measures, and its best headline with the epoch, where epochs can be compared.

        The weights of the best epoch on "val" are kept beside those of the last: `weights/<stage>.best.safetensors`.
        """
        if not values:
            return
        self.at.last[name] = values
        headline, value = next(iter(values.items()))
        best = self.at.best.get(name, {}).get(headline)
        sign = 1 if self.task.higher_is_better else -1
        better = best is None or math.isnan(best) or sign * value > sign * best
        if name in self.training.evaluations and better:
            self.at.best[name] = {headline: value, "epoch": self.at.epoch + 1}
            if name == "val":
                self._write_weights(self.run.best_weights_of(self.name), epoch=self.at.epoch + 1)

    def _headline(self) -> str | None:
        """The name of the main measure; None before the first evaluation."""
        return next((next(iter(values)) for values in self.at.last.values()), None)

    def _results(self) -> dict[str, Any]:
        """What run.json says: the headline's value by evaluation, its best ones, and all measures."""
        found = reported(self.at.last, self.training.evaluations)
        if found:
            headline = found["headline"]
            best = {f"best_{name}": entry[headline] for name, entry in self.at.best.items() if headline in entry}
            found |= {headline: {**found[headline], **best}, "best": self.at.best}
        return found

    def _finish(self) -> None:
        """Write the weights, and the mark that the stage is done."""
        file = self.run.weights / f"{self.name}.safetensors"
        outputs = {str(file.relative_to(self.run.path)): self._write_weights(file)}
        at = {"epoch": self.at.epoch, "step": self.at.step}  # for a run that was killed before it could say so
        self.run.update_entry(self.name, status="done", **at, **self._results(), outputs=outputs)

    def _write_weights(self, file: Path, **facts: Any) -> str:
        """Write the trained model; returns the file's sha256."""
        task = self.step.evaluated
        metadata = {**task.model_metadata(), **self.training.metadata, **facts}
        return distributed.on_main(save_weights, file, task.model_state(), metadata)

    # ---------------------------------------------------------------- checkpoints

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, or from the beginning."""
        found = distributed.on_each(lambda: self.checkpoints.load_latest() if distributed.is_main() else None)
        file = distributed.on_main(lambda: None if found is None else found[1])
        if file is not None:  # the other processes read the file that the main one has found
            self._load(distributed.on_each(lambda: load_checkpoint(file) if found is None else found[0]), file)
        elif distributed.is_main():  # a run that was stopped before its first checkpoint may have left lines
            self.run.metrics.drop(self.name, after=0)

    def _load(self, state: dict[str, Any], file: Path) -> None:
        if state["config_hash"] != self.training.metadata["config_hash"]:
            raise ConfigMismatch(f"checkpoint {file} was written under another configuration: remove it to start anew")
        self.step.load_state_dict(state["step"])
        self._found = self.step.look()
        self.at = Position(**state["position"])
        self._saved = (self.at.epoch, self.at.batch)
        if distributed.is_main():
            self.checkpoints.discard_newer(file)
            self.run.metrics.drop(self.name, after=self.at.epoch)
        self.run.update_entry(self.name, status="running")
        self._load_own(state["processes"])
        self._compare_best()

    def _compare_best(self) -> None:
        """The best weights may be those of an epoch after the checkpoint; then the next evaluation is the best."""
        file, best = self.run.best_weights_of(self.name), self.at.best.get("val")
        kept = distributed.on_main(lambda: load_weights_file(file)[1].get("epoch") if file.is_file() else None)
        if best is not None and kept != best["epoch"]:
            del self.at.best["val"]

    def _load_own(self, states: list[dict[str, Any]]) -> None:
        """What each process has of its own: sums of its samples, generators of random numbers."""
        process = distributed.current_process()
        if len(states) == process.world_size:
            own = states[process.rank]
            self.at.sums = {name: value.to(self.device) for name, value in own["sums"].items()}
            restore_random_state(own["random"])
            return
        warnings.warn(
            f"stage {self.name} was trained by {len(states)} processes and goes on with {process.world_size}: "
            "its bits will differ from those of a run that was not interrupted",
            stacklevel=2,
        )
        seed_everything(derive_seed(self.training.seed, f"process {process.rank} from step {self.at.step}"))
        for state in states if process.is_main else []:
            add_sums(self.at.sums, {name: value.to(self.device) for name, value in state["sums"].items()})

    def _save(self) -> None:
        if self._saved == (self.at.epoch, self.at.batch):
            return
        self._check_health()
        own = {"sums": {name: value.cpu() for name, value in self.at.sums.items()}, "random": random_state()}
        processes = distributed.gather_objects(own)
        state = {
            "stage": self.name,
            "config_hash": self.training.metadata["config_hash"],
            "step": self.step.state_dict(),
            "position": {**vars(self.at), "sums": {}},
            "processes": processes,
        }
        distributed.on_main(self.checkpoints.save, state, epoch=self.at.epoch, step=self.at.step)
        self._saved = (self.at.epoch, self.at.batch)

    def _stop_if_asked(self) -> None:
        received = self.stop.received
        if distributed.any_process(received is not None):
            self._save()
            name = "a signal" if received is None else received.name
            raise Preempted(f"{name} received; saved at epoch {self.at.epoch}, step {self.at.step}")

    # ---------------------------------------------------------------- batches

    def _waiting(self, loader: Loader) -> Iterator[Batch]:
        """The loader's batches; the time that they are waited for is counted."""
        iterator = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.at.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _to_device(self, batch: Batch, samples: Samples) -> Batch:
        layout = self.engine.channels_last
        return to_device(batch, self.device, normalise=samples.normalise, channels_last=layout)


def _columns(split: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in values.items()}
