"""How results are compared: tolerance by rule, not by guess.

An operator's error against a float64 computation may be twice the error that the same equations in plain PyTorch make
in that dtype, plus a few roundings. A rounding is one of the value itself in its dtype, and one of the largest value of
the result (of a result that is not a gradient also of the largest input) in the dtype of sums. So a bfloat16 result
that is a hundred times smaller than its neighbours, or than the input, is held to its own size. Inputs have no part in
a gradient's tolerance: it is often a hundred times smaller than they are. test_comparison.py plants faults that this
must catch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .generators import largest_finite, wide
from .spec import Sample

EPSILONS = 4  # roundings that an exact plain result is still given


@dataclass(frozen=True)
class Outcome:
    """What a call gave: its results by name, and the gradients of the sample's differentiable tensors."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    with_gradient: tuple[str, ...]  # the results through which gradients come

    def named(self) -> dict[str, Tensor | None]:
        return {**self.results, **{f"gradient of {name}": grad for name, grad in self.gradients.items()}}


def results(value: Any) -> dict[str, Tensor]:
    """A function's results by name: the fields of a NamedTuple, the numbers of a tuple, "output" for a tensor."""
    if isinstance(value, Tensor):
        return {"output": value}
    names = getattr(value, "_fields", None) or [f"output {number}" for number in range(len(value))]
    return dict(zip(names, value, strict=True))


def output_gradient(result: Tensor, number: int = 0) -> Tensor:
    """An output gradient that depends on the index, and on which result it is for."""
    count = result.numel()
    grad = torch.linspace(-1, 2, max(1, count), dtype=torch.float64)[:count].reshape(result.shape)
    return (grad / (1 + number)).to(result)


OutputGradient = Callable[[Tensor, int], Tensor]


def run(function: Callable[..., Any], sample: Sample, gradient: OutputGradient = output_gradient) -> Outcome:
    """The call's results, and its gradients for the output gradients that ``gradient(result, number)`` gives."""
    called = with_leaves(sample)
    value = results(function(**called.tensors, **called.options))
    differentiable = [name for name, result in value.items() if sample.differentiable and result.requires_grad]
    wanted = dict(leaves(called))
    gradients: dict[str, Tensor | None] = dict.fromkeys(wanted)
    if differentiable:
        through = [value[name] for name in differentiable]
        given = [gradient(result, number) for number, result in enumerate(through)]
        # Not backward(): what it accumulates may have other strides than what the operator gave.
        found = torch.autograd.grad(through, list(wanted.values()), given, allow_unused=True)
        gradients = dict(zip(wanted, found, strict=True))
    return Outcome({name: result.detach() for name, result in value.items()}, gradients, tuple(differentiable))


def with_leaves(sample: Sample) -> Sample:
    """The sample with a leaf for every differentiable tensor, over the same memory: a clone would lose strides."""

    def leaf(value: Any) -> Any:
        return [leaf(one) for one in value] if isinstance(value, list) else value.detach().requires_grad_()

    tensors = {name: leaf(value) if name in sample.differentiable else value for name, value in sample.tensors.items()}
    return replace(sample, tensors=tensors)


def leaves(sample: Sample) -> Iterator[tuple[str, Tensor]]:
    """The differentiable tensors by name; those of a list are numbered."""
    return named_tensors({name: sample.tensors[name] for name in sample.differentiable})


def named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, list):
            yield from ((f"{name}[{number}]", tensor) for number, tensor in enumerate(value))
        elif isinstance(value, Tensor):
            yield name, value


def map_tensors(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with every tensor replaced by ``change`` of it, lists included."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(one) for one in value]
        return change(value) if isinstance(value, Tensor) else value

    return replace(sample, tensors={name: changed(value) for name, value in sample.tensors.items()})


def map_first(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with ``change`` of its first argument, of every tensor of it where it is a list."""
    first = sample.tensors[sample.first]
    changed = [change(one) for one in first] if isinstance(first, list) else change(first)
    return replace(sample, tensors={**sample.tensors, sample.first: changed})


def in_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    return map_tensors(sample, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def assert_follows(
    function: Callable[..., Any],
    plain: Callable[..., Any],
    sample: Sample,
    cancelling: float = 0.0,
    cancelling_results: float = 0.0,
) -> None:
    """``function`` is as accurate as ``plain`` on this sample, in all results and in every gradient.

    ``cancelling`` is for inputs that nobody has chosen: the size of terms that may cancel in a gradient, of which
    roundings in the dtype of sums are given. There ``plain`` may have hardly an error, by luck. Results are given those
    of the largest argument, or of ``cancelling_results``.
    """
    actual, expected = run(function, sample), run(plain, sample)
    exact = run(plain, in_dtype(sample, torch.float64)).named()
    assert list(actual.results) == list(expected.results), f"{sample.name}: results {list(actual.results)}"
    assert actual.with_gradient == expected.with_gradient, f"{sample.name}: gradients through {actual.with_gradient}"
    tensors = [tensor for _, tensor in named_tensors(sample.tensors) if tensor.is_floating_point()]
    largest = max(cancelling_results, *map(largest_finite, tensors), 0.0)
    plains = expected.named()
    for name, one in actual.named().items():
        scale = largest if name in actual.results else cancelling
        assert_accurate(one, plains[name], exact[name], f"{sample.name}: {name}", scale)


def assert_accurate(
    actual: Tensor | None, plain: Tensor | None, exact: Tensor | None, what: str, scale: float = 0.0
) -> None:
    """``scale``: what roundings in the dtype of sums may be relative to, where it is more than the largest value."""
    assert (actual is None) == (plain is None), f"{what}: one of the two is missing"
    if actual is None or plain is None or exact is None:
        return
    assert actual.shape == plain.shape, f"{what}: shape {list(actual.shape)}, expected {list(plain.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, plain), f"{what}: {int((actual != plain).sum())} of {actual.numel()} entries differ"
        return
    assert torch.equal(actual.isnan(), plain.isnan()), f"{what}: NaN in other places"
    infinite = plain.isinf()
    assert torch.equal(actual[infinite], plain[infinite]), f"{what}: infinities in other places"
    finite = plain.isfinite() & exact.isfinite()
    if not finite.any():
        return
    truth = exact[finite].double()
    error, allowed = (actual[finite].double() - truth).abs(), tolerance(plain[finite], truth, scale)
    worst = int((error - allowed).argmax())
    assert error[worst] <= allowed[worst], f"{what}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"


def tolerance(plain: Tensor, truth: Tensor, scale: float) -> Tensor:
    """For each value: twice the plain error, in absolute terms and in roundings, and a few roundings."""
    own, sums = torch.finfo(plain.dtype), torch.finfo(wide(plain.dtype))
    plain_error = (plain.double() - truth).abs()
    rounding = own.eps * truth.abs() + sums.eps * max(float(truth.abs().max()), scale)
    rounding = rounding + own.smallest_normal * own.eps  # what lies below the normal numbers has fewer digits
    factor = max(float(EPSILONS), 2 * float((plain_error / rounding).max()))
    return torch.minimum(factor * rounding, 2 * plain_error.max() + EPSILONS * rounding.max())


def assert_same_bits(one: Any, other: Any, what: str) -> None:
    """Of two outcomes, or of two sequences or dictionaries of tensors."""
    firsts, seconds = _listed(one), _listed(other)
    assert list(firsts) == list(seconds), f"{what}: {list(firsts)} and {list(seconds)}"
    for name, first in firsts.items():
        second = seconds[name]
        if first is None or second is None:
            assert first is second, f"{what}: {name} is missing once"
            continue
        same = (
            first.dtype == second.dtype and first.shape == second.shape and torch.equal(_bytes(first), _bytes(second))
        )
        assert same, f"{what}: {name} has other bits"


def _listed(value: Any) -> dict[str, Tensor | None]:
    if isinstance(value, Outcome):
        return value.named()
    if isinstance(value, dict):
        return value
    assert isinstance(value, Sequence), type(value)
    return {f"result {number}": result for number, result in enumerate(value)}


def _bytes(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.new_zeros(0, dtype=torch.uint8)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
