"""Backbones and one model a paper."""

from fgvc_ext.models.backbone import Backbone, LoadReport, available_backbones, build_backbone, load_weights
from fgvc_ext.models.subtle_differences import SubtleDifferences

__all__ = [
    "Backbone",
    "LoadReport",
    "SubtleDifferences",
    "available_backbones",
    "build_backbone",
    "load_weights",
]
