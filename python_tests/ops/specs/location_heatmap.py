"""The location heat map: a list of levels of features, each of its own size."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    NO_INTS,
    SIDES,
    Draw,
    arrange,
    boolean,
    drawn_layout,
    inf,
    nan,
    often,
    random,
    wide,
    wrong,
    wrong_first,
)
from ..spec import Benchmark, Case, Sample, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, levels: list[Tensor], image_size: int | tuple[int, int] = 32) -> Sample:
    return Sample(name, {"features": levels}, (), {"image_size": image_size})


def level(*size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Quarters, whose sums are exact in any order: no rounding decides whether one exceeds the mean."""
    return (4 * random(*size, dtype=torch.float64, device=device, seed=seed)).round().clamp(-64, 64).div(4).to(dtype)


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def laid_out(*size: int, seed: int = 0) -> Tensor:
        return arrange(level(*size, dtype=dtype, device=device, seed=seed), layout)

    first, second, third = laid_out(3, 5, 8, 8), laid_out(3, 17, 4, 4, seed=1), laid_out(3, 33, 2, 2, seed=2)
    flat = arrange(torch.full_like(first, 0.25), layout)
    partly = first.clone()
    partly[1:] = -3
    return [
        sample("typical", [first, second, third]),
        sample("float32 beside it", [first, second.to(wide(dtype)), third.to(wide(dtype))]),
        sample("one level", [first], 24),
        sample("eight levels", [first, second, third, flat, second, first, third, first], 16),
        sample("after a ReLU", [first.relu(), second.relu(), third.relu()]),
        sample("dead features", [first * 0, second, third]),
        sample("a constant level", [flat, second]),
        sample("some constant maps", [arrange(partly, layout), second]),
        sample("levels that do not divide the image", [laid_out(2, 3, 7, 9), laid_out(2, 4, 5, 3)], (31, 47)),
        sample("an image smaller than the levels", [first, second], (3, 1)),
        sample("one position", [laid_out(3, 5, 1, 1), second], 5),
        sample("one channel", [laid_out(2, 1, 14, 14)], 28),
        sample("more channels than a group", [laid_out(1, 517, 3, 2), laid_out(1, 300, 2, 5)], 12),
        sample("prime sides", [laid_out(1, 7, 61, 67)], (61, 134)),
    ]


def empty() -> list[Sample]:
    return [sample("empty", [torch.zeros(0, 3, 4, 5), torch.zeros(0, 6, 2, 3)])]


def large() -> list[Sample]:
    levels = [level(8, 300, 28, 28, dtype=torch.float32), level(8, 520, 14, 14, dtype=torch.float32, seed=1)]
    return [sample("large", levels, (640, 448))]  # more than the caches are asked to hold


def of_size(size: Size, device: str) -> Sample:
    samples, channels, height, width = size
    first = level(*size, dtype=torch.float32, device=device)
    second = level(samples, channels + 32, 2 * height, 2 * width, dtype=torch.float32, device=device, seed=1)
    return sample("of size", [first, second], 448)


def raw(sample: Sample) -> tuple[Any, ...]:
    size = sample.options["image_size"]
    return sample.tensors["features"], *(size if isinstance(size, tuple) else (size, size))


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    samples, dtype = draw.choice(FEW), draw.choice(DTYPES)
    levels = []
    for number in range(draw.integer(1, 4)):
        size = samples, draw.choice([1, 2, 7, 16, 33, 260]), draw.choice(SIDES), draw.choice(SIDES)
        values = level(*size, dtype=dtype if number == 0 else draw.choice([dtype, wide(dtype)]), seed=number)
        if samples and not often(draw):
            values.view(-1)[draw.integer(0, values.numel() - 1)] = draw.choice([nan, inf, -inf, -0.0])
        levels.append(drawn_layout(draw, values))
    side = draw.choice([1, 14, 37, draw.integer(1, 100)])
    return sample("drawn", levels, (draw.integer(1, 100), side) if boolean(draw) else side)


def another_level(draw: Draw, sample: Sample) -> tuple[str, Any]:
    """Something that does not fit beside the first level."""
    first = sample.tensors["features"][0]
    right = torch.zeros(len(first), 3, 2, 2, dtype=first.dtype)
    other_dtype = torch.float32 if first.dtype == torch.float64 else torch.float64
    more, no_channels, no_rows = right.new_zeros(len(first) + 1, 3, 2, 2), right[:, :0], right[:, :, :0]
    wrong_one = draw.choice([right.to(other_dtype), right.to("meta"), right.long(), more, no_channels, no_rows, None])
    return "features", [first, wrong_one]


def another_number(draw: Draw, sample: Sample) -> tuple[str, Any]:
    first = sample.tensors["features"][0]
    return "features", draw.choice([[], (), [first] * 9, {0: first}, first])


NO_SIDES = (0, -1, 2**63, 2**70, -(2**70), 2**31, *(value for value in NO_INTS if value != [1]))
FAULTS = (
    wrong_first,
    another_level,
    another_number,
    wrong("image_size", *NO_SIDES, *((448, side) for side in NO_SIDES), *((side, 448) for side in NO_SIDES)),
    wrong("image_size", (448,), (448, 448, 3), [], torch.tensor([448, 448])),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

CPU_TARGETS = (Target("read once", at_most=1.5),)
CUDA_TARGETS = (Target("copy", at_least=1.7, text="copy / ours (1.7 is 85 % of the copy's bandwidth)"),)
RESNET = (16, 512, 56, 56)  # its first level at 448 pixels; the others have twice the channels and half the sides


def timed(case: Case, device: str) -> Sample:
    samples, channels, height, width = case.shape
    sizes = [(samples, channels * step, height // step, width // step) for step in (1, 2, 4)]
    levels = [arrange(level(*size, dtype=case.dtype, device=device), case.layout) for size in sizes]
    return sample("timed", levels, (8 * height, 8 * width))


def plain(features: list[Tensor], image_size: tuple[int, int]) -> Tensor:
    """As one writes it in PyTorch."""
    masks = []
    for level in features:
        aggregation = level.sum(1, keepdim=True, dtype=torch.float32)
        mask = (aggregation > aggregation.mean((2, 3), keepdim=True)).to(level.dtype)
        mask = torch.where(mask.amax((2, 3), keepdim=True) == 0, 1, mask)
        masks.append(functional.interpolate(mask, image_size, mode="nearest-exact"))
    return torch.stack(masks).mean(0)


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(
        Case(RESNET, targets=CPU_TARGETS),
        Case(RESNET, layout="channels_last", targets=CPU_TARGETS),
        Case(RESNET, dtype=torch.bfloat16),
    ),
    cuda=(
        Case(RESNET, targets=CUDA_TARGETS),
        Case(RESNET, layout="channels_last", targets=CUDA_TARGETS),
        Case(RESNET, dtype=torch.bfloat16, targets=CUDA_TARGETS),
    ),
    sweep=tuple(
        Case((samples, channels, side, side), dtype=dtype)
        for samples in (1, 16)
        for channels, side in ((64, 8), (128, 28), (512, 28), (512, 56))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    others={"reference": reference.location_heatmap},
)

SPEC = Spec(
    name="location_heatmap",
    function=ops.location_heatmap,
    reference=reference.location_heatmap,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    shape="[N,C,h,w]",
    benchmark=BENCHMARK,
)
