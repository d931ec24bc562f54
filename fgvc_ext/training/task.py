"""What a method brings to the engine: one forward for a step, sums for an evaluation, parameter groups, stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fgvc_ext.training.config import OptimConfig
from fgvc_ext.training.sampling import Batch, Samples


class Task(nn.Module):
    """A model with its losses.

    `step` is the only forward of a training step (a data-parallel wrapper synchronises around exactly one), so
    everything that needs gradients belongs inside.
    """

    def forward(self, batch: Batch) -> dict[str, Any]:
        return self.step(batch)

    def step(self, batch: Batch) -> dict[str, Any]:
        """One training forward.

        Returns:
            "loss": scalar, the mean over the batch; "logs": sums over the samples by name, such as "correct";
            "n": the number of samples.
        """
        raise NotImplementedError

    def eval_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over the samples of a batch: nothing but what may be added up. "n" and "correct" give the accuracy."""
        raise NotImplementedError

    def param_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; each may have its own "lr"."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch (counted from 0), for losses that change on the way."""

    def model_state(self) -> dict[str, torch.Tensor]:
        """What is saved as the trained model."""
        return self.state_dict()

    def load_model_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `model_state` returned."""
        self.load_state_dict(state)


@dataclass
class Stage:
    """One training within a run.

    Attributes:
        name: unique in the run; prefix of its checkpoints and name of its weights file.
        build: makes the task; called with all generators seeded from `seed`.
        train: training samples. evaluations: samples by name, "test" and "val" have columns in metrics.csv.
        final: evaluations for the end of the stage only, such as five crops.
        metadata: goes into the weights file (class names, preprocessing, method).
        inputs: hashes of what the stage builds on, such as pretrained weights or an earlier stage's output.
    """

    name: str
    build: Callable[[], Task]
    optim: OptimConfig
    train: Samples
    evaluations: Mapping[str, Samples]
    seed: int
    final: Mapping[str, Samples] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


def accuracy(sums: Mapping[str, torch.Tensor]) -> float | None:
    """Share of correct samples, None where nothing was counted."""
    n = int(sums["n"]) if "n" in sums else 0
    return float(sums["correct"]) / n if n and "correct" in sums else None
