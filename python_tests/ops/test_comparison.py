"""The comparison has tests of its own: it must see the faults that it is there for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .comparison import assert_accurate, assert_follows, assert_same_bits, in_dtype, run
from .generators import DTYPES
from .spec import SPECS, Sample, Spec

SAMPLE = Sample("sample", {"x": torch.linspace(-2, 3, 50)}, ("x",))


def plain(x: Tensor) -> Tensor:
    return x.exp()


def test_equal_functions_pass() -> None:
    assert_follows(plain, plain, SAMPLE)


def test_a_missing_gradient_is_seen() -> None:
    with pytest.raises(AssertionError, match="gradient of x: one of the two is missing"):
        assert_follows(lambda x: x.detach().exp() + torch.zeros((), requires_grad=True), plain, SAMPLE)


@pytest.mark.parametrize("fault", [1e-4, float("nan"), float("inf")])
def test_a_single_wrong_entry_is_seen(fault: float) -> None:
    def wrong(x: Tensor) -> Tensor:
        error = torch.zeros_like(x)
        error[7] = fault
        return x.exp() + error

    with pytest.raises(AssertionError, match="sample: output"):
        assert_follows(wrong, plain, SAMPLE)


def test_a_wrong_gradient_is_seen() -> None:
    with pytest.raises(AssertionError, match="gradient of x: error"):
        assert_follows(lambda x: x.exp() + (x - x.detach()) * 1e-4, plain, SAMPLE)


def test_another_dtype_or_shape_is_seen() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(x.double(), x, x, "x")
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(x[:2], x, x, "x")


def test_other_bits_are_seen() -> None:
    zero = torch.zeros(3)
    assert_same_bits([zero], [zero.clone()], "zeros")
    with pytest.raises(AssertionError, match="other bits"):
        assert_same_bits([zero], [-zero], "−0")
    with pytest.raises(AssertionError, match="missing once"):
        assert_same_bits([zero], [None], "nothing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_value_is_held_to_its_own_size_in_low_precision(dtype: torch.dtype) -> None:
    """What is lost there would vanish in the rounding of a large neighbour, or of the input."""
    exact = torch.tensor([100.0, 0.01], dtype=torch.float64)
    plain = exact.to(dtype)
    assert_accurate(plain, plain, exact, "sum", scale=100.0)
    with pytest.raises(AssertionError, match=r"sum: error 0\.01"):
        assert_accurate(plain * torch.tensor([1, 0], dtype=dtype), plain, exact, "sum", scale=100.0)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def with_fault(function: Callable[..., Tensor], name: str, factor: float) -> Callable[..., Tensor]:
    """The function with a factor on its gradient to the argument ``name``."""

    def faulty(**arguments: Any) -> Tensor:
        return function(**{**arguments, name: ScaledGradient.apply(arguments[name], factor)})

    return faulty


differentiable = [spec for spec in SPECS if spec.differentiable]


def changed_gradients(spec: Spec, sample: Sample, factor: float) -> int:
    """Puts a factor on the gradient of each tensor in turn; how many of these faults were seen."""
    seen = 0
    exact = run(spec.reference, in_dtype(sample, torch.float64)).gradients
    for name in sample.differentiable:
        if not isinstance(sample.tensors[name], Tensor) or exact[name] is None or not exact[name].any():
            continue  # zero times anything
        with pytest.raises(AssertionError, match=f"gradient of {name}: error"):
            assert_follows(with_fault(spec.reference, name, factor), spec.reference, sample)
        seen += 1
    return seen


@pytest.mark.parametrize("spec", differentiable, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_a_factor_on_a_gradient_is_seen_on_every_sample(spec: Spec, dtype: torch.dtype, factor: float) -> None:
    samples = spec.samples(dtype, "cpu", "contiguous")
    assert sum(changed_gradients(spec, sample, factor) for sample in samples) >= len(samples) // 2
