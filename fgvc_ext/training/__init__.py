"""What the drivers share: an engine for staged training with exact resume, and the report of a run."""

from fgvc_ext.training.config import ConfigMismatch, EngineConfig, OptimConfig, load_config, save_config
from fgvc_ext.training.interruption import EXIT_PREEMPTED, NonFiniteLoss, Preempted
from fgvc_ext.training.loop import run_stages
from fgvc_ext.training.run_folder import RunFolder, RunLocked
from fgvc_ext.training.sampling import Samples
from fgvc_ext.training.state import CheckpointCorrupt
from fgvc_ext.training.task import Stage, Task

__all__ = [
    "EXIT_PREEMPTED",
    "CheckpointCorrupt",
    "ConfigMismatch",
    "EngineConfig",
    "NonFiniteLoss",
    "OptimConfig",
    "Preempted",
    "RunFolder",
    "RunLocked",
    "Samples",
    "Stage",
    "Task",
    "load_config",
    "run_stages",
    "save_config",
]
