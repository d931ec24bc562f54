"""What the operators keep between forward and backward: the bytes that their specs say, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .comparison import named_tensors, results, with_leaves
from .conftest import each_differentiable, each_spec, needs_libraries
from .spec import Spec
from .test_contract import samples

pytestmark = needs_libraries


def saved_by(function: Callable[[], Any]) -> list[Tensor]:
    """Every tensor that autograd packs for backward during the call."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = results(function())
    assert any(result.requires_grad for result in value.values()), "the call built no graph"
    return saved


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@each_differentiable
def test_what_is_saved_is_what_the_spec_says(spec: Spec) -> None:
    """New bytes count each storage once; of the arguments, those that are kept are kept as they are, not copied."""
    cases = spec.saved()
    assert cases, "a spec with gradients says what they keep"
    for case in cases:
        called = with_leaves(case.sample)
        saved = saved_by(lambda called=called: spec.function(**called.tensors, **called.options))
        storages = {address(tensor): tensor.untyped_storage().nbytes() for tensor in saved}
        arguments = dict(named_tensors(called.tensors))
        kept = {name for name, tensor in arguments.items() if address(tensor) in storages}
        assert kept == set(case.keeps), case.sample.name
        new = sum(size for where, size in storages.items() if where not in map(address, arguments.values()))
        assert new == case.new_bytes, case.sample.name


@each_spec
def test_nothing_is_saved_where_no_gradient_is_asked_for(spec: Spec) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        for sample in samples(spec):
            spec.function(**sample.tensors, **sample.options)
            with torch.no_grad():
                called = with_leaves(sample)
                spec.function(**called.tensors, **called.options)
    assert not saved


def test_a_copy_of_an_argument_would_be_seen() -> None:
    x = torch.randn(5, requires_grad=True)
    (kept,) = saved_by(lambda: x.square())
    (copied,) = saved_by(lambda: x.clone().square())
    assert address(kept) == address(x)
    assert address(copied) != address(x)
    with pytest.raises(AssertionError, match="built no graph"):
        saved_by(lambda: x.detach() + 1)
