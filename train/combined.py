"""Train two heads of different papers on one feature map, and several such models that look at different places.

python train/combined.py demo
python train/combined.py cub --data.root CUB_200_2011
python train/combined.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/combined.py demo --method.map-head False --method.members.models 1      # one paper's part alone

From an installed package: fgvc-ext train combined demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fgvc_ext.data.pipeline import DataConfig, Datasets
from fgvc_ext.models import Combined
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.ensemble import Average
from fgvc_ext.training import Artefact, OptimConfig, Results, RunConfig, Stage
from fgvc_ext.training.combined import CombinedTraining
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.embedding import EmbeddingConfig
from fgvc_ext.training.members import MembersConfig, view_of_ensembles
from fgvc_ext.training.presets import demo, presets
from fgvc_ext.training.subtle_differences import BlockAndLossConfig


@dataclass
class MethodConfig:
    """Three papers' parts. Every one can be switched off: what is left is that of the others."""

    embedding_head: bool = True
    """k-max pooling, embedding layer and class means (ELoPE)."""
    map_head: bool = True
    """1×1 convolution, diversification block and gradient-boosting loss (Accounting for Subtle Differences)."""
    average: Average = "probabilities"
    """What a model averages over its heads; all averages are reported."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    maps: BlockAndLossConfig = field(default_factory=BlockAndLossConfig)
    members: MembersConfig = field(default_factory=partial(MembersConfig, models=2))


@dataclass
class Config(RunConfig):
    """Embedding head and map head on one feature map, and models that look at different places."""

    method: MethodConfig = field(default_factory=MethodConfig)


def recipe(name: Any) -> Config:
    """No paper has one: every part as its own paper sets it, trained as knowledge transfer trains, the only one of them
    that trains several models."""
    optim = OptimConfig(epochs=100, lr=0.001, new_layers_lr=0.01, weight_decay=5e-4, schedule="cosine")
    data, model = DataConfig(name=name), ModelConfig(weights="imagenet")
    return Config(data=data, model=model, optim=optim, out=Path("runs") / f"combined_{name}")


PRESETS = presets(
    (
        "Synthetic birds on a CPU, under a minute: two models with both heads.",
        demo(Config, "combined", method=MethodConfig(embedding=EmbeddingConfig(embedding_dim=128))),
    ),
    recipe,
    cub="CUB-200-2011: two ResNet-50 with both heads from ImageNet weights, 448 px, 100 epochs.",
    cars="Stanford Cars with the same recipe.",
    aircraft="FGVC-Aircraft with the same recipe.",
)


def build_task(
    config: Config,
    embedding: EmbeddingConfig | None,
    maps: BlockAndLossConfig | None,
    classes: list[str],
    earlier: Results,
) -> CombinedTraining:
    """A model with these heads, and what it learns from earlier ones."""
    smoothing = config.optim.label_smoothing
    model = Combined(
        config.model.build(),
        len(classes),
        embedding=None if embedding is None else embedding.head(),
        maps=None if maps is None else maps.block(),
        average=config.method.average,
    )
    return CombinedTraining(
        model,
        embedding=None if embedding is None else embedding.losses(len(classes), smoothing),
        maps=None if maps is None else maps.losses(smoothing, "method.maps"),
        **config.method.members.learning(model, earlier),
    )


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    """The models one after another, then the ensembles."""
    method = config.method
    if not method.embedding_head and not method.map_head:
        raise ValueError("--method: expected embedding-head or map-head or both to be True, got False and False")
    embedding = method.embedding if method.embedding_head else None
    maps = method.maps.for_maps(config.model, config.data.crop) if method.map_head else None
    build = partial(build_task, config, embedding, maps, datasets.train.classes)
    settings = {"average": method.average, "embedding": embedding, "maps": maps}
    return method.members.stages(config, datasets, build, settings, "method.members")


def figures(config: Config, datasets: Datasets, results: Results) -> None:
    """How good every beginning of an ensemble is, where its members look, and how differently."""
    config.method.members.figures(config, datasets, results)


DRIVER = Driver("Combination", PRESETS, stages, view_of_ensembles, figures)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
