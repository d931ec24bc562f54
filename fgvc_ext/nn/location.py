from collections.abc import Sequence

from torch import Tensor, nn

from .. import ops


class LocationHeatmap(nn.Module):
    """Where the object is, from several levels of features. See :func:`fgvc_ext.ops.location_heatmap`.

    No parameters.
    """

    def forward(self, features: Sequence[Tensor], image_size: int | tuple[int, int]) -> Tensor:
        """features: levels [N,C,h,w] → [N,1,H,W] of the image's size, values in [0, 1]."""
        return ops.location_heatmap(features, image_size)
