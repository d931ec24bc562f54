"""The papers' equations in plain PyTorch: oracle of the tests, fallback without compiled libraries, documentation.

Each function has the signature of its namesake in :mod:`fgvc_ext.ops`, but takes its arguments as already checked.
This package imports nothing of fgvc_ext outside itself.
"""

from .class_mean_loss import ClassMeanLosses as ClassMeanLosses
from .class_mean_loss import class_mean_loss as class_mean_loss
from .compose_parts import compose_parts as compose_parts
from .diversify import diversify as diversify
from .diversify import suppression_mask as suppression_mask
from .global_k_max_pool import global_k_max_pool as global_k_max_pool
from .gradient_boosting_cross_entropy import gradient_boosting_cross_entropy as gradient_boosting_cross_entropy
from .group_bilinear import group_bilinear as group_bilinear
from .heatmap_to_boxes import heatmap_to_boxes as heatmap_to_boxes
from .location_heatmap import location_heatmap as location_heatmap
from .orthogonal_loss import orthogonal_loss as orthogonal_loss
from .part_box_losses import BoxLosses as BoxLosses
from .part_box_losses import part_box_losses as part_box_losses
from .select_boxes import select_boxes as select_boxes
from .semantic_grouping_loss import semantic_grouping_loss as semantic_grouping_loss
from .spatial_attention_map import spatial_attention_map as spatial_attention_map
