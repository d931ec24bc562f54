"""The comparison has tests of its own: it must see the faults that it is there for."""

import pytest
import torch
from torch import Tensor

from .comparison import assert_accurate, assert_follows, assert_same_bits
from .samples import Sample

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
