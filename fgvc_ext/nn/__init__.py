"""Modules around the operators: parameters, buffers and state."""

from .attention import OrthogonalLoss, SpatialAttentionMap
from .class_mean import ClassMeanLoss
from .diversification import Diversification2d
from .gradient_boosting import GradientBoostingCrossEntropyLoss
from .pooling import GlobalKMaxPool2d

__all__ = [
    "ClassMeanLoss",
    "Diversification2d",
    "GlobalKMaxPool2d",
    "GradientBoostingCrossEntropyLoss",
    "OrthogonalLoss",
    "SpatialAttentionMap",
]
