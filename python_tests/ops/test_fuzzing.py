"""Random arguments: a result that follows the reference, or an error of Python's that names the operator.

Arguments are drawn afresh for each example, but the same ones on every run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from fgvc_ext import _library

from .comparison import assert_follows, assert_same_bits, run
from .conftest import INSTRUCTION_SETS
from .samples import DTYPES, LAYOUTS, OPERATORS, Operator, Sample, arrange, random

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _library.has_schemas(), reason="the package has no compiled libraries"),
]
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
few_examples = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
more_examples = settings(few_examples, max_examples=400)

nan, inf = float("nan"), float("inf")
few = st.sampled_from([0, 1, 1, 2, 3, 5])  # samples
channels = st.sampled_from([0, 1, 2, 7, 15, 16, 17, 33])  # a tile of the CPU kernels has 16
sides = st.sampled_from([1, 1, 2, 3, 4, 7, 8, 9, 14, 17, 33])
int64s = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, 2**63 - 1, -(2**63)]))


# --- valid arguments --------------------------------------------------------------------------------------------------


def layout_of(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The values in a drawn layout: one of the table's, any order of the dimensions, or repeated along one of them."""
    names = [name for name in LAYOUTS if values.dim() == 4 or name != "channels_last"]
    name = draw(st.sampled_from([*names, "permuted", "repeated", "unaligned"]))
    if name == "permuted":
        order = draw(st.permutations(range(values.dim())))
        return values.permute(order).contiguous().permute([order.index(dim) for dim in range(values.dim())])
    if name == "repeated":
        return values.narrow(-1, 0, min(1, values.shape[-1])).expand_as(values)
    if name == "unaligned":
        memory = values.new_full((values.numel() + 1,), nan)
        return memory[1:].view(values.shape).copy_(values)
    return arrange(values, name)


def floats(draw: st.DrawFn, size: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values, sometimes with ties, sometimes far from zero, sometimes with a few that are not finite."""
    values = scale * random(*size, dtype=torch.float64, device="cpu", seed=draw(st.integers(0, 999)))
    values = draw(st.sampled_from([values, values, values.round(), values + 1000 * scale, values.relu()])).to(dtype)
    if values.numel() and draw(st.integers(0, 3)) == 0:
        for value in draw(st.lists(st.sampled_from([nan, inf, -inf, -0.0]), min_size=1, max_size=3)):
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = value
    return layout_of(draw, values)


def vector(draw: st.DrawFn, values: Tensor) -> Tensor:
    """Sometimes with gaps between the elements."""
    return torch.stack([values, values], dim=1)[:, 0] if draw(st.booleans()) else values


def maps_of(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    size = draw(st.tuples(few, channels, sides, sides))
    return floats(draw, size, dtype, draw(st.sampled_from([0.01, 1.0, 20.0])))


@st.composite
def k_max_samples(draw: st.DrawFn) -> Sample:
    dtype = draw(st.sampled_from(DTYPES))
    tensors = {"features": maps_of(draw, dtype)}
    positions = tensors["features"].shape[2] * tensors["features"].shape[3]
    k = draw(st.one_of(st.integers(1, min(positions, 20)), st.just(positions), st.integers(1, positions)))
    differentiable = ["features"] if draw(st.integers(0, 3)) else []
    if draw(st.booleans()):
        wide = torch.float64 if dtype == torch.float64 else draw(st.sampled_from([dtype, torch.float32]))
        weight = random(k, dtype=wide, device="cpu", seed=draw(st.integers(0, 999))).clamp(-1, 1)
        tensors["weight"] = vector(draw, weight)
        differentiable += ["weight"] if draw(st.booleans()) else []
    return Sample("drawn", tensors, tuple(differentiable), {"k": k})


@st.composite
def diversify_samples(draw: st.DrawFn) -> Sample:
    maps = maps_of(draw, draw(st.sampled_from(DTYPES)))
    seed = torch.tensor(draw(int64s))
    if draw(st.booleans()):
        seed = vector(draw, torch.tensor([draw(int64s) for _ in range(len(maps))], dtype=torch.int64))
    probability = st.one_of(st.sampled_from([0, 0.5, 1]), st.floats(0, 1))
    options = {
        "p_peak": draw(probability),
        "p_patch": draw(probability),
        "patch_size": draw(st.one_of(st.integers(1, 9), st.sampled_from([100, 2**31, 2**62]))),
        "alpha": draw(st.one_of(st.sampled_from([0, 1, 0.1]), st.floats(-2, 2))),
    }
    return Sample("drawn", {"maps": maps, "seed": seed}, ("maps",) if draw(st.integers(0, 3)) else (), options)


@st.composite
def mask_samples(draw: st.DrawFn) -> Sample:
    sample = draw(diversify_samples())
    options = {name: value for name, value in sample.options.items() if name != "alpha"}
    return replace(sample, differentiable=(), options=options)


@st.composite
def boosting_samples(draw: st.DrawFn) -> Sample:
    size = draw(st.tuples(few, st.sampled_from([1, 2, 3, 15, 16, 17, 18, 37, 200, 1030])))
    scores = floats(draw, size, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0.01, 1.0, 20.0])))
    samples, classes = size
    ignore_index = draw(st.one_of(st.just(-100), int64s, st.integers(0, classes - 1)))
    labels = st.one_of(st.integers(0, classes - 1), st.just(ignore_index))
    target = torch.tensor([draw(labels) for _ in range(samples)], dtype=torch.int64)
    options = {
        "k": draw(st.one_of(st.integers(1, classes + 2), st.sampled_from([15, 2**31, 2**63 - 1]))),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "ignore_index": ignore_index,
    }
    tensors = {"scores": scores, "target": vector(draw, target)}
    return Sample("drawn", tensors, ("scores",) if draw(st.integers(0, 3)) else (), options)


SAMPLES: dict[str, Callable[[], st.SearchStrategy[Sample]]] = {
    "global_k_max_pool": k_max_samples,
    "diversify": diversify_samples,
    "suppression_mask": mask_samples,
    "gradient_boosting_cross_entropy": boosting_samples,
}


def cancelling(sample: Sample) -> float:
    """The size of what may cancel in a gradient, for output gradients of up to 2."""
    if "scores" in sample.tensors:  # softmax − 1
        return 2.0 if sample.options["reduction"] == "none" else 1.0
    first = next(iter(sample.tensors.values()))
    finite = first[first.isfinite()].double().abs()
    return 2 * float(finite.max()) if "weight" in sample.differentiable and finite.numel() else 0.0  # Σ grad · S_r


@contextmanager
def drawn_instruction_set(data: st.DataObject) -> Iterator[None]:
    before = _library.instruction_set()
    _library._module.use_instruction_set(data.draw(st.sampled_from(INSTRUCTION_SETS)))
    try:
        yield
    finally:
        _library._module.use_instruction_set(before)


def describe(sample: Sample) -> None:
    for name, tensor in sample.tensors.items():
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            note(f"{name}: {tensor.dtype}, size {list(tensor.shape)}, strides {tensor.stride()}")
    note(f"gradients to {sample.differentiable}, options {sample.options}")


@each_operator
@more_examples
@given(data=st.data())
def test_valid_arguments_give_what_the_reference_gives(operator: Operator, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[operator.name]())
    describe(sample)
    with drawn_instruction_set(data):
        assert_follows(operator.function, operator.reference, sample, cancelling(sample))
        seed = sample.tensors.get("seed")
        if seed is not None and seed.dim() == 0:
            as_int = replace(sample, tensors={**sample.tensors, "seed": int(seed)})
            assert_same_bits(run(operator.function, as_int), run(operator.function, sample), "a seed as int")


# --- invalid arguments ------------------------------------------------------------------------------------------------

NO_INTS: list[Any] = [1.5, 1.0, "a", None, True, [1], 1j]
NO_NUMBERS: list[Any] = ["a", None, True, [0.5], 1j]
Fault = Callable[[st.DrawFn, Sample], tuple[str, Any]]  # the argument's name and a value that it must not have


def one_of(name: str, *values: Any) -> Fault:
    return lambda draw, sample: (name, draw(st.sampled_from(values)))


def wrong_first(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
    name, tensor = next(iter(sample.tensors.items()))
    dense = tensor.nan_to_num()
    kinds = [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
    more = tensor.new_zeros((2, *tensor.shape))
    values = [dense.to(draw(st.sampled_from(kinds))), more, more[0, ..., 0], dense.to_sparse(), dense.tolist()]
    return name, draw(st.sampled_from([*values, None, "a", 1.0]))


def no_positions(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
    name, tensor = next(iter(sample.tensors.items()))
    height, width = draw(st.sampled_from([(0, 3), (3, 0), (0, 0)]))
    return name, tensor.new_zeros(*tensor.shape[:2], height, width)


def k_above_the_positions(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
    positions = sample.tensors["features"].shape[2:].numel()
    return "k", draw(st.sampled_from([positions + 1, 2**15 + positions, 2**40, 2**63 - 1, 2**63, 2**70]))


def wrong_weight(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
    k, dtype = sample.options["k"], sample.tensors["features"].dtype
    right = torch.ones(k, dtype=dtype)
    other = right.to(torch.float16 if dtype == torch.float64 else torch.float64)
    values = [right[1:], torch.ones(k + 1, dtype=dtype), right[:, None], right.sum(), other, right.long()]
    return "weight", draw(st.sampled_from([*values, right.to("meta"), right.to_sparse(), right.tolist(), 1.0, "a"]))


def wrong_vector(name: str) -> Fault:
    """For an int64 vector of the batch's size: labels, or a seed a sample."""

    def fault(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
        right = torch.zeros(len(next(iter(sample.tensors.values()))), dtype=torch.int64)
        longer, deeper = torch.zeros(len(right) + 1, dtype=torch.int64), right[:, None]
        values = [longer, deeper, right.int(), right.float(), right.bool(), right.to("meta"), right.to_sparse()]
        return name, draw(st.sampled_from([*values, right.tolist(), "a", 1.5, 1j]))

    return fault


def no_classes(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
    return "scores", sample.tensors["scores"].new_zeros(len(sample.tensors["target"]), 0)


def wrong_label(draw: st.DrawFn, sample: Sample) -> tuple[str, Any]:
    target, classes = sample.tensors["target"].clone(), sample.tensors["scores"].shape[1]
    if not len(target):
        return "target", torch.zeros(1, dtype=torch.int64)
    labels = [classes, classes + 1, -1, -classes, 2**31, 2**32, 2**63 - 1, -(2**63)]
    label = draw(st.sampled_from([label for label in labels if label != sample.options["ignore_index"]]))
    target[draw(st.integers(0, len(target) - 1))] = label
    return "target", target


TOO_LARGE = (2**63, 2**70, -(2**63) - 1)
on_maps: list[Fault] = [
    wrong_first,
    no_positions,
    *(one_of(name, -0.1, 1.1, nan, inf, -inf, 2**70, *NO_NUMBERS) for name in ("p_peak", "p_patch")),
    one_of("patch_size", 0, -1, *TOO_LARGE, *NO_INTS),
    one_of("seed", *TOO_LARGE, 1.5, "a", True, [1], 1j),
    wrong_vector("seed"),
]
FAULTS: dict[str, list[Fault]] = {
    "global_k_max_pool": [
        wrong_first, no_positions, wrong_weight, k_above_the_positions, one_of("k", 0, -1, -(2**70), *NO_INTS),
    ],
    "diversify": [*on_maps, one_of("alpha", nan, inf, -inf, *NO_NUMBERS)],
    "suppression_mask": on_maps,
    "gradient_boosting_cross_entropy": [
        wrong_first, no_classes, wrong_vector("target"), one_of("target", None), wrong_label,
        one_of("k", 0, -1, *TOO_LARGE, *NO_INTS),
        one_of("ignore_index", *TOO_LARGE, *NO_INTS),
        one_of("reduction", "average", "", "MEAN", None, 1, True, ["mean"], ("none", "mean")),
    ],
}  # fmt: skip


@each_operator
@few_examples
@given(data=st.data())
def test_invalid_arguments_give_an_error_that_names_the_operator(operator: Operator, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[operator.name]())
    fault = data.draw(st.sampled_from(FAULTS[operator.name]))
    name, value = fault(data.draw, sample)
    describe(sample)
    note(f"wrong: {name} = {value!r}")
    arguments = {**sample.tensors, **sample.options, name: value}
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        operator.function(**arguments)
    assert type(raised.value) in (TypeError, ValueError, IndexError)
    assert str(raised.value).startswith(f"{operator.name}: ")
