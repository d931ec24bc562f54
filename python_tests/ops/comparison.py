"""How results are compared: tolerance by rule, not by guess.

An operator's error against a float64 computation may be twice the error that the same equations in plain PyTorch make
in that dtype, plus a few roundings of the largest value that comes out, or for the output that goes in. Inputs have no
part in a gradient's tolerance: it is often a hundred times smaller than they are. test_comparison.py plants faults that
this must catch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .samples import Sample

EPSILONS = 4  # roundings that an exact plain result is still given


def run(
    function: Callable[..., Tensor], sample: Sample, grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients of the sample's differentiable tensors, for an output gradient that depends on the index."""
    tensors = {
        name: _leaf(tensor) if name in sample.differentiable else tensor for name, tensor in sample.tensors.items()
    }
    output = function(**tensors, **sample.options)
    if not sample.differentiable:
        return output, []
    if grad is None:
        grad = torch.linspace(-1, 2, max(1, output.numel()), dtype=torch.float64)[: output.numel()].reshape(
            output.shape
        )
    output.backward(grad.to(output))
    return output.detach(), [tensors[name].grad for name in sample.differentiable]


def _leaf(tensor: Tensor) -> Tensor:
    """A leaf over the same memory, so that it keeps strides that a clone would lose."""
    return tensor.detach().requires_grad_()


def in_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in sample.tensors.items()
    }
    return Sample(sample.name, tensors, sample.differentiable, sample.options)


def assert_follows(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], sample: Sample, cancelling: float = 0.0
) -> None:
    """``function`` is as accurate as ``plain`` on this sample, in its output and in every gradient.

    ``cancelling`` is for inputs that nobody has chosen: the size of terms that may cancel in a gradient, of which
    roundings in the accumulation dtype are given. There ``plain`` may have hardly an error, by luck.
    """
    actual = _flat(run(function, sample))
    expected = _flat(run(plain, sample))
    exact = _flat(run(plain, in_dtype(sample, torch.float64)))
    largest = max(_largest(tensor) for tensor in sample.tensors.values() if tensor.is_floating_point())
    names = ["output", *(f"gradient of {name}" for name in sample.differentiable)]
    for name, one, other, truth in zip(names, actual, expected, exact, strict=True):
        scales = (largest, 0.0) if name == "output" else (0.0, cancelling)
        assert_accurate(one, other, truth, f"{sample.name}: {name}", *scales)


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def assert_accurate(
    actual: Tensor | None,
    plain: Tensor | None,
    exact: Tensor | None,
    what: str,
    largest_input: float = 0.0,
    cancelling: float = 0.0,
) -> None:
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
    finite = plain.isfinite()
    if not finite.any():
        return
    values, truth = actual[finite].double(), exact[finite].double()
    error, allowed = (values - truth).abs(), 2 * (plain[finite].double() - truth).abs().max()
    allowed = allowed + EPSILONS * torch.finfo(actual.dtype).eps * max(float(truth.abs().max()), largest_input)
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    allowed = allowed + EPSILONS * torch.finfo(accumulation).eps * cancelling
    assert error.max() <= allowed, f"{what}: error {error.max():.3g}, allowed {allowed:.3g}"


def assert_same_bits(one: Sequence[Any], other: Sequence[Any], what: str) -> None:
    for number, (first, second) in enumerate(zip(_flat(one), _flat(other), strict=True)):
        if first is None or second is None:
            assert first is second, f"{what}: result {number} is missing once"
            continue
        same = first.dtype == second.dtype and torch.equal(_bytes(first), _bytes(second))
        assert same, f"{what}: result {number} has other bits"


def _bytes(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0, dtype=torch.uint8)
    )


def _flat(result: Sequence[Any]) -> list[Tensor | None]:
    output, grads = result
    return [output, *grads]
