"""Labels outside the range of classes: which they are, and the error that names the first of them."""

import torch
from torch import Tensor


def wrong_labels(labels: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """bool [N]: the labels that are neither in [0, classes) nor ``ignore_index``."""
    wrong = (labels < 0) | (labels >= classes)
    return wrong if ignore_index is None else wrong & (labels != ignore_index)


def look_at_labels(op: str, argument: str, labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Raises IndexError for the first wrong label. Waits for the labels' device.

    Args:
        op: the operator that the message names.
        argument: the name of ``labels`` in that operator.
        labels: int64 [N].
        classes: the number of classes.
        ignore_index: a label outside the range that is allowed, if there is one.
    """
    wrong = wrong_labels(labels, classes, ignore_index)
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    nor = "" if ignore_index is None else f", nor ignore_index = {ignore_index}"
    raise IndexError(
        f"{op}: {argument}[{row}] = {int(labels[row])} is not in [0, {classes}), the range of {classes} classes{nor}"
    )


def look_at_labels_on_cpu(
    op: str, argument: str, labels: Tensor, classes: int, ignore_index: int | None = None
) -> None:
    """:func:`look_at_labels` where looking costs no wait: not on other devices, and not while a graph is compiled."""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        look_at_labels(op, argument, labels, classes, ignore_index)
