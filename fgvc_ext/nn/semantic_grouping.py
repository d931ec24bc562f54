from torch import Tensor, nn

from .. import ops


class SemanticGroupingLoss(nn.Module):
    """Makes neighbouring channels respond at the same places: features [N,C,H,W] → [].

    See :func:`fgvc_ext.ops.semantic_grouping_loss`. No parameters. Every process, and every part of a batch whose
    gradients are accumulated, has the loss of its own samples, as BatchNorm has the statistics of its own: it is no
    mean over samples, and the mean of these losses is not that of the whole batch.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        return ops.semantic_grouping_loss(features, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
