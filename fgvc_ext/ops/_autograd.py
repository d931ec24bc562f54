"""What every operator's autograd shares.

An operator is an ``autograd.Function`` beside its public function, whose forward and backward are one call each of
``torch.ops.fgvc_ext``. (With ``torch.library.register_autograd`` in its place, forward and backward of a small operator
took half as long again.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def call_backward(backward: Callable[..., Any], *arguments: Any) -> Any:
    """``backward(*arguments)``, the backward operator of an op."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # create_graph=True: the refusal must be recorded
        return backward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # nothing to record: saves a third of the call
        return backward(*arguments)


def refuse_second_backward(op: str) -> None:
    """Differentiating what ``<op>_backward`` gives raises and names the operator; torch alone would only warn."""

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{op}: a second backward (create_graph=True) is not supported")

    torch.library.register_autograd(f"fgvc_ext::{op}_backward", refuse)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(tensor)``: a gradient keeps the layout without the tensor being saved."""
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()
