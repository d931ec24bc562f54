"""What every operator with a gradient promises of it: through autograd, torch.func and the raw operator."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .comparison import (
    assert_same_bits,
    leaves,
    map_tensors,
    named_tensors,
    output_gradient,
    results,
    run,
    with_leaves,
)
from .conftest import each_differentiable, each_spec, needs_libraries
from .generators import DTYPES
from .spec import Sample, Spec
from .test_contract import samples

pytestmark = needs_libraries

# Output gradients without a dense memory: `.sum().backward()` gives the first one.
EXPANDED = {
    "one number": lambda grad: grad.flatten()[-1].expand_as(grad),
    "along the first dimension": lambda grad: grad[:1].expand_as(grad) if grad.dim() else grad,
    "along the last dimension": lambda grad: grad[..., :1].expand_as(grad) if grad.dim() else grad,
    "transposed": lambda grad: grad.mT.contiguous().mT if grad.dim() > 1 else grad,
    "sliced": lambda grad: torch.stack([grad, grad.new_full(grad.shape, 1e3)], dim=-1)[..., 0],
}


@each_differentiable
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "shifted"])
@pytest.mark.parametrize("kind", EXPANDED)
def test_an_output_gradient_may_have_any_strides(spec: Spec, kind: str, layout: str, device: str) -> None:
    def strided(result: Tensor, number: int) -> Tensor:
        return EXPANDED[kind](output_gradient(result, number))

    for dtype in (torch.float32, torch.bfloat16):
        for sample in samples(spec, dtype, device, layout):
            dense = run(spec.function, sample, lambda result, number: strided(result, number).contiguous())
            assert_same_bits(run(spec.function, sample, strided), dense, f"{sample.name} {dtype}")


@each_differentiable
def test_a_sum_can_be_differentiated(spec: Spec, device: str) -> None:
    for sample in samples(spec, torch.float32, device):
        called = with_leaves(sample)
        total = sum(result.sum() for result in results(spec.function(**called.tensors, **called.options)).values()
                    if result.requires_grad)  # fmt: skip
        total.backward()
        ones = run(spec.function, sample, lambda result, number: torch.ones_like(result)).gradients
        assert_same_bits({name: leaf.grad for name, leaf in leaves(called)}, ones, sample.name)


@each_differentiable
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_exactly_zero_outside_their_support(spec: Spec, dtype: torch.dtype, instruction_set: str) -> None:
    """A tolerance would let something small pass there."""
    if spec.support is None:
        pytest.skip("this operator's gradients may differ from zero anywhere")
    for layout in spec.layouts:
        if layout == "expanded":
            continue  # copies of one sample, which the others have tried
        for sample in [*spec.samples(dtype, "cpu", layout), *(spec.large() if dtype == torch.float32 else [])]:
            gradients = run(spec.function, sample).gradients
            for name, support in spec.support(sample).items():
                outside = gradients[name][~support]
                assert not outside.any(), f"{sample.name}, {layout}: {int(outside.count_nonzero())} in {name}"


@each_spec
@pytest.mark.parametrize("function", ["function", "reference"])
def test_what_is_said_to_have_no_gradient_has_none(function: str, spec: Spec, device: str) -> None:
    """Even where it requires one; and the other results have one. So it is in the reference, which may stand in."""
    for sample in samples(spec, torch.float32, device)[:3]:
        everything = map_tensors(sample, lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))
        value = results(getattr(spec, function)(**everything.tensors, **everything.options))
        assert set(spec.constant_results) <= set(value)
        for name, result in value.items():
            differentiable = bool(spec.differentiable) and name not in spec.constant_results
            assert result.requires_grad == differentiable, name
        through = [result.sum() for result in value.values() if result.requires_grad]
        if through:
            torch.autograd.backward(through)
        for name, tensor in named_tensors(everything.tensors):
            wanted = tensor.is_floating_point() and name.split("[")[0] in spec.differentiable
            assert (tensor.grad is not None) == wanted, name


@each_differentiable
def test_each_gradient_is_the_same_whichever_others_are_asked_for(spec: Spec, device: str) -> None:
    for sample in samples(spec, torch.float32, device):
        whole = run(spec.function, sample).gradients
        for name in sample.differentiable:
            alone = run(spec.function, replace(sample, differentiable=(name,))).gradients
            assert_same_bits(alone, {key: whole[key] for key in alone}, f"{sample.name}: {name}")


@each_differentiable
def test_gradcheck(spec: Spec, device: str) -> None:
    for sample in samples(spec, torch.float64, device)[:9]:
        small = with_leaves(map_tensors(spec.shrunk(sample), torch.clone))
        names = [name for name, _ in leaves(small)]
        # Distinct values, well apart: at a tie a maximum has no derivative.
        for _, leaf in leaves(small):
            order = leaf.detach().flatten().argsort().argsort().to(leaf.dtype)
            leaf.data = ((order - order.mean()) * 0.05).reshape(leaf.shape)
        function = function_of(spec, small, names)
        assert torch.autograd.gradcheck(function, [leaf for _, leaf in leaves(small)], eps=1e-5, atol=1e-7)


def function_of(spec: Spec, sample: Sample, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The differentiable results as a function of the differentiable tensors, in the order of ``names``."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        value = results(spec.function(**with_tensors(sample, names, tensors).tensors, **sample.options))
        return tuple(result for name, result in value.items() if name not in spec.constant_results)

    return function


def with_tensors(sample: Sample, names: list[str], tensors: tuple[Tensor, ...]) -> Sample:
    """The sample with these tensors in place of those called ``names``, as ``named_tensors`` calls them."""
    given = dict(zip(names, tensors, strict=True))
    replaced: dict[str, Any] = {}
    for name, value in sample.tensors.items():
        if isinstance(value, list):
            replaced[name] = [given.get(f"{name}[{number}]", one) for number, one in enumerate(value)]
        else:
            replaced[name] = given.get(name, value)
    return replace(sample, tensors=replaced)


@each_differentiable
def test_a_second_backward_is_refused_by_name(spec: Spec, device: str) -> None:
    called = with_leaves(samples(spec, torch.float64, device)[0])
    _, leaf = next(leaves(called))
    value = results(spec.function(**called.tensors, **called.options))
    total = sum((result**2).sum() for result in value.values() if result.requires_grad)
    (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{spec.name}: a second backward"):
        grad.sum().backward()


@each_differentiable
@pytest.mark.parametrize("mode", ["autograd", "torch.func"])
def test_a_second_backward_is_refused_where_the_output_gradient_is_constant(spec: Spec, mode: str) -> None:
    """Then only what forward saved tells that the gradient depends on the input."""
    called = with_leaves(samples(spec, torch.float64, "cpu")[0])
    name, leaf = next(leaves(called))

    def penalty(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def total(tensor: Tensor) -> Tensor:
            sample = with_tensors(called, [name], (tensor,))
            value = results(function(**sample.tensors, **sample.options))
            return sum(result.sum() for key, result in value.items() if key not in spec.constant_results)

        def of_gradient(tensor: Tensor) -> Tensor:
            if mode == "torch.func":
                return torch.func.grad(total)(tensor).square().sum()
            return torch.autograd.grad(total(tensor), tensor, create_graph=True)[0].square().sum()

        return of_gradient

    def second(function: Callable[..., Any]) -> Tensor:
        tensor = leaf.detach().requires_grad_()
        if mode == "torch.func":
            return torch.func.grad(penalty(function))(tensor.detach())
        value = penalty(function)(tensor)
        found = torch.autograd.grad(value, tensor, allow_unused=True)[0] if value.requires_grad else None
        return torch.zeros_like(tensor) if found is None else found

    if second(spec.reference).any():
        with pytest.raises(RuntimeError, match=f"{spec.name}: a second backward"):
            second(spec.function)
    else:  # linear: there is none
        assert not second(spec.function).any()


@each_differentiable
def test_constants_that_require_a_gradient_make_no_graph(spec: Spec) -> None:
    sample = samples(spec, torch.float32, "cpu")[0]
    constants = [
        name
        for name, value in sample.tensors.items()
        if name not in spec.differentiable and isinstance(value, Tensor) and value.is_floating_point()
    ]
    tensors = {
        name: value.detach().requires_grad_(name in constants) if isinstance(value, Tensor) else value
        for name, value in sample.tensors.items()
    }
    value = results(spec.function(**tensors, **sample.options))
    assert not any(result.requires_grad for result in value.values())


# --- the raw operator -------------------------------------------------------------------------------------------------


def raw_function(spec: Spec, count: int) -> Callable[..., list[Tensor]]:
    """The raw operator, called with a sample's arguments: the first ``count`` of its results."""

    def function(**arguments: Any) -> list[Tensor]:
        options = {name: value for name, value in arguments.items() if not isinstance(value, (Tensor, list))}
        tensors = {name: value for name, value in arguments.items() if name not in options}
        value = getattr(torch.ops.fgvc_ext, spec.name)(*spec.raw(Sample("raw", tensors, (), options)))
        return [value] if isinstance(value, Tensor) else list(islice(value, count))

    return function


@each_spec
def test_the_raw_operator_gives_the_same_results_and_gradients(spec: Spec, device: str) -> None:
    for layout in ("contiguous", "shifted"):
        for sample in samples(spec, torch.float32, device, layout):
            public = run(spec.function, sample)
            raw = run(raw_function(spec, len(public.results)), sample)
            assert len(raw.with_gradient) == len(public.with_gradient)
            assert_same_bits(list(raw.named().values()), list(public.named().values()), sample.name)


# --- torch.func -------------------------------------------------------------------------------------------------------


def functional_gradients(spec: Spec, sample: Sample) -> dict[str, Tensor]:
    names = [name for name, _ in leaves(sample)]
    function = function_of(spec, sample, names)

    def total(*tensors: Tensor) -> Tensor:
        value = function(*tensors)
        return sum((result * output_gradient(result, number)).sum() for number, result in enumerate(value))

    grads = torch.func.grad(total, argnums=tuple(range(len(names))))(*[tensor for _, tensor in leaves(sample)])
    return dict(zip(names, grads, strict=True))


@each_differentiable
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_func_grad_gives_the_bits_of_autograd(spec: Spec, layout: str, device: str) -> None:
    for sample in samples(spec, torch.float32, device, layout):
        assert_same_bits(functional_gradients(spec, sample), run(spec.function, sample).gradients, sample.name)


@each_differentiable
def test_a_gradient_of_func_grad_is_refused_by_name(spec: Spec, device: str) -> None:
    sample = samples(spec, torch.float64, device)[0]
    names = [name for name, _ in leaves(sample)]
    function = function_of(spec, sample, names)

    def squared(*tensors: Tensor) -> Tensor:
        return sum((result**2).sum() for result in function(*tensors))

    def slope(*tensors: Tensor) -> Tensor:
        return torch.func.grad(squared)(*tensors).sum()

    with pytest.raises(RuntimeError, match=f"{spec.name}: a second backward"):
        torch.func.grad(slope)(*[tensor for _, tensor in leaves(sample)])


@each_differentiable
@pytest.mark.parametrize("functional", [False, True], ids=["dual numbers", "torch.func.jvp"])
def test_forward_mode_is_refused_and_not_dropped(spec: Spec, functional: bool, device: str) -> None:
    sample = samples(spec, torch.float32, device)[0]
    names = [name for name, _ in leaves(sample)]
    tensors = [tensor for _, tensor in leaves(sample)]
    function = function_of(spec, sample, names)
    tangents = [torch.ones_like(tensor) for tensor in tensors]
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward.?(mode )?AD|forward derivative"):  # noqa: PT012
        if functional:
            torch.func.jvp(function, tuple(tensors), tuple(tangents))
        else:
            with forward_ad.dual_level():
                function(*[forward_ad.make_dual(one, other) for one, other in zip(tensors, tangents, strict=True)])
