"""What a model costs for one image: multiply-adds and parameters, as papers count them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
ELEMENTWISE = {
    "native_batch_norm": 2,
    "cudnn_batch_norm": 2,
    "_native_batch_norm_legit_no_training": 2,
    "relu": 1,
    "relu_": 1,
    "_prelu_kernel": 1,
}
"""Operators that the wider convention counts, and how often for each element of their result."""


@dataclass(frozen=True)
class Cost:
    """Of one forward pass in evaluation.

    Attributes:
        multiply_adds: of convolutions and matrix products alone.
        with_elementwise: the same, with two for each element that a BatchNorm gives and one for each of a ReLU or
            PReLU; pooling and additions count nothing. The numbers of ELoPE's Table 3 follow from this convention.
        parameters: of the whole model.
    """

    multiply_adds: int
    with_elementwise: int
    parameters: int


def cost(model: nn.Module, height: int, width: int | None = None) -> Cost:
    """Run the model once, in evaluation, on one black image of this size, and count with torch's own flop counter."""
    parameter, training = next(model.parameters()), model.training
    images = torch.zeros(1, 3, height, height if width is None else width, device=parameter.device)
    extra: dict[Any, Any] = {getattr(_aten, name): _per_element(times) for name, times in ELEMENTWISE.items()}
    model.eval()
    try:
        # Not in inference mode, in which torch does not let the counter see what a batch norm is made of.
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
            model(images)
    finally:
        model.train(training)
    counts = {str(name).rpartition(".")[2]: int(n) for name, n in counter.get_flop_counts()["Global"].items()}
    wide = sum(n for name, n in counts.items() if name in ELEMENTWISE)
    products = (sum(counts.values()) - wide) // 2
    return Cost(products, products + wide, sum(p.numel() for p in model.parameters()))


def _per_element(times: int) -> Any:
    def count(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
        """torch gives the shapes of what goes in and comes out; of a batch norm's several results the first counts."""
        shape = out_shape[0] if isinstance(out_shape, (list, tuple)) and _nested(out_shape) else out_shape
        return times * prod(shape)

    return count


def _nested(shape: Any) -> bool:
    return len(shape) > 0 and not isinstance(shape[0], int)
