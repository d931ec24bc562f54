"""What every operator promises, tried on every entry of the table in samples.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.export import Dim

import fgvc_ext
from fgvc_ext import _library

from .comparison import assert_follows, assert_same_bits, run
from .samples import DTYPES, LAYOUTS, OPERATORS, Operator, Sample, random

pytestmark = pytest.mark.skipif(not _library.has_schemas(), reason="the package has no compiled libraries")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
differentiable_ones = [operator for operator in OPERATORS if operator.empty()[0].differentiable]
each_differentiable = pytest.mark.parametrize("operator", differentiable_ones, ids=lambda operator: operator.name)


def on(sample: Sample, device: str) -> Sample:
    tensors = {name: tensor.to(device) for name, tensor in sample.tensors.items()}
    return replace(sample, tensors=tensors)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(operator: Operator, dtype: torch.dtype, instruction_set: str) -> None:
    for sample in operator.samples(dtype, "cpu"):
        assert_follows(operator.function, operator.reference, sample)


@pytest.mark.cuda
@needs_gpu
@each_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference_on_cuda(operator: Operator, dtype: torch.dtype, layout: str) -> None:
    for sample in operator.samples(dtype, "cuda", layout if operator.image_like else "contiguous"):
        assert_follows(operator.function, operator.reference, sample)


@each_operator
def test_large_inputs_equal_the_reference(operator: Operator, device: str) -> None:
    for sample in operator.large():
        assert_follows(operator.function, operator.reference, on(sample, device))


@each_operator
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layouts(operator: Operator, layout: str, dtype: torch.dtype, instruction_set: str) -> None:
    if not operator.image_like and layout == "channels_last":
        pytest.skip("not a 4-D input")
    for sample in operator.samples(dtype, "cpu", layout):
        assert_follows(operator.function, operator.reference, sample)


@each_operator
@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_like_results_keep_the_dense_layout(operator: Operator, layout: str, device: str) -> None:
    if not operator.image_like:
        pytest.skip("not a 4-D input")
    sample = operator.samples(torch.float32, device, layout)[0]
    output, grads = run(operator.function, sample)
    image = next(iter(sample.tensors.values()))
    for result in [output, *grads]:
        if result is not None and result.dim() == 4:
            assert result.stride() == torch.empty_like(image).stride()


@each_differentiable
def test_gradcheck(operator: Operator, device: str) -> None:
    for sample in operator.samples(torch.float64, device)[:9]:
        small = shrunk(sample)
        names = small.differentiable
        leaves = [small.tensors[name].detach().clone().requires_grad_() for name in names]
        others = {name: tensor for name, tensor in small.tensors.items() if name not in names}

        def function(*leaves: Tensor, small: Sample = small, others: dict[str, Tensor] = others) -> Tensor:
            return operator.function(**dict(zip(small.differentiable, leaves, strict=True)), **others, **small.options)

        # Distinct values, well apart: at a tie a maximum has no derivative.
        for leaf in leaves:
            order = leaf.detach().flatten().argsort().argsort().to(leaf.dtype)
            leaf.data.copy_((order - order.mean()).reshape(leaf.shape) * 0.05)
        assert torch.autograd.gradcheck(function, leaves, eps=1e-5, atol=1e-7)


def shrunk(sample: Sample) -> Sample:
    """One sample and three channels of an image-like input: gradcheck calls the operator twice for each value."""
    first = next(iter(sample.tensors))
    if sample.tensors[first].dim() != 4:
        return sample
    tensors = {
        name: tensor[:1] if tensor.dim() == 1 and name == "seed" else tensor for name, tensor in sample.tensors.items()
    }
    return Sample(sample.name, {**tensors, first: tensors[first][:1, :3]}, sample.differentiable, sample.options)


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(operator: Operator, dtype: torch.dtype, device: str) -> None:
    for layout in ("contiguous", "channels_last") if operator.image_like else ("contiguous", "sliced"):
        for sample in operator.samples(dtype, device, layout)[:3]:
            name, arguments = operator.raw(sample)
            torch.library.opcheck(getattr(torch.ops.fgvc_ext, name).default, arguments)


def backward_calls(operator: Operator, device: str) -> list[tuple[Any, list[Any]]]:
    """The calls of backward operators that autograd makes for the first samples, their tensors detached."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(function).startswith("fgvc_ext.") and "backward" in str(function):
                calls.append((function, [x.detach() if isinstance(x, Tensor) else x for x in args]))
            return function(*args, **(kwargs or {}))

    with Recorder():
        for sample in operator.samples(torch.float32, device)[:2]:
            run(operator.function, sample)
    assert calls
    return calls


@each_differentiable
def test_backward_operators_pass_opcheck(operator: Operator, device: str) -> None:
    for function, arguments in backward_calls(operator, device):
        torch.library.opcheck(function, arguments)


@each_differentiable
def test_backward_operators_have_no_gradient_and_say_so(operator: Operator, device: str) -> None:
    """Called on their own, as a compiled graph calls them: else autograd would hand back nothing, or a warning."""
    for function, arguments in backward_calls(operator, device):
        results = function(arguments[0].requires_grad_(), *arguments[1:])
        first = results if isinstance(results, Tensor) else results[0]
        with pytest.raises(RuntimeError, match=operator.name):
            first.sum().backward()


def compiled(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@each_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(operator: Operator, dynamic: bool, device: str) -> None:
    """fullgraph, forward and backward, through AOTAutograd: what inductor gets."""
    function = compiled(operator.function, backend="aot_eager", dynamic=dynamic)
    for sample in operator.samples(torch.float32, device)[:3]:
        assert_same_bits(run(function, sample), run(operator.function, sample), sample.name)


@each_operator
def test_compiles_with_inductor(operator: Operator) -> None:
    sample = operator.samples(torch.float32, "cpu")[0]
    assert_same_bits(run(compiled(operator.function), sample), run(operator.function, sample), sample.name)


@each_operator
def test_one_dynamic_compilation_serves_many_sizes(operator: Operator, device: str) -> None:
    """Forward and backward, with the results of eager mode."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = compiled(operator.function, backend=counter, dynamic=True)
    counts = []
    for size in ((2, 19, 7, 6), (3, 21, 9, 5), (5, 38, 12, 14), (4, 33, 31, 20)):
        sample = of_size(operator, size, device)
        assert_same_bits(run(function, sample), run(operator.function, sample), f"{sample.name} {size}")
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


def of_size(operator: Operator, size: tuple[int, ...], device: str) -> Sample:
    """The typical sample with a first tensor of another size."""
    sample = operator.samples(torch.float32, device)[0]
    first = next(iter(sample.tensors))
    tensors = {
        **sample.tensors,
        first: random(*size[: sample.tensors[first].dim()], dtype=torch.float32, device=device),
    }
    if "target" in tensors:
        tensors["target"] = torch.arange(size[0], device=device) % size[1]
    return replace(sample, tensors=tensors)


def module_of(operator: Operator, options: dict[str, Any]) -> torch.nn.Module:
    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Tensor:
            return operator.function(**tensors, **options)

    return Module()


@each_operator
def test_exports(operator: Operator, device: str) -> None:
    sample = operator.samples(torch.float32, device)[0]
    program = torch.export.export(module_of(operator, sample.options), (dict(sample.tensors),))
    assert torch.equal(program.module()(dict(sample.tensors)), operator.function(**sample.tensors, **sample.options))


@each_operator
def test_exports_with_every_size_dynamic(operator: Operator, device: str) -> None:
    sample = operator.samples(torch.float32, device)[0]
    sizes = {name: dict.fromkeys(range(tensor.dim()), Dim.DYNAMIC) for name, tensor in sample.tensors.items()}
    module = module_of(operator, sample.options)
    program = torch.export.export(module, (dict(sample.tensors),), dynamic_shapes={"tensors": sizes}).module()
    for size in ((3, 5, 11, 9), (1, 40, 14, 14), (1, 2, 200, 200)):  # k-max pooling indexes the last one in int32
        other = of_size(operator, size, device)
        assert torch.equal(program(dict(other.tensors)), operator.function(**other.tensors, **other.options)), size


@each_operator
def test_autocast_changes_nothing(operator: Operator, device: str) -> None:
    """The operators take autocast's mixture of dtypes as it is, and accumulate in float32 whatever it says."""
    for sample in operator.samples(torch.bfloat16, device):
        plain = run(operator.function, sample)
        with torch.autocast(device, torch.bfloat16):
            assert_same_bits(run(operator.function, sample), plain, sample.name)


@each_operator
def test_same_bits_every_time_and_for_every_thread_count(
    operator: Operator, instruction_set: str, threads: None
) -> None:
    for sample in [*operator.samples(torch.float32, "cpu"), *operator.large()]:
        torch.set_num_threads(1)
        one = run(operator.function, sample)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same_bits(run(operator.function, sample), one, f"{sample.name}, {count} threads")


@pytest.mark.cuda
@needs_gpu
@each_operator
def test_same_bits_every_time_on_cuda(operator: Operator) -> None:
    large = [on(sample, "cuda") for sample in operator.large()]
    for sample in [*operator.samples(torch.float32, "cuda"), *large]:
        one = run(operator.function, sample)
        for _ in range(3):
            assert_same_bits(run(operator.function, sample), one, sample.name)


@each_operator
def test_empty(operator: Operator, device: str) -> None:
    for sample in operator.empty():
        empty = on(sample, device)
        assert_follows(operator.function, operator.reference, empty)
        for name, grad in zip(empty.differentiable, run(operator.function, empty)[1], strict=True):
            assert not grad.any(), f"gradient of {name}"


@each_differentiable
def test_a_second_backward_is_refused_by_name(operator: Operator, device: str) -> None:
    sample = operator.samples(torch.float64, device)[0]
    leaf = sample.tensors[sample.differentiable[0]].detach().clone().requires_grad_()
    output = operator.function(**{**sample.tensors, sample.differentiable[0]: leaf}, **sample.options)
    (grad,) = torch.autograd.grad((output**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator.name}: a second backward"):
        grad.sum().backward()


@each_differentiable
def test_arguments_are_not_written_to(operator: Operator, device: str) -> None:
    for sample in operator.samples(torch.float32, device):
        before = {name: (tensor.clone(), tensor._version) for name, tensor in sample.tensors.items()}
        run(operator.function, sample)
        for name, tensor in sample.tensors.items():
            assert torch.equal(tensor, before[name][0])
            assert tensor._version == before[name][1]


@each_operator
def test_use_reference_runs_the_reference(operator: Operator, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        f"fgvc_ext.reference.{operator.name}", lambda *args, **kwargs: called.append(1) or torch.zeros(())
    )
    sample = operator.samples(torch.float32, device)[0]
    with fgvc_ext.use_reference():
        operator.function(**sample.tensors, **sample.options)
    assert called == [1]
    operator.function(**sample.tensors, **sample.options)
    assert called == [1]


def assert_follows_with_nan_and_infinities(operator: Operator, device: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        for sample in operator.samples(torch.float32, device):
            first = next(iter(sample.tensors))
            poisoned = sample.tensors[first].clone()
            poisoned.view(-1)[:: max(1, poisoned.numel() // 5)] = value
            dirty = replace(sample, tensors={**sample.tensors, first: poisoned})
            assert_follows(operator.function, operator.reference, dirty)


@each_operator
def test_nan_and_infinities_are_neither_lost_nor_fatal(operator: Operator, instruction_set: str) -> None:
    assert_follows_with_nan_and_infinities(operator, "cpu")


@pytest.mark.cuda
@needs_gpu
@each_operator
def test_nan_and_infinities_are_neither_lost_nor_fatal_on_cuda(operator: Operator) -> None:
    assert_follows_with_nan_and_infinities(operator, "cuda")


@each_operator
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_other_dtypes_are_refused_by_name(operator: Operator, dtype: torch.dtype) -> None:
    sample = operator.samples(torch.float32, "cpu")[0]
    first = next(iter(sample.tensors))
    got = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"{operator.name}: {first} must be of dtype float32, .* got {got}"):
        operator.function(**{**sample.tensors, first: sample.tensors[first].to(dtype)}, **sample.options)


@each_operator
def test_other_shapes_and_types_are_refused_by_name(operator: Operator) -> None:
    sample = operator.samples(torch.float32, "cpu")[0]
    first = next(iter(sample.tensors))
    with pytest.raises(ValueError, match=rf"{operator.name}: {first} must have shape \[N,C.* got \["):
        operator.function(**{**sample.tensors, first: sample.tensors[first][0]}, **sample.options)
    with pytest.raises(TypeError, match=f"{operator.name}: {first} must be a tensor .* got list"):
        operator.function(**{**sample.tensors, first: [[1.0]]}, **sample.options)


@each_operator
def test_sparse_tensors_are_refused_by_name(operator: Operator) -> None:
    sample = operator.samples(torch.float32, "cpu")[0]
    for name, tensor in sample.tensors.items():
        if tensor.dim():
            with pytest.raises(TypeError, match=f"^{operator.name}: {name} .*strided"):
                operator.function(**{**sample.tensors, name: tensor.to_sparse()}, **sample.options)
