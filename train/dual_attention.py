"""Train dual attention fusion: a student that proposes parts, a teacher that is shown them, and the fusion of both.

python train/dual_attention.py demo
python train/dual_attention.py cub --data.root CUB_200_2011
python train/dual_attention.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/dual_attention.py demo --method.use-distill False   # a row of the paper's Table 3

From an installed package: fgvc-ext train dual_attention demo
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fgvc_ext.data.pipeline import DataConfig, Datasets
from fgvc_ext.models import DualAttention, load
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.dual_attention import NEW_LAYERS
from fgvc_ext.training import OptimConfig, Results, RunConfig, Stage
from fgvc_ext.training.classifier_stage import classifier_stage
from fgvc_ext.training.device import choose_device
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.dual_attention import DualAttentionClassification, DualAttentionConfig
from fgvc_ext.training.presets import demo, presets


@dataclass
class MethodConfig(DualAttentionConfig):
    """The paper's parts, its Table 3 as the first four switches, each of which needs the ones before."""

    compare_plain: bool = False
    """Train the plain network (the first row of Table 3) first, and show both side by side."""


@dataclass
class Config(RunConfig):
    """Dual attention fusion: location heat map, part proposals, teacher with deep bilinear blocks, score fusion."""

    method: MethodConfig = field(default_factory=MethodConfig)


PLAIN: Mapping[str, Any] = {
    "use_sppn": False,
    "use_lhm": False,
    "use_teacher": False,
    "use_distill": False,
    "student_weight": 1.0,
}
"""The first row of Table 3: a backbone with a classifier."""


SHORT_TRAINING: Mapping[str, Any] = {
    "part_statistics": "own",
    "dropout": 0.0,
    "paf_floor": 0.1,
    "anchor_sizes": (112.0, 160.0, 224.0),
    "student_weight": 0.35,
    "teacher_weight": 0.7,
    "fusion_weight": 0.3,
    "sppn_lr": 0.1,
}
"""What forty steps need: part images leave the running statistics alone, regions are as large as parts from the first
step, those that are still random hide less, and the losses are no steeper together than the plain network's one."""


def recipe(name: Any) -> Config:
    """That of section 4, and of NTS-Net's public code where the paper is silent."""
    optim = OptimConfig(epochs=200, batch_size=16, lr=0.01, weight_decay=1e-4, step_epochs=50, step_factor=0.5)
    model, out = ModelConfig(weights="imagenet"), Path("runs") / f"dual_attention_{name}"
    return Config(data=DataConfig(name=name), model=model, optim=optim, out=out)


PRESETS = presets(
    (
        "Synthetic birds on a CPU, under a minute: the plain network, then student, teacher and fusion.",
        demo(
            Config,
            "dual_attention",
            method=MethodConfig(**SHORT_TRAINING, part_size=56, compare_plain=True),
        ),
    ),
    recipe,
    cub="CUB-200-2011 with the paper's recipe: two ResNet-50 from ImageNet weights, 448 px, 200 epochs.",
    cars="Stanford Cars with the same recipe.",
    aircraft="FGVC-Aircraft with the same recipe.",
)


def build_task(config: Config, method: MethodConfig, classes: list[str], earlier: Results) -> Any:
    """The networks and their losses."""
    model = DualAttention(config.model.build(), len(classes), **method.network())
    loss = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    return DualAttentionClassification(model, loss, method)


def stages(config: Config, datasets: Datasets) -> list[Stage]:
    """ "ours", after "plain" where both are to be compared; the same seed gives both the same images in every step."""
    methods = {"ours": replace(config.method, compare_plain=False)}
    config.method.check(config.data.crop, config.optim.epochs)
    if config.method.compare_plain:
        methods = {"plain": replace(methods["ours"], **PLAIN), **methods}
    return [
        classifier_stage(
            name,
            config,
            datasets,
            partial(build_task, config, method, datasets.train.classes),
            method,
            new_layers=NEW_LAYERS,
        )
        for name, method in methods.items()
    ]


def figures(config: Config, datasets: Datasets, results: Results) -> None:
    """From image to parts, what the networks look at, what proposals cover, and whether regions still learn."""
    from fgvc_ext.explain.dual_attention import explain_parts, save_training_figures

    model: Any = load(results["ours"].path, choose_device(config.engine.device))
    if model.proposals is not None:
        explain_parts(config.out, datasets.test, model, seed=config.seed)
        save_training_figures(config.out, "ours")


DRIVER = Driver("Dual attention fusion", PRESETS, stages, figures=figures)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
