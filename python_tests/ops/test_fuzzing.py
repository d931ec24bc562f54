"""Random arguments: a result that follows the reference, or an error of Python's that names the operator.

Arguments are drawn afresh for each example, but the same ones on every run. What is drawn stands in the specs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fgvc_ext import _library

from .comparison import assert_follows, assert_same_bits, named_tensors, run
from .conftest import INSTRUCTION_SETS, each_spec, needs_libraries
from .generators import T
from .spec import Sample, Spec

pytestmark = [pytest.mark.slow, needs_libraries]
few_examples = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
more_examples = settings(few_examples, max_examples=400)


class FromHypothesis:
    """A ``generators.Draw`` whose choices hypothesis makes, and shrinks where they fail."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def number(self, least: float, most: float) -> float:
        return self.draw(st.floats(least, most))

    def choice(self, values: Sequence[T]) -> T:
        return values[self.draw(st.integers(0, len(values) - 1))]


@contextmanager
def drawn_instruction_set(draw: FromHypothesis) -> Iterator[None]:
    before = _library.instruction_set()
    _library._module.use_instruction_set(draw.choice(INSTRUCTION_SETS))
    try:
        yield
    finally:
        _library._module.use_instruction_set(before)


def describe(sample: Sample) -> None:
    for name, tensor in named_tensors(sample.tensors):
        if tensor.layout == torch.strided:
            note(f"{name}: {tensor.dtype}, size {list(tensor.shape)}, strides {tensor.stride()}")
    note(f"gradients to {sample.differentiable}, options {sample.options}")


@each_spec
@more_examples
@given(data=st.data())
def test_valid_arguments_give_what_the_reference_gives(spec: Spec, data: st.DataObject) -> None:
    draw = FromHypothesis(data)
    sample = spec.drawn(draw)
    describe(sample)
    with drawn_instruction_set(draw):
        assert_follows(spec.function, spec.reference, sample, spec.cancelling(sample), spec.cancelling_results(sample))
        seed = sample.tensors.get("seed")
        if seed is not None and seed.dim() == 0:
            as_int = replace(sample, tensors={**sample.tensors, "seed": int(seed)})
            assert_same_bits(run(spec.function, as_int), run(spec.function, sample), "a seed as int")


@each_spec
@few_examples
@given(data=st.data())
def test_invalid_arguments_give_an_error_that_names_the_operator(spec: Spec, data: st.DataObject) -> None:
    draw = FromHypothesis(data)
    sample = spec.drawn(draw)
    name, value = draw.choice(spec.faults)(draw, sample)
    describe(sample)
    note(f"wrong: {name} = {value!r}")
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        spec.function(**{**sample.tensors, **sample.options, name: value})
    assert type(raised.value) in (TypeError, ValueError, IndexError)
    assert str(raised.value).startswith(f"{spec.name}: ")
