"""Modules around the operators: parameters, buffers and state."""

from .attention import OrthogonalLoss as OrthogonalLoss
from .attention import SpatialAttentionMap as SpatialAttentionMap
from .class_mean import ClassMeanLoss as ClassMeanLoss
from .composition import PartComposition as PartComposition
from .diversification import Diversification2d as Diversification2d
from .gradient_boosting import GradientBoostingCrossEntropyLoss as GradientBoostingCrossEntropyLoss
from .group_bilinear import GroupBilinear2d as GroupBilinear2d
from .location import LocationHeatmap as LocationHeatmap
from .part_boxes import PartBoxLosses as PartBoxLosses
from .pooling import GlobalKMaxPool2d as GlobalKMaxPool2d
from .semantic_grouping import SemanticGroupingLoss as SemanticGroupingLoss
