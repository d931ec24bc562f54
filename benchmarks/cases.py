"""What is measured: an operator on one shape in one direction, its contenders, and the targets it must meet there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import floor
import torch
import torch._functorch.config
from specs import OPERATORS, Benchmark, Case, Sample, Spec, Target, leaves, results, with_leaves
from timing import Contender, Times
from torch import Tensor

from fgvc_ext import _library

OURS, EAGER, COMPILED = "fgvc_ext", "eager", "torch.compile"
READ_ONCE, READ_AND_WRITE, COPY, FLOOR = "read once", "read and write once", "copy", "floor"
SHORT = 5  # eager takes less than so many times the call that does nothing
LARGEST_CHECKED = 2**24  # elements whose results are compared before they are timed
Function = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    what: str
    measured: str
    wanted: str
    passed: bool


@dataclass(frozen=True)
class Measured:
    """A case of an operator; one of a sweep has no targets of its own."""

    spec: Spec
    case: Case
    sweep: bool

    @property
    def op(self) -> str:
        return self.spec.name

    @property
    def benchmark(self) -> Benchmark:
        assert self.spec.benchmark is not None
        return self.spec.benchmark

    @property
    def direction(self) -> str:
        if self.case.alone:
            return "backward"
        return "forward+backward" if self.case.backward else "forward"

    @property
    def dtype_name(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        layout = "" if self.case.layout == "contiguous" else f" {self.case.layout}"
        return f"{list(self.case.shape)} {self.dtype_name}{layout} {self.direction}"

    def verdicts(self, times: Times) -> list[Verdict]:
        return [*(verdict(target, times) for target in self.case.targets), *never_slower(times)]


def headline(spec: Spec, device: str) -> list[Measured]:
    assert spec.benchmark is not None
    return [Measured(spec, case, False) for case in (spec.benchmark.cuda if device == "cuda" else spec.benchmark.cpu)]


def sweep(spec: Spec) -> list[Measured]:
    assert spec.benchmark is not None
    return [Measured(spec, case, True) for case in spec.benchmark.sweep]


# --- targets ----------------------------------------------------------------------------------------------------------


def verdict(target: Target, times: Times) -> Verdict:
    if target.at_least is not None:
        ratio = times.ratio(target.other, OURS)
        what, wanted, passed = f"{target.other} / ours", f"≥ {target.at_least:g}", ratio >= target.at_least
    else:
        assert target.at_most is not None
        ratio = times.ratio(OURS, target.other)
        what, wanted, passed = f"ours / {target.other}", f"≤ {target.at_most:g}", ratio <= target.at_most
    one = Verdict(target.text or what, f"{ratio:.3g}", wanted, passed)
    return either(one, verdict(target.otherwise, times)) if target.otherwise else one


def either(one: Verdict, other: Verdict) -> Verdict:
    pairs = zip((one.what, one.measured, one.wanted), (other.what, other.measured, other.wanted), strict=True)
    return Verdict(*(" or ".join(pair) for pair in pairs), passed=one.passed or other.passed)


def never_slower(times: Times) -> list[Verdict]:
    """Every shape: no slower than plain PyTorch, compiled or not. Small shapes, whose time is that of calls, where
    torch.compile adds to eager's: no slower than eager either."""

    def no_slower(what: str, other: str) -> Verdict:
        ratio = times.ratio(OURS, other)
        return Verdict(what, f"{ratio:.3g}", "≤ 1", ratio <= 1)

    slower = max((name for name in (EAGER, COMPILED) if name in times.samples), key=times.median)
    verdicts = [no_slower("ours / max(eager, torch.compile)", slower)]
    if FLOOR in times.samples and times.median(EAGER) < SHORT * times.median(FLOOR):
        verdicts.append(no_slower("small shapes: ours / eager", EAGER))
    return verdicts


# --- contenders -------------------------------------------------------------------------------------------------------


def contenders(measured: Measured, device: str, instruction_sets: list[str]) -> list[Contender]:
    """Ours, plain PyTorch, the same compiled, yardsticks, the do-nothing operator, and what the spec adds."""
    benchmark, case = measured.benchmark, measured.case
    sample = benchmark.sample(case, device)
    if not case.backward:
        sample = replace(sample, differentiable=())
    compare(measured.spec, benchmark, sample)

    def call(function: Function) -> Callable[[], Any]:
        return backward_call(function, sample) if case.alone else timed_call(function, sample, measured.spec)

    def nothing(**arguments: Any) -> Tensor:
        return floor.do_nothing(first_of(arguments))

    if case.alone:
        assert benchmark.backward is not None
        our_call, no_call = (
            benchmark.backward(sample),
            timed_call(nothing, replace(sample, differentiable=()), measured.spec),
        )
        torch.testing.assert_close(our_call(), call(benchmark.plain)()[0])
    else:
        our_call, no_call = call(measured.spec.function), call(nothing)
    every = [
        *ours(instruction_sets, our_call),
        Contender(EAGER, call(benchmark.plain)),
        Contender(COMPILED, call(compiled(benchmark.plain, measured.sweep))),
        *yardsticks(case, first_tensors(sample)),
        Contender(FLOOR, no_call),
    ]
    if not measured.sweep:
        every += [Contender(name, call(function)) for name, function in benchmark.others.items()]
    return every


def compare(spec: Spec, benchmark: Benchmark, sample: Sample) -> None:
    """Raises where ours and plain PyTorch give different results: then no time means anything."""
    if first_tensor(sample).numel() > LARGEST_CHECKED:
        return
    options, plain = sample.options, benchmark.plain
    if benchmark.comparable_options is not None:
        options, plain = {**options, **benchmark.comparable_options}, reference_of(spec)
    ours = results(spec.function(**sample.tensors, **options))
    theirs = results(plain(**sample.tensors, **options)).values()  # a plain tuple has no names
    for name, other in zip(ours, theirs, strict=False):
        # Not closer than plain PyTorch itself is: what is wrong is more than this. Of what is rounded to half precision
        # in the end, the last digit may differ.
        digit = torch.finfo(other.dtype).eps if other.dtype.is_floating_point else 0.0
        torch.testing.assert_close(ours[name], other, check_dtype=False, rtol=max(1e-4, digit), atol=max(1e-4, digit))


def reference_of(spec: Spec) -> Function:
    """The reference through the public function, which takes the same options, such as a seed that is an int."""

    def function(**arguments: Any) -> Any:
        with _library.use_reference():
            return spec.function(**arguments)

    return function


def timed_call(function: Function, sample: Sample, spec: Spec) -> Callable[[], Any]:
    """The call that is timed, with the gradients to the sample's differentiable tensors."""
    called = with_leaves(sample)
    arguments = {**called.tensors, **called.options}
    wanted = [leaf for _, leaf in leaves(called)]
    if not wanted:
        return lambda: function(**arguments)
    value = function(**arguments)
    if isinstance(value, Tensor):
        grad = torch.ones_like(value)
        return lambda: torch.autograd.grad(function(**arguments), wanted, grad, allow_unused=True)
    places = [number for number, result in enumerate(value) if result.requires_grad]
    grads = [torch.ones_like(value[place]) for place in places]

    def forward_and_backward() -> Any:
        value = function(**arguments)
        return torch.autograd.grad([value[place] for place in places], wanted, grads, allow_unused=True)

    return forward_and_backward


def backward_call(function: Function, sample: Sample) -> Callable[[], Any]:
    """Backward alone, of a graph that is kept; made at the first call, where compiling belongs."""
    graph: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def backward() -> Any:
        if not graph:
            called = with_leaves(sample)
            outputs = [
                one for one in results(function(**called.tensors, **called.options)).values() if one.requires_grad
            ]
            graph.append((outputs, [leaf for _, leaf in leaves(called)], [torch.ones_like(one) for one in outputs]))
        outputs, wanted, grads = graph[0]
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)

    return backward


def first_of(arguments: dict[str, Any]) -> Tensor:
    value = next(iter(arguments.values()))
    return value[0] if isinstance(value, list) else value


def first_tensor(sample: Sample) -> Tensor:
    return first_of(sample.tensors)


def first_tensors(sample: Sample) -> list[Tensor]:
    """Those of the first argument, which may be a list."""
    value = sample.tensors[sample.first]
    return value if isinstance(value, list) else [value]


def ours(instruction_sets: list[str], call: Callable[[], Any]) -> list[Contender]:
    """Our operator, once for each instruction set; the first one is held to the targets."""
    if not instruction_sets:
        return [Contender(OURS, call)]
    return [
        Contender(OURS if number == 0 else f"{OURS} {name}", call, lambda name=name: use_instruction_set(name))
        for number, name in enumerate(instruction_sets)
    ]


def use_instruction_set(name: str) -> None:
    _library._module.use_instruction_set(name)


def yardsticks(case: Case, tensors: list[Tensor]) -> list[Contender]:
    """The time to move the bytes that must move: forward reads the tensors, backward also writes some of their size."""
    pairs = [(tensor.detach(), torch.empty_like(tensor)) for tensor in tensors]
    if not case.backward:
        sticks = [Contender(READ_ONCE, lambda: [values.sum() for values, _ in pairs])]
    else:
        sticks = [Contender(READ_AND_WRITE, lambda: [(values.sum(), other.zero_()) for values, other in pairs])]
    if tensors[0].device.type == "cuda":
        sticks.append(Contender(COPY, lambda: [other.copy_(values) for values, other in pairs]))
    return sticks


_compiled: dict[tuple[Function, bool], Function] = {}


def compiled(function: Function, sweep: bool) -> Function:
    """A headline case gets code for its own shape; the sweep shares one compilation with dynamic shapes."""
    if (function, sweep) not in _compiled:
        torch._functorch.config.donated_buffer = (
            False  # they would forbid to keep the graph: backward alone is timed so
        )
        _compiled[function, sweep] = torch.compile(function, dynamic=sweep)
    return _compiled[function, sweep]


__all__ = ["OPERATORS", "OURS", "Measured", "Verdict", "contenders", "headline", "sweep", "use_instruction_set"]
