"""Part images."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    NO_INTS,
    NO_NUMBERS,
    SIDES,
    TOO_LARGE,
    Draw,
    arrange,
    boolean,
    drawn_floats,
    drawn_layout,
    drawn_vector,
    inf,
    int64,
    nan,
    no_positions,
    random,
    wide,
    wrong,
    wrong_first,
    wrong_int64s,
)
from ..spec import Benchmark, Case, Sample, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, images: Tensor, boxes: Tensor, seed: Tensor | None = None, **options: Any) -> Sample:
    if seed is None:
        seed = torch.tensor(0x1234_5678_9ABC_DEF, device=images.device)
    return Sample(name, {"images": images, "boxes": boxes, "seed": seed}, (), {"blur_sigma": 6.0, **options})


def some_boxes(samples: int, parts: int, height: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Boxes of a third to two thirds of the image, which overlap here and there."""
    place = torch.rand(samples, parts, 4, generator=torch.Generator().manual_seed(3)).to(device)
    corner, size = place[..., :2] * 0.6, 0.33 + place[..., 2:] * 0.33
    return (torch.cat((corner, corner + size), dim=2) * torch.tensor([width, height] * 2, device=device)).to(dtype)


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def laid_out(name: str, size: tuple[int, int, int], parts: int = 3, **options: Any) -> Sample:
        samples, height, width = size
        images = arrange(random(samples, 3, height, width, dtype=dtype, device=device), layout)
        boxes = options.pop("boxes", None)
        if boxes is None:
            boxes = some_boxes(samples, parts, height, width, dtype, device)
        return sample(name, images, boxes, **options)

    def given(*boxes: list[float]) -> Tensor:
        return torch.tensor([boxes] * 2, dtype=dtype, device=device)

    odd, beyond = (2, 29, 37), (2, 24, 20)
    float_boxes = some_boxes(2, 3, *odd[1:], wide(dtype), device)
    return [
        laid_out("typical", (2, 32, 24)),
        laid_out("odd sides", odd, seed=torch.arange(2, device=device) * 0x7_1234_5678 - 3),
        laid_out("noise in place of pixels", odd, noise_mode="replace", noise_std=0.5),
        laid_out("float32 boxes", odd, boxes=float_boxes),
        laid_out("no noise", odd, noise_std=0.0),
        laid_out("no blur", odd, blur_sigma=0.0),
        laid_out("a blur wider than the image", odd, blur_sigma=60.0),
        laid_out("hardly a blur", (1, 16, 16), blur_sigma=0.2),
        laid_out("parts of half the size", (2, 32, 24), part_size=(16, 12)),
        laid_out("parts of other sizes", (2, 30, 33), part_size=(10, 3)),
        laid_out("parts of one pixel", (2, 9, 8), part_size=1),
        laid_out("rows put together", (2, 9, 8), part_size=(3, 8)),
        laid_out("one part", odd, 1),
        laid_out("eight parts", (1, 16, 20), 8),
        laid_out("boxes beyond the image", beyond, boxes=given([-50, -3, 8, 200], [12, 10, 400, 15], [90, 0, 99, 9])),
        laid_out("empty boxes", beyond, boxes=given([5, 5, 5, 9], [9, 9, 3, 12], [0, 0, 9, 9])),
        laid_out("infinite boxes", beyond, boxes=given([-inf, 3, inf, 9], [3, -inf, 12, inf])),
        laid_out("edges on and beside middles", beyond, boxes=given([2.5, 3.5, 8.5, 9.5], [4, 5, 9.75, 11.25])),
        laid_out("the same box twice", beyond, boxes=given([3, 4, 15, 12], [3, 4, 15, 12])),
        laid_out("one pixel", (3, 1, 1)),
        laid_out("a few pixels", (2, 2, 5)),
        laid_out("one row", (1, 1, 70)),
        laid_out("one column", (1, 43, 1)),
    ]


def empty() -> list[Sample]:
    return [
        sample("no images", torch.zeros(0, 3, 8, 8), torch.zeros(0, 2, 4)),
        sample("no boxes", torch.ones(2, 3, 8, 8), torch.zeros(2, 0, 4)),
    ]


def large() -> list[Sample]:
    return [of_size((6, 3, 130, 128), "cpu")]


def of_size(size: Size, device: str) -> Sample:
    """Eleven parts: as many as there are samples or columns, torch.compile would take both for the same number."""
    samples, _, height, width = size
    images = random(samples, 3, height, width, dtype=torch.float32, device=device)
    return sample("of size", images, some_boxes(samples, 11, height, width, torch.float32, device))


def raw(sample: Sample) -> tuple[Any, ...]:
    images, boxes, seed = sample.tensors.values()
    options, sides = sample.options, tuple(images.shape[2:])
    size = options.get("part_size") or sides
    replace = options.get("noise_mode", "add") == "replace"
    sides = size if isinstance(size, tuple) else (size, size)
    return images, boxes, seed, options["blur_sigma"], options.get("noise_std", 1.0), replace, *sides


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    samples, height, width, parts = draw.choice(FEW), draw.choice(SIDES), draw.choice(SIDES), draw.integer(0, 4)
    dtype = draw.choice(DTYPES)
    images = drawn_floats(draw, (samples, 3, height, width), dtype, draw.choice([0.01, 1.0, 20.0]))
    boxes = some_boxes(samples, parts, height, width, torch.float64, "cpu") * draw.choice([0.5, 1.0, 3.0])
    boxes = boxes.to(draw.choice([dtype, wide(dtype)]))
    if boxes.numel() and boolean(draw):
        boxes.view(-1)[draw.integer(0, boxes.numel() - 1)] = draw.choice([nan, inf, -inf, -5.0, 2.5])
    seed = torch.tensor(int64(draw))
    if boolean(draw):
        seed = drawn_vector(draw, torch.tensor([int64(draw) for _ in range(samples)], dtype=torch.int64))
    divisors = [[side for side in range(1, whole + 1) if whole % side == 0] for whole in (height, width)]
    options = {
        "blur_sigma": draw.choice([0, 0.5, 6, 20, 100, draw.number(0, 50), 1e-300]),
        "noise_std": draw.choice([0, 1, draw.number(0, 5)]),
        "noise_mode": draw.choice(["add", "replace"]),
        "part_size": draw.choice([None, (draw.choice(divisors[0]), draw.choice(divisors[1]))]),
    }
    return sample("drawn", images, drawn_layout(draw, boxes), seed, **options)


def another_number_of_channels(draw: Draw, sample: Sample) -> tuple[str, Any]:
    images = sample.tensors["images"]
    return "images", images.new_zeros(len(images), draw.choice([0, 1, 2, 4]), 5, 5)


def wrong_boxes(draw: Draw, sample: Sample) -> tuple[str, Any]:
    images = sample.tensors["images"]
    right = torch.zeros(len(images), 2, 4, dtype=images.dtype)
    other_dtype = torch.float32 if images.dtype == torch.float64 else torch.float64
    others = right.to(other_dtype), right.to("meta"), right.long(), right[..., :3], right[0], right.to_sparse()
    return "boxes", draw.choice([*others, right.new_zeros(len(images) + 1, 2, 4), right.tolist(), None])


def no_divisor(draw: Draw, sample: Sample) -> tuple[str, Any]:
    height, width = sample.tensors["images"].shape[2:]
    return "part_size", draw.choice([2 * height * width, (height + 1, width), (height, 2 * width)])


FAULTS = (
    wrong_first,
    no_positions,
    another_number_of_channels,
    wrong_boxes,
    no_divisor,
    wrong("blur_sigma", -0.1, nan, inf, -inf, 4096.5, 2**70, *NO_NUMBERS),
    wrong("noise_std", -0.1, nan, inf, -inf, 1e39, 2**2000, *NO_NUMBERS),
    wrong("noise_mode", "Add", "", None, True, 1, ["add"]),
    wrong("part_size", 0, -1, (1, 0), *TOO_LARGE, *(value for value in NO_INTS if value is not None)),
    wrong("seed", *TOO_LARGE, 1.5, "a", True, [1], 1j),
    wrong_int64s("seed"),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

CPU_TARGETS = (Target("eager", at_least=5),)
CUDA_TARGETS = (Target("torch.compile", at_least=3),)
PARTS, SIGMA = 3, 20.0
SHAPE = (16, 3, 448, 448)


def timed(case: Case, device: str) -> Sample:
    """Without a seed: one is drawn in each call, as in training."""
    images = arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout)
    boxes = some_boxes(len(images), PARTS, *images.shape[2:], torch.float32, device)
    return Sample("timed", {"images": images, "boxes": boxes}, ())


def plain(images: Tensor, boxes: Tensor) -> Tensor:
    """As one writes it in PyTorch: with torch.randn, and a separable convolution at a quarter of the size.

    That is in float32 at least: a CPU's grouped convolution in bfloat16 takes minutes.
    """
    _, channels, height, width = images.shape
    y = torch.arange(height, device=images.device) + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    x1, y1, x2, y2 = (side[..., None] for side in boxes.unbind(2))
    inside = ((y1 <= y) & (y < y2))[..., None] & ((x1 <= x) & (x < x2))[:, :, None]

    dtype = torch.promote_types(images.dtype, torch.float32)
    radius = math.ceil(3 * SIGMA / 4)
    offsets = torch.arange(-radius, radius + 1, dtype=dtype, device=images.device)
    weights = torch.softmax(-0.5 * (offsets / (SIGMA / 4)) ** 2, 0).expand(channels, 1, 1, -1)
    small = functional.avg_pool2d(images, 4, ceil_mode=True, count_include_pad=False).to(dtype)
    small = functional.pad(small, (radius, radius, radius, radius), mode="reflect")
    small = functional.conv2d(functional.conv2d(small, weights, groups=channels), weights.mT, groups=channels)
    blurred = functional.interpolate(small, (height, width), mode="bilinear").to(images.dtype)

    outside = torch.where(inside.any(1)[:, None], images + torch.randn_like(images), blurred)
    return torch.where(inside[:, :, None], images[:, None], outside[:, None])


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(
        Case(SHAPE, targets=CPU_TARGETS),
        Case(SHAPE, layout="channels_last"),
        Case(SHAPE, dtype=torch.bfloat16),
    ),
    cuda=(
        Case(SHAPE, targets=CUDA_TARGETS),
        Case(SHAPE, layout="channels_last"),
        Case(SHAPE, dtype=torch.bfloat16, targets=CUDA_TARGETS),
    ),
    sweep=tuple(
        Case((samples, 3, side, side), dtype=dtype)
        for samples in (1, 16)
        for side in (128, 224, 448)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    others={
        "reference": lambda images, boxes: reference.compose_parts(
            images, boxes, seed=torch.zeros((), dtype=torch.int64).to(images.device)
        )
    },
    comparable_options={"seed": 0},
)

SPEC = Spec(
    name="compose_parts",
    function=ops.compose_parts,
    reference=reference.compose_parts,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    shape="[N,3,H,W]",
    channels=3,
    benchmark=BENCHMARK,
)
