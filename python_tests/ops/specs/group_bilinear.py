"""Group bilinear pooling."""

from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference
from fgvc_ext.nn.group_bilinear import position_code

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
    largest_finite,
    nan,
    no_channels,
    no_positions,
    often,
    random,
    wide,
    wrong,
    wrong_first,
    wrong_groups,
)
from ..spec import Benchmark, Case, Fault, Sample, Saved, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, features: Tensor, groups: int, position: Tensor | None = None, **options: Any) -> Sample:
    tensors = {"features": features} if position is None else {"features": features, "position": position}
    return Sample(name, tensors, ("features",), {"groups": groups, **options})


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    """The CPU kernel takes 16 to 128 positions at a time and squares of 4 × 4 products."""

    def laid_out(name: str, features: Tensor, groups: int, coded: bool = False, **options: Any) -> Sample:
        position = random(features.shape[1], dtype=wide(dtype), device=device, seed=1) if coded else None
        return sample(name, arrange(features, layout), groups, position, **options)

    def maps(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    some, wider = maps(2, 18, 7, 6), random(36, dtype=wide(dtype), device=device, seed=1)
    return [
        laid_out("typical", some, 3, coded=True, scale=0.1),
        laid_out("plain", some, 3),
        laid_out("another number of channels", some, 3, coded=True, out_channels=20),
        laid_out("as many channels as products", some, 3, out_channels=36),
        laid_out("half as many", maps(2, 32, 5, 4), 4, out_channels=32),
        laid_out("many more", maps(1, 6, 3, 5), 2, out_channels=50),
        laid_out("one output", some, 3, out_channels=1),
        laid_out("groups of one channel", some, 18, out_channels=3),
        sample("code of other strides", arrange(some, layout), 3, wider[::2]),
        sample("code in the features' dtype", arrange(some, layout), 3, wider[:18].to(dtype)),
        laid_out("one group", maps(1, 11, 4, 4), 1),
        laid_out("one channel", maps(2, 1, 3, 4), 1, coded=True),
        laid_out("one pixel", maps(3, 16, 1, 1), 4),
        laid_out("one row", maps(2, 8, 1, 37), 2),
        laid_out("14x14", maps(1, 32, 14, 14), 8, coded=True),
        laid_out("a side of the paper", maps(1, 64, 3, 3), 16, out_channels=16),
        laid_out("prime sides", maps(1, 5, 23, 29), 1),
        laid_out("saturated", some * 20, 3),
        laid_out("small", some * 0.01, 3),
        laid_out("scale of zero", some, 3, scale=0.0),
        laid_out("a negative scale", some, 3, scale=-0.25),
    ]


def empty() -> list[Sample]:
    features = torch.zeros(0, 8, 4, 5)
    return [sample("empty", features, 2), sample("empty, coded", features, 2, torch.ones(8), out_channels=3)]


def large() -> list[Sample]:
    features = random(3, 64, 28, 28, dtype=torch.float32, device="cpu")
    code = random(64, dtype=torch.float32, device="cpu", seed=1)
    return [
        sample("large", features, 8, code),
        sample("large, channels_last", arrange(features, "channels_last"), 8, code, out_channels=48),
    ]


def of_size(size: Size, device: str) -> Sample:
    """One group, which every number of channels has."""
    code = random(size[1], dtype=torch.float32, device=device, seed=1)
    return sample("of size", random(*size, dtype=torch.float32, device=device), 1, code, scale=0.1)


def shrunk(sample: Sample) -> Sample:
    tensors = {**sample.tensors, "features": sample.tensors["features"][:1, :, :2, :3]}
    return Sample(sample.name, tensors, sample.differentiable, sample.options)


def raw(sample: Sample) -> tuple[Any, ...]:
    features, options = sample.tensors["features"], sample.options
    out_channels = options.get("out_channels", features.shape[1])
    return features, options["groups"], sample.tensors.get("position"), out_channels, options.get("scale", 1 / 32)


# --- what must hold of them -------------------------------------------------------------------------------------------


def cancelling(sample: Sample) -> float:
    """Σ_k a_gk S_ik with S = scale · (D + Dᵀ)(1 − T²); T's argument is itself a sum that may cancel."""
    features, groups = sample.tensors["features"], sample.options["groups"]
    scale = abs(sample.options.get("scale", 1 / 32))
    largest = largest_finite(features)
    if "position" in sample.tensors:
        largest += largest_finite(sample.tensors["position"])
    per_group, outputs = features.shape[1] // groups, sample.options.get("out_channels", features.shape[1])
    terms = per_group * (1 + outputs / per_group**2)  # several outputs may lie between two products
    return 8 * scale * largest * terms * max(1.0, groups * largest**2 * scale)


def saved() -> list[Saved]:
    """The features and the code as they are, and nothing else."""
    calls = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in ("contiguous", "channels_last", "sliced"):
            features = arrange(random(2, 8, 7, 6, dtype=dtype, device="cpu"), layout)
            calls.append(Saved(sample(f"{layout} {dtype}", features, 2), 0, keeps=("features",)))
            coded = sample(f"{layout} {dtype}, coded", features, 4, torch.ones(8, dtype=wide(dtype)), out_channels=5)
            calls.append(Saved(coded, 0, keeps=("features", "position")))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    features = drawn_maps(draw)
    if not features.shape[1]:
        features = features.new_ones(features.shape[0], 1, *features.shape[2:])
    channels, dtype = features.shape[1], features.dtype
    groups = draw.choice([groups for groups in range(1, channels + 1) if channels % groups == 0])
    options: dict[str, Any] = {"groups": groups}
    if boolean(draw):
        options["out_channels"] = draw.choice([draw.integer(1, 40), (channels // groups) ** 2])
    if boolean(draw):
        options["scale"] = draw.choice([0.0, 1.0, draw.number(-1, 1)])
    tensors = {"features": features}
    if boolean(draw):
        beside = torch.float64 if dtype == torch.float64 else draw.choice([dtype, torch.float32])
        code = random(channels, dtype=beside, device="cpu", seed=draw.integer(0, 999))
        tensors["position"] = drawn_vector(draw, code)
    return Sample("drawn", tensors, ("features",) if often(draw) else (), options)


def wrong_position(draw: Draw, sample: Sample) -> tuple[str, Any]:
    channels, dtype = sample.tensors["features"].shape[1], sample.tensors["features"].dtype
    right = torch.ones(channels, dtype=dtype)
    other = right.to(torch.float16 if dtype == torch.float64 else torch.float64)
    values = [right[1:], torch.ones(channels + 1, dtype=dtype), right[:, None], right.sum(), other, right.long()]
    return "position", draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), 1.0, "a"])


FAULTS: tuple[Fault, ...] = (
    wrong_first,
    no_positions,
    no_channels,
    wrong_groups,
    wrong_position,
    wrong("out_channels", 0, -1, 2**31, *TOO_LARGE, *(value for value in NO_INTS if value is not None)),
    wrong("scale", nan, inf, -inf, 10**400, *NO_NUMBERS),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

# The sites of the deep bilinear transformation in a ResNet-50 at 448 pixels.
SITES = ((16, 256, 56, 56), (16, 256, 28, 28), (16, 512, 28, 28), (16, 512, 14, 14), (16, 2048, 14, 14))
CPU_TARGETS = (Target("eager", at_least=5),)
CUDA_TARGETS = (Target("torch.compile", at_least=3),)


def timed(case: Case, device: str) -> Sample:
    features = arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout)
    channels = features.shape[1]
    groups = {64: 8, 2048: 32}.get(channels, 16)
    return sample("timed", features, groups, position_code(channels, groups).to(features))


def plain(features: Tensor, position: Tensor, groups: int) -> Tensor:
    """The products of all positions as one batch; twice as many as channels, or as many, at the sites above."""
    samples, channels, height, width = features.shape
    coded = (features + position[:, None, None]).permute(0, 2, 3, 1).reshape(-1, groups, channels // groups)
    responses = torch.bmm(coded.mT, coded).div_(32).tanh().flatten(1)
    if responses.shape[1] == 2 * channels:
        between = torch.linspace(0, 1, channels, dtype=responses.dtype, device=responses.device)
        responses = torch.lerp(responses[:, ::2], responses[:, 1::2], between)
    return responses.view(samples, height, width, channels).permute(0, 3, 1, 2).contiguous()


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(
        *(Case(site, targets=CPU_TARGETS) for site in SITES),
        *(Case(site, backward=True, targets=CPU_TARGETS) for site in SITES),
        Case(SITES[0], layout="channels_last"),
        Case(SITES[0], dtype=torch.bfloat16),
    ),
    cuda=tuple(
        Case(site, dtype=dtype, backward=backward, targets=CUDA_TARGETS)
        for site in SITES
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    sweep=tuple(
        Case((samples, channels, side, side), dtype=dtype, layout=layout, backward=backward)
        for samples in (1, 16)
        for channels, side in ((64, 56), (256, 28), (512, 14), (2048, 7), (2048, 14))
        for dtype, layout in (
            (torch.float32, "contiguous"),
            (torch.bfloat16, "contiguous"),
            (torch.float32, "channels_last"),
        )
        for backward in (False, True)
    ),
    saves="nothing but the features and the position code",
    others={"reference": reference.group_bilinear},
)

SPEC = Spec(
    name="group_bilinear",
    function=ops.group_bilinear,
    reference=reference.group_bilinear,
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
