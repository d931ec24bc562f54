from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops._checks import seed_tensor


class Diversification2d(nn.Module):
    """Turns class activation maps [N,C,H,W] into scores [N,C]; in training, suppresses peaks and patches at random.

    Training: :func:`fgvc_ext.ops.diversify`. Evaluation: the plain spatial mean, nothing suppressed (Sun et al.,
    "Accounting for Subtle Differences…", section 3.1). No parameters.

    ``last_seed`` is the int64 seed ([] or [N]) of the last training forward, None before it:
    :meth:`suppression_mask` draws the mask that was used.
    """

    last_seed: Tensor | None

    def __init__(self, p_peak: float = 0.5, p_patch: float = 0.5, patch_size: int = 3, alpha: float = 0.1) -> None:
        super().__init__()
        self.p_peak, self.p_patch, self.patch_size, self.alpha = p_peak, p_patch, patch_size, alpha
        self.last_seed = None

    def forward(self, maps: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """``seed`` as in :func:`fgvc_ext.ops.diversify`: None, an int, or int64 [] or [N]; unused in evaluation."""
        if not self.training:
            return maps.mean(dim=(2, 3))
        seed = seed_tensor("diversify", seed, maps)
        self.last_seed = seed
        return ops.diversify(maps, alpha=self.alpha, seed=seed, **self.mask_options())

    def mask_options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`fgvc_ext.ops.suppression_mask` that describe this block."""
        return {"p_peak": self.p_peak, "p_patch": self.p_patch, "patch_size": self.patch_size}

    def suppression_mask(self, maps: Tensor) -> Tensor:
        """The mask, bool [N,C,H,W], that the last training forward drew for these ``maps``."""
        if self.last_seed is None:
            raise RuntimeError("Diversification2d: no mask has been drawn yet: there was no forward in training mode")
        return ops.suppression_mask(maps, seed=self.last_seed, **self.mask_options())

    def extra_repr(self) -> str:
        return f"p_peak={self.p_peak}, p_patch={self.p_patch}, patch_size={self.patch_size}, alpha={self.alpha}"
