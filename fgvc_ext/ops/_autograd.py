"""What every operator's autograd shares.

An operator is an ``autograd.Function`` beside its public function, whose forward and backward are one call each of
``torch.ops.fgvc_ext``. (``torch.library.register_autograd`` costs about 80 % more per call in forward and backward.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _SecondBackward(torch.autograd.Function):
    """Calls a backward operator so that differentiating its result raises, and names the operator."""

    @staticmethod
    def forward(ctx: Any, op: str, function: Callable[..., Any], *arguments: Any) -> Any:
        ctx.op = op
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{ctx.op}: a second backward (create_graph=True) is not supported")


def call_backward(op: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, the backward operator of ``op``; a second backward through it is refused by name."""
    if torch.is_grad_enabled():  # create_graph=True
        return _SecondBackward.apply(op, function, *arguments)
    return function(*arguments)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(tensor)``: a gradient keeps the layout without the tensor being saved."""
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()
