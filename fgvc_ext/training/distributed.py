"""Which process this is, what is its own, and what all of them agree on: the only place here that knows ranks.

The engine trains in one process today. It is written for several: batch sizes are global and each process takes its
share, evaluation shards are not padded and their sums are added up, and whatever is decided (is a stage done, stop,
where to go on) is decided by the main process alone, which alone writes files. Every such place calls a function of
this module. A launcher that starts more than one process is refused before anything is trained, because gradients
would not be exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from torch import Tensor

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Process:
    """One process of a training job."""

    rank: int = 0
    world_size: int = 1
    launched: bool = False  # started by torchrun

    @property
    def is_main(self) -> bool:
        """True for the one process that decides, writes files and shows progress."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """The samples of an evaluation set that are this process' own: every sample exactly once, no padding."""
        return range(self.rank, count, self.world_size)


def current_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read torchrun's variables; without them, one process.

    Raises:
        ValueError: more than one process was launched.
    """
    process = Process(
        rank=int(environment.get("RANK", "0")),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        launched="TORCHELASTIC_RUN_ID" in environment,
    )
    if process.world_size != 1:
        raise ValueError(
            f"this version trains in one process, but WORLD_SIZE is {process.world_size}: "
            "start the driver with python, or with torchrun --nproc-per-node=1"
        )
    return process


@contextmanager
def joined() -> Iterator[Process]:
    """Within this context the processes of the job work together. Several are refused, see `current_process`."""
    yield current_process()


def is_main() -> bool:
    """True in the one process that decides, writes files and shows progress."""
    return current_process().is_main


def on_main(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call the function in the main process alone; every process gets its result, or its error."""
    return function(*args, **kwargs)


def any_process(flag: bool) -> bool:
    """True where the flag is set in at least one process: all of them stop when one is asked to."""
    return flag


def own_rows(count: int) -> range:
    """The rows of an evaluation set of `count` samples that are this process' own."""
    return current_process().shard(count)


def own_share(batch: Sequence[Item]) -> list[Item]:
    """This process' share of a global training batch; the shares' lengths differ by at most one."""
    process = current_process()
    low, high = (len(batch) * rank // process.world_size for rank in (process.rank, process.rank + 1))
    return list(batch[low:high])


def reduce_sums(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all processes, added up; every process gets them."""
    return sums


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """The rows [n,…] that each process made of its `own_rows(count)`, put together in their order: [count,…].

    Raises:
        ValueError: this process has another number of rows than `own_rows` gave it.
    """
    own = len(own_rows(count))
    if len(rows) != own:
        raise ValueError(f"gather_rows: expected {own} rows of {count}, got {len(rows)}")
    return rows
