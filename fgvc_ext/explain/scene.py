"""The test images as a report sees them: decoded several at a time, with what is known of each in the crop."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fgvc_ext.explain.crop import CentreCrop

if TYPE_CHECKING:
    from fgvc_ext.data.dataset import ImageDataset


def shown_rows(dataset: ImageDataset, count: int) -> list[int]:
    """The rows that stand for a data set in a figure, at most `count`: evenly spread over it, not chosen."""
    count = min(count, len(dataset))
    return [int((n + 0.5) * len(dataset) / count) for n in range(count)]


class _Image(NamedTuple):
    """An image, and what is known of it, in pixels of the crop."""

    prepared: Tensor
    shown: Tensor | None  # where the image is to be kept
    box: Tensor | None
    parts: Tensor | None


class Scene:
    """A data set in the crop's pixels.

    Attributes:
        boxes: float32 [N,4] xyxy, cut to the crop; None for a data set without.
        parts: float32 [N,P,3], x, y and whether the part is visible within the crop; None for a data set without.
        part_names: their names.

    Boxes and parts are placed by `batches`, since only a decoded image has a size; before, they are NaN.
    """

    def __init__(self, dataset: ImageDataset, frame: CentreCrop, prepare: Callable[[Tensor], Tensor]) -> None:
        self.dataset, self.frame, self.prepare = dataset, frame, prepare
        parts: Tensor | None = getattr(dataset, "parts", None)
        self.boxes = None if dataset.boxes is None else torch.full((len(dataset), 4), torch.nan)
        self.parts = None if parts is None else torch.full_like(parts, torch.nan)
        self.part_names: list[str] = list(getattr(dataset, "part_names", []))
        self._truth = parts
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def batches(
        self, batch_size: int, keep: Collection[int] = (), rows: Sequence[int] | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Rows (None: all) in their order, and their prepared images [n,3,crop,crop]. Those of `keep` stay in memory.

        Threads decode the next batch while this one is looked at.

        Raises:
            BrokenImageError: an image that cannot be decoded.
        """
        wanted: Sequence[int] = range(len(self.dataset)) if rows is None else rows
        waiting = deque[tuple[Sequence[int], list[Future[_Image]]]]()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(wanted), batch_size):
                batch = wanted[first : first + batch_size]
                waiting.append((batch, [pool.submit(self._load, row, row in keep) for row in batch]))
                if len(waiting) > 1:
                    yield self._placed(*waiting.popleft())
            while waiting:
                yield self._placed(*waiting.popleft())

    def prepared(self, rows: Sequence[int]) -> Tensor:
        """The prepared images [n,3,crop,crop] of rows that `batches` has kept."""
        return torch.stack([self._kept[row][0] for row in rows])

    def shown(self, row: int) -> Tensor:
        """The crop of an image, to be shown: uint8 [3,crop,crop]. It is decoded again unless `batches` has kept it."""
        return self._kept[row][1] if row in self._kept else self.frame.image(self.dataset.load(row))

    def _load(self, row: int, keep: bool) -> _Image:
        image = self.dataset.load(row)
        height, width = image.shape[-2:]
        box = parts = None
        if self.dataset.boxes is not None:
            box = self.frame.boxes(self.dataset.boxes[row], height, width)
        if self._truth is not None:
            places = self.frame.points(self._truth[row, :, :2], height, width)
            inside = ((places >= 0) & (places < self.frame.crop)).all(1)
            parts = torch.cat([places, (self._truth[row, :, 2:] > 0) & inside[:, None]], 1)
        return _Image(self.prepare(image), self.frame.image(image) if keep else None, box, parts)

    def _placed(self, rows: Sequence[int], loaded: list[Future[_Image]]) -> tuple[Sequence[int], Tensor]:
        images = [future.result() for future in loaded]
        for row, image in zip(rows, images, strict=True):
            if self.boxes is not None and image.box is not None:
                self.boxes[row] = image.box
            if self.parts is not None and image.parts is not None:
                self.parts[row] = image.parts
            if image.shown is not None:
                self._kept[row] = image.prepared, image.shown
        return rows, torch.stack([image.prepared for image in images])
