"""The training of a model with two heads on one feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from fgvc_ext.data.loading import Batch
from fgvc_ext.models import Combined
from fgvc_ext.models.ensemble import Average
from fgvc_ext.training.attention_transfer import AttentionTransfer
from fgvc_ext.training.embedding import add_embedding_loss


class CombinedTraining(AttentionTransfer):
    """L = the sum of what each head alone is trained with, + α · L_or where there are teachers (`AttentionTransfer`).

    Embedding head: L_CE + λ · L_e (`EmbeddingClassification`). Map head: the gradient-boosting cross-entropy of the
    block's scores, with cross-entropy before `from_epoch` (`Classification`). The heads meet in the backbone alone:
    above a frozen one each learns what it would learn without the other.

    Beside the accuracy of the model, the evaluations of one with two heads measure that of either average and of each
    head: `probabilities_accuracy`, `logits_accuracy`, `embedding_accuracy`, `maps_accuracy`.

    Args:
        model: the student.
        embedding: loss, embedding_loss and weight of the embedding head, as of `EmbeddingClassification`.
        maps: loss, and first_loss and from_epoch if it changes, of the map head, as of `Classification`.
        learning: further arguments of `AttentionTransfer`.

    Raises:
        ValueError: losses for other heads than the model has.
    """

    student: Combined

    def __init__(
        self,
        model: Combined,
        *,
        embedding: Mapping[str, Any] | None,
        maps: Mapping[str, Any] | None,
        **learning: Any,
    ) -> None:
        given = {name for name, losses in (("embedding", embedding), ("maps", maps)) if losses is not None}
        if given != set(model.classifier):
            raise ValueError(
                f"CombinedTraining: expected losses for the heads {', '.join(model.classifier)} of the model, got them "
                f"for {', '.join(sorted(given)) or 'none'}"
            )
        entropy = {} if embedding is None else {"loss": embedding["loss"]}
        super().__init__(model, **(entropy if maps is None else maps), **learning)
        if embedding is not None:
            self.losses["entropy"], self.weight = embedding["loss"], embedding["weight"]
            if embedding["embedding_loss"] is not None:
                self.losses["embedding"] = embedding["embedding_loss"]

    def learn(self, features: Tensor, batch: Batch) -> dict[str, Any]:
        labels = batch["label"]
        scores, embeddings = self.student.head_scores(features, batch["seed"])
        losses = {"maps": self.loss}
        if embeddings is not None:
            losses["embedding"] = self.losses["entropy"]
        total = sum(losses[head](values, labels) for head, values in scores.items())
        correct = (self.student.averaged(scores).detach().argmax(1) == labels).sum()
        answer = {"loss": total, "logs": {"correct": correct}, "n": len(labels)}
        if embeddings is not None and "embedding" in self.losses:
            add_embedding_loss(answer, self.losses["embedding"], self.weight, embeddings, labels, self.batch_sizes)
        return answer

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        labels = batch["label"]
        heads, _ = self.student.head_scores(self.student.backbone(batch["image"]))
        found = self.sums(self.student.averaged(heads), labels)
        if len(heads) > 1:
            answers = heads | {average: self.student.averaged(heads, average) for average in get_args(Average)}
            found |= {f"{name}_accuracy": (scores.argmax(1) == labels).sum() for name, scores in answers.items()}
        return found
