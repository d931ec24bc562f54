"""Which classes a model takes for one another."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes (`a` < `b`, indices and names) that were taken for one another."""

    a: int
    b: int
    name_a: str
    name_b: str
    a_as_b: int
    """Images of a that were called b."""
    b_as_a: int
    count: int
    """Both directions together."""
    share: float
    """`count` over the images of both classes."""


def confusion_matrix(target: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts int64 [C,C]: row = true class, column = predicted class. Labels [N] outside [0,C) raise IndexError."""
    if target.ndim != 1 or target.shape != predicted.shape:
        raise ValueError(
            "confusion_matrix: expected target and predicted as labels [N] of one length, "
            f"got {list(target.shape)} and {list(predicted.shape)}"
        )
    target, predicted = target.cpu().long(), predicted.cpu().long()
    for name, labels in (("target", target), ("predicted", predicted)):
        outside = labels[(labels < 0) | (labels >= num_classes)]
        if len(outside):
            raise IndexError(
                f"confusion_matrix: {name} holds label {outside[0].item()}, there are {num_classes} classes"
            )
    pairs = torch.bincount(target * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def confused_pairs(matrix: Tensor, classes: Sequence[str], top: int = 10) -> list[ConfusedPair]:
    """The pairs of classes confused most often, both directions together.

    Most confusions first, then the larger share, then the lower indices; pairs without any are left out.
    """
    matrix = _counts(matrix, len(classes), "confused_pairs")
    images = matrix.sum(1).tolist()
    both = torch.triu(matrix + matrix.T, diagonal=1)
    found = []
    for a, b in both.nonzero().tolist():
        forth, back = int(matrix[a, b]), int(matrix[b, a])
        share = (forth + back) / (images[a] + images[b])
        found.append(ConfusedPair(a, b, classes[a], classes[b], forth, back, forth + back, share))
    return sorted(found, key=lambda pair: (-pair.count, -pair.share, pair.a, pair.b))[:top]


def class_accuracy(matrix: Tensor) -> Tensor:
    """Share of each class's images that were recognised: float64 [C], NaN for a class without images."""
    return matrix.diagonal().double() / matrix.sum(1)


def confusable_group(matrix: Tensor, size: int) -> list[int]:
    """Classes that are confused among themselves: grown from the most confused pair, at most `size`, ascending.

    Each step takes the class with most confusions with the group so far (the lowest index among equals). It stops
    early where no further class is confused with the group; no confusion at all gives no class.
    """
    matrix = _counts(matrix, len(matrix), "confusable_group")
    both = (matrix + matrix.T).fill_diagonal_(0)
    if size < 1 or both.sum() == 0:
        return []
    group = [int(both.sum(1).argmax())] if size == 1 else list(divmod(int(both.argmax()), len(both)))
    while len(group) < size:
        ties = both[group].sum(0)
        ties[group] = 0
        if ties.max() == 0:
            break
        group.append(int(ties.argmax()))
    return sorted(group)


def write_confusions_csv(path: Path, pairs: Iterable[ConfusedPair]) -> Path:
    """One line a pair, most confused first: `class_a,class_b,a_as_b,b_as_a,count,share`."""
    path = Path(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("class_a", "class_b", "a_as_b", "b_as_a", "count", "share"))
        for pair in pairs:
            writer.writerow((pair.name_a, pair.name_b, pair.a_as_b, pair.b_as_a, pair.count, f"{pair.share:.6f}"))
    return path


def _counts(matrix: Tensor, num_classes: int, function: str) -> Tensor:
    if tuple(matrix.shape) != (num_classes, num_classes):
        raise ValueError(f"{function}: matrix: expected [{num_classes},{num_classes}], got {list(matrix.shape)}")
    return matrix.cpu().long()
