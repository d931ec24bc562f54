"""What a trainer is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fgvc_ext.data.loading import Samples
from fgvc_ext.training.config import OptimConfig
from fgvc_ext.training.task import Task


@dataclass(kw_only=True)
class Training:
    """What a trainer is given: a stage (see `stages.Stage`) with the results of earlier ones filled in."""

    name: str
    build: Callable[[], Task]
    start: Callable[[Any], str]
    optim: OptimConfig
    train: Samples
    evaluations: Mapping[str, Samples]
    final: Mapping[str, Samples]
    seed: int
    metadata: Mapping[str, Any]
    early: Mapping[str, Samples] | None = None
    """What the epochs before the last are evaluated on, by the same names; None: the same samples."""
