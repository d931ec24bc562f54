"""Train the diversification block and the gradient-boosting cross-entropy (AAAI 2020) on fine-grained images.

python train/subtle_differences.py demo
python train/subtle_differences.py cub --data.root CUB_200_2011
python train/subtle_differences.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/subtle_differences.py --config runs/demo/config.json --out runs/again

From an installed package: fgvc-ext train subtle_differences demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fgvc_ext.data.pipeline import DataConfig, Datasets, five_crop_samples
from fgvc_ext.explain import ModelView, view_of
from fgvc_ext.models import SubtleDifferences
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.training import Classification, Results, RunConfig, Stage
from fgvc_ext.training.classifier_stage import classifier_stage
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.presets import demo, presets
from fgvc_ext.training.subtle_differences import BlockAndLossConfig


@dataclass
class MethodConfig(BlockAndLossConfig):
    """The paper's two parts, each of which can be switched off."""

    compare_plain: bool = False
    """Train the plain network (no block, cross-entropy) first, and show both side by side."""


@dataclass
class Config(RunConfig):
    """Diversification block and gradient-boosting cross-entropy."""

    method: MethodConfig = field(default_factory=MethodConfig)
    five_crop: bool = True
    """Evaluate the final model with five crops as well."""


def recipe(name: Any) -> Config:
    """The recipe of section 4.2 for every benchmark, which the defaults are: see `DataConfig` and `OptimConfig`."""
    data, five_crop = DataConfig(name=name), name != "gtos"
    return Config(data=data, model=ModelConfig(weights="imagenet"), five_crop=five_crop, out=Path("runs") / name)


PRESETS = presets(
    (
        "Synthetic birds on a CPU, under a minute: the plain network and ours.",
        demo(Config, "subtle_differences", method=MethodConfig(compare_plain=True)),
    ),
    recipe,
    cub="CUB-200-2011 with the paper's recipe: ResNet-50 from ImageNet weights, 448 px, 150 epochs. The batch of 32 is "
    "that of all processes together: the recipe holds for any number of GPUs.",
    cars="Stanford Cars with the same recipe.",
    aircraft="FGVC-Aircraft (variants, without the banner) with the same recipe.",
    dogs="Stanford Dogs with the same recipe; its images come from ImageNet.",
    gtos="GTOS-mobile with the same recipe, evaluated on single crops.",
)


def build_task(config: Config, method: MethodConfig, classes: list[str], earlier: Results) -> Classification:
    """The network and its losses."""
    model = SubtleDifferences(config.model.build(), len(classes), **method.block())
    return Classification(model, **method.losses(config.optim.label_smoothing))


def stages(config: Config, datasets: Datasets) -> list[Stage]:
    """ "ours", after "plain" where both are to be compared; the same seed gives both the same images in every step."""
    methods = {"ours": replace(config.method, compare_plain=False).for_maps(config.model, config.data.crop)}
    if config.method.compare_plain:
        methods = {"plain": MethodConfig(diversification=False, gce=False), **methods}
    prepare = config.model.preprocessing(config.data)
    final = {"five_crop": five_crop_samples(datasets, prepare)} if config.five_crop else {}
    return [
        classifier_stage(
            name,
            config,
            datasets,
            partial(build_task, config, method, datasets.train.classes),
            method,
            final=lambda earlier: final,
            depends={"five_crop": config.five_crop},
        )
        for name, method in methods.items()
    ]


def view(model: SubtleDifferences) -> ModelView | None:
    """A trained network as the report sees it, with what its block would hide."""
    device, seen = next(model.parameters()).device, view_of(model)
    if seen is None or model.diversification is None:
        return seen

    def masks(images: Tensor, seed: Tensor) -> Tensor:
        return model.suppression_mask(images.to(device), seed.to(device))

    return replace(seen, masks=masks)


DRIVER = Driver("Subtle differences", PRESETS, stages, view)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
