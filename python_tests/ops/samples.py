"""The table that drives every operator through the contract: its functions and the inputs to try them on.

A new operator adds one entry to OPERATORS; test_contract.py does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fgvc_ext import ops, reference
from fgvc_ext.reference.diversify import hide_threshold

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


@dataclass(frozen=True)
class Sample:
    """Arguments of the public function; ``differentiable`` names the tensors that take gradients."""

    name: str
    tensors: dict[str, Tensor]
    differentiable: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    samples: Callable[..., list[Sample]]  # (dtype, device, layout) -> samples; the first one is the typical one
    raw: Callable[[Sample], tuple[str, tuple[Any, ...]]]  # the call of torch.ops.fgvc_ext that the function makes
    empty: Callable[[], list[Sample]]  # N = 0
    large: Callable[[], list[Sample]]  # float32 on the CPU, enough work for several parallel tasks
    image_like: bool  # whether `layout` makes a difference


def arrange(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout of memory."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full([2 * size for size in values.shape], float("nan"), dtype=values.dtype, device=values.device)
        view = wide[tuple(slice(None, None, 2) for _ in values.shape)]
        return view.copy_(values)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # all samples share one memory
        return values[:1].expand_as(values)
    return values.contiguous()


def random(*size: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a second floating argument under autocast."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _k_max_samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def sample(name: str, features: Tensor, k: int, weighted: bool = False) -> Sample:
        tensors = {"features": arrange(features, layout)}
        if weighted:
            tensors["weight"] = random(k, dtype=_wide(dtype), device=device, seed=1)
        return Sample(name, tensors, tuple(tensors), {"k": k})

    maps = random(2, 19, 7, 6, dtype=dtype, device=device)
    return [
        sample("typical", maps, 4),
        sample("weighted", maps, 4, weighted=True),
        sample("max", maps, 1),
        sample("average", maps, 42),
        sample("k of 17", random(2, 3, 5, 11, dtype=dtype, device=device), 17, weighted=True),
        sample("one pixel", random(3, 5, 1, 1, dtype=dtype, device=device), 1),
        sample("one row", random(1, 2, 1, 37, dtype=dtype, device=device), 3),
        sample("14x14", random(1, 17, 14, 14, dtype=dtype, device=device), 4),
        sample("few values", (maps * 1.5).round(), 5, weighted=True),
        sample("after a ReLU", (maps - 1.3).relu(), 4),
        sample("prime sides", random(1, 1, 61, 67, dtype=dtype, device=device), 7),
        sample("average of a large map", random(1, 3, 56, 56, dtype=dtype, device=device), 3136),
    ]


def _large_k_max() -> list[Sample]:
    """More than 1024 maps: the gradient of the weights is added up in chunks of as many."""

    def sample(name: str, k: int, *size: int) -> Sample:
        tensors = {
            "features": random(*size, dtype=torch.float32, device="cpu"),
            "weight": random(k, dtype=torch.float32, device="cpu", seed=1),
        }
        return Sample(name, tensors, ("features", "weight"), {"k": k})

    return [sample("large", 4, 16, 200, 14, 14), sample("large, weighted max", 1, 6, 700, 3, 3)]


def _diversify_samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def sample(name: str, maps: Tensor, **options: Any) -> Sample:
        seeds = {"seed": torch.tensor(0x1234_5678_9ABC_DEF, device=device)}
        if options.pop("keyed", False):
            seeds["seed"] = torch.arange(len(maps), device=device) * 0x7_1234_5678 - 3
        return Sample(name, {"maps": arrange(maps, layout), **seeds}, ("maps",), options)

    maps = random(2, 19, 7, 6, dtype=dtype, device=device)
    return [
        sample("typical", maps),
        sample("a seed a sample", maps, keyed=True),
        sample("everything hidden", maps, p_peak=1.0, p_patch=1.0, alpha=0.25),
        sample("nothing hidden", maps, p_peak=0.0, p_patch=0.0),
        sample("peaks only", maps, p_patch=0.0, p_peak=0.7, alpha=0.0),
        sample("patches of one position", maps, patch_size=1, p_patch=0.3),
        sample("one patch", maps, patch_size=100, p_patch=0.6),
        sample("constant", torch.ones_like(maps), p_peak=0.5),
        sample("one pixel", random(3, 5, 1, 1, dtype=dtype, device=device)),
        sample("14x14", random(1, 33, 14, 14, dtype=dtype, device=device)),
        sample("prime sides", random(1, 2, 37, 41, dtype=dtype, device=device), patch_size=4),
        sample("wide rows", random(1, 3, 3, 70, dtype=dtype, device=device), patch_size=5),
    ]


def _boosting_samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def sample(name: str, scores: Tensor, target: list[int], **options: Any) -> Sample:
        tensors = {"scores": arrange(scores, layout), "target": torch.tensor(target, device=device)}
        return Sample(name, tensors, ("scores",), options)

    scores = random(5, 37, dtype=dtype, device=device)
    target = [0, 36, 17, 3, 3]
    return [
        sample("typical", scores, target),
        sample("one rival", scores, target, k=1),
        sample("none reduced", scores, target, k=5, reduction="none"),
        sample("summed", scores, target, k=5, reduction="sum"),
        sample("k of C-2", scores, target, k=35),
        sample("k of C-1", scores, target, k=36),
        sample("k above C", scores, target, k=1000),
        sample("ignored", scores, [0, -100, 17, -100, 3]),
        sample("another ignored", scores, [0, 7, 17, 7, 3], ignore_index=7, reduction="none"),
        sample("ties", (scores * 2).round(), target, k=4),
        sample("all tied", torch.zeros_like(scores), target, k=4),
        sample("one class", random(3, 1, dtype=dtype, device=device), [0, 0, 0]),
        sample("two classes", random(3, 2, dtype=dtype, device=device), [0, 1, 0], k=1),
        sample("many classes", random(2, 1031, dtype=dtype, device=device), [1030, 5]),
        sample("large scores", scores * 60, target),
        # Here a logarithm of a sum of exponentials keeps few digits of what makes the gradient.
        sample("far from zero", scores + 1000, target),
        sample("far from zero, all classes", scores - 1000, target, k=36),
    ]


def _raw_k_max(sample: Sample) -> tuple[str, tuple[Any, ...]]:
    weight = sample.tensors.get("weight")
    return "global_k_max_pool", (sample.tensors["features"], sample.options["k"], weight, weight is not None)


def _raw_diversify(sample: Sample) -> tuple[str, tuple[Any, ...]]:
    options = {"p_peak": 0.5, "p_patch": 0.5, "patch_size": 3, "alpha": 0.1, **sample.options}
    peak, patch = hide_threshold(options["p_peak"]), hide_threshold(options["p_patch"])
    return "diversify", (*sample.tensors.values(), peak, patch, options["patch_size"], options["alpha"])


def _raw_mask(sample: Sample) -> tuple[str, tuple[Any, ...]]:
    return "suppression_mask", _raw_diversify(sample)[1][:-1]


def _raw_boosting(sample: Sample) -> tuple[str, tuple[Any, ...]]:
    options = {"k": 15, "reduction": "mean", "ignore_index": -100, **sample.options}
    reduction = ("none", "mean", "sum").index(options["reduction"])
    return "gradient_boosting_cross_entropy", (
        *sample.tensors.values(),
        options["k"],
        reduction,
        options["ignore_index"],
    )


def _mask_samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    return [
        Sample(
            sample.name, sample.tensors, (), {name: value for name, value in sample.options.items() if name != "alpha"}
        )
        for sample in _diversify_samples(dtype, device, layout)
    ]


def _large_maps(differentiable: tuple[str, ...]) -> list[Sample]:
    maps = random(16, 200, 14, 14, dtype=torch.float32, device="cpu")
    return [Sample("large", {"maps": maps, "seed": torch.tensor(7)}, differentiable)]


def _large_boosting() -> list[Sample]:
    tensors = {"scores": random(600, 200, dtype=torch.float32, device="cpu"), "target": torch.arange(600) % 200}
    return [Sample("large", tensors, ("scores",), {"reduction": reduction}) for reduction in ("mean", "none")]


def _empty_k_max() -> list[Sample]:
    features = torch.zeros(0, 3, 4, 5)
    return [
        Sample("empty", {"features": features}, ("features",), {"k": 4}),
        Sample("empty, weighted", {"features": features, "weight": torch.ones(4)}, ("features", "weight"), {"k": 4}),
    ]


def _empty_maps(differentiable: tuple[str, ...]) -> list[Sample]:
    return [Sample("empty", {"maps": torch.zeros(0, 3, 4, 5), "seed": torch.tensor(1)}, differentiable)]


def _empty_boosting() -> list[Sample]:
    tensors = {"scores": torch.zeros(0, 5), "target": torch.zeros(0).long()}
    return [Sample("empty", tensors, ("scores",), {"reduction": name}) for name in ("mean", "sum", "none")]


OPERATORS = [
    Operator(
        "global_k_max_pool", ops.global_k_max_pool, reference.global_k_max_pool, _k_max_samples, _raw_k_max,
        _empty_k_max, _large_k_max, image_like=True,
    ),
    Operator(
        "diversify", ops.diversify, reference.diversify, _diversify_samples, _raw_diversify,
        lambda: _empty_maps(("maps",)), lambda: _large_maps(("maps",)), image_like=True,
    ),
    Operator(
        "suppression_mask", ops.suppression_mask, reference.suppression_mask, _mask_samples, _raw_mask,
        lambda: _empty_maps(()), lambda: _large_maps(()), image_like=True,
    ),
    Operator(
        "gradient_boosting_cross_entropy", ops.gradient_boosting_cross_entropy,
        reference.gradient_boosting_cross_entropy, _boosting_samples, _raw_boosting,
        _empty_boosting, _large_boosting, image_like=False,
    ),
]  # fmt: skip
