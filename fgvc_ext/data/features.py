"""What a frozen network makes of a data set's images, kept in a file and read in the images' place.

A file holds one array [N,V,h,w,C] (NumPy's .npy, memory-mapped): of N images V views, plain and perhaps flipped, each
in the order in memory of a channels_last batch. Beside it lies a .json with everything that decided its numbers, whose
hash is their name. Both appear whole or not at all; one process makes them while others that want the same wait. Who
computes the features is `training/features.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgvc_ext.atomic_files import NO_LOCKS, write_json

from .birds.dataset import default_cache_dir
from .dataset import BrokenImageError
from .loading import Batch, Key, Samples

DTYPES = {"fp16": np.float16, "fp32": np.float32}
SPARE = 2**28
"""Bytes that a cache leaves free on its disk."""


@dataclass(frozen=True)
class FeatureCache:
    """The place of one array of features.

    Args:
        folder: shared by all that want it; made if missing. None: `default_cache_dir()`/features.
        facts: everything that decides the numbers, as JSON: weights, images, preprocessing, …
    """

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path | None, facts: Mapping[str, Any]) -> FeatureCache:
        return cls(default_cache_dir() / "features" if folder is None else folder, facts)

    @property
    def key(self) -> str:
        """sha256 of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def file(self) -> Path:
        return self.folder / f"features-{self.key[:32]}.npy"

    def read(self) -> Features | None:
        """The features; None where they are not there, or not whole."""
        try:
            described = json.loads(self.file.with_suffix(".json").read_text())
            array = np.load(self.file, mmap_mode="r", allow_pickle=False)
            if described["key"] != self.key or list(array.shape) != described["shape"]:
                return None
            return Features(array, frozenset(described["broken"]))
        except (OSError, EOFError, KeyError, TypeError, ValueError):
            return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that makes the features; others wait until it is done or has ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.file.with_suffix(".lock"), "w") as stream:
            try:
                # A record lock, which processes that load images do not inherit: a killed maker holds it no longer.
                fcntl.lockf(stream, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks: the same features may be made twice
                if error.errno not in NO_LOCKS:
                    raise
            yield

    @contextlib.contextmanager
    def writing(self, shape: Sequence[int], precision: str, broken: set[int]) -> Iterator[np.ndarray]:
        """An array to be filled, which is published when the context ends without an error. The lock must be held.

        Args:
            broken: rows that stay empty, as their images cannot be read; it may be filled meanwhile.

        Raises:
            OSError: the disk has not so much space.
        """
        self._remove_what_killed_processes_left()
        needed, free = size_of(shape, precision), shutil.disk_usage(self.folder).free
        if needed + SPARE > free:
            raise self._no_room(needed, f"where {told(free)} are free")
        partial = self.folder / f".{self.file.name}.{os.getpid()}.partial"
        try:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=DTYPES[precision], shape=tuple(shape))
            try:
                _reserve(partial)
            except OSError as error:
                raise self._no_room(needed, f"but: {error.strerror}") from error
            yield array
            array.flush()
            del array
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, self.file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        described = {"key": self.key, "facts": self.facts, "shape": list(shape), "broken": sorted(broken)}
        write_json(self.file.with_suffix(".json"), described)

    def _remove_what_killed_processes_left(self) -> None:
        """Unfinished files, of these features and of others: those whose lock nobody holds."""
        for left in self.folder.glob(".features-*.npy.*.partial"):
            made = self.folder / left.name[1:].partition(".npy.")[0]
            if made == self.file.with_suffix(""):  # the lock is ours; a second handle would let go of it
                left.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError), open(made.with_suffix(".lock"), "a") as stream:  # another user's stays
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)

    def _no_room(self, needed: int, cause: str) -> OSError:
        return OSError(
            f"features: {told(needed)} are needed in {self.folder}, {cause}: --data.cache FOLDER names another place, "
            "--data.features images does without"
        )


def _reserve(file: Path) -> None:
    """Take the whole file's place on the disk now: where a quota or another run leaves too little, a write into mapped
    memory would end the process without a word (SIGBUS)."""
    with contextlib.suppress(AttributeError), open(file, "r+b") as stream:  # not every system has the call
        try:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # nor every file system
                raise


@dataclass(frozen=True)
class Features:
    """Features of a data set's images.

    Attributes:
        array: [N,V,h,w,C], memory-mapped.
        broken: rows whose images cannot be read.
    """

    array: np.ndarray
    broken: frozenset[int] = frozenset()

    def batch(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """A view each of these images, [n,C,h,w] in channels_last order."""
        taken = np.asarray(self.array)[np.asarray(rows, np.int64), np.asarray(views, np.int64)]
        return torch.from_numpy(taken).permute(0, 3, 1, 2)


def size_of(shape: Sequence[int], precision: str) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[precision]).itemsize


def told(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


class FeatureSamples(Samples):
    """Samples whose images are replaced by features: the same keys, labels and flips, no pixels.

    Args:
        samples: those of the images.
        features: of the data set `whole`, of which the samples' own is the part `rows`.
        flip: probability of the flipped view, drawn from the sample's seed as `TrainCrop` draws it.
        rows: row of each sample in the features; None: they are the same.

    Raises:
        BrokenImageError: an image that could not be read when the features were made, and is not to be skipped.
    """

    in_memory = True

    def __init__(
        self, samples: Samples, features: Features, *, flip: float = 0.0, rows: Sequence[int] | None = None
    ) -> None:
        super().__init__(samples.dataset, samples.transform, samples.broken_images)
        self.features, self.flip = features, flip
        self.rows = np.arange(len(samples)) if rows is None else np.asarray(rows, np.int64)
        self._broken = {index for index, row in enumerate(self.rows.tolist()) if row in features.broken}
        if self._broken and self.broken_images == "error":
            index = min(self._broken)
            self.dataset.load(index)  # which says what is wrong, unless the file was mended meanwhile
            raise BrokenImageError(f"cannot decode image {self.dataset.ids[index]} (index {index}): when it was cached")

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        batch = self.__getitems__([key])
        if not len(batch["label"]):
            return None
        index, seed = key
        return {"image": batch["image"][0], "label": int(batch["label"][0]), "index": index, "seed": seed}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """A whole batch: image [n,C,h,w] in the features' dtype, the rest as `collate` has it."""
        kept = [key for key in keys if key[0] not in self._broken]
        index, seed = (torch.tensor([key[i] for key in kept], dtype=torch.int64) for i in (0, 1))
        views = [is_flipped(key[1], self.flip) for key in kept]
        return {
            "image": self.features.batch(self.rows[index.numpy()].tolist(), views),
            "label": self.dataset.labels[index],
            "index": index,
            "seed": seed,
            "skipped": torch.tensor(len(keys) - len(kept)),
        }


def is_flipped(seed: int, probability: float) -> bool:
    """Whether `TrainCrop` flips a sample of this seed, where nothing else draws: as v2.RandomHorizontalFlip does."""
    if not probability:
        return False
    return bool(torch.rand(1, generator=torch.Generator().manual_seed(seed)) < probability)
