"""The device that the engine trains on, and how many processes load images for it."""

from __future__ import annotations

import torch

from fgvc_ext.training.config import EngineConfig


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine.device: {name} was asked for, but torch {torch.__version__} sees no GPU")
    return device


def worker_count(engine: EngineConfig, device: torch.device) -> int:
    """Processes that load images: as many as were asked for, by default none on a CPU, which is busy training."""
    return engine.workers if engine.workers >= 0 else (8 if device.type == "cuda" else 0)
