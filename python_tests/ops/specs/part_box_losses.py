"""Losses of part proposals."""

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
    Draw,
    arrange,
    boolean,
    drawn_floats,
    drawn_layout,
    drawn_vector,
    inf,
    nan,
    often,
    random,
    wide,
    wrong,
    wrong_bools,
    wrong_first,
)
from ..spec import Benchmark, Case, Sample, Saved, Size, Spec, Target

DEFAULTS = {
    "iou_weight": 2.0,
    "parts": 4,
    "min_area": 1024.0,
    "area_mode": "two_sided",
    "detach_denominator": False,
}
MODES = ("two_sided", "hinge", "log")  # as the raw operator numbers them

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, boxes: Tensor, valid: Tensor, areas: Tensor, **options: Any) -> Sample:
    return Sample(name, {"boxes": boxes, "valid": valid, "object_area": areas}, ("boxes",), options)


def proposals(samples: int, number: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Boxes of some 100 pixels around the middle of an image of 448."""
    around = random(samples, number, 4, dtype=torch.float64, device=device)
    middle, sides = 224 + 50 * around[..., :2], 100 + 20 * around[..., 2:]
    return (scale * torch.cat((middle - sides / 2, middle + sides / 2), dim=2)).to(dtype)


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def laid_out(name: str, boxes: Tensor, valid: Any = True, areas: Any = 50000, **options: Any) -> Sample:
        valid = torch.as_tensor(valid, device=device).expand(boxes.shape[:2])
        areas = torch.as_tensor(areas, device=device).to(dtype).expand(boxes.shape[:1])
        return sample(name, arrange(boxes, layout), valid, areas, **options)

    def some(samples: int, number: int) -> Tensor:
        return proposals(samples, number, dtype, device)

    def boxes(*corners: list[float]) -> Tensor:
        return torch.tensor([corners], dtype=dtype, device=device)

    pair, three = some(3, 4), torch.tensor([20000, 60000, 9000])
    partly = torch.tensor([[True, False, True, True], [False, True, True, False], [True, True, True, True]])
    few = torch.tensor([[False, False, True, False], [False] * 4, [True, True, False, False]])
    part = boxes([0, 0, 128, 80], [50, 100, 178, 200], [60, 20, 160, 220])  # 10,240, 12,800 and 20,000 pixels
    empty = boxes([10, 10, 10, 50], [0, 0, 100, 100], [20, 30, 60, 30], [40, 40, 40, 40])
    crossed = boxes([90, 10, 20, 50], [0, 0, 100, 100], [20, 80, 60, 30], [70, 70, 30, 30])
    return [
        laid_out("typical", pair, partly, three),
        laid_out("hinge", pair, partly, three, area_mode="hinge"),
        laid_out("log", pair, partly, three, area_mode="log"),
        laid_out("other parameters", pair, partly, three, iou_weight=-0.7, parts=2, min_area=20000),
        laid_out("few are valid", pair, few, three),
        laid_out("none is valid", pair, False, three),
        laid_out("one box", some(3, 1)),
        laid_out("two boxes", some(3, 2)),
        laid_out("one image", some(1, 3)),
        laid_out("no box", some(3, 0)),
        laid_out("more boxes than a warp has lanes", some(2, 37)),
        # Behind those that gradcheck takes: this is no derivative.
        laid_out("no gradient through the sum of areas", pair, partly, three, detach_denominator=True),
        laid_out("equal boxes", some(2, 1).repeat(1, 3, 1)),
        laid_out("equal edges", boxes([0, 0, 50, 60], [0, 20, 80, 60], [30, 0, 50, 40])),
        laid_out("touching edges", boxes([0, 0, 50, 60], [50, 0, 90, 60], [0, 60, 50, 90])),
        laid_out("apart", boxes([0, 0, 50, 60], [60, 0, 90, 60], [200, 300, 270, 400])),
        laid_out("one in another", boxes([0, 0, 100, 100], [20, 30, 60, 80])),
        laid_out("the size of a part", part, areas=40960),
        laid_out("as large as a part, hinge", part, areas=40960, area_mode="hinge"),
        laid_out("as large as a part, log", part, areas=51200, area_mode="log"),
        *(laid_out(f"empty boxes, {mode}", empty, area_mode=mode) for mode in MODES),
        *(laid_out(f"crossed sides, {mode}", crossed, area_mode=mode) for mode in MODES),
        laid_out("nothing but empty boxes", empty[:, ::2]),
        laid_out("no object", pair, areas=0),
        laid_out("an area below zero", pair, areas=-5000),
        laid_out("no weight", pair, iou_weight=0),
        Sample(
            "float32 areas, valid of other strides",
            {
                "boxes": arrange(pair, layout),
                "valid": partly.to(device).mT.contiguous().mT,
                "object_area": three.to(device).to(wide(dtype)),
            },
            ("boxes",),
        ),
    ]


def empty() -> list[Sample]:
    return [
        sample("empty", torch.zeros(0, number, 4), torch.zeros(0, number, dtype=torch.bool), torch.zeros(0))
        for number in (3, 0)
    ]


def large() -> list[Sample]:
    boxes = proposals(300, 20, torch.float32, "cpu")
    valid = torch.arange(300 * 20).reshape(300, 20) % 7 > 1
    return [sample("large", boxes, valid, torch.linspace(0, 200000, 300))]


def of_size(size: Size, device: str) -> Sample:
    samples, number, _, _ = size
    boxes = proposals(samples, number, torch.float32, device)
    valid = torch.arange(samples * number, device=device).reshape(samples, number) % 5 != 3
    return sample("of size", boxes, valid, torch.full((samples,), 60000.0, device=device))


def shrunk(sample: Sample) -> Sample:
    """Two images of three boxes; gradcheck makes their sides short, beside which other areas would be infinite."""
    tensors = {
        "boxes": sample.tensors["boxes"][:2, :3],
        "valid": sample.tensors["valid"][:2, :3],
        "object_area": sample.tensors["object_area"][:2] * 1e-4,
    }
    return Sample(sample.name, tensors, sample.differentiable, {**sample.options, "min_area": 0.1})


def raw(sample: Sample) -> tuple[Any, ...]:
    weight, parts, least, mode, detached = {**DEFAULTS, **sample.options}.values()
    return *sample.tensors.values(), weight, parts, least, MODES.index(mode), detached


# --- what must hold of them -------------------------------------------------------------------------------------------


def support(sample: Sample) -> dict[str, Tensor]:
    """A box that does not count has no gradient, and no edge has one where the box has neither width nor height."""
    boxes = sample.tensors["boxes"]
    sides = boxes[..., 2:] - boxes[..., :2]
    return {"boxes": (sample.tensors["valid"] & (sides > 0).any(2))[..., None].expand_as(boxes)}


def cancelling(sample: Sample) -> float:
    """Two terms for each other box, each at most the weight over the box's own shorter side."""
    options = {**DEFAULTS, **sample.options}
    boxes = sample.tensors["boxes"].double()
    sides = boxes[..., 2:] - boxes[..., :2]
    sides = sides[sides.isfinite() & (sides > 0)]
    shortest = float(sides.min()) if sides.numel() else 1.0
    longest = float(sides.max()) if sides.numel() else 1.0
    return 4 * abs(options["iou_weight"]) / shortest + 2 * max(longest / options["min_area"], 1 / shortest)


def saved() -> list[Saved]:
    """The gradients of both losses, in the dtype of sums."""
    calls = []
    for dtype, number in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        boxes, valid = proposals(5, 3, dtype, "cpu"), torch.ones(5, 3, dtype=torch.bool)
        call = sample(str(dtype), boxes, valid, torch.full((5,), 30000, dtype=dtype))
        calls.append(Saved(call, 2 * 5 * 3 * 4 * number))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    samples, number = draw.choice(FEW), draw.choice([0, 1, 2, 3, 7, 33])
    dtype = draw.choice(DTYPES)
    if boolean(draw):
        boxes = drawn_floats(draw, (samples, number, 4), dtype, draw.choice([1.0, 20.0]))
    else:
        boxes = drawn_layout(draw, proposals(samples, number, dtype, "cpu", draw.choice([0.1, 1.0])))
        boxes = boxes.round() if boolean(draw) else boxes
    share = draw.choice([0.0, 0.5, 1.0])
    valid = random(samples, number, dtype=torch.float64, device="cpu", seed=draw.integer(0, 99)).sigmoid() <= share
    areas = drawn_floats(draw, (samples,), draw.choice([dtype, wide(dtype)]), draw.choice([1.0, 1000.0]))
    options = {
        "iou_weight": draw.choice([0, 2, -1, draw.number(0, 5)]),
        "parts": draw.choice([1, 4, 2**62, draw.integer(1, 9)]),
        "min_area": draw.choice([1, 1024, draw.number(0.1, 5000)]),
        "area_mode": draw.choice(MODES),
        "detach_denominator": boolean(draw),
    }
    tensors = {"boxes": boxes, "valid": drawn_layout(draw, valid), "object_area": drawn_vector(draw, areas)}
    return Sample("drawn", tensors, ("boxes",) if often(draw) else (), options)


def no_boxes(draw: Draw, sample: Sample) -> tuple[str, Any]:
    boxes = sample.tensors["boxes"]
    return "boxes", boxes.new_zeros(*boxes.shape[:2], draw.choice([0, 1, 3, 5]))


def wrong_areas(draw: Draw, sample: Sample) -> tuple[str, Any]:
    right, dtype = sample.tensors["object_area"].nan_to_num(), sample.tensors["boxes"].dtype
    other = right.to(torch.float16 if dtype in (torch.float64, torch.bfloat16) else torch.float64)
    values = [right.new_zeros(len(right) + 1), right[:, None], other, right.long(), right.to(torch.complex64)]
    return "object_area", draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), None, "a", 1.0])


FAULTS = (
    wrong_first,
    no_boxes,
    wrong_bools("valid"),
    wrong_areas,
    wrong("iou_weight", nan, inf, -inf, 2**2000, *NO_NUMBERS),
    wrong("parts", 0, -1, 2**63, *NO_INTS),
    wrong("min_area", 0, -1, 1e-39, 1e39, nan, inf, 2**2000, *NO_NUMBERS),
    wrong("area_mode", "", "mean", None, 0, ["log"]),
    wrong("detach_denominator", None, 1, 0.0, "a"),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

CPU_TARGETS = (Target("eager", at_least=2), Target("torch.compile", at_least=1))
CUDA_TARGETS = (Target("eager", at_least=3),)


def timed(case: Case, device: str) -> Sample:
    boxes = arrange(proposals(*case.shape[:2], case.dtype, device), case.layout)
    valid = torch.ones(case.shape[:2], dtype=torch.bool, device=device)
    return sample("timed", boxes, valid, torch.full((len(boxes),), 60000.0, device=device))


def plain(boxes: Tensor, valid: Tensor, object_area: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it in PyTorch, without the reference's care for boxes that do not count or are empty."""
    boxes = boxes.float()
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    areas = width * height
    a, b = boxes[:, :, None], boxes[:, None]
    width, height = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).relu().unbind(-1)
    pairs = (valid[:, :, None] & valid[:, None]).float().triu(1)
    overlaps = pairs * (width * height / (areas[:, :, None] + areas[:, None]))
    overlap = 2 * overlaps.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    ratios = areas / (object_area / 4).clamp(min=1024)[:, None]
    area = ((ratios - 1).abs() * valid).sum(1) / valid.sum(1).clamp(min=1)
    return overlap.mean(), area.mean()


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(Case((16, 3, 4)), Case((16, 3, 4), backward=True, targets=CPU_TARGETS)),
    cuda=(Case((16, 3, 4)), Case((16, 3, 4), backward=True, targets=CUDA_TARGETS)),
    sweep=tuple(
        Case((samples, number, 4), dtype=dtype, backward=backward)
        for samples in (1, 16, 64)
        for number in (2, 3, 6)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    saves="two numbers per edge of a box",
    others={"reference": reference.part_box_losses},
)

SPEC = Spec(
    name="part_box_losses",
    function=ops.part_box_losses,
    reference=reference.part_box_losses,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    saved=saved,
    differentiable=("boxes",),
    layouts=MATRIX_LAYOUTS,
    shape="[N,M,4]",
    shrunk=shrunk,
    support=support,
    cancelling=cancelling,
    benchmark=BENCHMARK,
)
