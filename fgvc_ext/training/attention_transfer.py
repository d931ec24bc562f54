"""The training of a model that looks where its teachers do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.models import Combined, KnowledgeTransfer, Model
from fgvc_ext.ops import orthogonal_loss, spatial_attention_map
from fgvc_ext.training.classification import Classification
from fgvc_ext.training.distributed import sum_over_processes
from fgvc_ext.training.teachers import Frozen

Balance = Literal["absolute", "relative"]
Student = KnowledgeTransfer | Combined
"""Models that can be teachers (`attention`), and give scores of the features that their attention is made of."""


class AttentionTransfer(Classification):
    """Cross-entropy, and the orthogonal loss as the mean over the own teachers ("Knowledge Transfer Based Fine-grained
    Visual Classification", eq. 2–6). Without teachers it is a plain training, bit for bit.

    Teachers stay as they are. They see the student's own batch in the student's precision, up to their last stage.

    Args:
        model: the student.
        loss: scores [N,C], labels [N] → the mean cross-entropy, scalar.
        teachers: earlier models with the same size of map (`attention`).
        alpha: weight of the orthogonal loss.
        balance: "absolute": CE + α · L_or (eq. 6). "relative": CE + L_or · (α · CE / L_or), the factor being a constant
            of the global batch, as in the authors' public code; CE alone where L_or = 0.
        losses: further arguments of `Classification`.

    Raises:
        ValueError: another balance.
    """

    def __init__(
        self,
        model: Student,
        loss: nn.Module,
        teachers: Sequence[Model] = (),
        *,
        alpha: float = 0.5,
        balance: Balance = "absolute",
        **losses: Any,
    ) -> None:
        super().__init__(model, loss, **losses)
        if balance not in get_args(Balance):
            raise ValueError(f"AttentionTransfer: balance: expected one of {get_args(Balance)}, got {balance!r}")
        self.student, self.alpha = model, alpha
        self.teachers = [Frozen(teacher) for teacher in teachers]
        self.whole_batch = bool(teachers) and balance == "relative"  # a factor of the global batch, not of its parts

    def learn(self, features: Tensor, batch: Batch) -> dict[str, Any]:
        """What a step without teachers returns, of the student's features [N,D,h,w] of the last stage."""
        return self.answer(self.student.scores(features), batch["label"])

    def step(self, batch: Batch) -> dict[str, Any]:
        images = batch["image"]
        if not self.teachers:
            return self.learn(self.student.backbone(images), batch)
        # The teachers first: their feature maps are gone before the student's are kept for its backward pass.
        taught = torch.stack([teacher.attention(images) for teacher in self.teachers])
        features = self.student.backbone(images)
        answer = self.learn(features, batch)
        shared = orthogonal_loss(spatial_attention_map(features), taught)
        factor = self._relative(answer["loss"], shared, answer["n"]) if self.whole_batch else self.alpha
        answer["loss"] = answer["loss"] + factor * shared
        answer["logs"]["orthogonal"] = shared.detach() * answer["n"]
        return answer

    def _relative(self, cross_entropy: Tensor, shared: Tensor, n: int) -> Tensor:
        """α · CE / L_or of the global batch; `n` samples are this process' own."""
        own = torch.stack([cross_entropy, shared.to(cross_entropy.dtype)])
        both = sum_over_processes(own * n if n else torch.zeros_like(own))  # the mean of nothing is NaN
        return torch.where(both[1] == 0, 0.0, self.alpha * both[0] / both[1])
