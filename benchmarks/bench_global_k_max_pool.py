"""Global k-max pooling, k = 4."""

import cases
import floor
import torch
from cases import COPY, EAGER, READ_ONCE, Case, Target
from timing import Contender
from torch import Tensor

from fgvc_ext import ops

OP = "global_k_max_pool"
K = 4
CPU_TARGETS = (Target(EAGER, at_least=20, text="topk().mean() / ours"), Target(READ_ONCE, at_most=3))
CUDA_TARGETS = (
    Target(EAGER, at_least=5, text="topk().mean() / ours"),
    # A copy moves each byte twice, reading once.
    Target(COPY, at_least=1.6, text="copy / ours (1.6 is 80 % of the copy's bandwidth)"),
)


def our(features: Tensor) -> Tensor:
    return ops.global_k_max_pool(features, K)


def plain(features: Tensor) -> Tensor:
    return features.flatten(2).topk(K, dim=2).values.mean(2)


def headline(device: str) -> list[Case]:
    targets = CUDA_TARGETS if device == "cuda" else CPU_TARGETS
    shape = (256, 2048, 14, 14) if device == "cuda" else (32, 2048, 14, 14)
    return [
        Case(OP, shape, targets=targets),
        Case(OP, shape, layout="channels_last", targets=targets),
        Case(OP, shape, dtype=torch.bfloat16, targets=targets if device == "cuda" else ()),
        Case(OP, shape, backward=True),
        Case(OP, shape, layout="channels_last", backward=True),
    ]


def sweep(device: str) -> list[Case]:
    return [
        Case(OP, (samples, channels, side, side), dtype=dtype, layout=layout, backward=backward, sweep=True)
        for samples in (1, 16, 64)
        for channels in (64, 2048)
        for side in (7, 14, 28, 56)
        for dtype, layout in (
            (torch.float32, "contiguous"),
            (torch.bfloat16, "contiguous"),
            (torch.float32, "channels_last"),
        )
        for backward in (False, True)
    ]


def contenders(case: Case, device: str, instruction_sets: list[str]) -> list[Contender]:
    x = case.input(device)
    torch.testing.assert_close(our(x), plain(x))
    return cases.contenders(
        case,
        instruction_sets,
        (x,),
        our=our,
        plain=plain,
        nothing=lambda features: floor.global_k_max_pool(features, K),
    )
