"""Bytes kept between forward and backward, and peak memory, beside plain PyTorch: ``python benchmarks/memory.py``."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from cases import first_tensor
from results import table
from specs import OPERATORS, Sample, leaves, results, with_leaves
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Function = Callable[..., Any]


def saved_bytes(function: Function, sample: Sample) -> int:
    """Bytes of the storages kept for backward beyond those of the arguments, each storage counted once."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**sample.tensors, **sample.options)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for argument in sample.tensors.values():
        for tensor in argument if isinstance(argument, list) else [argument]:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(function: Function, sample: Sample) -> int:
    """Most bytes allocated at once during forward and backward, beyond what there was before."""
    wanted = [leaf for _, leaf in leaves(sample)]

    def forward_and_backward() -> None:
        value = results(function(**sample.tensors, **sample.options)).values()
        total = sum(result.sum() for result in value if result.requires_grad)
        torch.autograd.grad(total, wanted, allow_unused=True)

    forward_and_backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_and_backward()
    # The profiler's tables add allocations up by operator; only its raw events have each one with its time.
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(totals, default=0)


def memory_table() -> str:
    rows = [["bytes", "input", "saved", "saved, ours", "saved, eager", "peak, ours", "peak, eager"]]
    for spec in OPERATORS.values():
        benchmark = spec.benchmark
        if not spec.differentiable:
            continue
        sample = with_leaves(benchmark.sample(benchmark.cpu[0], "cpu"))
        numbers = [
            measured(one, sample) for measured in (saved_bytes, peak_bytes) for one in (spec.function, benchmark.plain)
        ]
        size, shape = first_tensor(sample).untyped_storage().nbytes(), list(benchmark.cpu[0].shape)
        rows.append([f"{spec.name} {shape}", f"{size:,}", benchmark.saves, *(f"{number:,}" for number in numbers)])
    return table(rows)


if __name__ == "__main__":
    print(memory_table())
