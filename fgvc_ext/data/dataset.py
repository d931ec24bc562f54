"""What every data set offers, and how an image file becomes a tensor."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from .file_contents import content_of

MAX_PIXELS = 500_000_000
"""What `decode_image` decodes by default: 20,000 x 20,000 pixels fit (1.2 GB as RGB), a decompression bomb does not."""

Result = TypeVar("Result")
_open_lock = threading.Lock()


class DatasetError(ValueError):
    """A data set that is not as its format says. The message names file, line (where there is one) and cause."""

    @classmethod
    def at(cls, file: Path, line: int | None, cause: str) -> DatasetError:
        """The error of one file, or of one line of it (counted from 1)."""
        return cls(f"{file}{'' if line is None else f', line {line}'}: {cause}")


class BrokenImageError(RuntimeError):
    """An image that cannot be decoded.

    Attributes: `path`, `index` (position in the data set, None outside one) and `cause`. They survive pickling. A
    DataLoader worker's error is rebuilt from its message alone, which names all three as well.
    """

    def __init__(self, message: str, *, path: Path | None = None, index: int | None = None, cause: str = "") -> None:
        super().__init__(message)
        self.path, self.index, self.cause = path, index, cause

    @classmethod
    def of(cls, path: Path, index: int | None, cause: str) -> BrokenImageError:
        position = "" if index is None else f" (index {index})"
        return cls(f"cannot decode image {path}{position}: {cause}", path=path, index=index, cause=cause)


def decode_image(path: str | os.PathLike[str], *, index: int | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image file as uint8 RGB [3,H,W], fully decoded and turned upright as its EXIF orientation says.

    Greyscale and palette images become RGB, 16-bit greyscale is scaled to 8 bits, CMYK is converted, transparency is
    laid over white, and of an animation the first frame is taken. Nothing is guessed about images without a defined
    range (32-bit float).

    Raises `BrokenImageError` for a missing, empty, truncated, foreign or unsupported file and for more than
    `max_pixels` pixels; its message holds path, `index` (where given) and cause.
    """
    return _read(path, index, lambda data: _decode(data, max_pixels)[0]).contiguous()


def decode_at_least(
    path: str | os.PathLike[str], least_side: int | None = None, *, index: int | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """`decode_image`, of a large JPEG perhaps at 1/2, 1/4 or 1/8 of its size, in the order in memory of the decoder.

    A JPEG is reduced while its shorter side keeps `least_side` pixels (None: never) and where both of its sides are
    multiples of the factor: otherwise the copy would be stretched by a part of a pixel, which is more than a grey level
    at edges. Returns uint8 [3,h,w] and height and width of the whole image.
    """
    return _read(path, index, lambda data: _decode(data, MAX_PIXELS, least_side))


def verify_image(
    path: str | os.PathLike[str], *, index: int | None = None, max_pixels: int = MAX_PIXELS, header_only: bool = False
) -> None:
    """Raise the `BrokenImageError` that `decode_image` would raise, at a part of its cost.

    A JPEG is decoded at an eighth of its size: all of its data is read, few pixels are computed. With `header_only`,
    only the header is read (and, of a PNG, the checksums): a truncated JPEG is not found then.
    """
    _read(path, index, lambda data: _verify(data, max_pixels, header_only))


def _read(path: str | os.PathLike[str], index: int | None, use: Callable[[bytes], Result]) -> Result:
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenImageError.of(path, index, error.strerror or str(error)) from error
    if not data:
        raise BrokenImageError.of(path, index, "the file is empty (0 bytes)")
    try:
        return use(data)
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ...: all mean one thing
        raise BrokenImageError.of(path, index, str(error) or type(error).__name__) from error


def _decode(data: bytes, max_pixels: int, least_side: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    image = _open(data, max_pixels)
    width = image.width
    if least_side is not None:
        factor = _reduction(*image.size, least_side)
        image.draft(None, (image.width // factor, image.height // factor))  # only a JPEG takes notice
    factor = width // image.width
    with _whole_images_only:
        image.load()
    pixels = torch.from_numpy(np.array(_to_rgb(_upright(image)), dtype=np.uint8)).permute(2, 0, 1)
    return pixels, (pixels.shape[1] * factor, pixels.shape[2] * factor)


def _reduction(width: int, height: int, least_side: int) -> int:
    """The factor by which an image of this size may be reduced in decoding, see `decode_at_least`."""
    for factor in (8, 4, 2):
        if width % factor == height % factor == 0 and min(width, height) >= factor * least_side:
            return factor
    return 1


def _verify(data: bytes, max_pixels: int, header_only: bool) -> None:
    image = _open(data, max_pixels)
    with _whole_images_only:
        if header_only:
            image.verify()
            return
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))  # only a JPEG takes notice
        image.load()
    _to_rgb(image)


class _WholeImagesOnly:
    """While any thread is inside, Pillow refuses truncated files, whatever the program set elsewhere.

    `ImageFile.LOAD_TRUNCATED_IMAGES` is a global of Pillow, which pads such files with grey. It is put back when the
    last thread leaves; the lock is not held meanwhile, so threads decode side by side.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_whole_images_only = _WholeImagesOnly()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = _open_header(data)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels}")
    return image


def _open_header(data: bytes) -> Image.Image:
    """Read the header. Pillow's own size limit is a global that refuses legitimate images; `max_pixels` is ours."""
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data))
        except Image.UnidentifiedImageError:
            raise ValueError(f"not an image (it begins with {data[:8]!r})") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # EXIF data that cannot be read says nothing about the orientation
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("32-bit float images have no defined range; convert the file to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer values {values.min()}..{values.max()} exceed 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


Self = TypeVar("Self", bound="ImageDataset")


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images with class labels; the base of every data set here.

    Attributes
    ----------
    name, split : what and which part of it.
    classes : names, position = label.
    labels : int64 [N], each in [0, len(classes)).
    ids : stable sample names (relative path or official id), unique.
    boxes : float32 [N,4] xyxy in pixels of the upright image, or None.

    `load(i)` gives the uint8 RGB image [3,H,W]; `dataset[i]` gives (image, label).
    """

    per_sample: tuple[str, ...] = ("labels", "ids", "boxes")
    """Attributes with one entry a sample: what `subset` cuts."""
    part_of: tuple[ImageDataset, list[int]] | None = None
    """What a validation share has left of a data set: that data set, and which of its samples these are. What is
    computed of its images once serves every share."""

    def __init__(
        self,
        name: str,
        split: str,
        classes: Sequence[str],
        labels: Tensor,
        ids: Sequence[str],
        boxes: Tensor | None = None,
    ) -> None:
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise TypeError(f"labels: expected int64 [N], got {labels.dtype} {list(labels.shape)}")
        if len(ids) != len(labels):
            raise ValueError(f"ids: expected {len(labels)} (one a label), got {len(ids)}")
        if boxes is not None and tuple(boxes.shape) != (len(labels), 4):
            raise ValueError(f"boxes: expected [{len(labels)}, 4], got {list(boxes.shape)}")
        outside = ((labels < 0) | (labels >= len(classes))).nonzero().flatten()
        if len(outside):
            i = int(outside[0])
            raise DatasetError(f"label {int(labels[i])} of sample {ids[i]}: expected 0..{len(classes) - 1}")
        self.name, self.split, self.classes = name, split, list(classes)
        self.labels, self.ids, self.boxes = labels, list(ids), boxes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.load(index), int(self.labels[index])

    def load(self, index: int) -> Tensor:
        """The image as uint8 RGB [3,H,W], in any order in memory. Raises `BrokenImageError`."""
        raise NotImplementedError

    def load_at_least(self, index: int, least_side: int) -> tuple[Tensor, tuple[int, int]]:
        """The image, or a reduced copy whose shorter side has at least `least_side` pixels where that is faster.

        Returns uint8 RGB [3,h,w] and the height and width of the whole image. Raises `BrokenImageError`.
        """
        image = self.load(index)
        return image, (image.shape[-2], image.shape[-1])

    def content_key(self) -> str:
        """What tells this content from other images under the same ids; part of the fingerprint."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 over name, split, classes, ids, labels, boxes and content key; where the data lie is no part of it."""
        digest = hashlib.sha256()
        labels = ",".join(str(label) for label in self.labels.tolist())
        boxes = "" if self.boxes is None else str(self.boxes.tolist())
        for field in (self.name, self.split, *self.classes, "", *self.ids, labels, boxes, self.content_key()):
            digest.update(field.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def subset(self: Self, indices: Sequence[int], split: str | None = None) -> Self:
        """The samples at `indices`, in that order, as a data set of the same type; images are shared, not copied."""
        part = copy.copy(self)
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        for field in self.per_sample:
            values = getattr(self, field)
            if isinstance(values, Tensor):
                setattr(part, field, values[rows])
            elif values is not None:
                setattr(part, field, [values[i] for i in rows.tolist()])
        part.split = self.split if split is None else split
        part.part_of = None
        return part

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.split!r}, {len(self)} images, {len(self.classes)} classes)"


class ImageFiles(ImageDataset):
    """A data set of image files: `paths` holds one path a sample."""

    per_sample = (*ImageDataset.per_sample, "paths")

    def __init__(self, *args: Any, paths: Sequence[Path], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(paths) != len(self.ids):
            raise ValueError(f"paths: expected {len(self.ids)} (one an id), got {len(paths)}")
        self.paths = list(paths)

    def load(self, index: int) -> Tensor:
        return decode_at_least(self.paths[index], index=index)[0]

    def load_at_least(self, index: int, least_side: int) -> tuple[Tensor, tuple[int, int]]:
        if type(self).load is not ImageFiles.load:  # a subclass cuts, turns or replaces its images
            return super().load_at_least(index, least_side)
        return decode_at_least(self.paths[index], least_side, index=index)

    def content_key(self) -> str:
        """What the files hold, see `content_of`."""
        return content_of(self.paths)


def split_validation(dataset: Self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
    """Hold out `fraction` of every class (rounded, but never all of it): (train, val) with the order of samples kept.

    Which samples go depends on the seed and the sample ids alone, not on their order or on any generator's state.
    Raises ValueError for a fraction outside (0, 1) and where no class can spare an image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"split_validation: expected a fraction between 0 and 1, got {fraction}")
    ranks = [hashlib.sha256(f"{seed}/{sample}".encode("utf-8", "surrogateescape")).digest() for sample in dataset.ids]
    held_out: set[int] = set()
    for label in range(len(dataset.classes)):
        members = (dataset.labels == label).nonzero().flatten().tolist()
        count = min(round(len(members) * fraction), len(members) - 1)
        held_out.update(sorted(members, key=ranks.__getitem__)[: max(count, 0)])
    if not held_out:
        raise ValueError(
            f"split_validation: {fraction} of {len(dataset)} images in {len(dataset.classes)} classes is no image"
        )
    kept = [i for i in range(len(dataset)) if i not in held_out]
    train = dataset.subset(kept)
    train.part_of = (dataset, kept)
    return train, dataset.subset(sorted(held_out), "val")
