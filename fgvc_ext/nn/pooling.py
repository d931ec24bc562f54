import torch
from torch import Tensor, nn

from .. import ops


class GlobalKMaxPool2d(nn.Module):
    """Mean of the ``k`` largest values of every map: [N,C,H,W] → [N,C]. See :func:`fgvc_ext.ops.global_k_max_pool`.

    With ``weighted``, the parameter ``weight`` [k] weighs the ranks; it starts at one (ELoPE, eq. 4).
    """

    weight: nn.Parameter | None

    def __init__(self, k: int = 4, weighted: bool = False) -> None:
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.ones(k)) if weighted else None

    def forward(self, features: Tensor) -> Tensor:
        return ops.global_k_max_pool(features, self.k, self.weight)

    def extra_repr(self) -> str:
        return f"k={self.k}, weighted={self.weight is not None}"
