"""Bytes kept between forward and backward, and peak memory, beside plain PyTorch: ``python benchmarks/memory.py``."""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import bench_diversify
import bench_global_k_max_pool
import bench_gradient_boosting_cross_entropy
import torch
from results import table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fgvc_ext import ops


@contextmanager
def saved_tensors(saved: list[Tensor]) -> Any:
    """Collects in ``saved`` what autograd keeps for backward."""

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def saved_bytes(function: Callable[..., Tensor], *arguments: Tensor) -> int:
    """Bytes of the storages kept for backward beyond those of the arguments, each storage counted once."""
    saved: list[Tensor] = []
    with saved_tensors(saved):
        function(*arguments)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for argument in arguments:
        storages.pop(argument.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(function: Callable[..., Tensor], *arguments: Tensor) -> int:
    """Most bytes allocated at once during forward and backward, beyond what there was before."""
    function(*arguments).sum().backward()
    arguments[0].grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*arguments).sum().backward()
    arguments[0].grad = None
    # The profiler's tables add allocations up by operator; only its raw events have each one with its time.
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(totals, default=0)


def contenders() -> list[tuple[str, str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Operator, what ours states that it saves, ours, plain PyTorch, arguments."""
    features = torch.randn(32, 2048, 14, 14, requires_grad=True)
    maps = torch.randn(32, 200, 14, 14, requires_grad=True)
    scores, target = torch.randn(32, 200, requires_grad=True), torch.arange(32)
    pooling, loss = bench_global_k_max_pool, bench_gradient_boosting_cross_entropy
    return [
        (pooling.OP, "4 int16 a map", pooling.our, pooling.plain, (features,)),
        (bench_diversify.OP, "1 bit an element", ops.diversify, bench_diversify.plain, (maps,)),
        (loss.OP, "4 numbers a sample", ops.gradient_boosting_cross_entropy, loss.plain, (scores, target)),
    ]


def memory_table() -> str:
    rows = [["bytes", "input", "saved", "saved, ours", "saved, eager", "peak, ours", "peak, eager"]]
    for name, stated, our, plain, arguments in contenders():
        numbers = [saved_bytes(our, *arguments), saved_bytes(plain, *arguments)]
        peaks = [peak_bytes(our, *arguments), peak_bytes(plain, *arguments)]
        size = arguments[0].untyped_storage().nbytes()
        rows.append([f"{name} {list(arguments[0].shape)}", f"{size:,}", stated, *(f"{n:,}" for n in numbers + peaks)])
    return table(rows)


if __name__ == "__main__":
    print(memory_table())
