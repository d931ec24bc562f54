"""The call floor: operators of our signatures that allocate their results and do nothing, compiled at the first use.

Called the cheapest way there is: straight into the dispatcher; where a gradient is asked, through an autograd.Function.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
TORCH_2_11 = "0x020b000000000000"  # the stable ABI that the operators are built for


@cache
def operators() -> Any:
    """``torch.ops.fgvc_ext_floor``. Needs the C++ compiler and ninja that built the package."""
    cpp_extension.load(
        "fgvc_ext_floor",
        [str(FOLDER / "floor.cpp")],
        extra_include_paths=[str(FOLDER.parent / "csrc")],
        extra_cflags=["-O2", f"-DTORCH_TARGET_VERSION={TORCH_2_11}"],
        is_python_module=False,
        with_cuda=False,
    )
    return torch.ops.fgvc_ext_floor


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, forward: Callable[..., Any], backward: Callable[..., Any], *rest: Any
    ) -> Tensor:
        result, *others = forward(first, *rest)
        ctx.save_for_backward(*others)
        ctx.call = backward
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.call(grad, *ctx.saved_tensors), *[None] * (len(ctx.needs_input_grad) - 1)


def global_k_max_pool(features: Tensor, k: int) -> Tensor:
    forward, backward = operators().global_k_max_pool.default, operators().global_k_max_pool_backward.default
    if not features.requires_grad:
        return forward(features, k, None, False)[0]
    size, stride = features.shape, features.stride()

    def gradient(grad: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        return backward(grad, indices, values, None, size, stride, True, False)[0]

    return _Call.apply(features, forward, gradient, k, None, False)


def diversify(maps: Tensor, seed: Tensor, patch_size: int, alpha: float) -> Tensor:
    forward, backward = operators().diversify.default, operators().diversify_backward.default
    if not maps.requires_grad:
        return forward(maps, seed, 0, 0, patch_size, alpha)[0]
    size, stride = maps.shape, maps.stride()

    def gradient(grad: Tensor, bits: Tensor) -> Tensor:
        return backward(grad, bits, alpha, size, stride)

    return _Call.apply(maps, forward, gradient, seed, 0, 0, patch_size, alpha)


def gradient_boosting_cross_entropy(scores: Tensor, target: Tensor, k: int) -> Tensor:
    forward = operators().gradient_boosting_cross_entropy.default
    backward = operators().gradient_boosting_cross_entropy_backward.default
    if not scores.requires_grad:
        return forward(scores, target, k, 1, -100)[0]
    values = scores.detach()

    def gradient(grad: Tensor, rows: Tensor) -> Tensor:
        return backward(grad, values, target, rows)

    return _Call.apply(scores, forward, gradient, target, k, 1, -100)
