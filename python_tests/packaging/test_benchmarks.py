"""The benchmarks: their cases come from the specs, and the clock shows what a contender takes, not its neighbour."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from python_tests.ops.spec import SPECS, Case, Spec, Target

from .conftest import PACKAGE, compiled

FOLDER = PACKAGE.parent / "benchmarks"
pytestmark = [compiled, pytest.mark.skipif(not FOLDER.is_dir(), reason="the sources are not here")]
benchmarked = [spec for spec in SPECS if spec.benchmark is not None]
each_benchmark = pytest.mark.parametrize("spec", benchmarked, ids=lambda spec: spec.name)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The folder's modules, which find each other as a script's do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import cases
    import results
    import timing

    yield {"cases": cases, "timing": timing, "results": results}
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def small(spec: Spec, backward: bool) -> Case:
    case = min(spec.benchmark.sweep, key=lambda case: torch.Size(case.shape).numel())
    return replace(case, backward=backward, targets=())


@each_benchmark
@pytest.mark.parametrize("backward", [False, True])
def test_every_contender_can_be_called(spec: Spec, backward: bool, modules: dict[str, Any]) -> None:
    """But what is compiled first, which takes long."""
    cases = modules["cases"]
    measured = cases.Measured(spec, small(spec, backward and bool(spec.differentiable)), False)
    every = cases.contenders(measured, "cpu", [])
    assert {cases.OURS, cases.EAGER, cases.COMPILED, cases.FLOOR} <= {one.name for one in every}
    for one in every:
        if one.name not in (cases.COMPILED, cases.FLOOR):
            one.call()


@each_benchmark
def test_a_contender_with_other_results_is_refused(spec: Spec, modules: dict[str, Any]) -> None:
    cases = modules["cases"]
    sample = spec.benchmark.sample(small(spec, False), "cpu")
    cases.compare(spec, spec.benchmark, sample)

    def halved(value: Any) -> Any:
        return value / 2 if isinstance(value, torch.Tensor) else type(value)(*(one / 2 for one in value))

    wrong = replace(spec, function=lambda **arguments: halved(spec.function(**arguments)))
    if spec.benchmark.comparable_options is None:
        with pytest.raises(AssertionError, match="not close"):
            cases.compare(wrong, spec.benchmark, sample)


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_floor_does_nothing_but_is_called_as_ours_are(requires_grad: bool, modules: dict[str, Any]) -> None:
    import floor

    first = torch.ones(3, 5, requires_grad=requires_grad)
    result = floor.do_nothing(first)
    assert result.shape == (3,)
    if requires_grad:
        result.sum().backward()
        assert first.grad.shape == (3, 5)


def test_a_neighbour_s_traces_are_not_timed(modules: dict[str, Any]) -> None:
    """A contender that is slow only after another one, as after one that emptied the caches."""
    timing = modules["timing"]
    cold = [True]

    def ours() -> None:
        time.sleep(0.02 if cold[0] else 0.001)
        cold[0] = False

    def neighbour() -> None:
        cold[0] = True

    contenders = [timing.Contender("ours", ours), timing.Contender("neighbour", neighbour)]
    times = timing.measure(contenders, "cpu", rounds=6, seconds=1)
    assert 0.001 <= times.median("ours") < 0.01


def test_fresh_memory_is_noticed(modules: dict[str, Any]) -> None:
    timing = modules["timing"]
    import mmap

    def fresh() -> None:
        with mmap.mmap(-1, 2**21) as memory:
            memory[:: mmap.PAGESIZE] = b"x" * (2**21 // mmap.PAGESIZE)

    kept = bytearray(2**21)
    contenders = [timing.Contender("fresh", fresh), timing.Contender("kept", lambda: kept.count(b"y"))]
    times = timing.measure(contenders, "cpu", rounds=6, seconds=1)
    assert times.faults["fresh"] >= 1
    assert times.faults["kept"] == 0


def test_either_of_two_targets_is_enough(modules: dict[str, Any]) -> None:
    cases, timing = modules["cases"], modules["timing"]
    times = timing.Times({"fgvc_ext": [1.0], "eager": [30.0], "read once": [0.25]}, {}, {}, {})
    target = Target("read once", at_most=2, otherwise=Target("eager", at_least=20))
    verdict = cases.verdict(target, times)
    assert verdict.passed
    assert verdict.what == "ours / read once or eager / ours"
    assert not cases.verdict(replace(target, otherwise=Target("eager", at_least=40)), times).passed
    assert not cases.verdict(replace(target, otherwise=None), times).passed
