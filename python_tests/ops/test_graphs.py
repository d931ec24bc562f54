"""What every operator promises to whoever traces or batches it: opcheck, torch.compile, torch.export, vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from .comparison import assert_same_bits, leaves, map_tensors, named_tensors, output_gradient, results, run
from .conftest import each_differentiable, each_spec, needs_libraries
from .spec import Sample, Spec
from .test_contract import samples
from .test_gradients import function_of, with_tensors

pytestmark = needs_libraries
SIZES = ((2, 19, 7, 6), (3, 21, 9, 5), (5, 38, 12, 14), (4, 33, 31, 20))


class Recorder(TorchDispatchMode):
    """Collects the calls of raw operators, their tensors detached."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fgvc_ext":
            self.calls.append((function, [_detached(argument) for argument in args]))
        return function(*args, **(kwargs or {}))


def _detached(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_detached(one) for one in argument]
    return argument.detach() if isinstance(argument, Tensor) else argument


# --- fake kernels -----------------------------------------------------------------------------------------------------


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(spec: Spec, dtype: torch.dtype, layout: str, device: str) -> None:
    for sample in samples(spec, dtype, device, layout)[:3]:
        torch.library.opcheck(getattr(torch.ops.fgvc_ext, spec.name).default, spec.raw(sample))


def backward_calls(spec: Spec, device: str) -> list[tuple[Any, list[Any]]]:
    """The calls of backward operators that autograd makes for the first samples."""
    with Recorder() as recorder:
        for sample in samples(spec, torch.float32, device)[:2]:
            run(spec.function, sample)
    calls = [call for call in recorder.calls if "backward" in str(call[0])]
    assert calls
    return calls


@each_differentiable
def test_backward_operators_pass_opcheck(spec: Spec, device: str) -> None:
    for function, arguments in backward_calls(spec, device):
        torch.library.opcheck(function, arguments)


@each_differentiable
def test_backward_operators_have_no_gradient_and_say_so(spec: Spec, device: str) -> None:
    """Called on their own, as a compiled graph calls them: else autograd would hand back nothing, or a warning."""
    for function, arguments in backward_calls(spec, device):
        value = function(arguments[0].requires_grad_(), *arguments[1:])
        first = value if isinstance(value, Tensor) else value[0]
        with pytest.raises(RuntimeError, match=spec.name):
            first.sum().backward()


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@each_spec
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(spec: Spec, dynamic: bool, device: str) -> None:
    """fullgraph, forward and backward, through AOTAutograd: what inductor gets."""
    function = compiled(spec.function, backend="aot_eager", dynamic=dynamic)
    for sample in samples(spec, torch.float32, device)[:3]:
        assert_same_bits(run(function, sample), run(spec.function, sample), sample.name)


@each_spec
def test_compiles_with_inductor(spec: Spec) -> None:
    sample = samples(spec)[0]
    assert_same_bits(run(compiled(spec.function), sample), run(spec.function, sample), sample.name)


@each_spec
def test_one_dynamic_compilation_serves_many_sizes(spec: Spec, device: str) -> None:
    """Forward and backward, with the results of eager mode."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = compiled(spec.function, backend=counter, dynamic=True)
    counts = []
    for size in SIZES:
        sample = spec.of_size(size, device)
        assert_same_bits(run(function, sample), run(spec.function, sample), f"{sample.name} {size}")
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


# --- torch.export -----------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """The operator behind a parameter for each of its differentiable tensors."""

    def __init__(self, spec: Spec, sample: Sample) -> None:
        super().__init__()
        self.spec, self.sample = spec, sample
        self.names = [name for name, _ in leaves(sample)]
        self.scale = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.full((), 1.5, dtype=tensor.dtype)) for _, tensor in leaves(sample)]
        )

    def forward(self, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        given = Sample("given", tensors, self.sample.differentiable, self.sample.options)
        scaled = tuple(tensor * scale for (_, tensor), scale in zip(leaves(given), self.scale, strict=True))
        called = with_tensors(given, self.names, scaled)
        return tuple(results(self.spec.function(**called.tensors, **called.options)).values())


def exported(module: Scaled, sizes: dict[str, Any] | None = None) -> torch.nn.Module:
    example = (dict(module.sample.tensors),)
    return torch.export.export(module, example, dynamic_shapes={"tensors": sizes} if sizes else None).module()


def dynamic_sizes(spec: Spec, device: str) -> dict[str, Any]:
    """Every size that differs between two samples of different sizes; others follow from options, such as k."""

    def dims(one: Any, other: Any) -> Any:
        if isinstance(one, list):
            return [dims(*pair) for pair in zip(one, other, strict=True)]
        return {dim: Dim.DYNAMIC for dim in range(one.dim()) if one.shape[dim] != other.shape[dim]}

    one, other = (spec.of_size(size, device).tensors for size in SIZES[:2])
    return {name: dims(one[name], other[name]) for name in one}


@each_spec
def test_exports(spec: Spec, device: str) -> None:
    for sample in samples(spec, torch.float32, device)[:3]:
        module = Scaled(spec, sample).to(device)
        with torch.no_grad():
            program = exported(module)
            assert_same_bits(program(dict(sample.tensors)), module(dict(sample.tensors)), sample.name)


@each_spec
def test_exports_with_every_size_dynamic(spec: Spec, device: str) -> None:
    module = Scaled(spec, spec.of_size(SIZES[0], device)).to(device)
    program = exported(module, dynamic_sizes(spec, device))
    for size in ((3, 5, 11, 9), (1, 40, 14, 14), (1, 2, 200, 200)):  # k-max pooling indexes the last one in int32
        tensors = dict(spec.of_size(size, device).tensors)
        assert_same_bits(program(tensors), module(tensors), str(size))


@each_differentiable
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_can_be_trained(spec: Spec, dynamic: bool, device: str) -> None:
    """The gradients of its parameters have the bits of eager mode."""
    module = Scaled(spec, spec.of_size(SIZES[0], device)).to(device)
    program = exported(module, dynamic_sizes(spec, device) if dynamic else None)
    tensors = dict(spec.of_size(SIZES[1] if dynamic else SIZES[0], device).tensors)
    gradients = []
    for trained in (module, program):
        through = [result for result in trained(tensors) if result.requires_grad]
        torch.autograd.backward(through, [output_gradient(result, number) for number, result in enumerate(through)])
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    assert gradients[0]
    assert all(grad is not None and grad.any() for grad in gradients[0].values())
    assert_same_bits(gradients[1], gradients[0], "trained")


class Plain(torch.nn.Module):
    def __init__(self, spec: Spec, options: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.options = spec, options

    def forward(self, tensors: dict[str, Any]) -> Any:
        return self.spec.function(**tensors, **self.options)


@each_differentiable
def test_an_exported_program_gives_its_inputs_gradients(spec: Spec, device: str) -> None:
    """Also those that required none when it was exported: what backward needs of the forward pass must be there."""
    for sample in samples(spec, torch.float32, device)[:3]:
        program = torch.export.export(Plain(spec, sample.options), (dict(sample.tensors),)).module()
        outcome = run(lambda p=program, s=sample, **arguments: p(given_to(s, arguments)), sample)
        assert_same_bits(outcome, run(spec.function, sample), sample.name)


def given_to(sample: Sample, arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a call's arguments the tensors; the options are constants of the program."""
    return {name: arguments[name] for name in sample.tensors}


# --- torch.func.vmap --------------------------------------------------------------------------------------------------

BATCH = 3


def batch_of(sample: Sample) -> Sample:
    """Every tensor BATCH times, along a new first dimension: other values where it is floating, the same otherwise."""

    def batched(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.stack([tensor, tensor.flip(-1) * 0.5, tensor * -2])
        return torch.stack([tensor] * BATCH)

    return map_tensors(sample, batched)


def one_by_one(function: Callable[..., Any], tensors: list[Tensor], dims: list[int | None]) -> list[Tensor]:
    """What vmap must give: a call for each element, and the results side by side."""
    calls = []
    for number in range(BATCH):
        elements = [x if dim is None else x.select(dim, number) for x, dim in zip(tensors, dims, strict=True)]
        calls.append(function(*elements))
    return [torch.stack(each) for each in zip(*calls, strict=True)]


def batched_cases(sample: Sample) -> list[tuple[list[str], list[Tensor], list[int | None]]]:
    """Names, tensors and batch dimensions: all tensors batched, only the first, all but the first, and the last one."""
    plain, batch = dict(named_tensors(sample.tensors)), dict(named_tensors(batch_of(sample).tensors))
    names = list(plain)
    cases = []
    for chosen in (names, names[:1], names[1:]):
        if chosen:
            tensors = [batch[name] if name in chosen else plain[name] for name in names]
            cases.append((names, tensors, [0 if name in chosen else None for name in names]))
    last = [batch[names[0]].movedim(0, -1), *(plain[name] for name in names[1:])]
    return [*cases, (names, last, [last[0].dim() - 1, *[None] * (len(names) - 1)])]


def all_results(spec: Spec, sample: Sample, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        value = spec.function(**with_tensors(sample, names, tensors).tensors, **sample.options)
        return tuple(results(value).values())

    return function


@each_spec
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_vmap_is_a_call_for_each_element(spec: Spec, layout: str, device: str) -> None:
    for sample in samples(spec, torch.float32, device, layout):
        for names, tensors, dims in batched_cases(sample):
            function = all_results(spec, sample, names)
            batched = torch.func.vmap(function, tuple(dims))(*tensors)
            assert_same_bits(batched, one_by_one(function, tensors, dims), f"{sample.name} {dims}")


@each_differentiable
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_per_element_are_those_of_its_own_call(spec: Spec, layout: str, device: str) -> None:
    for sample in samples(spec, torch.float32, device, layout):
        for names, tensors, dims in batched_cases(sample):
            function = function_of(spec, sample, names)
            wanted = tuple(number for number, name in enumerate(names) if name.split("[")[0] in sample.differentiable)

            def total(*tensors: Tensor, function: Any = function) -> Tensor:
                value = function(*tensors)
                return sum((result * output_gradient(result, number)).sum() for number, result in enumerate(value))

            grad = torch.func.grad(total, argnums=wanted)
            batched = torch.func.vmap(grad, tuple(dims))(*tensors)
            assert_same_bits(batched, one_by_one(grad, tensors, dims), f"{sample.name} {dims}")


@each_spec
def test_vmap_is_one_call_where_the_spec_says_so(spec: Spec, device: str) -> None:
    """Over the first tensor, forward and backward; elsewhere it is as many calls as there are elements."""
    sample = samples(spec, torch.float32, device)[1]
    names = [name for name, _ in named_tensors(sample.tensors)]
    first, *others = [tensor for _, tensor in named_tensors(batch_of(sample).tensors)][:1] + [
        tensor for _, tensor in named_tensors(sample.tensors)
    ][1:]
    function = all_results(spec, sample, names)

    def total(*tensors: Tensor) -> Tensor:
        return function(*tensors)[0].sum()

    call = torch.func.grad(total) if spec.differentiable else function
    with Recorder() as recorder:
        torch.func.vmap(call, (0, *[None] * len(others)))(first, *others)
    directions = 2 if spec.differentiable else 1
    assert len(recorder.calls) == directions * (1 if spec.folds_vmap else BATCH)
