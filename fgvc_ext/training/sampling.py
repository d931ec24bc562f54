"""Which samples a step sees, in which order, and with which random numbers.

Everything follows from (seed, epoch, index): the order of an epoch, the augmentation of a sample, the mask of its
diversification block. So the number of workers, the way a batch is cut and the place where a run was interrupted
change nothing.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fgvc_ext.data.dataset import BrokenImageError, ImageDataset

Key = tuple[int, int]  # (index of the sample in its data set, its seed)
Batch = dict[str, torch.Tensor]


def mix64(words: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) of uint64 words."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2⁶⁴ is meant
        z = words + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sample_seeds(seed: int, epoch: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Seeds [N] of samples: m(m(m(seed) ⊕ epoch) ⊕ index) with m = splitmix64, without the sign bit.

    Returns:
        int64 array, every value in [0, 2⁶³).
    """
    state = mix64(mix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(epoch))
    return (mix64(state ^ np.asarray(indices, np.uint64)) & np.uint64(2**63 - 1)).astype(np.int64)


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of its own for a named purpose, such as the initial weights or the order of the images."""
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return int(sample_seeds(seed, word, [0])[0])


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices, spread evenly, so that a list sorted by class keeps all of its classes."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit: expected a positive number of images, got {limit}")
    return [i * count // limit for i in range(limit)]


class EpochBatches:
    """Batch sampler: a new permutation each epoch, started at any batch of it.

    The last batch may be smaller. Were it a single sample, whose batch statistics mean nothing, then that sample
    joins the batch before: no sample is lost, no batch has one sample (unless batch_size is 1).
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if count == 0 or (count == 1 and batch_size > 1):
            raise ValueError(f"no step in an epoch: {count} training image(s) for batches of {batch_size}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = self.first_batch = 0

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return max(1, full + (rest > (1 if self.batch_size > 1 else 0)))

    def start(self, epoch: int, batch: int = 0) -> None:
        """Set what the next iteration yields: the batches of `epoch` from number `batch` on."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"order of epoch {self.epoch}"))
        order = torch.randperm(self.count, generator=generator).numpy()
        keys = list(zip(order.tolist(), sample_seeds(self.seed, self.epoch, order).tolist(), strict=True))
        steps = self.steps_per_epoch
        for step in range(self.first_batch, steps):
            end = len(keys) if step == steps - 1 else (step + 1) * self.batch_size
            yield keys[step * self.batch_size : end]


class Samples(Dataset):
    """Images of a data set, transformed with the random numbers of their keys.

    The transform draws from torch's CPU generator, which is seeded for each sample and put back afterwards.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[torch.Tensor], torch.Tensor],
        broken_images: Literal["error", "skip"] = "error",
        crops: int = 1,
    ) -> None:
        self.dataset, self.transform, self.broken_images = dataset, transform, broken_images
        self.crops = crops  # images that the transform makes of one: a batch holds so many times fewer samples

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        index, seed = key
        try:
            image = self.dataset.load(index)
        except BrokenImageError:
            if self.broken_images == "error":
                raise
            return None
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reset the GPU's generator, which fork_rng(devices=[]) does not put back
            torch.default_generator.manual_seed(seed)
            image = self.transform(image)
        return {"image": image, "label": int(self.dataset.labels[index]), "index": index, "seed": seed}

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any] | None] | Exception:
        """The samples of a batch, or what is wrong with one of them.

        The error is handed over rather than raised, since a loading process would wrap it in its own traceback.
        """
        try:
            return [self[key] for key in keys]
        except (BrokenImageError, ValueError, OSError) as error:
            return error


def collate(samples: Sequence[dict[str, Any] | None] | Exception) -> Batch | Exception:
    """Stack samples: image [N,3,H,W] (five crops: [N,5,3,H,W]); label, index, seed int64 [N]; skipped int64 []."""
    if isinstance(samples, Exception):
        return samples
    kept = [sample for sample in samples if sample is not None]
    batch = {name: torch.tensor([s[name] for s in kept], dtype=torch.int64) for name in ("label", "index", "seed")}
    batch["image"] = torch.stack([s["image"] for s in kept]) if kept else torch.empty(0, 3, 1, 1)
    batch["skipped"] = torch.tensor(len(samples) - len(kept))
    return batch


def parts(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into at most `count` parts of nearly the same size, none of one sample if that can be helped."""
    n = len(batch["label"])
    count = max(1, min(count, n // 2))
    cut = {name: value.tensor_split(count) for name, value in batch.items() if value.dim() > 0}
    return [{name: values[i] for name, values in cut.items()} for i in range(count)]


def _leave_signals_to_the_main_process(_: int) -> None:
    # A scheduler signals every process; a worker that died of it would take the final checkpoint with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader(DataLoader):
    """A DataLoader whose errors are those of its samples, and whose processes end when it is closed.

    Close it in a `finally`: its processes ignore the signal by which Python ends the children that are left at exit,
    and would be waited for without end.
    """

    _running: Any = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._running = super().__iter__()
        for batch in self._running:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def close(self) -> None:
        """End the loading processes; the loader can be iterated again."""
        running, self._running, self._iterator = self._running, None, None
        processes = getattr(running, "_workers", [])
        if processes:
            running._shutdown_workers()
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def training_loader(samples: Samples, batches: EpochBatches, *, workers: int, pin_memory: bool = False) -> Loader:
    """Loader over `batches`; call `batches.start` before each iteration."""
    return _loader(samples, batches, workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0)


def evaluation_loader(
    samples: Samples, indices: Sequence[int], batch_size: int, *, workers: int, pin_memory: bool = False
) -> Loader:
    """Loader over the given samples once, in order, the last batch smaller; every sample's seed is that of epoch 0."""
    keys = list(zip(indices, sample_seeds(0, 0, np.asarray(indices, np.int64)).tolist(), strict=True))
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return _loader(samples, batches, workers=workers, pin_memory=pin_memory)


def _loader(samples: Samples, batches: Any, *, workers: int, **options: Any) -> Loader:
    # Its own generator: iter(DataLoader) draws a number, and from the global generator that would shift every
    # dropout mask of a run that was continued in the middle of an epoch.
    return Loader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
