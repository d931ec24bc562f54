"""The teacher of "dual attention fusion" (section 3.6): a backbone that sees two attention maps beside the image, and
whose channels are grouped by what they respond to and multiplied within their groups (deep bilinear transformation)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.part_attention import PartAttention, PartAttentionFilter
from fgvc_ext.nn import GroupBilinear2d

SITES = ("res4", "res5", "last")
"""Where a block stands: at the first convolution of every bottleneck of the last stage but one, and of the last stage;
and behind the backbone."""


def bilinear_groups(channels: int) -> int:
    """G for a map of C channels, such that the (C/G)² products are C or, if C is no square, 2 C, as near as can be.

    16 for 256 and 512, 32 for 1024 and 2048. The width of a group is a power of two that divides C.
    """
    width = 2 ** math.ceil(math.log2(channels) / 2)
    while channels % width:
        width //= 2
    return channels // width


class Grouped(NamedTuple):
    """What the semantic grouping loss sees of a block."""

    features: Tensor
    """[N,C,h,w], those that are multiplied within their groups."""
    groups: int


class DeepBilinearBlock(nn.Module):
    """Semantic grouping (a 1×1 convolution, BatchNorm, ReLU), then group bilinear, which is added.

    The convolution's output is weakened outside the parts, before its BatchNorm. With a new BatchNorm behind the
    products the block starts as the convolution, its BatchNorm and ReLU alone.

    Args:
        convolution, norm: of the semantic grouping; they may come from a pretrained network.
        groups: G; None: `bilinear_groups`.
        attention, floor: see `PartAttentionFilter`.
        bilinear: False: semantic grouping alone.
        position: see `nn.GroupBilinear2d`.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        norm: nn.BatchNorm2d,
        *,
        groups: int | None = None,
        attention: PartAttention = "pooled",
        floor: float = 0.0,
        bilinear: bool = True,
        position: str | None = "formula",
    ) -> None:
        super().__init__()
        channels = convolution.out_channels
        self.groups = bilinear_groups(channels) if groups is None else groups
        self.conv1, self.bn1 = convolution, norm  # as in torchvision's bottlenecks: their weights have these names
        self.attention = PartAttentionFilter(attention, floor)
        self.bilinear = GroupBilinear2d(channels, self.groups, position=position) if bilinear else None

    @classmethod
    def at_the_end(cls, channels: int, **options: object) -> DeepBilinearBlock:
        """A block of its own behind a backbone. Its convolution starts as the identity, of features that are ≥ 0."""
        convolution = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(convolution.weight)
        return cls(convolution, nn.BatchNorm2d(channels), **options)  # type: ignore[arg-type]

    def forward(self, features: Tensor, saliency: Tensor) -> tuple[Tensor, Grouped]:
        """features [N,C,h,w] and the mask [N,1,H,W] → [N,C',h',w'], and what was grouped."""
        found = F.relu(self.bn1(self.attention(self.conv1(features), saliency)))
        return found if self.bilinear is None else self.bilinear(found), Grouped(found, self.groups)

    def new_parameters(self) -> list[nn.Parameter]:
        """Those that no pretrained network has."""
        new = [self.attention] if self.bilinear is None else [self.attention, self.bilinear]
        return [parameter for module in new for parameter in module.parameters()]


class BilinearBottleneck(DeepBilinearBlock):
    """A ResNet's bottleneck whose first convolution is the semantic grouping of a block. Its weights load unchanged.

    Only the residual branch is filtered: the shortcut keeps the features as they are.
    """

    def __init__(self, block: Bottleneck, **options: object) -> None:
        super().__init__(block.conv1, block.bn1, **options)  # type: ignore[arg-type]
        self.conv2, self.bn2, self.conv3, self.bn3 = block.conv2, block.bn2, block.conv3, block.bn3
        self.downsample = block.downsample

    def forward(self, features: Tensor, saliency: Tensor) -> tuple[Tensor, Grouped]:
        found, grouped = super().forward(features, saliency)
        found = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(found)))))
        shortcut = features if self.downsample is None else self.downsample(features)
        return F.relu(found + shortcut), grouped


class Taught(NamedTuple):
    """What a teacher finds in images."""

    scores: Tensor
    """[N,C]."""
    features: Tensor
    """[N,D,h,w], whose mean over the positions the scores come from."""
    levels: list[Tensor]
    """The maps of the last three groups of layers, behind their blocks."""
    grouped: list[Grouped]
    """One for each block, from input to output."""


class TeacherNetwork(nn.Module):
    """A backbone of five channels with deep bilinear blocks, and a linear classifier: [N,5,H,W] → scores [N,C].

    The fourth channel is the location heat map, the fifth the saliency mask, which also filters the blocks. The
    weights of both are zero at first: the first convolution starts as the one for images alone, and learns also where
    the backbone's first layers are frozen. A frozen stage has no blocks, which are new.

    Args:
        backbone: for images; it is changed. Blocks within it need a ResNet of bottlenecks (resnet50 …) whose stride is
            on the 3×3 convolution; others have the one behind it alone.
        num_classes: C.
        sites: some of `SITES`; none: a plain backbone.
        options: of the blocks, see `DeepBilinearBlock`.

    Raises:
        ValueError: other sites, or a backbone whose first convolution cannot be widened.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, sites: Collection[str] = SITES, **options: object
    ) -> None:
        super().__init__()
        if unknown := [site for site in sites if site not in SITES]:
            raise ValueError(f"TeacherNetwork: sites: expected some of {', '.join(SITES)}, got {unknown[0]!r}")
        frozen_until, frozen = backbone.frozen_until, backbone.frozen_groups
        self.backbone = backbone.freeze(None).widen(5)
        self.names = backbone.level_names()[-3:]
        self.has_blocks_within = False
        for stage, site in zip(self.names[-2:], SITES[:2], strict=True):
            if site in sites and stage not in frozen:
                self.has_blocks_within |= _with_blocks(backbone, stage, options)
        backbone.freeze(frozen_until)
        backbone.get_parameter(str(backbone.input_weight)).requires_grad_(True)
        self.last = DeepBilinearBlock.at_the_end(backbone.channels, **options) if "last" in sites else None
        self.classifier = nn.Linear(backbone.channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[N,5,H,W] → scores [N,C]."""
        return self.teach(images).scores

    def teach(self, images: Tensor) -> Taught:
        """[N,5,H,W] → scores and what they come from."""
        saliency = images[:, 4:]
        levels, grouped = self._levels(images, saliency)
        features = levels[-1]
        if self.last is not None:
            features, one = self.last(features, saliency)
            grouped = [*grouped, one]
        return Taught(self.classifier(features.mean((2, 3))), features, levels, grouped)

    def _levels(self, images: Tensor, saliency: Tensor) -> tuple[list[Tensor], list[Grouped]]:
        if not self.has_blocks_within:
            return self.backbone.levels(images, self.names), []
        features = images
        ends: dict[str, Tensor] = {}  # and not dict[str, Tensor](), which torch.compile cannot follow
        grouped: list[Grouped] = []
        for name, layer in self.backbone.named_children():
            for block in layer if isinstance(layer, nn.Sequential) else (layer,):
                if isinstance(block, BilinearBottleneck):
                    features, one = block(features, saliency)
                    grouped.append(one)
                else:
                    features = block(features)
            ends[name] = features
        return [ends[name] for name in self.names], grouped

    def blocks(self) -> dict[str, DeepBilinearBlock]:
        """The last block of each site that has some, from input to output."""
        found: dict[str, DeepBilinearBlock] = {}
        for site, stage in zip(SITES[:2], self.names[-2:], strict=True):
            for name, module in self.backbone.named_modules():
                if isinstance(module, BilinearBottleneck) and name.startswith(f"{stage}."):
                    found[site] = module
        return found if self.last is None else {**found, "last": self.last}

    def new_parameters(self) -> list[nn.Parameter]:
        """Those of the blocks that no pretrained backbone has."""
        blocks = [module for module in self.backbone.modules() if isinstance(module, BilinearBottleneck)]
        found = [parameter for block in blocks for parameter in block.new_parameters()]
        return found if self.last is None else [*found, *self.last.parameters()]


def _with_blocks(backbone: Backbone, stage: str, options: dict[str, object]) -> bool:
    """Put a block into every bottleneck of a ResNet's stage; False where there is none."""
    layer = getattr(backbone, stage, None)
    if not isinstance(layer, nn.Sequential) or not all(isinstance(block, Bottleneck) for block in layer):
        return False
    if any(block.conv1.stride != (1, 1) for block in layer):
        raise ValueError(
            f"TeacherNetwork: {stage}: expected bottlenecks with the stride on the 3×3 convolution, got it on the 1×1 "
            "(stride_on_first_conv), before which features are weakened outside the parts"
        )
    blocks: Sequence[BilinearBottleneck] = [BilinearBottleneck(block, **options) for block in layer]
    setattr(backbone, stage, nn.Sequential(*blocks))
    return True


def five_channels(images: Tensor, heat: Tensor, saliency: Tensor) -> Tensor:
    """What a teacher sees: images [N,3,H,W], heat map and mask [N,1,H,W] → [N,5,H,W] in the images' dtype."""
    return torch.cat([images, heat.to(images.dtype), saliency.to(images.dtype)], dim=1)
