"""The comparison has tests of its own: it must see the faults that it is there for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .comparison import assert_accurate, assert_follows, assert_same_bits, in_dtype, run
from .samples import DTYPES, OPERATORS, Operator, Sample

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
    assert_same_bits((zero, []), (zero.clone(), []), "zeros")
    with pytest.raises(AssertionError, match="other bits"):
        assert_same_bits((zero, []), (-zero, []), "−0")


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


differentiable = [operator for operator in OPERATORS if operator.empty()[0].differentiable]


@pytest.mark.parametrize("operator", differentiable, ids=lambda operator: operator.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_a_factor_on_a_gradient_is_seen_on_every_sample(operator: Operator, dtype: torch.dtype, factor: float) -> None:
    seen = 0
    for sample in operator.samples(dtype, "cpu"):
        _, exact = run(operator.reference, in_dtype(sample, torch.float64))
        for name, grad in zip(sample.differentiable, exact, strict=True):
            if grad is None or not grad.any():
                continue  # zero times anything
            with pytest.raises(AssertionError, match=f"gradient of {name}: error"):
                assert_follows(with_fault(operator.reference, name, factor), operator.reference, sample)
            seen += 1
    assert seen > 10
