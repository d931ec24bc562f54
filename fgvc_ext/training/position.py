"""How far a training is: what a checkpoint keeps of it beside the networks and generators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Position:
    """How far a training is, and what it has counted since its epoch began: all of it goes into a checkpoint."""

    epoch: int = 0
    batch: int = 0
    """Number, within the epoch, of the next batch to train."""
    step: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of this process' samples, on the device."""
    counts: dict[str, int] = field(default_factory=dict)
    """Images left out as broken; steps left out as not finite, or because fp16 overflowed."""
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds that the epoch's batches were waited for."""
    rate: float = 0.0
    """Learning rate of the epoch's first step."""
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    last: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measures of the last time that each evaluation was made."""

    def count(self, name: str, number: int) -> None:
        if number:
            self.counts[name] = self.counts.get(name, 0) + number

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.counts, self.seconds, self.waited = {}, {}, 0.0, 0.0
