"""The papers' equations in plain PyTorch: oracle of the tests, fallback without compiled libraries, documentation.

Each function has the signature of its namesake in :mod:`fgvc_ext.ops`, but takes its arguments as already checked.
This package imports nothing of fgvc_ext outside itself.
"""

from .diversify import diversify, suppression_mask
from .global_k_max_pool import global_k_max_pool
from .gradient_boosting_cross_entropy import gradient_boosting_cross_entropy

__all__ = ["diversify", "global_k_max_pool", "gradient_boosting_cross_entropy", "suppression_mask"]
