"""Synthetic birds: the fine-grained data set that needs no download and knows what no benchmark knows.

Species come as twins that differ in one small part (beak, crown, eye, breast, wing or tail), while pose, size, place,
facing, light and a cluttered background vary freely. Beside labels it holds true boxes, part positions, and for every
two species the parts that tell them apart, so that localisation and attention can be measured, not only accuracy.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import multiprocessing
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cache as cached_result
from pathlib import Path
from random import Random

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from ..dataset import ImageDataset
from .drawing import draw_bird
from .species import PARTS, Looks, differing_parts, make_species

DRAWING_SOURCES = ("dataset", "drawing", "scene", "shapes", "species")
"""The modules that decide every pixel."""

_Arrays = dict[str, np.ndarray]


def default_cache_dir() -> Path:
    """`$FGVC_EXT_CACHE`, else `$XDG_CACHE_HOME/fgvc_ext`, else `~/.cache/fgvc_ext`."""
    own = os.environ.get("FGVC_EXT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fgvc_ext"


@cached_result
def drawing_key() -> str:
    """Changes with the code that draws and with Pillow's version: a cache file is only found by what would draw it.

    Line endings do not count. The key is no part of the fingerprint, which holds the pixels themselves.
    """
    digest = hashlib.sha256(f"Pillow {PIL.__version__}".encode())
    for module in DRAWING_SOURCES:
        digest.update(b"\0" + Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


class SyntheticBirds(ImageDataset):
    """Procedurally drawn birds, deterministic by seed.

    Parameters
    ----------
    split : "train" or "test". Each image depends on (seed, split, class, number) alone: more images a class extend a
        set and leave the others as they are.
    classes, seed : they decide the species. Species 2i and 2i + 1 are twins.
    train_per_class, test_per_class : images of each species in either split.
    image_size : side of the square images in pixels, at least 32; the small parts need about 96.
    cache : True keeps the drawn images under `default_cache_dir()`, a path under that folder, False draws anew.
        A cache file that is damaged, or of other drawing code or another Pillow, is drawn again; several processes
        may make the same one at once.

    Attributes beside those of `ImageDataset`
    -----------------------------------------
    parts : float32 [N,P,3], (x, y, visible) in pixels; invisible where a leaf or the image's edge hides the part.
    part_names : the P names.
    class_attributes : for each species, part -> look.
    pairs : (first twin, second twin, the one part in which they differ).
    """

    per_sample = (*ImageDataset.per_sample, "parts", "_rows")
    boxes: Tensor
    part_names: Sequence[str] = PARTS

    def __init__(
        self,
        split: str,
        *,
        classes: int = 20,
        train_per_class: int = 30,
        test_per_class: int = 20,
        image_size: int = 128,
        seed: int = 0,
        cache: bool | str | os.PathLike[str] = True,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        per_class = train_per_class if split == "train" else test_per_class
        if per_class < 1 or image_size < 32:
            raise ValueError(
                f"SyntheticBirds: expected at least 1 image a class and 32 pixels, got {per_class} and {image_size}"
            )
        names, self.class_attributes = make_species(classes, seed)
        self.image_size, self.seed = image_size, seed
        recipe = f"{split}-{classes}-{per_class}-{image_size}-{seed}"
        folder = (default_cache_dir() if cache is True else Path(cache)) if cache else None
        arrays = _cached(folder, f"{recipe}-{drawing_key()}", lambda: self._draw(split, per_class))
        self._images = torch.from_numpy(arrays["images"])
        self._rows = torch.arange(len(self._images))
        self._recipe = recipe
        self.parts = torch.from_numpy(arrays["parts"])
        super().__init__(
            "synthetic",
            split,
            names,
            torch.arange(classes).repeat_interleave(per_class),
            [f"{split}/{label:03d}/{i:04d}" for label in range(classes) for i in range(per_class)],
            torch.from_numpy(arrays["boxes"]),
        )

    def load(self, index: int) -> Tensor:
        return self._images[self._rows[index]].clone()

    def content_key(self) -> str:
        return f"{self._recipe} {hashlib.sha256(self._images.numpy().data).hexdigest()}"

    @property
    def pairs(self) -> list[tuple[int, int, str]]:
        return [(i, i + 1, self.separating_part(i, i + 1)) for i in range(0, len(self.classes) - 1, 2)]

    def separating_part(self, class_a: int, class_b: int) -> str:
        """The part that tells two species apart; several are joined by " + " (empty for a species and itself)."""
        return " + ".join(differing_parts(self._looks(class_a), self._looks(class_b)))

    def _looks(self, label: int) -> Looks:
        if not 0 <= label < len(self.class_attributes):
            raise IndexError(f"class: expected 0..{len(self.class_attributes) - 1}, got {label}")
        return self.class_attributes[label]

    def _draw(self, split: str, per_class: int) -> _Arrays:
        """All images, drawn by as many processes as there are processors. Each fills its rows of shared memory and
        ends by itself, so that none is left over should this process be killed."""
        todo = [(label, i) for label in range(len(self.class_attributes)) for i in range(per_class)]
        side = self.image_size
        arrays = {
            "images": _shared((len(todo), 3, side, side), np.uint8),
            "boxes": _shared((len(todo), 4), np.float32),
            "parts": _shared((len(todo), len(PARTS), 3), np.float32),
        }

        def draw_rows(rows: range) -> None:
            bar = tqdm(
                rows, f"drawing birds ({split})", unit="image", disable=None if rows.start == 0 else True, leave=False
            )
            for row in bar:
                label, i = todo[row]
                bird = draw_bird(self.class_attributes[label], side, Random(f"{self.seed}/{split}/{label}/{i}"))
                arrays["images"][row] = np.asarray(bird.image).transpose(2, 0, 1)
                arrays["boxes"][row], arrays["parts"][row] = bird.box, bird.parts

        _in_parallel(draw_rows, len(todo), _processes(len(todo)))
        return arrays


def _shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros in memory that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def _processes(images: int) -> int:
    can_fork = hasattr(os, "sched_getaffinity") and not multiprocessing.current_process().daemon
    return min(len(os.sched_getaffinity(0)), 8, images // 50) if can_fork else 1


def _in_parallel(work: Callable[[range], None], rows: int, processes: int) -> None:
    """`work` over `range(rows)`, cut into strides: this process takes the first, forked ones the others."""
    strides = [range(first, rows, max(1, processes)) for first in range(max(1, processes))]
    context = multiprocessing.get_context("fork") if len(strides) > 1 else None
    others = [context.Process(target=work, args=(stride,)) for stride in strides[1:]] if context else []
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; these processes run Pillow and NumPy on memory of their own.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in others:
            process.start()
    work(strides[0])
    for process, stride in zip(others, strides[1:], strict=True):
        process.join()
        if process.exitcode != 0:  # killed, out of memory, ...: its rows are drawn here
            work(stride)


def _cached(folder: Path | None, recipe: str, make: Callable[[], _Arrays]) -> _Arrays:
    if folder is None:
        return make()
    file = folder / f"synthetic-birds-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.npz"
    arrays = _read(file, recipe)
    if arrays is None:
        arrays = make()
        try:
            _write(file, recipe, arrays)
        except OSError as error:
            warnings.warn(f"the drawn birds are not cached: {error}", stacklevel=3)
    return arrays


def _read(file: Path, recipe: str) -> _Arrays | None:
    """The arrays of a whole cache file of this recipe; None where it is missing, damaged or another's."""
    try:
        with np.load(file, allow_pickle=False) as stored:  # reading checks the CRC of each array
            arrays = {name: stored[name] for name in ("images", "boxes", "parts")}
            return arrays if stored["recipe"].item() == recipe else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write(file: Path, recipe: str, arrays: _Arrays) -> None:
    """Write beside the file, then rename: readers and other writers only ever see whole files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, allow_pickle=False, recipe=np.array(recipe), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
