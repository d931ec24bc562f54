from torch import Tensor, nn

from .. import ops


class GradientBoostingCrossEntropyLoss(nn.Module):
    """Cross-entropy over the true class and its ``k`` most confusing rivals.

    See :func:`fgvc_ext.ops.gradient_boosting_cross_entropy`.
    """

    def __init__(self, k: int = 15, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__()
        self.k, self.reduction, self.ignore_index = k, reduction, ignore_index

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """scores [N,C], target int64 [N] → [] (or [N] for reduction "none")."""
        return ops.gradient_boosting_cross_entropy(
            scores, target, k=self.k, reduction=self.reduction, ignore_index=self.ignore_index
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"
