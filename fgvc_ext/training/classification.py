"""The task that classifiers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.training.config import OptimConfig
from fgvc_ext.training.task import Task


class Classification(Task):
    """A classifier and its loss. The headline is the accuracy.

    Args:
        model: `forward(images, seed) -> scores [N,C]`, and `parameter_groups()` by group of layers.
        loss: scores [N,C], labels [N] → scalar. It may have parameters, which are optimised, and buffers.
        first_loss: the loss of the epochs before `from_epoch` (counted from 0); None: `loss` from the beginning.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, *, first_loss: nn.Module | None = None, from_epoch: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        # Both are registered from the beginning, so that a checkpoint of any epoch has the same entries.
        self.losses = nn.ModuleDict({"main": loss} if first_loss is None else {"main": loss, "first": first_loss})
        self.from_epoch = 0 if first_loss is None else from_epoch
        self._begun = self.from_epoch == 0  # and not the epoch: a compiled step would be compiled anew for each

    @property
    def loss(self) -> nn.Module:
        """The loss of the present epoch."""
        return self.losses["main" if self._begun else "first"]

    def start_epoch(self, epoch: int) -> None:
        self._begun = epoch >= self.from_epoch

    def step(self, batch: Batch) -> dict[str, Any]:
        return self.answer(self.model(batch["image"], batch["seed"]), batch["label"])

    def answer(self, scores: Tensor, label: Tensor) -> dict[str, Any]:
        """What a training step returns that has these scores [N,C] and labels [N]."""
        loss = self.loss(scores, label)
        for idle in self.losses.values():  # its parameters have a gradient, zero: every step trains the same ones
            if idle is not self.loss:
                loss = loss + sum(0.0 * p.sum() for p in idle.parameters() if p.requires_grad)
        correct = (scores.detach().argmax(1) == label).sum()
        return {"loss": loss, "logs": {"correct": correct}, "n": len(scores)}

    def frozen_part(self) -> Backbone | None:
        """The model's backbone, where a part of it is frozen."""
        backbone = getattr(self.model, "backbone", None)
        return backbone if isinstance(backbone, Backbone) and backbone.frozen_until is not None else None

    def scores(self, images: Tensor) -> Tensor:
        """Scores [N,C] of images [N,3,H,W], or the mean score over the crops of [N,K,3,H,W].

        The crops go through the network one after the other: N images a pass, as without crops.
        """
        if images.dim() == 4:
            return self.model(images)
        return torch.stack([self.model(crop) for crop in images.unbind(1)]).mean(0)

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        return self.sums(self.scores(batch["image"]), batch["label"])

    def sums(self, scores: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The sums of an evaluation's batch with these scores [N,C] and labels [N]."""
        predicted, classes = scores.argmax(1), scores.shape[1]
        confusion = torch.bincount(label * classes + predicted, minlength=classes**2)
        return {
            "n": torch.tensor(len(label)),
            "correct": (predicted == label).sum(),
            "loss": nn.functional.cross_entropy(scores.float(), label, reduction="sum"),
            "confusion": confusion.reshape(classes, classes),
        }

    def measures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracy, mean loss, and the mean over the classes of their accuracies, those of them that the sums give."""
        found, n = {}, float(sums["n"]) if "n" in sums else 0.0
        for name, total in (("accuracy", "correct"), ("loss", "loss")):
            if n and total in sums:
                found[name] = float(sums[total]) / n
        if n and "confusion" in sums:
            found["class_accuracy"] = mean_class_accuracy(sums["confusion"])
        return found

    def param_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """One group at config.lr, one at config.new_layers_lr with config.new_layers and the losses' parameters."""
        groups: dict[str, list[nn.Parameter]] = self.model.parameter_groups()  # type: ignore[operator]
        if unknown := [name for name in config.new_layers if name not in groups]:
            raise ValueError(f"optim.new_layers: expected some of {', '.join(groups)}, got {unknown[0]!r}")
        backbone = self.frozen_part()
        if shut := [name for name in config.new_layers if backbone is not None and name in backbone.frozen_groups]:
            raise ValueError(f"optim.new_layers: {shut[0]} is frozen (model.frozen_until), so it cannot be learnt anew")
        old: list[nn.Parameter] = []
        new: list[nn.Parameter] = []
        for name, parameters in groups.items():
            (new if name in config.new_layers else old).extend(p for p in parameters if p.requires_grad)
        new.extend(p for p in self.losses.parameters() if p.requires_grad)
        rate = config.lr if config.new_layers_lr is None else config.new_layers_lr
        return [{"params": old, "lr": config.lr}, {"params": new, "lr": rate}]


def mean_class_accuracy(confusion: Tensor) -> float:
    """Mean, over the classes that occur, of the share of correct images; rows of `confusion` [C,C] are the labels."""
    images = confusion.sum(1).double()
    correct = confusion.diagonal().double()
    return float((correct[images > 0] / images[images > 0]).mean())
