"""Normalisation: what several models need beside torch's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def running_statistics(module: nn.Module, *, moved: bool) -> Iterator[None]:
    """Within it, a training pass moves the running statistics of BatchNorms, or leaves them: by a momentum of 0."""
    layers = [] if moved else [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
