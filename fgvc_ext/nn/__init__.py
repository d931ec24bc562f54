"""Modules around the operators: parameters, buffers and state."""

from .attention import OrthogonalLoss as OrthogonalLoss
from .attention import SpatialAttentionMap as SpatialAttentionMap
from .class_mean import ClassMeanLoss as ClassMeanLoss
from .composition import PartComposition as PartComposition
from .diversification import Diversification2d as Diversification2d
from .gradient_boosting import GradientBoostingCrossEntropyLoss as GradientBoostingCrossEntropyLoss
from .location import LocationHeatmap as LocationHeatmap
from .pooling import GlobalKMaxPool2d as GlobalKMaxPool2d
