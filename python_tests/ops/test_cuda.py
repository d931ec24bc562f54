"""What only a GPU can show: streams, graphs, several devices, and calls that do not wait. `make gpu-test` runs them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fgvc_ext import ops

from .comparison import Outcome, assert_follows, assert_same_bits, map_tensors, run
from .spec import SPECS, Sample, Spec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
CYCLES = 50_000_000  # of a kernel that keeps a stream busy for some 30 ms


def on(sample: Sample, device: str) -> Sample:
    return map_tensors(sample, lambda tensor: tensor.to(device))


def first_samples(spec: Spec, dtype: torch.dtype = torch.float32) -> list[Sample]:
    return spec.samples(dtype, "cuda", "contiguous")[:3]


@each_spec
def test_small_inputs_for_the_sanitizer(spec: Spec) -> None:
    """Each kernel, forward and backward, on inputs small enough for compute-sanitizer."""
    for layout in spec.layouts[:2]:
        for dtype in (torch.float32, torch.bfloat16):
            for sample in spec.samples(dtype, "cuda", layout):
                if sum(value.numel() for value in sample.tensors.values() if isinstance(value, Tensor)) < 5000:
                    assert_follows(spec.function, spec.reference, sample)


@each_spec
def test_the_current_stream_is_used(spec: Spec) -> None:
    """On a side stream behind a slow kernel that makes the input: whoever runs on another stream reads garbage."""
    for sample in first_samples(spec):
        expected = run(spec.function, sample)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            late = map_tensors(sample, torch.empty_like)
            torch.cuda._sleep(CYCLES)
            for name, value in late.tensors.items():
                if isinstance(value, Tensor):
                    value.copy_(sample.tensors[name])
            found = run(spec.function, late)
        stream.synchronize()
        assert_same_bits(found, expected, sample.name)


@each_spec
def test_a_call_does_not_wait_for_the_device(spec: Spec) -> None:
    for sample in first_samples(spec):
        run(spec.function, sample)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(spec.function, sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_spec
def test_a_captured_graph_gives_the_same_bits(spec: Spec) -> None:
    for sample in first_samples(spec):
        expected = run(spec.function, sample)
        replayed = captured(lambda sample=sample: run(spec.function, sample))
        assert_same_bits(replayed(), expected, sample.name)


def captured(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        function()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = function()

    def replay() -> Outcome:
        graph.replay()
        torch.cuda.synchronize()
        return outcome

    return replay


def test_a_captured_graph_draws_anew() -> None:
    maps = torch.randn(2, 3, 7, 7, device="cuda")
    ops.diversify(maps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = ops.diversify(maps)
    graph.replay()
    first = scores.clone()
    graph.replay()
    assert not torch.equal(scores, first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_spec
def test_tensors_of_another_device_than_the_current_one(spec: Spec) -> None:
    for sample in first_samples(spec):
        expected = run(spec.function, sample)
        with torch.cuda.device(0):
            found = run(spec.function, on(sample, "cuda:1"))
        assert all(tensor.device.index == 1 for tensor in found.results.values())
        for name, tensor in found.results.items():
            assert torch.equal(tensor.cpu(), expected.results[name].cpu())


@each_spec
def test_more_elements_than_32_bits_count(spec: Spec) -> None:
    """64-bit offsets: a batch whose last samples lie beyond 2³¹ elements."""
    if not spec.image_like:
        pytest.skip("not a 4-D input")
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    size: tuple[Any, ...] = (1 + 2**31 // (2048 * 196), 2048, 14, 14)
    sample = spec.of_size(size, "cuda")
    small = spec.of_size((2, *size[1:]), "cuda")
    whole, part = sample.tensors[sample.first], small.tensors[small.first]
    whole[-2:] = part
    if "seed" in sample.tensors:  # keys every sample on its own, so that the batch does not matter
        seeds = torch.arange(size[0], device="cuda")
        sample.tensors["seed"], small.tensors["seed"] = seeds, seeds[-2:]
    large, alone = spec.function(**sample.tensors, **sample.options), spec.function(**small.tensors, **small.options)
    assert torch.equal(large[-2:], alone)
