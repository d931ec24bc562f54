"""The networks of "dual attention fusion": a student that finds the parts of an object, a teacher that is shown them,
and the fusion of what both say."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import build_backbone
from fgvc_ext.models.deep_bilinear import SITES, Taught, TeacherNetwork, five_channels
from fgvc_ext.models.localiser import crop_and_resize
from fgvc_ext.models.model import Explanation, Model, activation_maps, backbone_groups
from fgvc_ext.models.norm import running_statistics
from fgvc_ext.models.part_attention import Foreground, PartAttention, box_union, foreground
from fgvc_ext.models.part_proposal import AnchorLevel, PartProposalNetwork, Proposals, relative_side
from fgvc_ext.ops import compose_parts, location_heatmap

PartImages = Literal["composed", "crops"]
"""What the student sees of a part: the whole image, blurred outside the parts, or the part cut out (as in NTS-Net)."""
PartStatistics = Literal["shared", "own"]
"""What a BatchNorm makes of part images in training. "shared": like any image they move its running statistics, which
an evaluation of whole images then uses. "own": they are normalised by their own batch, and move nothing."""
NEW_LAYERS = ("proposals", "bilinear")
"""Groups of layers that no pretrained backbone has, beside the classifier: see `load_weights`."""


class StudentNetwork(nn.Module):
    """A backbone whose last three levels can be looked at, and a linear classifier behind dropout.

    Args:
        backbone: feature extractor.
        num_classes: C.
        dropout: share of the pooled features that a training hides.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = backbone.level_names()[-3:]
        if len(self.names) < 3:
            raise ValueError(f"StudentNetwork: expected a backbone of at least 3 levels, got {self.names}")
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.channels, num_classes)

    def levels(self, images: Tensor) -> list[Tensor]:
        """images [N,3,H,W] → the maps of the last three groups of layers: res3, res4 and res5 of a ResNet."""
        return self.backbone.levels(images, self.names)

    def scores(self, features: Tensor) -> Tensor:
        """The last level [N,D,h,w] → scores [N,C]."""
        return self.classifier(self.dropout(features.mean((2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → scores [N,C]."""
        return self.scores(self.levels(images)[-1])


class ScoreFusion(nn.Module):
    """One linear layer over the scores of student and teacher, [N,C] each → [N,C]. It starts as their mean.

    Args:
        num_classes: C.
        detach: no gradient of the fused scores reaches the two networks.
    """

    def __init__(self, num_classes: int, *, detach: bool = True) -> None:
        super().__init__()
        self.detach = detach
        self.linear = nn.Linear(2 * num_classes, num_classes)
        half = torch.eye(num_classes) / 2
        with torch.no_grad():
            self.linear.weight.copy_(torch.cat([half, half], dim=1))
            nn.init.zeros_(self.linear.bias)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        both = torch.cat([student, teacher], dim=1)
        return self.linear(both.detach() if self.detach else both)


class Seen(NamedTuple):
    """What the student finds in whole images."""

    levels: list[Tensor]
    scores: Tensor
    """[N,C]."""
    heat: Tensor | None = None
    """Location heat map [N,1,H,W]; like the next two, None where the model has no such part."""
    object: Foreground | None = None
    proposals: Proposals | None = None


class DualAttention(Model, method="dual_attention"):
    """Student and teacher, whose scores are fused. Every row of the paper's Table 3 is a setting of the switches.

    The student's feature maps give the location heat map and, through the part proposal network, the boxes of the
    parts. The teacher sees both beside the image. In evaluation the scores are the fused ones, of two passes through a
    backbone; without a teacher they are the student's. Part images are for the training alone.

    Args:
        backbone: feature extractor of the student. The teacher's is a copy that is widened and given its blocks.
        num_classes: C.
        use_sppn: part proposals.
        use_lhm: the location heat map; without it every anchor can be a part. Needs use_sppn.
        use_teacher: the teacher and the fusion. Needs use_lhm.
        dropout: see `StudentNetwork`.
        regions, iou_threshold, fpn_channels, head_depth, sppn_detach: see `PartProposalNetwork`.
        anchor_sizes: of the three levels, in pixels at 448 × 448.
        fg_threshold: of the heat map, from which on a pixel is object.
        dbt_sites, use_bilinear, position, paf, paf_floor: see `TeacherNetwork` and `DeepBilinearBlock`.
        csf_detach: see `ScoreFusion`.
        part_images, part_size, blur_sigma, noise_std, noise_mode: see `part_images`.
        part_statistics: see `PartStatistics`.

    Attributes:
        level_channels: of the maps of the backbone's last three groups of layers.

    Raises:
        ValueError: no classes, a switch without what it needs, an unknown choice, or what the parts refuse.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        use_sppn: bool = True,
        use_lhm: bool = True,
        use_teacher: bool = True,
        dropout: float = 0.5,
        regions: int = 3,
        iou_threshold: float = 0.25,
        fpn_channels: int = 128,
        head_depth: int = 2,
        anchor_sizes: Sequence[float] = (48.0, 96.0, 192.0),
        sppn_detach: bool = True,
        fg_threshold: float = 0.5,
        dbt_sites: Sequence[str] = SITES,
        use_bilinear: bool = True,
        position: str | None = "formula",
        paf: PartAttention = "pooled",
        paf_floor: float = 0.0,
        csf_detach: bool = True,
        part_images: PartImages = "composed",
        part_size: int | None = None,
        blur_sigma: float = 20.0,
        noise_std: float = 1.0,
        noise_mode: Literal["add", "replace"] = "add",
        part_statistics: PartStatistics = "shared",
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "backbone", "__class__")}
        super().__init__(Preprocessing(**backbone.preprocessing))
        if num_classes < 1:
            raise ValueError(f"DualAttention: num_classes: expected at least 1, got {num_classes}")
        _check_switches(use_sppn=use_sppn, use_lhm=use_lhm, use_teacher=use_teacher)
        for name, value, choices in (
            ("part_images", part_images, get_args(PartImages)),
            ("part_statistics", part_statistics, get_args(PartStatistics)),
            ("noise_mode", noise_mode, ("add", "replace")),
        ):
            if value not in choices:
                raise ValueError(f"DualAttention: {name}: expected one of {', '.join(choices)}, got {value!r}")
        numbers = {"fg_threshold": fg_threshold, "blur_sigma": blur_sigma, "noise_std": noise_std}
        for name, number in numbers.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"DualAttention: {name}: expected a number from 0 on, got {number}")
        if part_size is not None and part_size < 1:
            raise ValueError(f"DualAttention: part_size: expected None or at least 1, got {part_size}")
        self._options: dict[str, Any] = {
            name: list(v) if isinstance(v, (tuple, list)) else v for name, v in options.items()
        }
        self.use_lhm, self.fg_threshold = use_lhm, fg_threshold
        twin = copy.deepcopy(backbone) if use_teacher else None  # the same weights, as both start pretrained
        self.student = StudentNetwork(backbone, num_classes, dropout=dropout)
        self.level_channels = _level_channels(backbone, self.student.names)
        self.proposals: PartProposalNetwork | None = None
        self.teacher: TeacherNetwork | None = None
        self.fusion: ScoreFusion | None = None
        if use_sppn:
            self.proposals = PartProposalNetwork(
                self.level_channels,
                width=fpn_channels,
                depth=head_depth,
                regions=regions,
                iou_threshold=iou_threshold,
                levels=[AnchorLevel(size) for size in anchor_sizes],
                detach=sppn_detach,
            )
        if twin is not None:
            blocks: dict[str, Any] = {"attention": paf, "floor": paf_floor, "bilinear": use_bilinear}
            self.teacher = TeacherNetwork(twin, num_classes, sites=dbt_sites, position=position, **blocks)
            self.fusion = ScoreFusion(num_classes, detach=csf_detach)

    # ---------------------------------------------------------------- the parts of a step

    def look(self, images: Tensor) -> Seen:
        """The student's pass over whole images [N,3,H,W]: scores, heat map, object and part proposals."""
        levels = self.student.levels(images)
        scores = self.student.scores(levels[-1])
        if self.proposals is None:
            return Seen(levels, scores)
        size = (images.shape[-2], images.shape[-1])
        if not self.use_lhm:
            return Seen(levels, scores, proposals=self.proposals(levels, size))
        with torch.no_grad():
            heat = location_heatmap(levels, size)
            found = foreground(heat, self.fg_threshold)
        return Seen(levels, scores, heat, found, self.proposals(levels, size, found.mask))

    @torch.no_grad()
    def part_images(self, images: Tensor, boxes: Tensor, seed: Tensor | int | None = None) -> Tensor:
        """What the student sees of every part: [N,M,3,h,w], of images [N,3,H,W] and boxes [N,M,4].

        "composed": the image within the part's own box, with noise within the others, blurred elsewhere; of the
        image's size, or of `part_size` pixels a side where it is half of that. "crops": the part itself, resized to
        `part_size` (None: half the image). The blur is in pixels at 448 × 448.
        """
        options, height = self._options, images.shape[-2]
        if options["part_images"] == "crops":
            size = options["part_size"] or max(1, height // 2)
            repeated = images.repeat_interleave(boxes.shape[1], dim=0)
            return crop_and_resize(repeated, boxes.flatten(0, 1), size).unflatten(0, boxes.shape[:2])
        return compose_parts(
            images,
            boxes,
            blur_sigma=options["blur_sigma"] * relative_side(images.shape[-2:]),
            noise_std=options["noise_std"],
            noise_mode=options["noise_mode"],
            part_size=options["part_size"],
            seed=seed,
        )

    def part_scores(self, parts: Tensor) -> Tensor:
        """The student's scores [N,M,C] of part images [N,M,3,h,w]."""
        with running_statistics(self.student, moved=self._options["part_statistics"] == "shared"):
            return self.student(parts.flatten(0, 1)).unflatten(0, parts.shape[:2])

    def saliency(self, seen: Seen, images: Tensor) -> Tensor:
        """The mask [N,1,H,W] of what lies in the boxes of the parts."""
        assert seen.proposals is not None
        return box_union(seen.proposals.boxes, images.shape[-2:])

    def teach(self, images: Tensor, seen: Seen) -> Taught:
        """The teacher's pass over images [N,3,H,W] of which the student has seen this much."""
        assert self.teacher is not None
        assert seen.heat is not None
        return self.teacher.teach(five_channels(images, seen.heat, self.saliency(seen, images)))

    # ---------------------------------------------------------------- inference

    def all_scores(self, images: Tensor) -> dict[str, Tensor]:
        """images [N,3,H,W] → scores [N,C] by name: "fused", "student", "teacher"; without a teacher "student" alone."""
        seen = self.look(images) if self.teacher is not None else Seen([], self.student(images))
        if self.teacher is None or self.fusion is None:
            return {"student": seen.scores}
        taught = self.teach(images, seen)
        return {"fused": self.fusion(seen.scores, taught.scores), "student": seen.scores, "teacher": taught.scores}

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """images [N,3,H,W] → the fused scores [N,C]. `seed` is not used: only part images are random."""
        return next(iter(self.all_scores(images).values()))

    def explain(self, images: Tensor) -> Explanation:
        """Maps, boxes and scores, as far as the model has the parts that they come from.

        "student" and "teacher", class activation maps [N,C,h,w] whose means are their scores; "heat map" and "saliency
        mask" [N,1,H,W]; "part attention res4", "res5" and "last" [N,1,h,w], what the teacher's blocks are filtered by.
        The boxes "parts" [N,M,4] are in the order of their regions' scores.
        """
        seen = self.look(images)
        scores, maps = seen.scores, {"student": activation_maps(seen.levels[-1], self.student.classifier)}
        boxes: dict[str, Tensor] = {}
        if seen.proposals is not None:
            boxes["parts"] = seen.proposals.boxes
        if seen.heat is not None:
            maps["heat map"] = seen.heat
        if seen.proposals is not None:
            maps["saliency mask"] = self.saliency(seen, images)
        if self.teacher is not None and self.fusion is not None:
            taught = self.teach(images, seen)
            scores = self.fusion(scores, taught.scores)
            maps["teacher"] = activation_maps(taught.features, self.teacher.classifier)
            for name, block in self.teacher.blocks().items():
                if block.attention.kind != "off":
                    size = taught.levels[-2 if name == "res4" else -1].shape[-2:]
                    maps[f"part attention {name}"] = block.attention.share(maps["saliency mask"], size)
        return Explanation(maps, boxes, scores)

    # ---------------------------------------------------------------- parameters, files

    def networks(self) -> dict[str, Backbone]:
        """The backbones by the prefix of their names: each is loaded from a file of weights to start from."""
        found = {"student.backbone.": self.student.backbone}
        return found if self.teacher is None else {**found, "teacher.backbone.": self.teacher.backbone}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The groups of both backbones, those of the same name together; "bilinear", what the teacher's blocks add to
        its backbone; "proposals"; "classifier", with the fusion."""
        parts: dict[str, list[nn.Parameter]] = {"bilinear": [], "proposals": [], "classifier": []}
        if self.teacher is not None:
            parts["bilinear"] += self.teacher.new_parameters()
        if self.proposals is not None:
            parts["proposals"] += self.proposals.parameters()
        for module in (self.student, self.teacher):
            parts["classifier"] += [] if module is None else module.classifier.parameters()
        parts["classifier"] += [] if self.fusion is None else self.fusion.parameters()
        apart = {id(parameter) for parameter in parts["bilinear"]}
        groups: dict[str, list[nn.Parameter]] = {}
        for backbone in self.networks().values():
            for name, parameters in backbone_groups(backbone).items():
                groups.setdefault(name, []).extend(p for p in parameters if id(p) not in apart)
        return groups | parts

    def settings(self) -> dict[str, Any]:
        return {"backbone": self.student.backbone.settings(), **self._options}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> DualAttention:
        options = dict(settings)
        return cls(build_backbone(**options.pop("backbone")), **options)


def _check_switches(**switches: bool) -> None:
    """ValueError for a row of Table 3 without the rows before."""
    for before, name in pairwise(switches):
        if switches[name] and not switches[before]:
            raise ValueError(f"DualAttention: {name}: expected False without {before}, on which it builds, got True")


def _level_channels(backbone: Backbone, names: Sequence[str]) -> list[int]:
    """Channels of the maps at the ends of these groups of layers. Only shapes are computed."""
    side = backbone.settings().get("image_size", 224)
    shapes = copy.deepcopy(backbone).to("meta").eval()
    return [level.shape[1] for level in shapes.levels(torch.zeros(1, 3, side, side, device="meta"), names)]
