"""The settings of diversification block and gradient-boosting cross-entropy, and what is built of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.subtle_differences import suppression_for
from fgvc_ext.nn import GradientBoostingCrossEntropyLoss
from fgvc_ext.training.config import at_least

Config = TypeVar("Config", bound="BlockAndLossConfig")


@dataclass
class BlockAndLossConfig:
    """The two parts of "Accounting for Subtle Differences" (AAAI 2020), each of which can be switched off."""

    diversification: bool = True
    """The diversification block (equations 1–8)."""
    p_peak: float | None = None
    """Probability that the peaks of a map are hidden; left out: 0.5 from 14 × 14 cells on, 0.2 below."""
    p_patch: float | None = None
    """Probability that a patch is hidden; left out: as p_peak."""
    patch_size: int | None = at_least(1, None)
    """G: side of a patch, in cells of the map; left out: a quarter of the map's side, at least 1, at most 3."""
    alpha: float = 0.1
    """Factor of what is hidden."""
    gce: bool = True
    """The gradient-boosting cross-entropy (equations 9–16); False: plain cross-entropy."""
    k: int = at_least(1, 15)
    """Number of confusing classes in the loss."""
    gce_from_epoch: int = at_least(0, 0)
    """Epochs of plain cross-entropy before (ImageNet recipe: half of them)."""

    def for_maps(self: Config, model: ModelConfig, crop: int) -> Config:
        """With the numbers in place that are left out: what the block hides, by the size of a backbone's maps."""
        if not self.diversification or None not in (self.p_peak, self.p_patch, self.patch_size):
            return self
        ruled: dict[str, Any] = suppression_for(model.map_side(crop))
        return replace(self, **{name: value for name, value in ruled.items() if getattr(self, name) is None})

    def block(self) -> dict[str, Any]:
        """The arguments of `models.SubtleDifferences`; of numbers that are in place, see `for_maps`."""
        if not self.diversification:
            return {"diversification": False}
        return {name: getattr(self, name) for name in ("p_peak", "p_patch", "patch_size", "alpha")}

    def losses(self, label_smoothing: float, group: str = "method") -> dict[str, Any]:
        """The arguments of `Classification` that are losses.

        Args:
            group: where a driver has these settings, as its flags name it.

        Raises:
            ValueError: smoothed labels for the gradient-boosting cross-entropy.
        """
        plain = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        if not self.gce:
            return {"loss": plain}
        if label_smoothing:
            raise ValueError(
                f"--optim.label-smoothing: expected 0 with --{group}.gce True, whose targets are single classes"
            )
        boosted = GradientBoostingCrossEntropyLoss(k=self.k)
        return {"loss": boosted, "first_loss": plain, "from_epoch": self.gce_from_epoch}
