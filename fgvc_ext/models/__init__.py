"""Backbones, one model a paper, and one of several papers' parts."""

from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import available_backbones, backbone_preprocessing, build_backbone
from fgvc_ext.models.combined import Combined
from fgvc_ext.models.dual_attention import DualAttention
from fgvc_ext.models.elope import ELoPE
from fgvc_ext.models.ensemble import Ensemble
from fgvc_ext.models.knowledge_transfer import KnowledgeTransfer
from fgvc_ext.models.localiser import LocalisationModule, MeanFeatureMap, crop_and_resize
from fgvc_ext.models.model import Explanation, Model, Prediction, load, save
from fgvc_ext.models.pretrained import LoadReport, load_weights
from fgvc_ext.models.subtle_differences import SubtleDifferences
from fgvc_ext.models.weights_file import WeightsFileError

__all__ = [
    "Backbone",
    "Combined",
    "DualAttention",
    "ELoPE",
    "Ensemble",
    "Explanation",
    "KnowledgeTransfer",
    "LoadReport",
    "LocalisationModule",
    "MeanFeatureMap",
    "Model",
    "Prediction",
    "SubtleDifferences",
    "WeightsFileError",
    "available_backbones",
    "backbone_preprocessing",
    "build_backbone",
    "crop_and_resize",
    "load",
    "load_weights",
    "save",
]
