"""The diversification block, and the mask that it applies."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference
from fgvc_ext.reference.diversify import hide_threshold

from ..generators import (
    NO_INTS,
    NO_NUMBERS,
    TOO_LARGE,
    Draw,
    arrange,
    boolean,
    drawn_maps,
    drawn_vector,
    inf,
    int64,
    nan,
    no_positions,
    often,
    random,
    wrong,
    wrong_first,
    wrong_int64s,
)
from ..spec import Benchmark, Case, Sample, Saved, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def sample(name: str, maps: Tensor, seed: Tensor | None = None, **options: Any) -> Sample:
        if seed is None:
            seed = torch.tensor(0x1234_5678_9ABC_DEF, device=device)
        return Sample(name, {"maps": arrange(maps, layout), "seed": seed}, ("maps",), options)

    def some(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    maps = some(2, 19, 7, 6)
    return [
        sample("typical", maps),
        sample("a seed per sample", maps, torch.arange(2, device=device) * 0x7_1234_5678 - 3),
        # Only alpha · hidden makes these scores: nothing larger stands beside it and hides its roundings.
        sample("everything hidden", maps, p_peak=1.0, p_patch=1.0, alpha=0.25),
        sample("nothing hidden", maps, p_peak=0.0, p_patch=0.0),
        sample("peaks only", maps, p_patch=0.0, p_peak=0.7, alpha=0.0),
        sample("patches of one position", maps, patch_size=1, p_patch=0.3),
        sample("one patch", maps, patch_size=100, p_patch=0.6),
        sample("the largest patch", maps, patch_size=2**63 - 1, p_patch=0.6),
        sample("constant", torch.ones_like(maps), p_peak=0.5),
        sample("one pixel", some(3, 5, 1, 1)),
        sample("14x14", some(1, 33, 14, 14)),
        sample("prime sides", some(1, 2, 37, 41), patch_size=4),
        sample("wide rows", some(1, 3, 3, 70), patch_size=5),
    ]


def empty() -> list[Sample]:
    return [Sample("empty", {"maps": torch.zeros(0, 3, 4, 5), "seed": torch.tensor(1)}, ("maps",))]


def large() -> list[Sample]:
    return [of_size((16, 200, 14, 14), "cpu")]


def of_size(size: Size, device: str) -> Sample:
    maps = random(*size, dtype=torch.float32, device=device)
    return Sample("of size", {"maps": maps, "seed": torch.tensor(7, device=device)}, ("maps",))


def shrunk(sample: Sample) -> Sample:
    maps, seed = sample.tensors["maps"][:1, :3], sample.tensors["seed"]
    return replace(sample, tensors={"maps": maps, "seed": seed[:1] if seed.dim() else seed})


def raw(sample: Sample) -> tuple[Any, ...]:
    return *raw_mask(sample), sample.options.get("alpha", 0.1)


def raw_mask(sample: Sample) -> tuple[Any, ...]:
    peak, patch = (hide_threshold(sample.options.get(name, 0.5)) for name in ("p_peak", "p_patch"))
    return sample.tensors["maps"], sample.tensors["seed"], peak, patch, sample.options.get("patch_size", 3)


def for_mask(sample: Sample) -> Sample:
    options = {name: value for name, value in sample.options.items() if name != "alpha"}
    return replace(sample, differentiable=(), options=options)


# --- what must hold of them -------------------------------------------------------------------------------------------


def support(sample: Sample) -> dict[str, Tensor]:
    """With alpha = 0 what is hidden has no gradient."""
    maps = sample.tensors["maps"]
    if sample.options.get("alpha") != 0:
        return {"maps": torch.ones_like(maps, dtype=torch.bool)}
    options = {name: value for name, value in sample.options.items() if name != "alpha"}
    return {"maps": ~reference.suppression_mask(maps, seed=sample.tensors["seed"], **options)}


def saved() -> list[Saved]:
    """One bit per element, whole bytes per map."""
    calls = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for height, width in ((1, 1), (7, 7), (14, 14), (5, 9)):
            maps = random(3, 5, height, width, dtype=dtype, device="cpu")
            call = Sample(f"{height}x{width} {dtype}", {"maps": maps}, ("maps",), {"seed": 0})
            calls.append(Saved(call, 3 * 5 * -(-height * width // 8)))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    maps = drawn_maps(draw)
    seed = torch.tensor(int64(draw))
    if boolean(draw):
        seed = drawn_vector(draw, torch.tensor([int64(draw) for _ in range(len(maps))], dtype=torch.int64))
    options = {
        "p_peak": draw.choice([0, 0.5, 1, draw.number(0, 1)]),
        "p_patch": draw.choice([0, 0.5, 1, draw.number(0, 1)]),
        "patch_size": draw.choice([draw.integer(1, 9), 100, 2**31, 2**62, 2**63 - 1]),
        "alpha": draw.choice([0, 1, 0.1, draw.number(-2, 2)]),
    }
    return Sample("drawn", {"maps": maps, "seed": seed}, ("maps",) if often(draw) else (), options)


def too_large_alpha(draw: Draw, sample: Sample) -> tuple[str, Any]:
    """Finite, but not in float32; beside float64 there is no such number, an infinity takes its place."""
    return "alpha", inf if sample.tensors["maps"].dtype == torch.float64 else draw.choice([1e39, -1e39, 10**39])


FAULTS = (
    wrong_first,
    no_positions,
    *(wrong(name, -0.1, 1.1, nan, inf, -inf, 2**70, *NO_NUMBERS) for name in ("p_peak", "p_patch")),
    wrong("patch_size", 0, -1, *TOO_LARGE, *NO_INTS),
    wrong("seed", *TOO_LARGE, 1.5, "a", True, [1], 1j),
    wrong_int64s("seed"),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

PATCH, ALPHA, P_PEAK, P_PATCH = 3, 0.1, 0.5, 0.5
CPU_TARGETS = (Target("torch.compile", at_least=5), Target("read once", at_most=3))
CUDA_TARGETS = (Target("copy", at_least=1.6, text="copy / ours (1.6 is 80 % of the copy's bandwidth)"),)
CPU_SHAPE, CUDA_SHAPE = (32, 200, 14, 14), (256, 2048, 14, 14)


def timed(case: Case, device: str) -> Sample:
    """Without a seed: one is drawn in each call, as in training."""
    maps = arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout)
    return Sample("timed", {"maps": maps}, ("maps",))


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


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(
        Case(CPU_SHAPE, targets=CPU_TARGETS),
        Case(CPU_SHAPE, layout="channels_last"),
        Case(CPU_SHAPE, dtype=torch.bfloat16),
        Case(CPU_SHAPE, backward=True),
    ),
    cuda=(
        Case(CUDA_SHAPE, targets=CUDA_TARGETS),
        Case(CUDA_SHAPE, layout="channels_last"),
        Case(CUDA_SHAPE, dtype=torch.bfloat16, targets=CUDA_TARGETS),
        Case(CUDA_SHAPE, backward=True),
    ),
    sweep=tuple(
        Case((samples, classes, side, side), dtype=dtype, backward=backward)
        for samples in (1, 16, 64)
        for classes in (200, 10000)
        for side in (7, 14, 28, 56)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    saves="1 bit per element",
    others={
        "reference": lambda maps: reference.diversify(maps, seed=torch.zeros((), dtype=torch.int64).to(maps.device))
    },
    comparable_options={"seed": 0},
)

DIVERSIFY = Spec(
    name="diversify",
    function=ops.diversify,
    reference=reference.diversify,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=(*FAULTS, wrong("alpha", nan, inf, -inf, *NO_NUMBERS), too_large_alpha),
    saved=saved,
    differentiable=("maps",),
    shrunk=shrunk,
    support=support,
    benchmark=BENCHMARK,
)

SUPPRESSION_MASK = Spec(
    name="suppression_mask",
    function=ops.suppression_mask,
    reference=reference.suppression_mask,
    samples=lambda dtype, device, layout="contiguous": [for_mask(sample) for sample in samples(dtype, device, layout)],
    empty=lambda: [for_mask(sample) for sample in empty()],
    large=lambda: [for_mask(sample) for sample in large()],
    of_size=lambda size, device: for_mask(of_size(size, device)),
    raw=raw_mask,
    drawn=lambda draw: for_mask(drawn(draw)),
    faults=FAULTS,
)
