"""Global k-max pooling. The spec to copy for a new operator: it uses every field but ``constant_results``."""

from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    NO_INTS,
    Draw,
    arrange,
    boolean,
    drawn_maps,
    drawn_vector,
    largest_finite,
    no_positions,
    often,
    random,
    wide,
    wrong,
    wrong_first,
)
from ..spec import Benchmark, Case, Sample, Saved, Size, Spec, Target

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, features: Tensor, k: int, weight: Tensor | None = None) -> Sample:
    tensors = {"features": features} if weight is None else {"features": features, "weight": weight}
    return Sample(name, tensors, tuple(tensors), {"k": k})


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def maps(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    def laid_out(name: str, features: Tensor, k: int, weighted: bool = False) -> Sample:
        weight = random(k, dtype=wide(dtype), device=device, seed=1) if weighted else None
        return sample(name, arrange(features, layout), k, weight)

    some = maps(2, 19, 7, 6)
    neighbours = 1 + (torch.arange(64, device=device) + 33).remainder(64).to(dtype) * torch.finfo(dtype).eps
    return [
        laid_out("weighted", some, 4, weighted=True),
        laid_out("plain", some, 4),
        laid_out("max", some, 1),
        laid_out("average", some, 42),
        laid_out("k of 17", maps(2, 3, 5, 11), 17, weighted=True),
        laid_out("one pixel", maps(3, 5, 1, 1), 1),
        laid_out("one row", maps(1, 2, 1, 37), 3),
        laid_out("14x14", maps(1, 17, 14, 14), 4),
        # No number lies between the 32 largest and the others, and the 32nd is at the last position.
        laid_out("neighbouring numbers", neighbours.view(1, 1, 8, 8), 32),
        laid_out("few values", (some * 1.5).round(), 5, weighted=True),
        laid_out("after a ReLU", (some - 1.3).relu(), 4),
        laid_out("prime sides", maps(1, 1, 61, 67), 7),
        laid_out("average of a large map", maps(1, 3, 56, 56), 3136),
    ]


def empty() -> list[Sample]:
    features = torch.zeros(0, 3, 4, 5)
    return [sample("empty", features, 4), sample("empty, weighted", features, 4, torch.ones(4))]


def large() -> list[Sample]:
    """More than 1024 maps: the gradient of the weights is added up in chunks of as many."""

    def weighted(name: str, k: int, *size: int) -> Sample:
        features = random(*size, dtype=torch.float32, device="cpu")
        return sample(name, features, k, random(k, dtype=torch.float32, device="cpu", seed=1))

    return [weighted("large", 4, 16, 200, 14, 14), weighted("large, weighted max", 1, 6, 700, 3, 3)]


def of_size(size: Size, device: str) -> Sample:
    weight = random(4, dtype=torch.float32, device=device, seed=1)
    return sample("of size", random(*size, dtype=torch.float32, device=device), 4, weight)


def shrunk(sample: Sample) -> Sample:
    tensors = {**sample.tensors, "features": sample.tensors["features"][:1, :3]}
    return Sample(sample.name, tensors, sample.differentiable, sample.options)


def raw(sample: Sample) -> tuple[Any, ...]:
    features, weight = sample.tensors["features"], sample.tensors.get("weight")
    wide_indices = features.shape[2] * features.shape[3] > 32768
    return features, sample.options["k"], weight, weight is not None, wide_indices


# --- what must hold of them -------------------------------------------------------------------------------------------


def support(sample: Sample) -> dict[str, Tensor]:
    """A map's gradient lies at its k largest values, the lowest index first among equals."""
    maps = sample.tensors["features"].flatten(2)
    largest = maps.sort(dim=2, descending=True, stable=True).indices[:, :, : sample.options["k"]]
    taken = torch.zeros(maps.shape, dtype=torch.bool, device=maps.device).scatter(2, largest, True)
    return {"features": taken.view(sample.tensors["features"].shape)}


def cancelling(sample: Sample) -> float:
    """Σ grad · S_r, the gradient of a weight."""
    return 2 * largest_finite(sample.tensors["features"]) if "weight" in sample.differentiable else 0.0


def saved() -> list[Saved]:
    """k indices per map in int16 (int32 where a map has more than 32,768 positions), k values only for the weight."""

    def indices(k: int, dtype: torch.dtype) -> Saved:
        features = random(3, 5, 7, 6, dtype=dtype, device="cpu")
        return Saved(sample(f"k of {k} in {dtype}", features, k), 3 * 5 * k * 2)

    def weighted(*differentiable: str) -> Saved:
        features, weight = random(3, 5, 7, 6, dtype=torch.float32, device="cpu"), torch.ones(4)
        values = 4 if "weight" in differentiable else 0  # bytes of one
        call = Sample(
            f"gradient to {differentiable}", {"features": features, "weight": weight}, differentiable, {"k": 4}
        )
        return Saved(call, 3 * 5 * 4 * (2 + values), keeps=("weight",))

    return [
        *(indices(k, dtype) for k in (1, 4, 20) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        Saved(sample("32,768 positions", torch.zeros(1, 2, 128, 256), 4), 2 * 4 * 2),
        Saved(sample("32,896 positions", torch.zeros(1, 2, 128, 257), 4), 2 * 4 * 4),
        weighted("features"),
        weighted("features", "weight"),
    ]


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    tensors = {"features": drawn_maps(draw)}
    dtype, positions = tensors["features"].dtype, tensors["features"].shape[2:].numel()
    k = draw.choice([draw.integer(1, min(positions, 20)), positions, draw.integer(1, positions)])
    differentiable = ("features",) if often(draw) else ()
    if boolean(draw):
        beside = torch.float64 if dtype == torch.float64 else draw.choice([dtype, torch.float32])
        weight = random(k, dtype=beside, device="cpu", seed=draw.integer(0, 999)).clamp(-1, 1)
        tensors["weight"] = drawn_vector(draw, weight)
        differentiable += ("weight",) if boolean(draw) else ()
    return Sample("drawn", tensors, differentiable, {"k": k})


def k_above_the_positions(draw: Draw, sample: Sample) -> tuple[str, Any]:
    positions = sample.tensors["features"].shape[2:].numel()
    return "k", draw.choice([positions + 1, 2**15 + positions, 2**40, 2**63 - 1, 2**63, 2**70])


def wrong_weight(draw: Draw, sample: Sample) -> tuple[str, Any]:
    k, dtype = sample.options["k"], sample.tensors["features"].dtype
    right = torch.ones(k, dtype=dtype)
    other = right.to(torch.float16 if dtype == torch.float64 else torch.float64)
    values = [right[1:], torch.ones(k + 1, dtype=dtype), right[:, None], right.sum(), other, right.long()]
    return "weight", draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), 1.0, "a"])


FAULTS = (
    wrong_first,
    no_positions,
    wrong_weight,
    k_above_the_positions,
    wrong("k", 0, -1, -(2**70), *NO_INTS),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

K = 4
TOPK = Target("eager", at_least=20, text="topk().mean() / ours")
CPU_TARGETS = (Target("read once", at_most=2, otherwise=TOPK),)
CHANNELS_LAST_TARGETS = (Target("read once", at_most=3, otherwise=TOPK),)
CUDA_TARGETS = (
    Target("eager", at_least=5, text="topk().mean() / ours"),
    # A copy moves each byte twice, reading once.
    Target("copy", at_least=1.6, text="copy / ours (1.6 is 80 % of the copy's bandwidth)"),
)
CPU_SHAPE, CUDA_SHAPE = (32, 2048, 14, 14), (256, 2048, 14, 14)


def timed(case: Case, device: str) -> Sample:
    return sample("timed", arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout), K)


def plain(features: Tensor, k: int) -> Tensor:
    return features.flatten(2).topk(k, dim=2).values.mean(2)


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(
        Case(CPU_SHAPE, targets=CPU_TARGETS),
        Case(CPU_SHAPE, layout="channels_last", targets=CHANNELS_LAST_TARGETS),
        Case(CPU_SHAPE, dtype=torch.bfloat16),
        Case(CPU_SHAPE, backward=True),
        Case(CPU_SHAPE, layout="channels_last", backward=True),
    ),
    cuda=(
        Case(CUDA_SHAPE, targets=CUDA_TARGETS),
        Case(CUDA_SHAPE, layout="channels_last", targets=CUDA_TARGETS),
        Case(CUDA_SHAPE, dtype=torch.bfloat16, targets=CUDA_TARGETS),
        Case(CUDA_SHAPE, backward=True),
        Case(CUDA_SHAPE, layout="channels_last", backward=True),
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
    saves="4 int16 per map",
)

SPEC = Spec(
    name="global_k_max_pool",
    function=ops.global_k_max_pool,
    reference=reference.global_k_max_pool,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    saved=saved,
    differentiable=("features", "weight"),
    shrunk=shrunk,
    support=support,
    cancelling=cancelling,
    folds_vmap=True,
    benchmark=BENCHMARK,
)
