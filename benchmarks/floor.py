"""The call floor: one operator that allocates a small result and does nothing, compiled at the first use.

It is called as ours are: through ``fgvc_ext.ops._operator.Operator``, with a gradient where one is asked for. What an
operator of ours takes beyond it are its argument checks and its work.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from fgvc_ext.ops._operator import Operator, backward_operator, dense_strides

FOLDER = Path(__file__).parent
TORCH_2_11 = "0x020b000000000000"  # the stable ABI that the operators are built for


def do_nothing(first: Tensor) -> Tensor:
    """[N] for a tensor [N,…]; the gradient is memory that nobody has written to."""
    forward, _ = operators()
    return forward(first, 4, 0.5)[0]


@cache
def operators() -> tuple[Operator, Operator]:
    """Needs the C++ compiler and ninja that built the package."""
    cpp_extension.load(
        "fgvc_ext_floor",
        [str(FOLDER / "floor.cpp")],
        extra_include_paths=[str(FOLDER.parent / "csrc")],
        extra_cflags=["-O2", "-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_2_11}"],
        is_python_module=False,
        with_cuda=False,
    )
    backward = backward_operator("do_nothing", _fake_backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.size, ctx.stride = inputs[0].shape, dense_strides(inputs[0])

    def gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        first = None if grad is None else backward(grad, *ctx.saved_tensors, ctx.size, ctx.stride)
        return first, None, None

    return Operator("do_nothing", _fake, setup_context, gradient), backward


def _fake(first: Tensor, k: int, factor: float) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape[:1]), first.new_empty(first.shape[:1])


def _fake_backward(grad: Tensor, kept: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(size, stride, dtype=grad.dtype, device=grad.device)
