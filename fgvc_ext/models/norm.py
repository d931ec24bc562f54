"""A layer that the heads of several models share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddingNorm(nn.BatchNorm1d):
    """BatchNorm of embeddings [N,E]. In training a single sample, which has no statistics, is given the running ones.

    That is the rest of an epoch that several processes share.
    """

    def forward(self, embeddings: Tensor) -> Tensor:
        if self.training and embeddings.shape[0] < 2:
            return F.batch_norm(embeddings, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(embeddings)
