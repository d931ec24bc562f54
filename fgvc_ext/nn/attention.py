from torch import Tensor, nn

from .. import ops


class SpatialAttentionMap(nn.Module):
    """Where a network looks, from its feature maps: [N,C,H,W] → [N,H,W].

    See :func:`fgvc_ext.ops.spatial_attention_map`. No parameters.
    """

    def forward(self, features: Tensor) -> Tensor:
        return ops.spatial_attention_map(features)


class OrthogonalLoss(nn.Module):
    """How far a student looks where its teachers look. See :func:`fgvc_ext.ops.orthogonal_loss`. No parameters."""

    def forward(self, student_map: Tensor, teacher_maps: Tensor) -> Tensor:
        """student_map [N,H,W] and teacher_maps [T,N,H,W], both raw maps → []."""
        return ops.orthogonal_loss(student_map, teacher_maps)
