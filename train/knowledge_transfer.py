"""Train models one after another, each to look where the earlier ones do not, and let them answer together.

python train/knowledge_transfer.py demo
python train/knowledge_transfer.py cub --data.root CUB_200_2011 --model.backbone vgg16_bn
python train/knowledge_transfer.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/knowledge_transfer.py cub --out runs/cub --method.models 6 --force-stage ensemble   # one model more

From an installed package: fgvc-ext train knowledge_transfer demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fgvc_ext.data.pipeline import DataConfig, Datasets
from fgvc_ext.models import KnowledgeTransfer
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.knowledge_transfer import Head
from fgvc_ext.training import Artefact, OptimConfig, Results, RunConfig, Stage
from fgvc_ext.training.attention_transfer import AttentionTransfer
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.members import MembersConfig, view_of_ensembles
from fgvc_ext.training.presets import demo, presets


@dataclass
class MethodConfig(MembersConfig):
    """How models learn from earlier ones, and how they answer together."""

    head: Head = "linear"
    """linear: mean pooling and one linear layer. official: that of the public code."""


@dataclass
class Config(RunConfig):
    """Knowledge transfer: attention maps and the orthogonal loss."""

    method: MethodConfig = field(default_factory=MethodConfig)


def recipe(name: Any) -> Config:
    """The paper's, with its defaults of size (600, then 448 px) and batch (32)."""
    optim = OptimConfig(epochs=100, lr=0.001, new_layers_lr=0.01, weight_decay=5e-4, schedule="cosine")
    data, model = DataConfig(name=name), ModelConfig(weights="imagenet")
    return Config(data=data, model=model, optim=optim, out=Path("runs") / f"kt_{name}")


PRESETS = presets(
    (
        "Synthetic birds on a CPU, under a minute: two models with the method, two without.",
        demo(Config, "knowledge_transfer", method=MethodConfig(models=2, baseline=True)),
    ),
    recipe,
    cub="CUB-200-2011 with the paper's recipe: five ResNet-50 from ImageNet weights, 448 px, 100 epochs.",
    cars="Stanford Cars with the same recipe.",
    aircraft="FGVC-Aircraft with the same recipe.",
)


def build_task(config: Config, classes: list[str], earlier: Results) -> AttentionTransfer:
    """A model that learns from earlier ones."""
    model = KnowledgeTransfer(config.model.build(), len(classes), head=config.method.head)
    loss = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    return AttentionTransfer(model, loss, **config.method.learning(model, earlier))


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    """The models one after another, then the ensembles."""
    build = partial(build_task, config, datasets.train.classes)
    return config.method.stages(config, datasets, build, {"head": config.method.head})


def figures(config: Config, datasets: Datasets, results: Results) -> None:
    """Table 3, Figure 5, and how differently the models look."""
    config.method.figures(config, datasets, results)


DRIVER = Driver("Knowledge transfer", PRESETS, stages, view_of_ensembles, figures)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
