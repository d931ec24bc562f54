"""Which samples a step sees, in which order, and with which random numbers.

Everything follows from (seed, epoch, index): the order of an epoch, the augmentation of a sample, the mask of its
diversification block. So the number of workers, the way a batch is cut and the place where a run was interrupted
change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fgvc_ext.data.loading import Batch, Key, Loader, Samples, make_loader
from fgvc_ext.training import distributed


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


class EpochBatches:
    """Batch sampler: a new permutation each epoch, started at any batch of it; every process takes its share of each.

    The last batch may be smaller. Were it a single sample, whose batch statistics mean nothing, then that sample
    joins the batch before: no sample is lost, no batch has one sample (unless batch_size is 1).

    Args:
        labels: classes [count] of the samples: an epoch then draws `count` of them with replacement, every class with
            the same probability. None: each sample once.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, labels: Tensor | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if count == 0 or (count == 1 and batch_size > 1):
            raise ValueError(f"no step in an epoch: {count} training image(s) for batches of {batch_size}")
        self.count, self.batch_size, self.seed, self.labels = count, batch_size, seed, labels
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
        order = self._order(self.epoch)
        # Of balanced epochs the random numbers follow from the place: a sample that comes again looks different.
        place = order.numpy() if self.labels is None else self.count + np.arange(self.count)
        keys = list(zip(order.tolist(), sample_seeds(self.seed, self.epoch, place).tolist(), strict=True))
        for batch in range(self.first_batch, self.steps_per_epoch):
            yield distributed.own_share(keys[self._slice(batch)])

    def _slice(self, batch: int) -> slice:
        start = batch * self.batch_size
        return slice(start, self.count if batch == self.steps_per_epoch - 1 else start + self.batch_size)

    def size_of(self, batch: int) -> int:
        """Samples of the global batch of this number."""
        return len(range(self.count)[self._slice(batch)])

    def samples_of(self, epoch: int, batch: int) -> list[int]:
        """Indices of the samples of a global batch."""
        return self._order(epoch)[self._slice(batch)].tolist()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"order of epoch {epoch}"))
        if self.labels is None:
            return torch.randperm(self.count, generator=generator)
        weights = 1 / torch.bincount(self.labels)[self.labels].double()
        return torch.multinomial(weights, self.count, replacement=True, generator=generator)


def parts(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into at most `count` parts of nearly the same size, none of one sample if that can be helped."""
    n = len(batch["label"])
    count = max(1, min(count, n // 2))
    cut = {name: value.tensor_split(count) for name, value in batch.items() if value.dim() > 0}
    return [{name: values[i] for name, values in cut.items()} for i in range(count)]


def training_loader(samples: Samples, batches: EpochBatches, *, workers: int, pin_memory: bool = False) -> Loader:
    """Loader over `batches`; call `batches.start` before each iteration."""
    return make_loader(samples, batches, workers=workers, pin_memory=pin_memory)


def evaluation_loader(
    samples: Samples, indices: Sequence[int], batch_size: int, *, workers: int, pin_memory: bool = False
) -> Loader:
    """Loader over the given samples once, in order, the last batch smaller; every sample's seed is that of epoch 0."""
    keys = list(zip(indices, sample_seeds(0, 0, np.asarray(indices, np.int64)).tolist(), strict=True))
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return make_loader(samples, batches, workers=workers, pin_memory=pin_memory)
