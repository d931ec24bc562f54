"""Orthogonal loss."""

from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    MATRIX_LAYOUTS,
    SIDES,
    Draw,
    arrange,
    drawn_floats,
    often,
    random,
    wide,
    wrong,
    wrong_first,
)
from ..spec import Benchmark, Case, Sample, Saved, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, student: Tensor, teachers: Tensor) -> Sample:
    return Sample(name, {"student_map": student, "teacher_maps": teachers}, ("student_map",))


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def maps(*size: int, seed: int = 0) -> Tensor:
        return random(*size, dtype=dtype, device=device, seed=seed)

    def laid_out(name: str, student: Tensor, teachers: Tensor | int = 2) -> Sample:
        if isinstance(teachers, int):
            teachers = maps(teachers, *student.shape, seed=1)
        return sample(name, arrange(student, layout), teachers)

    some, others = maps(3, 6, 8), maps(4, 3, 6, 8, seed=1)
    partly = some.clone()
    partly[1] = 0.5
    blind = others.clone()
    blind[2, 0] = -3
    return [
        laid_out("typical", some, others),
        laid_out("float32 teachers", some, others.to(wide(dtype))),
        laid_out("teachers of the same layout", some, arrange(others, layout)),
        laid_out("one teacher", some, 1),
        laid_out("a constant map", partly, others),
        laid_out("a constant map of a teacher", some, blind),
        laid_out("nothing but constant maps", torch.ones_like(some), torch.zeros_like(others)),
        # In float32 the mean of this map is not its value.
        laid_out("a constant map of a third", torch.full_like(some, 1 / 3), others),
        laid_out("one pixel", maps(3, 1, 1)),
        laid_out("six pixels", maps(3, 2, 3)),
        laid_out("one row", maps(2, 1, 37)),
        laid_out("7x7", maps(2, 7, 7)),
        laid_out("14x14", maps(2, 14, 14), 5),
        laid_out("prime sides", maps(1, 61, 67)),
        laid_out("ties", some.round(), others.round()),
        laid_out("after a ReLU", some.relu(), others.relu()),
        laid_out("the student is the teacher", some, some[None]),
        laid_out("far from zero", some + 100, others - 100),
        # Their squares are not finite, and zero, in the narrow dtypes.
        laid_out("large maps", some * 1e4, others * 1e4),
        laid_out("small maps", some * 1e-3, others * 1e-3),
    ]


def empty() -> list[Sample]:
    return [sample("empty", torch.zeros(0, 3, 4), torch.zeros(teachers, 0, 3, 4)) for teachers in (1, 3)]


def large() -> list[Sample]:
    student = random(70, 14, 14, dtype=torch.float32, device="cpu")
    return [sample("large", student, random(4, 70, 14, 14, dtype=torch.float32, device="cpu", seed=1))]


def of_size(size: Size, device: str) -> Sample:
    """Three teachers: as many as there are samples, torch.compile would take both for the same number."""
    samples, _, height, width = size
    student = random(samples, height, width, dtype=torch.float32, device=device)
    return sample("of size", student, random(3, samples, height, width, dtype=torch.float32, device=device, seed=1))


def shrunk(sample: Sample) -> Sample:
    """Two maps of an even number of positions, so that gradcheck's evenly spaced values have no z of zero."""
    student, teachers = sample.tensors["student_map"], sample.tensors["teacher_maps"]
    tensors = {"student_map": student[:1, :2, :6], "teacher_maps": teachers[:, :1, :2, :6]}
    return Sample(sample.name, tensors, sample.differentiable)


def raw(sample: Sample) -> tuple[Any, ...]:
    return sample.tensors["student_map"], sample.tensors["teacher_maps"]


# --- what must hold of them -------------------------------------------------------------------------------------------


def support(sample: Sample) -> dict[str, Tensor]:
    """A constant map receives no gradient."""
    student = sample.tensors["student_map"]
    return {"student_map": (student != student[:, :1, :1]).flatten(1).any(1)[:, None, None].expand_as(student)}


def cancelling(sample: Sample) -> float:
    """(h − mean(h) − z · mean(h · z)) / std, where h is A_t over the number of positions."""
    student, teachers = (sample.tensors[name].double().flatten(-2) for name in ("student_map", "teacher_maps"))
    if not student.numel():
        return 0.0
    deviation = student.std(1, correction=0)
    usable = deviation[deviation.isfinite() & (deviation > 0)]
    attention = (teachers - teachers.mean(2, keepdim=True)) / teachers.std(2, correction=0, keepdim=True)
    seen = attention.abs()[attention.isfinite()]
    if not usable.numel() or not seen.numel():
        return 0.0
    return 2 * float(seen.max()) / student.numel() / float(usable.min())


def saved() -> list[Saved]:
    """The gradient of the loss, a number of the dtype of sums per position."""
    calls = []
    for dtype, number in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        for teachers in (1, 3):
            student = random(3, 5, 7, dtype=dtype, device="cpu")
            call = sample(f"{teachers} teachers {dtype}", student, random(teachers, 3, 5, 7, dtype=dtype, device="cpu"))
            calls.append(Saved(call, 3 * 5 * 7 * number))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    size = draw.choice(FEW), draw.choice(SIDES), draw.choice(SIDES)
    dtype, teachers = draw.choice(DTYPES), draw.integer(1, 4)
    student = drawn_floats(draw, size, dtype, draw.choice([0.01, 1.0, 20.0]))
    beside = draw.choice([dtype, wide(dtype)])
    maps = drawn_floats(draw, (teachers, *size), beside, draw.choice([0.01, 1.0, 20.0]))
    tensors = {"student_map": student, "teacher_maps": maps}
    return Sample("drawn", tensors, ("student_map",) if often(draw) else ())


def no_map(draw: Draw, sample: Sample) -> tuple[str, Any]:
    student = sample.tensors["student_map"]
    height, width = draw.choice([(0, 3), (3, 0), (0, 0)])
    return "student_map", student.new_zeros(len(student), height, width)


def wrong_teachers(draw: Draw, sample: Sample) -> tuple[str, Any]:
    right = sample.tensors["teacher_maps"].nan_to_num()
    teachers, samples, height, width = right.shape
    sizes = [
        (0, samples, height, width),
        (teachers, samples + 1, height, width),
        (teachers, samples, height + 1, width),
        (teachers, samples, height, 2 * width),
        (teachers, samples, height * width),
        (1, teachers, samples, height, width),
    ]
    if height != width:
        sizes.append((teachers, samples, width, height))
    student = sample.tensors["student_map"].dtype
    other = torch.float16 if student in (torch.float64, torch.bfloat16, torch.float32) else torch.bfloat16
    values = [*(right.new_zeros(size) for size in sizes), right.to(other), right.long(), right.to(torch.complex64)]
    if student != torch.float64:
        values.append(right.double())
    return "teacher_maps", draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), [right]])


FAULTS = (wrong_first, no_map, wrong_teachers, wrong("teacher_maps", None, "a", 1.0))

# --- benchmarks -------------------------------------------------------------------------------------------------------

TEACHERS = 4
CPU_TARGETS = (Target("eager", at_least=2), Target("torch.compile", at_least=1))
CUDA_TARGETS = (Target("eager", at_least=3),)


def timed(case: Case, device: str) -> Sample:
    student = arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout)
    return sample("timed", student, random(TEACHERS, *case.shape, dtype=case.dtype, device=device, seed=1))


def plain(student_map: Tensor, teacher_maps: Tensor) -> Tensor:
    """As one writes it in PyTorch, without the reference's care for constant, large and small maps."""

    def normalised(maps: Tensor) -> Tensor:
        variance, mean = torch.var_mean(maps.float(), (-2, -1), correction=0, keepdim=True)
        return (maps - mean) * variance.rsqrt()

    with torch.no_grad():
        attention = normalised(teacher_maps).abs().mean(0)
    return (attention * normalised(student_map).relu()).mean()


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(Case((32, 14, 14)), Case((32, 14, 14), backward=True, targets=CPU_TARGETS)),
    cuda=(Case((32, 14, 14)), Case((32, 14, 14), backward=True, targets=CUDA_TARGETS)),
    sweep=tuple(
        Case((samples, side, side), dtype=dtype, backward=backward)
        for samples in (1, 16, 64)
        for side in (7, 14, 28, 56)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    saves="a number per position",
    others={"reference": reference.orthogonal_loss},
)

SPEC = Spec(
    name="orthogonal_loss",
    function=ops.orthogonal_loss,
    reference=reference.orthogonal_loss,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    saved=saved,
    differentiable=("student_map",),
    layouts=MATRIX_LAYOUTS,
    shape="[N,H,W]",
    shrunk=shrunk,
    support=support,
    cancelling=cancelling,
    benchmark=BENCHMARK,
)
