"""What every operator's autograd registration shares."""

from typing import Any

import torch
from torch import Tensor


def refuse_second_backward(op: str) -> None:
    """Registers for ``fgvc_ext::<op>_backward`` a formula that raises; without one torch only warns and returns nothing."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{op}: a second backward (create_graph=True) is not supported")

    torch.library.register_autograd(f"fgvc_ext::{op}_backward", refuse)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like(tensor)``, so that a gradient keeps the layout without the tensor being saved."""
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()
