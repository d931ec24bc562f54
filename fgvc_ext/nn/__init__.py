"""Modules around the operators: parameters, buffers and state."""

from .diversification import Diversification2d
from .gradient_boosting import GradientBoostingCrossEntropyLoss
from .pooling import GlobalKMaxPool2d

__all__ = ["Diversification2d", "GlobalKMaxPool2d", "GradientBoostingCrossEntropyLoss"]
