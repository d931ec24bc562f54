"""Boxes around the high values of heat maps."""

from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    MATRIX_LAYOUTS,
    NO_INTS,
    NO_NUMBERS,
    SIDES,
    Draw,
    arrange,
    boolean,
    drawn_floats,
    inf,
    nan,
    random,
    wrong,
    wrong_first,
)
from ..spec import Benchmark, Case, Sample, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, heatmaps: Tensor, **options: Any) -> Sample:
    return Sample(name, {"heatmaps": heatmaps}, (), {"threshold": 0.3, "image_size": 448, **options})


def bumps(samples: int, height: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """A bright spot a map, each somewhere else, in little noise."""
    place = random(samples, 2, 1, 1, dtype=torch.float64, device=device, seed=1)
    y = torch.linspace(-2, 2, height, dtype=torch.float64, device=device)[:, None] - place[:, 0]
    x = torch.linspace(-2, 2, width, dtype=torch.float64, device=device) - place[:, 1]
    noise = random(samples, height, width, dtype=torch.float64, device=device)
    return ((-2 * (x**2 + y**2)).exp() + 0.05 * noise).to(dtype)


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def laid_out(name: str, heatmaps: Tensor, **options: Any) -> Sample:
        return sample(name, arrange(heatmaps, layout), **options)

    def spots(*size: int) -> Tensor:
        return bumps(*size, dtype, device)

    some = spots(5, 14, 14)
    flat = some.clone()
    flat[[0, 3]] = 0.25
    corners = torch.zeros_like(some)
    corners[0, 0, 0] = corners[1, 0, 13] = corners[2, 13, 0] = corners[3, 13, 13] = 1
    corners[4, 0, 13] = corners[4, 13, 0] = 1
    return [
        laid_out("typical", some),
        laid_out("a high threshold", some, threshold=0.9, min_size=40),
        laid_out("everything but the lowest", some, threshold=0),
        laid_out("nothing", some, threshold=1),
        laid_out("some constant maps", flat, threshold=0),
        laid_out("negative", -some, threshold=0.8),
        laid_out("corners", corners),
        laid_out("one pixel", spots(3, 1, 1)),
        laid_out("one row", spots(3, 1, 37), min_size=0),
        laid_out("one column", spots(3, 37, 1), min_size=0),
        laid_out("another image", some, image_size=(300, 501)),
        laid_out("an image smaller than the map", some, image_size=(3, 5), min_size=0),
        laid_out("no smallest size", some, threshold=0.95, min_size=0),
        laid_out("a fraction of a pixel", some, threshold=0.95, min_size=32.5),
        laid_out("nothing is large enough", some, min_size=1000),
        laid_out("just large enough", corners, min_size=32),  # a position has 32 pixels
        laid_out("few values", (4 * some).round() / 4, threshold=0.5),
        laid_out("prime sides", spots(2, 61, 67), image_size=(1000, 997)),
        laid_out("7x9", spots(2, 7, 9)),
        laid_out("noise", random(3, 20, 17, dtype=dtype, device=device), threshold=0.7),
    ]


def empty() -> list[Sample]:
    return [sample("empty", torch.zeros(0, 14, 14))]


def large() -> list[Sample]:
    return [sample("large", bumps(400, 28, 28, torch.float32, "cpu"), threshold=0.5)]


def of_size(size: Size, device: str) -> Sample:
    samples, _, height, width = size
    return sample("of size", bumps(samples, height, width, torch.float32, device))


def raw(sample: Sample) -> tuple[Any, ...]:
    options, size = sample.options, sample.options["image_size"]
    sides = size if isinstance(size, tuple) else (size, size)
    return sample.tensors["heatmaps"], options["threshold"], *sides, options.get("min_size", 10)


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    size = draw.choice(FEW), draw.choice(SIDES), draw.choice(SIDES)
    heatmaps = drawn_floats(draw, size, draw.choice(DTYPES), draw.choice([0.01, 1.0, 20.0]))
    side = draw.choice([1, 14, 448, 2**31, draw.integer(1, 5000)])
    options = {
        "threshold": draw.choice([0, 0.3, 1, draw.number(0, 1)]),
        "image_size": (draw.integer(1, 1000), side) if boolean(draw) else side,
        "min_size": draw.choice([0, 10, 2**70, draw.number(0, 300)]),
    }
    return Sample("drawn", {"heatmaps": heatmaps}, (), options)


def no_map(draw: Draw, sample: Sample) -> tuple[str, Any]:
    height, width = draw.choice([(0, 3), (3, 0), (0, 0)])
    return "heatmaps", sample.tensors["heatmaps"].new_zeros(len(sample.tensors["heatmaps"]), height, width)


NO_SIDES = (0, -1, 2**63, 2**70, -(2**70), *(value for value in NO_INTS if value != [1]))
FAULTS = (
    wrong_first,
    no_map,
    wrong("threshold", -0.1, 1.1, nan, inf, -inf, 2**70, *NO_NUMBERS),
    wrong("min_size", -0.1, nan, inf, -inf, 2**2000, *NO_NUMBERS),
    wrong("image_size", *NO_SIDES, *((448, side) for side in NO_SIDES), *((side, 448) for side in NO_SIDES)),
    wrong("image_size", (448,), (448, 448, 3), [], torch.tensor([448, 448])),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

CPU_TARGETS = (Target("eager", at_least=2), Target("torch.compile", at_least=1))
CUDA_TARGETS = (Target("eager", at_least=3),)


def timed(case: Case, device: str) -> Sample:
    return sample("timed", arrange(bumps(*case.shape, case.dtype, device), case.layout))


def plain(heatmaps: Tensor, threshold: float, image_size: int) -> Tensor:
    """As one writes it in PyTorch, without the reference's care for maps that are not finite."""
    _, height, width = heatmaps.shape
    values = heatmaps.float()
    lowest, highest = values.aminmax(dim=2)
    lowest, highest = lowest.amin(1)[:, None, None], highest.amax(1)[:, None, None]
    kept = values - lowest > threshold * (highest - lowest)

    def edges(kept: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        numbers = kept.byte()  # argmax gives the first of equals
        return numbers.argmax(1), positions - numbers.flip(1).argmax(1)

    (top, bottom), (left, right) = edges(kept.any(2), height), edges(kept.any(1), width)
    boxes = torch.stack((left, top, right, bottom), 1) * (image_size / heatmaps.new_tensor([width, height] * 2).float())
    small = (boxes[:, 2:] - boxes[:, :2] < 10).any(1) | (highest == lowest).flatten()
    return torch.where(small[:, None], boxes.new_tensor([0, 0, image_size, image_size]), boxes)


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(Case((32, 14, 14), targets=CPU_TARGETS),),
    cuda=(Case((256, 14, 14), targets=CUDA_TARGETS),),
    sweep=tuple(
        Case((samples, side, side), dtype=dtype)
        for samples in (1, 16, 64)
        for side in (7, 14, 28, 56)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    others={"reference": reference.heatmap_to_boxes},
)

SPEC = Spec(
    name="heatmap_to_boxes",
    function=ops.heatmap_to_boxes,
    reference=reference.heatmap_to_boxes,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    layouts=MATRIX_LAYOUTS,
    shape="[N,h,w]",
    benchmark=BENCHMARK,
)
