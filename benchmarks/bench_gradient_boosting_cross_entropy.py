"""Gradient-boosting cross-entropy, k = 15."""

import cases
import floor
import torch
import torch.nn.functional as F
from cases import COMPILED, EAGER, Case, Target
from timing import Contender
from torch import Tensor

from fgvc_ext import ops, reference

OP = "gradient_boosting_cross_entropy"
K = 15
CROSS_ENTROPY = "cross_entropy"  # torch's own, over all classes: another loss, for information
CPU_TARGETS = (Target(EAGER, at_least=2), Target(COMPILED, at_least=1))
CUDA_TARGETS = (Target(EAGER, at_least=3),)


def plain(scores: Tensor, target: Tensor) -> Tensor:
    """As one writes it in PyTorch, without the reference's care for ignored samples, bad labels and NaN."""
    negatives = scores.detach().float().scatter(1, target[:, None], float("-inf"))
    k = min(K, scores.shape[1] - 1)
    dropped = negatives < negatives.topk(k, dim=1).values[:, -1:]
    dropped = dropped.scatter(1, target[:, None], False)
    return F.cross_entropy(scores.float().masked_fill(dropped, float("-inf")), target)


def headline(device: str) -> list[Case]:
    targets = CUDA_TARGETS if device == "cuda" else CPU_TARGETS
    return [Case(OP, (32, 200)), Case(OP, (32, 200), backward=True, targets=targets)]


def sweep(device: str) -> list[Case]:
    return [
        Case(OP, (samples, classes), dtype=dtype, backward=backward, sweep=True)
        for samples in (1, 16, 64)
        for classes in (20, 200, 2000, 10000)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ]


def contenders(case: Case, device: str, instruction_sets: list[str]) -> list[Contender]:
    x = case.input(device)
    target = torch.arange(case.shape[0], device=device) % case.shape[1]
    torch.testing.assert_close(ops.gradient_boosting_cross_entropy(x, target, k=K), plain(x, target))
    every = cases.contenders(
        case,
        instruction_sets,
        (x, target),
        our=ops.gradient_boosting_cross_entropy,
        plain=plain,
        nothing=lambda scores, target: floor.gradient_boosting_cross_entropy(scores, target, K),
        slow=reference.gradient_boosting_cross_entropy,
    )
    if not case.sweep:
        every.append(Contender(CROSS_ENTROPY, cases.direction(case, F.cross_entropy, x, target)))
    return every
