"""Batched operators for fine-grained visual classification. One file an operator; its docstring is the contract."""

from .diversify import diversify, suppression_mask
from .global_k_max_pool import global_k_max_pool
from .gradient_boosting_cross_entropy import gradient_boosting_cross_entropy

__all__ = ["diversify", "global_k_max_pool", "gradient_boosting_cross_entropy", "suppression_mask"]
