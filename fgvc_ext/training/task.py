"""What a method brings to a training: one forward for a step, sums for an evaluation, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.model import Model, describe
from fgvc_ext.training.config import OptimConfig


class Task(nn.Module):
    """A model with its losses. `model`, where a task has one of `fgvc_ext.models`, is what its stage ships.

    `step` is the only forward of a training step (a data-parallel wrapper synchronises around exactly one), so
    everything that needs gradients belongs inside. Parameters and buffers of losses are registered like any others:
    they are optimised, saved and restored. What shall stay as it is belongs into `teachers.Frozen`.
    """

    higher_is_better = True
    """Whether the larger value of the headline (the first measure) is the better one."""

    batch_sizes: tuple[int, ...] = ()
    """How many samples of the present batch each process has; set by the engine before a step, for losses that see the
    batches of all (`nn.ClassMeanLoss` takes it)."""

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
        """Sums over the samples of a batch: nothing but what may be added up. "n" is the number of samples."""
        raise NotImplementedError

    def measures(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """What the sums of an evaluation say; the first is the headline, by which epochs are compared.

        Also called with the sums of a training epoch: what `step` logs, with "loss" and "n". A sum that is not looked
        at here is reported all the same, as its mean over the samples (see `evaluation.measured`).
        """
        return means(sums)

    def param_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; each may have its own "lr"."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def frozen_part(self) -> Backbone | None:
        """The backbone through whose frozen part alone the task sees its images (`Backbone.freeze`).

        Its output, computed once, then comes in the images' place wherever only flips augment. None, the default: the
        task needs images in every epoch.
        """
        return None

    @property
    def evaluates_images(self) -> bool:
        """Whether an evaluation needs images also where `frozen_part`'s output serves a training step."""
        return False

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch (counted from 0), for losses that change on the way."""

    def model_state(self) -> dict[str, torch.Tensor]:
        """What is saved as the trained model: the state of `model`, or of the whole task without one."""
        model = getattr(self, "model", None)
        return model.state_dict() if isinstance(model, nn.Module) else self.state_dict()

    def model_metadata(self) -> dict[str, Any]:
        """What is saved beside it, so that `models.load` can build the model again."""
        model = getattr(self, "model", None)
        return describe(model) if isinstance(model, Model) else {}


def means(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The mean over the samples of every sum that is one number."""
    n = float(sums["n"]) if "n" in sums else 0.0
    if not n:
        return {}
    return {name: float(value) / n for name, value in sums.items() if name != "n" and value.dim() == 0}
