"""Semantic grouping loss."""

import math
from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    Draw,
    arrange,
    drawn_maps,
    no_channels,
    no_positions,
    often,
    random,
    wide,
    wrong_first,
    wrong_groups,
)
from ..spec import Benchmark, Case, Fault, Sample, Saved, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, features: Tensor, groups: int) -> Sample:
    return Sample(name, {"features": features}, ("features",), {"groups": groups})


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    """The CPU kernels multiply squares of 64 channels, 32 positions or channels deep.

    Maps that are constant, equal or of one position are not among them, and few are positive: a gradient is the
    difference of two numbers that then are nearly the same. test_semantic_grouping_loss.py has such maps.
    """

    def laid_out(name: str, features: Tensor, groups: int) -> Sample:
        return sample(name, arrange(features, layout), groups)

    def maps(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    some = maps(2, 18, 7, 6).relu()
    return [
        laid_out("typical", some, 3),
        laid_out("negative values too", maps(2, 18, 7, 6), 3),
        laid_out("groups of one channel", some, 18),
        laid_out("one group", some, 1),
        laid_out("two channels", maps(3, 2, 4, 5), 1),
        laid_out("two pixels", maps(3, 16, 1, 2), 4),
        laid_out("one row", maps(2, 8, 1, 37), 2),
        laid_out("several squares", maps(1, 66, 4, 6), 6),
        laid_out("one more channel than two depths", maps(1, 65, 4, 5), 5),
        laid_out("one more position than a depth", maps(3, 6, 1, 11), 2),
        laid_out("a square", maps(1, 64, 4, 5), 8),
        laid_out("14x14", maps(2, 24, 14, 14), 4),
        laid_out("prime sides", maps(1, 5, 23, 29), 5),
    ]


def empty() -> list[Sample]:
    return [sample("empty", torch.zeros(0, 8, 4, 5), 2), sample("empty, one pixel", torch.zeros(0, 70, 1, 1), 7)]


def large() -> list[Sample]:
    features = random(3, 200, 14, 14, dtype=torch.float32, device="cpu").relu()
    return [sample("large", features, 8), sample("large, channels_last", arrange(features, "channels_last"), 8)]


def of_size(size: Size, device: str) -> Sample:
    """One group, which every number of channels has."""
    return sample("of size", random(*size, dtype=torch.float32, device=device).relu(), 1)


def shrunk(sample: Sample) -> Sample:
    features, groups = sample.tensors["features"], sample.options["groups"]
    channels = features.shape[1] if features.shape[1] <= 18 else groups
    tensors = {"features": features[:2, :channels, :2, :3]}
    return Sample(sample.name, tensors, sample.differentiable, sample.options)


def raw(sample: Sample) -> tuple[Any, ...]:
    return sample.tensors["features"], sample.options["groups"]


# --- what must hold of them -------------------------------------------------------------------------------------------


def cancelling(sample: Sample) -> float:
    """(dZ − Z <Z, dZ>) / |V| with dZ = (4k/N) · R Z, where |R| and |Z| are at most 1."""
    features = sample.tensors["features"].double().nan_to_num()
    if not features.numel():
        return 0.0
    channels = features.shape[1]
    shortest = float(((features.flatten(2) + 1e-3).square().sum(2) + 1e-10).sqrt().min())
    return 16e-3 / (channels / 512) ** 2 * channels / shortest


def cancelling_results(sample: Sample) -> float:
    """k · (co − gt)² where co is off by roundings of 1: twice their product with the difference, C² times."""
    features, groups = sample.tensors["features"].double(), sample.options["groups"]
    channels = features.shape[1]
    loss = float(reference.semantic_grouping_loss(features, groups).nan_to_num())
    return 2 * channels**2 * math.sqrt(1e-3 / (channels / 512) ** 2 * loss)


def saved() -> list[Saved]:
    """The features as they are, and co − gt."""
    calls = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in ("contiguous", "channels_last", "sliced"):
            features = arrange(random(2, 8, 7, 6, dtype=dtype, device="cpu"), layout)
            new = 8 * 8 * wide(dtype).itemsize
            calls.append(Saved(sample(f"{layout} {dtype}", features, 2), new, keeps=("features",)))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    features = drawn_maps(draw)
    if not features.shape[1]:
        features = features.new_ones(features.shape[0], 1, *features.shape[2:])
    elif draw.integer(0, 9) == 0:  # several squares
        features = features.repeat(1, 65 // features.shape[1] + 1, 1, 1)
    channels = features.shape[1]
    groups = draw.choice([groups for groups in range(1, channels + 1) if channels % groups == 0])
    return Sample("drawn", {"features": features}, ("features",) if often(draw) else (), {"groups": groups})


FAULTS: tuple[Fault, ...] = (wrong_first, no_positions, no_channels, wrong_groups)

# --- benchmarks -------------------------------------------------------------------------------------------------------

# The sites of the deep bilinear transformation in a ResNet-50 at 448 pixels, with fewer samples than 16: the product is
# all there is to time.
SITES = ((4, 256, 56, 56), (8, 256, 28, 28), (8, 512, 28, 28), (8, 512, 14, 14), (4, 2048, 14, 14))
CPU_TARGETS = (Target("eager", at_least=1), Target("torch.compile", at_least=1))


def timed(case: Case, device: str) -> Sample:
    features = arrange(random(*case.shape, dtype=case.dtype, device=device).relu(), case.layout)
    return sample("timed", features, {64: 8, 2048: 32}.get(features.shape[1], 16))


def plain(features: Tensor, groups: int) -> Tensor:
    samples, channels = features.shape[:2]
    values = features.float().flatten(2) + 1e-3
    unit = values * (values.square().sum(2, keepdim=True) + 1e-10).rsqrt()
    rows = unit.transpose(0, 1).flatten(1)
    correlation = rows @ rows.T / samples
    group = torch.arange(channels, device=features.device) // (channels // groups)
    together = group[:, None] == group
    return 1e-3 / (channels / 512) ** 2 * (correlation - together.float()).square().sum()


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(
        *(Case(site) for site in SITES),
        *(Case(site, backward=True, targets=CPU_TARGETS) for site in SITES),
        Case(SITES[1], layout="channels_last", backward=True),
        Case(SITES[1], dtype=torch.bfloat16, backward=True),
    ),
    cuda=tuple(
        Case((16, *site[1:]), dtype=dtype, backward=True, targets=(Target("eager", at_least=1),))
        for site in SITES
        for dtype in (torch.float32, torch.bfloat16)
    ),
    sweep=tuple(
        Case((samples, channels, side, side), dtype=dtype, layout=layout, backward=backward)
        for samples in (1, 16)
        for channels, side in ((64, 28), (256, 28), (512, 14), (2048, 7))
        for dtype, layout in (
            (torch.float32, "contiguous"),
            (torch.bfloat16, "contiguous"),
            (torch.float32, "channels_last"),
        )
        for backward in (False, True)
    ),
    saves="the features themselves, and C·C numbers",
    others={"reference": reference.semantic_grouping_loss},
)

SPEC = Spec(
    name="semantic_grouping_loss",
    function=ops.semantic_grouping_loss,
    reference=reference.semantic_grouping_loss,
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
    cancelling_results=cancelling_results,
    benchmark=BENCHMARK,
)
