"""The training of a model that looks where its teachers do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.models import KnowledgeTransfer, Model
from fgvc_ext.ops import orthogonal_loss, spatial_attention_map
from fgvc_ext.training.classification import Classification
from fgvc_ext.training.distributed import sum_over_processes
from fgvc_ext.training.teachers import Frozen

Balance = Literal["absolute", "relative"]


class AttentionTransfer(Classification):
    """Cross-entropy, and the orthogonal loss as the mean over the own teachers ("Knowledge Transfer Based Fine-grained
    Visual Classification", eq. 2–6). Without teachers it is a plain training, bit for bit.

    Teachers stay as they are. They see the student's own batch in the student's precision, up to their last stage.

    Args:
        model: the student.
        loss: scores [N,C], labels [N] → the mean cross-entropy, scalar.
        teachers: earlier models with the same size of map (`KnowledgeTransfer.attention`).
        alpha: weight of the orthogonal loss.
        balance: "absolute": CE + α · L_or (eq. 6). "relative": CE + L_or · (α · CE / L_or), the factor being a constant
            of the global batch, as in the authors' public code; CE alone where L_or = 0.

    Raises:
        ValueError: another balance.
    """

    def __init__(
        self,
        model: KnowledgeTransfer,
        loss: nn.Module,
        teachers: Sequence[Model] = (),
        *,
        alpha: float = 0.5,
        balance: Balance = "absolute",
    ) -> None:
        super().__init__(model, loss)
        if balance not in get_args(Balance):
            raise ValueError(f"AttentionTransfer: balance: expected one of {get_args(Balance)}, got {balance!r}")
        self.student, self.alpha = model, alpha
        self.teachers = [Frozen(teacher) for teacher in teachers]
        self.whole_batch = bool(teachers) and balance == "relative"  # a factor of the global batch, not of its parts

    def step(self, batch: Batch) -> dict[str, Any]:
        if not self.teachers:
            return super().step(batch)
        images = batch["image"]
        # The teachers first: their feature maps are gone before the student's are kept for its backward pass.
        taught = torch.stack([teacher.attention(images) for teacher in self.teachers])
        features = self.student.backbone(images)
        answer = self.answer(self.student.scores(features), batch["label"])
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
