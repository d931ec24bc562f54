from torch import Tensor, nn

from .. import ops
from ..ops.part_box_losses import BoxLosses


class PartBoxLosses(nn.Module):
    """How much part proposals overlap, and how far their areas are from that of a part of the object.

    See :func:`fgvc_ext.ops.part_box_losses`. No parameters.
    """

    def __init__(
        self,
        iou_weight: float = 2.0,
        parts: int = 4,
        min_area: float = 1024.0,
        area_mode: str = "two_sided",
        detach_denominator: bool = False,
    ) -> None:
        super().__init__()
        self.iou_weight, self.parts, self.min_area = iou_weight, parts, min_area
        self.area_mode, self.detach_denominator = area_mode, detach_denominator

    def forward(self, boxes: Tensor, valid: Tensor, object_area: Tensor) -> BoxLosses:
        """boxes [N,M,4], valid bool [N,M], object_area [N] → (overlap, area), each []."""
        return ops.part_box_losses(
            boxes,
            valid,
            object_area,
            iou_weight=self.iou_weight,
            parts=self.parts,
            min_area=self.min_area,
            area_mode=self.area_mode,
            detach_denominator=self.detach_denominator,
        )

    def extra_repr(self) -> str:
        return (
            f"iou_weight={self.iou_weight}, parts={self.parts}, min_area={self.min_area}, "
            f"area_mode={self.area_mode!r}, detach_denominator={self.detach_denominator}"
        )
