import torch
from torch import Tensor, nn

from .. import ops
from ..ops._checks import check_int

POSITION_CODES = ("formula", "upstream", None)


class GroupBilinear2d(nn.Module):
    """The residual block ``features + BN(group_bilinear(features + position code))``: [N,C,H,W] → [N,C,H,W].

    See :func:`fgvc_ext.ops.group_bilinear`. The scales of the BatchNorm ``norm`` start at zero, so that the block
    starts as the identity and can stand in a pretrained network. Its parameters and statistics are all that the state
    dict has.

    ``position`` is the fixed code of [C] that tells the groups apart, a buffer outside the state dict: "formula" is
    :func:`position_code`; "upstream" the same but for 2,048 channels in 32 groups, where the public code of the deep
    bilinear transformation repeats a table of 8 groups of 16 channels, so that the 32 groups share two codes; None has
    no code.
    """

    position: Tensor | None

    def __init__(self, channels: int, groups: int, *, position: str | None = "formula", scale: float = 1 / 32) -> None:
        super().__init__()
        check_int("GroupBilinear2d", "channels", channels, least=1)
        check_int("GroupBilinear2d", "groups", groups, least=1)
        if channels % groups:
            raise ValueError(f"GroupBilinear2d: groups must divide the {channels} channels, got {groups}")
        if position not in POSITION_CODES:
            names = ", ".join(str(code) for code in POSITION_CODES)
            raise ValueError(f"GroupBilinear2d: position must be one of {names}, got {position!r}")
        self.channels, self.groups, self.scale, self.code = channels, groups, scale, position
        self.register_buffer("position", _code(channels, groups, position), persistent=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.norm(self.bilinear(features))

    def bilinear(self, features: Tensor) -> Tensor:
        """The operator alone, before BatchNorm and sum."""
        return ops.group_bilinear(features, self.groups, position=self.position, scale=self.scale)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, groups={self.groups}, position={self.code!r}, scale={self.scale}"


def position_code(channels: int, groups: int) -> Tensor:
    """[channels] float32: channel k of group g has sin(t) for even k, cos(t) for odd k, t = g / 1.5^(2k/p)."""
    per_group = channels // groups
    channel = torch.arange(per_group, dtype=torch.float64)
    angles = torch.arange(groups, dtype=torch.float64)[:, None] / 1.5 ** (2 * channel / per_group)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).flatten().float()


def _code(channels: int, groups: int, position: str | None) -> Tensor | None:
    if position is None:
        return None
    if position == "upstream" and (channels, groups) == (2048, 32):
        return position_code(128, 8).repeat(16)
    return position_code(channels, groups)
