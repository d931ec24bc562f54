"""Diversification block, the default probabilities and patches of 3 × 3."""

import cases
import floor
import torch
from cases import COMPILED, COPY, READ_ONCE, Case, Target
from timing import Contender
from torch import Tensor

from fgvc_ext import ops, reference

OP = "diversify"
LARGEST_CHECKED = 2**21  # elements; the reference is slow
P_PEAK, P_PATCH, PATCH, ALPHA = 0.5, 0.5, 3, 0.1
CPU_TARGETS = (Target(COMPILED, at_least=5), Target(READ_ONCE, at_most=3))
CUDA_TARGETS = (Target(COPY, at_least=1.6, text="copy / ours (1.6 is 80 % of the copy's bandwidth)"),)


def plain(maps: Tensor) -> Tensor:
    """As one writes it in PyTorch: with torch.rand, which is faster than the reference's counter-based stream."""
    samples, classes, height, width = maps.shape
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    peaks = maps == maps.amax((2, 3), keepdim=True)
    hide_peaks = torch.rand(samples, classes, 1, 1, device=maps.device) < P_PEAK
    hide_patches = torch.rand(samples, classes, rows, 1, columns, 1, device=maps.device) < P_PATCH
    patches = hide_patches.expand(samples, classes, rows, PATCH, columns, PATCH)
    patches = patches.reshape(samples, classes, rows * PATCH, columns * PATCH)[:, :, :height, :width]
    mask = torch.where(peaks, hide_peaks, patches)
    return torch.where(mask, ALPHA * maps, maps).mean((2, 3))


def headline(device: str) -> list[Case]:
    targets = CUDA_TARGETS if device == "cuda" else CPU_TARGETS
    shape = (256, 2048, 14, 14) if device == "cuda" else (32, 200, 14, 14)
    return [
        Case(OP, shape, targets=targets),
        Case(OP, shape, layout="channels_last"),
        Case(OP, shape, dtype=torch.bfloat16, targets=targets if device == "cuda" else ()),
        Case(OP, shape, backward=True),
    ]


def sweep(device: str) -> list[Case]:
    return [
        Case(OP, (samples, classes, side, side), dtype=dtype, backward=backward, sweep=True)
        for samples in (1, 16, 64)
        for classes in (200, 10000)
        for side in (7, 14, 28, 56)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ]


def contenders(case: Case, device: str, instruction_sets: list[str]) -> list[Contender]:
    x = case.input(device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    if x.numel() <= LARGEST_CHECKED:
        torch.testing.assert_close(ops.diversify(x, seed=seed), reference.diversify(x, seed=seed))
    return cases.contenders(
        case,
        instruction_sets,
        (x,),
        our=ops.diversify,  # draws a seed each call, as in training
        plain=plain,
        nothing=lambda maps: floor.diversify(maps, seed, PATCH, ALPHA),
        slow=lambda maps: reference.diversify(maps, seed=seed),
    )
