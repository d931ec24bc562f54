"""What the presets of several drivers have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fgvc_ext.data.pipeline import DataConfig
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.training.config import EngineConfig, OptimConfig, RunConfig

Config = TypeVar("Config", bound=RunConfig)


def demo(kind: type[Config], name: str, **groups: Any) -> Config:
    """The preset "demo" of a driver: 30 synthetic species of 4 images, fine-tuned in seconds from `birds` weights.

    Hard enough that the plain network ends near 80 %, so that a method can be better as well as worse. Chosen on the
    species of other seeds than the one that is shown.

    Args:
        kind, name: the driver's configuration and file name.
        groups: its method, and what differs from the other drivers.
    """
    common = {
        "data": demo_data(),
        "model": ModelConfig(backbone="resnet10_narrow", weights="birds"),
        "optim": demo_optim(),
        "engine": EngineConfig(eval_every=5),
        "out": Path("runs") / f"{name}_demo",
    }
    return kind(**{**common, **groups})


def demo_optim(**changes: Any) -> OptimConfig:
    """How a demo trains."""
    settings = {"epochs": 10, "batch_size": 30, "lr": 0.02, "new_layers_lr": 0.1, "weight_decay": 5e-4}
    return OptimConfig(**{**settings, "schedule": "cosine", "warmup_epochs": 1, **changes})


def demo_data(**changes: Any) -> DataConfig:
    """What a demo trains on."""
    settings = {"name": "synthetic", "resize": 128, "crop": 112, "classes": 30, "train_per_class": 4}
    return DataConfig(**{**settings, **changes})


YOUR_IMAGES = "Your own images: ROOT/train/<class>/*.jpg and ROOT/test/<class>/*.jpg."


def presets(
    synthetic: tuple[str, Config], recipe: Callable[[Any], Config], **lines: str
) -> dict[str, tuple[str, Config]]:
    """The presets of a driver: its demo, the user's own images, and benchmarks, each with its line of the help.

    Args:
        synthetic: line and configuration of "demo".
        recipe: name of a data set → the paper's configuration for it.
    """
    found = {"demo": synthetic, "folder": (YOUR_IMAGES, recipe("folder"))}
    return {**found, **{name: (line, recipe(name)) for name, line in lines.items()}}
