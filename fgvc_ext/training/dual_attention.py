"""The training of "dual attention fusion": one step of student, teacher and fusion, and its settings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fgvc_ext.data.loading import Batch
from fgvc_ext.models.deep_bilinear import Taught
from fgvc_ext.models.dual_attention import DualAttention, PartImages, PartStatistics, Seen
from fgvc_ext.models.part_attention import PartAttention
from fgvc_ext.models.part_proposal import Proposals, relative_side
from fgvc_ext.ops import part_box_losses, semantic_grouping_loss
from fgvc_ext.training.classification import Classification
from fgvc_ext.training.config import OptimConfig, at_least
from fgvc_ext.training.part_losses import (
    Hint,
    area_counts,
    area_quantiles,
    mean_part_scores,
    part_targets,
    ranking_loss,
    soft_target_loss,
)

Level = Literal["res3", "res4", "res5"]
"""The maps of a backbone's last three groups of layers, by their names in a ResNet."""
LEVELS: tuple[Level, ...] = ("res3", "res4", "res5")
NETWORK = (
    *("use_sppn", "use_lhm", "use_teacher", "dropout", "regions", "iou_threshold", "fpn_channels", "head_depth"),
    *("anchor_sizes", "sppn_detach", "fg_threshold", "dbt_sites", "use_bilinear", "paf", "paf_floor", "csf_detach"),
    *("part_images", "part_size", "blur_sigma", "noise_std", "noise_mode"),
    "part_statistics",
)
"""The settings that `models.DualAttention` takes under the same names."""
QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class DualAttentionConfig:
    """The paper's parts, its Table 3 as the first four switches, each of which needs the ones before."""

    use_sppn: bool = True
    """The part proposal network, its part images, and the losses of both."""
    use_lhm: bool = True
    """The location heat map; False: every anchor can be a part, and areas have no loss."""
    use_teacher: bool = True
    """The teacher and the fusion of scores."""
    use_distill: bool = True
    """The student learns from the teacher."""
    regions: int = at_least(1, 3)
    """M: regions that are kept of an image."""
    parts: int = at_least(1, 4)
    """N: a region should have this part of the object's area (birds: 4)."""
    iou_threshold: float = at_least(0, 0.25)
    """A region that overlaps a better one by more is suppressed."""
    iou_weight: float = at_least(0, 2.0)
    """Factor of the overlap loss; 2 is Dice's coefficient, 0 switches the loss off."""
    detach_denominator: bool = False
    """No gradient through the areas in the overlap loss, where it rewards large regions."""
    area_mode: Literal["two_sided", "hinge", "log"] = "two_sided"
    """|r − 1|, max(0, r − 1) or |log r| of a region's area to that of a part."""
    area_weight: float = at_least(0, 1.0)
    """Factor of the area loss; 0 switches it off."""
    min_area: float = at_least(1, 1024.0)
    """Smallest area of a part, in square pixels of an image of 448 × 448."""
    margin: float = at_least(0, 1.0)
    """By how much the score of a better region shall exceed another's."""
    con_weight: float = at_least(0, 1.0)
    """Factor of the concentrate loss, the cross-entropy of the mean score of the part images; 0 switches it off."""
    dropout: float = at_least(0, 0.5)
    """Share of the student's pooled features that a training hides."""
    fpn_channels: int = at_least(1, 128)
    """Channels of the feature pyramid and of its two towers."""
    head_depth: int = at_least(0, 2)
    """3×3 convolutions of a tower before its last."""
    anchor_sizes: tuple[float, ...] = (48.0, 96.0, 192.0)
    """Of the three levels, in pixels of an image of 448 × 448."""
    sppn_lr: float = at_least(0, 1.0)
    """Learning rate of the part proposals, as a factor of the others'; 0.1 is NTS-Net's to the paper's."""
    sppn_detach: bool = True
    """No gradient of the proposals reaches the backbone."""
    fg_threshold: float = at_least(0, 0.5)
    """From which value of the heat map on a pixel is object."""
    part_images: PartImages = "composed"
    """The whole image, with noise in the other regions and blurred outside all; crops: the regions, cut out."""
    part_size: int | None = at_least(1, None)
    """Side of part images; left out: the image's, of crops half of it."""
    blur_sigma: float = at_least(0, 20.0)
    """Of the blur, in pixels of an image of 448 × 448."""
    noise_std: float = at_least(0, 1.0)
    """Of the noise, in units of normalised images."""
    noise_mode: Literal["add", "replace"] = "add"
    """Noise is added to the image, or stands in its place."""
    part_statistics: PartStatistics = "shared"
    """Part images move the BatchNorms' running statistics like any image, or are normalised by their own alone."""
    dbt_sites: tuple[Literal["res4", "res5", "last"], ...] = ("res4", "res5", "last")
    """Where the teacher has deep bilinear blocks; a backbone without bottlenecks has the last alone."""
    use_bilinear: bool = True
    """The products within groups; False: semantic grouping alone."""
    position: Literal["formula", "upstream", "none"] = "formula"
    """The code that tells the groups apart."""
    paf: PartAttention = "pooled"
    """The part attention filter: the share of a cell that lies in a part, a learnt function of it, or none."""
    paf_floor: float = at_least(0, 0.0)
    """What the filter leaves outside the parts; 0.1 helps while regions are still random."""
    grouping_weight: float = at_least(0, 1e-5)
    """Factor of the semantic grouping loss (3e-4 to pretrain); 0 switches it off."""
    temperature: float = at_least(0, 4.0)
    """T of the soft targets."""
    hint_levels: tuple[Level, ...] = ("res4",)
    """Maps of which the student learns the teacher's."""
    hint_weight: float = at_least(0, 1.0)
    """α: factor of the hint loss beside the soft targets'."""
    distill_mix: Literal["sum", "convex"] = "sum"
    """α · hint + soft, or α · hint + (1 − α) · soft."""
    distill_warmup_epochs: int = at_least(0, 5)
    """Epochs in which the distillation's weight rises from 0 to 1; 0: it is 1 from the beginning."""
    csf_detach: bool = True
    """No gradient of the fused scores reaches student and teacher."""
    student_weight: float = at_least(0, 1.0)
    teacher_weight: float = at_least(0, 1.0)
    fusion_weight: float = at_least(0, 1.0)
    """Factors of the three losses in the sum."""
    evaluate_parts: bool = False
    """Evaluate also the mean of the student's scores of an image and of its parts, at M more passes."""

    def check(self, crop: int, epochs: int) -> None:
        """ValueError for what does not fit images of this side; a warning for a training of too few epochs."""
        if self.use_sppn and self.part_images == "composed" and self.part_size and crop % self.part_size:
            raise ValueError(
                f"--method.part-size: expected a divisor of --data.crop {crop}, got {self.part_size}: part images are "
                "means over whole cells"
            )
        if self.use_distill and self.distill_warmup_epochs >= epochs:
            reached = (epochs - 1) / self.distill_warmup_epochs
            warnings.warn(
                f"--method.distill-warmup-epochs {self.distill_warmup_epochs} in a training of {epochs} epochs: the "
                f"distillation reaches {reached:.0%} of its weight",
                stacklevel=2,
            )

    def network(self) -> dict[str, Any]:
        """The arguments of `models.DualAttention` beside backbone and classes.

        Raises:
            ValueError: a switch without those that it needs, or a number out of its range.
        """
        if self.use_distill and not self.use_teacher:
            raise ValueError("--method.use-distill: expected False without --method.use-teacher, got True")
        if self.distill_mix == "convex" and self.hint_weight > 1:
            raise ValueError(
                f"--method.hint-weight: expected at most 1 with --method.distill-mix convex, got {self.hint_weight}"
            )
        if not self.temperature > 0:
            raise ValueError(f"--method.temperature: expected above 0, got {self.temperature}")
        for name, value in (("iou-threshold", self.iou_threshold), ("fg-threshold", self.fg_threshold)):
            if not value <= 1:
                raise ValueError(f"--method.{name}: expected at most 1, got {value}")
        if len(self.anchor_sizes) != 3:
            raise ValueError(f"--method.anchor-sizes: expected three, one a level, got {self.anchor_sizes}")
        position = None if self.position == "none" else self.position
        return {"position": position, **{name: getattr(self, name) for name in NETWORK}}


class DualAttentionClassification(Classification):
    """Student, teacher and fusion in one step: L = w_s · L_student + w_t · L_teacher + w_f · L_CSF (equations 6 to 8).

    L_student is the sum of cross-entropies of the image ("pred") and of the mean score of its parts ("con"), the
    ranking of the regions ("rank"), their overlap and area, and the distillation. L_teacher is cross-entropy and the
    semantic grouping loss. What has no gradient where:

    - regions get one from overlap and area alone, their scores from the ranking alone;
    - the backbone none from the regions' losses (`sppn_detach`), the teacher none from the distillation, neither
      network one from the fused scores (`csf_detach`).

    The headline is the accuracy of the fused scores; without a teacher they are the student's.

    Args:
        model: built with `method.network()`.
        loss: scores [N,C], labels [N] → the mean cross-entropy, scalar: of all scores alike.
        method: the settings.
    """

    def __init__(self, model: DualAttention, loss: nn.Module, method: DualAttentionConfig) -> None:
        super().__init__(model, loss)
        self.network, self.method = model, method
        self.distills = method.use_distill and model.teacher is not None
        if self.distills:
            channels = dict(zip(LEVELS, model.level_channels, strict=True))
            self.losses["hint"] = nn.ModuleDict({name: Hint(channels[name]) for name in method.hint_levels})
        # A tensor: a compiled step would be compiled anew for each value of a number.
        self.register_buffer("ramp", torch.ones(()), persistent=False)
        self.ramp: Tensor

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        epochs = self.method.distill_warmup_epochs
        self.ramp.fill_(min(1.0, epoch / epochs) if epochs else 1.0)

    def param_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """As of every classifier, but for the part proposals, whose rate is `sppn_lr` times theirs.

        Raises:
            ValueError: a frozen group of layers among the new ones.
        """
        frozen = self.network.student.backbone.frozen_groups
        if shut := [name for name in config.new_layers if name in frozen]:
            raise ValueError(f"optim.new_layers: {shut[0]} is frozen (model.frozen_until), so it cannot be learnt anew")
        groups = super().param_groups(config)
        if self.network.proposals is None:
            return groups
        own = {id(parameter) for parameter in self.network.proposals.parameters()}
        rates = ((group, [p for p in group["params"] if id(p) in own]) for group in groups)
        apart = [{"params": found, "lr": group["lr"] * self.method.sppn_lr} for group, found in rates]
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        return [*rest, *apart]

    def step(self, batch: Batch) -> dict[str, Any]:
        images, label, method = batch["image"], batch["label"], self.method
        seen = self.network.look(images)
        student = {"pred": self.loss(seen.scores, label)}
        logs: dict[str, Tensor] = {}
        if seen.proposals is not None:
            found, counted = self._regions(batch, seen, seen.proposals)
            student, logs = {**student, **found}, counted
        if self.network.teacher is None or self.network.fusion is None:
            answer = self.answer(seen.scores, label)
            answer["loss"] = method.student_weight * _total(student)
            return self._with_logs(answer, student, logs)
        taught = self.network.teach(images, seen)
        if self.distills:
            student["distill"], counted = self.distillation(seen, taught)
            logs |= counted
        teacher = {"teacher": self.loss(taught.scores, label)}
        if taught.grouped and method.grouping_weight:
            teacher["grouping"] = method.grouping_weight * grouping_loss(taught)
        answer = self.answer(self.network.fusion(seen.scores, taught.scores), label)
        parts = {**student, **teacher, "fusion": answer["loss"]}
        answer["loss"] = (
            method.student_weight * _total(student)
            + method.teacher_weight * _total(teacher)
            + method.fusion_weight * answer["loss"]
        )
        for name, scores in (("student", seen.scores), ("teacher", taught.scores)):
            logs[f"{name}_correct"] = (scores.detach().argmax(1) == label).sum()
        return self._with_logs(answer, parts, logs)

    def _regions(self, batch: Batch, seen: Seen, found: Proposals) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of regions and part images, and what is counted of them."""
        images, label, method = batch["image"], batch["label"], self.method
        parts = self.network.part_images(images, found.boxes.detach(), batch["seed"])
        scores = self.network.part_scores(parts)
        ranking = ranking_loss(found.scores, part_targets(scores, label), found.valid, method.margin)
        area = seen.object.area if seen.object is not None else torch.ones_like(found.scores[:, 0])
        min_area = method.min_area * relative_side(images.shape[-2:]) ** 2
        boxes = part_box_losses(
            found.boxes,
            found.valid,
            area,
            iou_weight=method.iou_weight,
            parts=method.parts,
            min_area=min_area,
            area_mode=method.area_mode,
            detach_denominator=method.detach_denominator,
        )
        losses = {"rank": ranking.loss, "overlap": boxes.overlap}
        if method.con_weight:
            losses["con"] = method.con_weight * self.loss(mean_part_scores(scores, found.valid), label)
        if seen.object is not None and method.area_weight:
            losses["area"] = method.area_weight * boxes.area
        counted = {
            "active_pairs": ranking.active,
            "comparable_pairs": ranking.comparable,
            "valid_regions": found.valid.float().mean(1).sum(),
        }
        if seen.object is not None:
            counted |= {
                "foreground": seen.object.mask.float().mean((1, 2)).sum(),
                "fallback": seen.object.fallback.sum(),
                "union_to_object": (self.network.saliency(seen, images).sum((1, 2, 3)) / area).sum(),
                "areas": area_counts(found.boxes, found.valid, (area / method.parts).clamp(min=min_area)),
            }
        return losses, counted

    def distillation(self, seen: Seen, taught: Taught) -> tuple[Tensor, dict[str, Tensor]]:
        """The hints' mean and the soft targets, with the weight of the present epoch; and both of them for the logs."""
        method, hints = self.method, self.losses["hint"]
        soft = soft_target_loss(seen.scores, taught.scores, method.temperature)
        levels = {name: (own, other) for name, own, other in zip(LEVELS, seen.levels, taught.levels, strict=True)}
        each = [hints[name](*levels[name]) for name in method.hint_levels]  # type: ignore[index]
        hint = torch.stack(each).mean() if each else torch.zeros_like(soft.loss)
        share = 1.0 if method.distill_mix == "sum" else 1.0 - method.hint_weight
        count = len(seen.scores)
        logs = {"hint": hint.detach() * count, "soft": soft.loss.detach() * count, "soft_kl": soft.divergence * count}
        return self.ramp * (method.hint_weight * hint + share * soft.loss), logs

    def _with_logs(
        self, answer: dict[str, Any], parts: Mapping[str, Tensor], logs: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Every part of the loss as it is summed, weights included, as a sum over the samples."""
        n = answer["n"]
        if n:  # the mean of no sample is NaN
            answer["logs"] |= {name: value.detach() * n for name, value in parts.items()}
        answer["logs"] |= logs
        return answer

    # ---------------------------------------------------------------- evaluation

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        images, label = batch["image"], batch["label"]
        crops = [images] if images.dim() == 4 else images.unbind(1)
        each = [self._answers(crop, batch) for crop in crops]
        found = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
        headline, *others = found
        sums = self.sums(found[headline], label)
        return {**sums, **{f"{name}_correct": (found[name].argmax(1) == label).sum() for name in others}}

    def _answers(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scores by name, the headline's first; "mean" are the two networks' mean probabilities."""
        found = self.network.all_scores(images)
        if "teacher" in found:
            found["mean"] = (found["student"].float().softmax(1) + found["teacher"].float().softmax(1)) / 2
        if self.method.evaluate_parts and self.network.proposals is not None:
            seen = self.network.look(images)
            assert seen.proposals is not None
            parts = self.network.part_scores(self.network.part_images(images, seen.proposals.boxes, batch.get("seed")))
            found["parts"] = (seen.scores + mean_part_scores(parts, seen.proposals.valid)) / 2
        return found

    def measures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracies: "accuracy" of the fused scores, the others' by name; and the figures that show whether regions
        still learn: the share of ranked pairs that have a gradient, the areas relative to a part's."""
        found, n = super().measures(sums), float(sums["n"]) if "n" in sums else 0.0
        for name in ("student", "teacher", "mean", "parts"):
            if n and f"{name}_correct" in sums:
                found[f"{name}_accuracy"] = float(sums[f"{name}_correct"]) / n
        if "comparable_pairs" in sums:
            found["active_share"] = float(sums["active_pairs"]) / max(1.0, float(sums["comparable_pairs"]))
        if "areas" in sums and sums["areas"].sum() > 0:
            areas = area_quantiles(sums["areas"], QUANTILES)
            found |= {f"area_ratio_p{100 * share:.0f}": area for share, area in zip(QUANTILES, areas, strict=True)}
        return found


def grouping_loss(taught: Taught) -> Tensor:
    """½ l², l being the mean semantic grouping loss of the teacher's blocks (deep bilinear transformation)."""
    each = [semantic_grouping_loss(block.features, block.groups) for block in taught.grouped]
    return 0.5 * torch.stack(each).mean().square()


def _total(parts: Mapping[str, Tensor]) -> Tensor:
    first, *others = parts.values()
    return sum(others, start=first)
