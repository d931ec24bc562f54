"""The processes of a job: which one this is, what is its own, and what all of them agree on.

The only place in the package, beside the gather of `nn.ClassMeanLoss`, that knows ranks. Batch sizes are global and
each process takes its share; evaluation shards are not padded and their sums are added up; whatever is decided (is a
stage done, stop, where to go on) is decided by the main process alone, which alone writes files. In one process every
function here does nothing but what its name says.

Numbers on a GPU are exchanged with NCCL, decisions and everything else on the host with gloo, which waits for no GPU.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


class OtherProcessFailed(RuntimeError):  # noqa: N818 (says what happened)
    """Another process of the job has failed, which says itself why."""


@dataclass(frozen=True)
class Process:
    """One process of a training job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its machine, which is also that of its GPU."""
    local_size: int = 1
    """Processes on its machine."""
    launched: bool = False
    """Started by torchrun."""
    restarts: int = 0
    """How often torchrun has started the job before, after a process had died."""

    @property
    def is_main(self) -> bool:
        """True for the one process that decides, writes files and shows progress."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """The samples of an evaluation set that are this process' own: every sample exactly once, no padding."""
        return range(self.rank, count, self.world_size)

    def share(self, count: int) -> slice:
        """The part of a global training batch of `count` that is this process' own; sizes differ by at most one.

        The larger shares are those of the first ranks: the main process, whose buffers are kept, always has one.
        """
        low, high = (-(-count * rank // self.world_size) for rank in (self.rank, self.rank + 1))
        return slice(low, high)


def current_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read torchrun's variables; without them, one process."""

    def number(name: str, default: int) -> int:
        return int(environment.get(name, str(default)))

    world_size = number("WORLD_SIZE", 1)
    return Process(
        rank=number("RANK", 0),
        world_size=world_size,
        local_rank=number("LOCAL_RANK", 0),
        local_size=number("LOCAL_WORLD_SIZE", world_size),
        launched="TORCHELASTIC_RUN_ID" in environment,
        restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
    )


@contextmanager
def joined(timeout: timedelta | None = None) -> Iterator[Process]:
    """Within this context the processes of the job work together.

    Args:
        timeout: how long a process waits for the others; None: torch's own, half an hour for gloo.
    """
    process = current_process()
    if process.world_size == 1 or dist.is_initialized():
        yield process
        return
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    store, rank, world_size = next(dist.rendezvous("env://", **options))
    # After a restart the launcher's store still holds the addresses of the attempt before, dead processes among them.
    attempt = dist.PrefixStore(f"attempt {process.restarts}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if process.local_rank < torch.cuda.device_count():  # `choose_device` refuses where a GPU is wanted and lacks
        torch.cuda.set_device(process.local_rank)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, **options)
    try:
        yield process
    finally:
        dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """Within this context only the main process writes to standard output; errors are everybody's own."""
    with open(os.devnull, "w") as nowhere, nullcontext() if is_main() else redirect_stdout(nowhere):
        yield


def is_main() -> bool:
    """True in the one process that decides, writes files and shows progress."""
    return current_process().is_main


def check_joined() -> None:
    """RuntimeError where a launcher has started several processes that do not work together: each would train alone."""
    count = current_process().world_size
    if count > 1 and not _several():
        raise RuntimeError(f"WORLD_SIZE is {count}, but the processes have not joined: see distributed.joined()")


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process did not answer: it has ended, or hangs."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# -------------------------------------------------------------------- decisions, on the host


def on_main(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call the function in the main process alone; every process gets its result, or its error."""
    if not _several():
        return function(*args, **kwargs)
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = function(*args, **kwargs)
        except BaseException as error:
            _from_main([None, f"{type(error).__name__}: {error}"])
            raise
    result, failure = _from_main(answer)
    if failure is not None:
        raise OtherProcessFailed(f"the main process has failed: {failure}")
    return result


def _from_main(values: list[Any]) -> list[Any]:
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values


def on_each(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call the function in every process. Where it fails in one, all fail: none is left waiting for another.

    Raises:
        The own error; OtherProcessFailed where the function failed in others alone.
    """
    if not _several():
        return function(*args, **kwargs)
    result, failure = None, None
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        failure = error
    said = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if others := [f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None]:
        raise OtherProcessFailed("; ".join(others))
    return result  # type: ignore[return-value]


def any_process(flag: bool) -> bool:
    """True where the flag is set in at least one process: all of them stop when one is asked to."""
    if not _several():
        return flag
    value = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def gather_objects(value: Item) -> list[Item]:
    """The values of all processes, in the order of their ranks; every process gets them."""
    if not _several():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)  # with gloo wherever it takes part
    return found


# -------------------------------------------------------------------- what is whose


def own_rows(count: int) -> range:
    """The rows of an evaluation set of `count` samples that are this process' own."""
    return current_process().shard(count)


def largest_share(count: int) -> int:
    """The number of rows of the process that has most of them."""
    return -(-count // current_process().world_size)


def own_share(batch: Sequence[Item]) -> list[Item]:
    """This process' share of a global training batch; the shares' lengths differ by at most one."""
    return list(batch[current_process().share(len(batch))])


def reduce_sums(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all processes, added up in the order of their ranks, on the CPU; every process gets them.

    A process that had no samples has no sums: names may differ.
    """
    total: dict[str, Tensor] = {}
    for part in gather_objects({name: value.cpu() for name, value in sums.items()}):
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def share_sizes(count: int) -> list[int]:
    """How many of a global training batch of `count` samples each process takes."""
    size = current_process().world_size
    shares = [Process(rank, size).share(count) for rank in range(size)]
    return [share.stop - share.start for share in shares]


def gather_rows(rows: Tensor | None, count: int) -> Tensor:
    """The rows [n,…] that each process made of its `own_rows(count)`, put together in their order: [count,…].

    Args:
        rows: on the CPU; None in a process that has no rows, and does not know their shape.

    Raises:
        ValueError: this process has another number of rows than `own_rows` gave it, or no process has any.
    """
    own = len(own_rows(count))
    if own != (0 if rows is None else len(rows)):
        raise ValueError(f"gather_rows: expected {own} rows of {count}, got {0 if rows is None else len(rows)}")
    parts = gather_objects(rows)
    if parts[0] is None:
        raise ValueError("gather_rows: no process has a row")
    whole = parts[0].new_empty((count, *parts[0].shape[1:]))
    for rank, part in enumerate(parts):
        if part is not None:
            whole[rank :: len(parts)] = part
    return whole


# -------------------------------------------------------------------- a step


def data_parallel(task: nn.Module) -> nn.Module:
    """The task's forward, whose backward takes the mean of the gradients over all processes."""
    if not _several():
        return task
    # Buffers are the same after every step (`share_buffers`), so they need not be sent before the next.
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 has renamed the switch
    options: dict[str, Any] = {next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known): False}
    return DistributedDataParallel(task, **options)


def with_shared_batch_norm(task: Module, device: torch.device) -> Module:
    """The task with BatchNorm of the global batch, where several GPUs train; a CPU has none, and a warning says so."""
    if not _several():
        return task
    if device.type != "cuda":
        warnings.warn("engine.sync_batch_norm: only GPUs have it; each process normalises its own share", stacklevel=2)
        return task
    return nn.SyncBatchNorm.convert_sync_batchnorm(task)


def exchanging(model: nn.Module, exchange: bool) -> AbstractContextManager[None]:
    """A context in which backward exchanges gradients, or sums them up in this process until a later one does."""
    return nullcontext() if exchange or not isinstance(model, DistributedDataParallel) else model.no_sync()


def all_true(flag: Tensor) -> Tensor:
    """Whether the flag (bool [], on the device of the training) is True in all processes; no host waits for it."""
    if not _several():
        return flag
    value = flag.to(torch.int32)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return value.bool()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of the values (a constant, on the device of the training) over all processes; no host waits for it."""
    total = values.detach()
    if _several():
        total = total.clone()
        dist.all_reduce(total)
    return total


def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers, such as the running means of BatchNorm, each of its own shards."""
    if not _several():
        return
    of_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for buffer in module.buffers():
        if buffer.numel():
            of_dtype[buffer.dtype].append(buffer)
    for buffers in of_dtype.values():
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.detach().copy_(part.view(buffer.shape))
