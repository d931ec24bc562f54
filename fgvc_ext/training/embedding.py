"""Classifiers with an embedding layer, whose embeddings have a loss of their own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.training.classification import Classification


class Embedding(Protocol):
    """A classifier of embeddings, such as `models.ELoPE`."""

    classifier: nn.Module

    def embed(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → embeddings [N,E]."""


class EmbeddingClassification(Classification):
    """L = L_CE + λ · L_e (ELoPE, eq. 1 and 5).

    Args:
        model: `embed(images) -> [N,E]`, `classifier(embeddings) -> scores [N,C]`, and `parameter_groups()`.
        loss: of scores [N,C] and labels [N].
        embedding_loss: `nn.ClassMeanLoss`, whose parts "within" and "between" are then logged; None: L_CE alone.
        weight: λ; the paper's is 2.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, embedding_loss: nn.Module | None, *, weight: float = 2.0
    ) -> None:
        super().__init__(model, loss)
        if embedding_loss is not None:
            self.losses["embedding"] = embedding_loss
        self.weight = weight

    def step(self, batch: Batch) -> dict[str, Any]:
        labels, model = batch["label"], self.model
        embeddings: Tensor = model.embed(batch["image"])  # type: ignore[operator]
        scores = model.classifier(embeddings)  # type: ignore[operator]
        loss, n = self.loss(scores, labels), len(labels)
        logs = {"correct": (scores.detach().argmax(1) == labels).sum()}
        if "embedding" in self.losses:
            part: Any = self.losses["embedding"]
            loss = loss + self.weight * part(embeddings, labels, batch_sizes=self.batch_sizes or None)
            # Of the global batch, so every process reports the same mean.
            logs |= {"within": part.within * n, "between": part.between * n}
        return {"loss": loss, "logs": logs, "n": n}


def mean_embeddings(embeddings: Tensor, labels: Tensor, classes: int, *, normalize: bool = True) -> Tensor:
    """The mean of each class's embeddings [N,E]: [C,E], zeros for a class without any.

    Args:
        normalize: bring every embedding to length one first, as the class-mean loss does.
    """
    rows = nn.functional.normalize(embeddings) if normalize else embeddings
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows) / counts
