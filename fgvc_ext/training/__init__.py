"""What the drivers share: an engine for stages that build on each other, with exact resume."""

from fgvc_ext.training.attention_transfer import AttentionTransfer
from fgvc_ext.training.checkpoints import CheckpointCorrupt
from fgvc_ext.training.classification import Classification
from fgvc_ext.training.config import (
    ConfigMismatch,
    EngineConfig,
    OptimConfig,
    RunConfig,
    at_least,
    load_config,
    save_config,
)
from fgvc_ext.training.dual_attention import DualAttentionClassification
from fgvc_ext.training.ensembles import EnsembleAccuracy, ensemble_measures
from fgvc_ext.training.evaluation import evaluate_samples, map_samples
from fgvc_ext.training.run_folder import RunFolder, RunLocked
from fgvc_ext.training.stages import Artefact, Result, Results, Stage, run_stages
from fgvc_ext.training.stop_request import EXIT_PREEMPTED, Preempted
from fgvc_ext.training.task import Task
from fgvc_ext.training.teachers import Frozen
from fgvc_ext.training.trainer import NonFiniteLoss

__all__ = [
    "EXIT_PREEMPTED",
    "Artefact",
    "AttentionTransfer",
    "CheckpointCorrupt",
    "Classification",
    "ConfigMismatch",
    "DualAttentionClassification",
    "EngineConfig",
    "EnsembleAccuracy",
    "Frozen",
    "NonFiniteLoss",
    "OptimConfig",
    "Preempted",
    "Result",
    "Results",
    "RunConfig",
    "RunFolder",
    "RunLocked",
    "Stage",
    "Task",
    "at_least",
    "ensemble_measures",
    "evaluate_samples",
    "load_config",
    "map_samples",
    "run_stages",
    "save_config",
]
