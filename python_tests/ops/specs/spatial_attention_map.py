"""Spatial attention map."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    Draw,
    arrange,
    drawn_maps,
    largest_finite,
    no_channels,
    no_positions,
    often,
    random,
    wrong_first,
)
from ..spec import Benchmark, Case, Fault, Sample, Saved, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, features: Tensor) -> Sample:
    return Sample(name, {"features": features}, ("features",))


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    """The CPU kernel adds channels up in groups of 128, and looks at 8,192 values of a group at a time."""

    def laid_out(name: str, features: Tensor) -> Sample:
        return sample(name, arrange(features, layout))

    def maps(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    some = maps(2, 19, 7, 6)
    return [
        laid_out("typical", some),
        laid_out("after a ReLU", (some - 0.3).relu()),
        laid_out("rounded", (some * 1.5).round()),
        laid_out("constant maps", some[:, :, :1, :1].expand_as(some)),
        laid_out("zeros", torch.zeros_like(some)),
        laid_out("one channel", maps(3, 1, 4, 5)),
        laid_out("one pixel", maps(3, 21, 1, 1)),
        laid_out("one row", maps(2, 3, 1, 37)),
        laid_out("one group", maps(1, 128, 3, 4)),
        laid_out("a group and a channel", maps(2, 129, 3, 5)),
        laid_out("several groups", maps(2, 301, 7, 7)),
        laid_out("14x14", maps(1, 131, 14, 14)),
        laid_out("prime sides", maps(1, 5, 61, 67)),
        laid_out("a map above 8,192 positions", maps(1, 3, 97, 101)),
        # Here the means of the channels lose most digits, where they are added up one after another.
        laid_out("far from zero", some + 100),
    ]


def empty() -> list[Sample]:
    return [sample("empty", torch.zeros(0, 3, 4, 5)), sample("empty, several groups", torch.zeros(0, 300, 1, 1))]


def large() -> list[Sample]:
    features = random(5, 300, 14, 14, dtype=torch.float32, device="cpu")
    return [sample("large", features), sample("large, channels_last", arrange(features, "channels_last"))]


def of_size(size: Size, device: str) -> Sample:
    return sample("of size", random(*size, dtype=torch.float32, device=device))


def shrunk(sample: Sample) -> Sample:
    return Sample(sample.name, {"features": sample.tensors["features"][:1, :3, :5, :7]}, sample.differentiable)


def raw(sample: Sample) -> tuple[Any, ...]:
    return (sample.tensors["features"],)


# --- what must hold of them -------------------------------------------------------------------------------------------


def cancelling(sample: Sample) -> float:
    """g_c · grad[p] and the mean of grad · F_c, both divided by the channels."""
    features = sample.tensors["features"]
    return 4 * largest_finite(features) / max(1, features.shape[1])


def saved() -> list[Saved]:
    """The features as they are, and nothing else."""
    calls = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in ("contiguous", "channels_last", "sliced"):
            features = arrange(random(2, 5, 7, 6, dtype=dtype, device="cpu"), layout)
            calls.append(Saved(sample(f"{layout} {dtype}", features), 0, keeps=("features",)))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    features = drawn_maps(draw)
    if not features.shape[1]:
        features = features.new_ones(features.shape[0], 1, *features.shape[2:])
    elif draw.integer(0, 9) == 0:  # several groups
        features = features.repeat(1, 129 // features.shape[1] + 1, 1, 1)
    return Sample("drawn", {"features": features}, ("features",) if often(draw) else ())


FAULTS: tuple[Fault, ...] = (wrong_first, no_positions, no_channels)

# --- benchmarks -------------------------------------------------------------------------------------------------------

CPU_TARGETS = (Target("read once", at_most=1.5),)
# Backward alone: read once, and write once into warm memory.
CPU_BACKWARD_TARGETS = (Target("read and write once", at_most=1.5),)
# A copy moves each byte twice, as backward alone does. Forward reads once.
CUDA_TARGETS = (Target("copy", at_least=1.7, text="copy / ours (1.7 is 85 % of the copy's bandwidth)"),)
CUDA_BACKWARD_TARGETS = (Target("copy", at_least=0.85, text="copy / ours (0.85 is 85 % of the copy's bandwidth)"),)
CPU_SHAPE, CUDA_SHAPE = (32, 2048, 14, 14), (256, 2048, 14, 14)


def timed(case: Case, device: str) -> Sample:
    return sample("timed", arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout))


def plain(features: Tensor) -> Tensor:
    """A product of a vector and a matrix per sample: it reads the features twice, and makes no copy of them."""
    samples, channels, height, width = features.shape
    maps = features.flatten(2)
    weights = maps.mean(2)[:, None] / channels
    return torch.bmm(weights, maps).view(samples, height, width)


def backward(sample: Sample) -> Callable[[], Tensor]:
    features = sample.tensors["features"].detach()
    grad = features.new_ones(len(features), *features.shape[2:])
    return lambda: torch.ops.fgvc_ext.spatial_attention_map_backward(grad, features)


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    backward=backward,
    cpu=(
        Case(CPU_SHAPE, targets=CPU_TARGETS),
        Case(CPU_SHAPE, layout="channels_last", targets=CPU_TARGETS),
        Case(CPU_SHAPE, dtype=torch.bfloat16),
        Case(CPU_SHAPE, backward=True),
        Case(CPU_SHAPE, layout="channels_last", backward=True),
        Case(CPU_SHAPE, backward=True, alone=True, targets=CPU_BACKWARD_TARGETS),
        Case(CPU_SHAPE, layout="channels_last", backward=True, alone=True, targets=CPU_BACKWARD_TARGETS),
    ),
    cuda=tuple(
        Case(CUDA_SHAPE, dtype=dtype, layout=layout, backward=backward, alone=backward, targets=targets)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in ("contiguous", "channels_last")
        for backward, targets in ((False, CUDA_TARGETS), (True, CUDA_BACKWARD_TARGETS))
    ),
    sweep=tuple(
        Case((samples, channels, side, side), dtype=dtype, layout=layout, backward=backward)
        for samples in (1, 16, 64)
        for channels in (64, 2048)
        for side in (7, 14, 28, 56)
        for dtype, layout in (
            (torch.float32, "contiguous"),
            (torch.bfloat16, "contiguous"),
            (torch.float32, "channels_last"),
        )
        for backward in (False, True)
    ),
    saves="nothing but the features themselves",
    others={"reference": reference.spatial_attention_map},
)

SPEC = Spec(
    name="spatial_attention_map",
    function=ops.spatial_attention_map,
    reference=reference.spatial_attention_map,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    saved=saved,
    differentiable=("features",),
    shrunk=shrunk,
    cancelling=cancelling,
    folds_vmap=True,
    benchmark=BENCHMARK,
)
