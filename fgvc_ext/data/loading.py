"""From a data set to batches on a device: samples with random numbers of their own, the processes that load them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from .crops import stacked
from .dataset import BrokenImageError, ImageDataset

Key = tuple[int, int]
"""Index of a sample in its data set, and the seed of its random numbers."""
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Views:
    """How features of the images, computed once, may stand in for samples that only flips augment.

    Attributes:
        plain: the transform without its random numbers.
        recipe: what decides the pixels that it makes, as JSON.
        flip: probability of the mirror image.
        precision, folder: of the features that are kept, and where; folder None: the default one.
    """

    plain: Callable[..., torch.Tensor]
    recipe: Mapping[str, Any]
    flip: float = 0.0
    precision: Literal["fp16", "fp32"] = "fp32"
    folder: Path | None = None


class Samples(Dataset):
    """Images of a data set, transformed with the random numbers of their keys.

    The transform draws from torch's CPU generator, which is seeded for each sample and put back afterwards.

    Args:
        transform: uint8 [3,H,W] → the sample's image. With an attribute `least_side` it may be given a reduced copy
            whose shorter side has at least so many pixels, and as second argument the photo's height and width.
        crops: images that the transform makes of one: a batch holds so many times fewer samples.
        normalise: what `to_device` does with images that the transform leaves as uint8 (`Preprocessing.normalise`).
        views: how features may stand in for them; or a text that says why images are needed, to follow "because".
    """

    in_memory = False
    """Whether batches are at hand, so that processes which load them would only be in the way."""

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[..., torch.Tensor],
        broken_images: Literal["error", "skip"] = "error",
        crops: int = 1,
        *,
        normalise: Callable[[torch.Tensor], torch.Tensor] | None = None,
        views: Views | str = "its transform may draw random numbers",
    ) -> None:
        self.dataset, self.transform, self.broken_images = dataset, transform, broken_images
        self.crops, self.normalise, self.views = crops, normalise, views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        index, seed = key
        least_side = getattr(self.transform, "least_side", None)
        try:
            if least_side is None:
                loaded: tuple[Any, ...] = (self.dataset.load(index),)
            else:
                loaded = self.dataset.load_at_least(index, least_side)
        except BrokenImageError:
            if self.broken_images == "error":
                raise
            return None
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reset the GPU's generator, which fork_rng(devices=[]) does not put back
            torch.default_generator.manual_seed(seed)
            image = self.transform(*loaded)
        return {"image": image, "label": int(self.dataset.labels[index]), "index": index, "seed": seed}

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any] | None] | Batch | Exception:
        """The samples of a batch, or what is wrong with one of them.

        The error is handed over rather than raised, since a loading process would wrap it in its own traceback.
        """
        try:
            return [self[key] for key in keys]
        except (BrokenImageError, ValueError, OSError) as error:
            return error


def collate(samples: Sequence[dict[str, Any] | None] | Batch | Exception) -> Batch | Exception:
    """Stack samples: image [N,3,H,W] (five crops: [N,5,3,H,W]); label, index, seed int64 [N]; skipped int64 []."""
    if isinstance(samples, (Exception, dict)):  # what is wrong, or a batch that is one already
        return samples
    kept = [sample for sample in samples if sample is not None]
    batch = {name: torch.tensor([s[name] for s in kept], dtype=torch.int64) for name in ("label", "index", "seed")}
    batch["image"] = stacked([s["image"] for s in kept]) if kept else torch.empty(0, 3, 1, 1)
    batch["skipped"] = torch.tensor(len(samples) - len(kept))
    return batch


def to_device(
    batch: Batch,
    device: torch.device,
    *,
    normalise: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channels_last: bool = False,
) -> Batch:
    """The batch on the device, without waiting for it, its images as a network takes them.

    uint8 images are normalised there (`Samples.normalise`); float ones, from a transform of one's own, are left as they
    are. [N,3,H,W] gets the order in memory that is asked for, other shapes are contiguous.
    """
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    images = moved["image"]
    if normalise is not None and images.dtype == torch.uint8:
        images = normalise(images)
    layout = torch.channels_last if channels_last and images.dim() == 4 else torch.contiguous_format
    return {**moved, "image": images.contiguous(memory_format=layout)}


def _leave_signals_to_the_main_process(_: int) -> None:
    # A scheduler signals every process; a worker that died of it would take the final checkpoint with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader(DataLoader):
    """A DataLoader whose errors are those of its samples, and whose processes end when it is closed.

    It can be iterated again and again; an iteration that was left in the middle does not matter to the next. Close it
    in a `finally`: its processes ignore the signal by which Python ends the children that are left at exit, and would
    be waited for without end.
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


def make_loader(samples: Samples, batches: Any, *, workers: int, **options: Any) -> Loader:
    """Loader of the batches of keys that `batches` yields, whose processes stay until it is closed.

    `options` go to DataLoader.
    """
    workers = 0 if samples.in_memory else workers
    options["persistent_workers"] = workers > 0
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
