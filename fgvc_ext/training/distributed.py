"""Which process this is, and which samples are its own.

The engine trains in one process. What it computes is already written for several: batch sizes are global, evaluation
shards are not padded, evaluation returns sums. A launcher that starts more than one process is refused here, before
anything is trained, because gradients would not be exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One process of a training job."""

    rank: int = 0
    world_size: int = 1
    launched: bool = False  # started by torchrun

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and shows progress."""
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
