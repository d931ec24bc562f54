"""Train the diversification block and the gradient-boosting cross-entropy (AAAI 2020) on fine-grained images.

python train/subtle_differences.py demo
python train/subtle_differences.py cub --data.root CUB_200_2011
python train/subtle_differences.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/subtle_differences.py --config runs/demo/config.json --out runs/again

From an installed package: fgvc-ext train subtle_differences demo
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgvc_ext.data.pipeline import DataConfig, Datasets, evaluation_samples, five_crop_samples, training_samples
from fgvc_ext.explain import ModelView, view_of
from fgvc_ext.models import SubtleDifferences
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.subtle_differences import suppression_for
from fgvc_ext.nn import GradientBoostingCrossEntropyLoss
from fgvc_ext.training import Classification, Results, RunConfig, Stage, at_least
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.presets import demo


@dataclass
class MethodConfig:
    """The paper's two parts, each of which can be switched off."""

    diversification: bool = True
    """The diversification block (equations 1–8)."""
    p_peak: float | None = None
    """Probability that the peaks of a map are hidden; left out: 0.5 from 14 × 14 cells on, 0.2 below."""
    p_patch: float | None = None
    """Probability that a patch is hidden; left out: as p_peak."""
    patch_size: int | None = at_least(1, None)
    """G: side of a patch, in cells of the map; left out: a quarter of the map's side, at least 1, at most 3."""
    alpha: float = 0.1
    """Factor of what is hidden."""
    gce: bool = True
    """The gradient-boosting cross-entropy (equations 9–16); False: plain cross-entropy."""
    k: int = at_least(1, 15)
    """Number of confusing classes in the loss."""
    gce_from_epoch: int = at_least(0, 0)
    """Epochs of plain cross-entropy before (ImageNet recipe: half of them)."""
    compare_plain: bool = False
    """Train the plain network (no block, cross-entropy) first, and show both side by side."""


@dataclass
class Config(RunConfig):
    """Diversification block and gradient-boosting cross-entropy."""

    method: MethodConfig = field(default_factory=MethodConfig)
    five_crop: bool = True
    """Evaluate the final model with five crops as well."""


def _paper(name: Any, **options: Any) -> Config:
    """The recipe of section 4.2 for every benchmark, which the defaults are: see `DataConfig` and `OptimConfig`."""
    return Config(
        data=DataConfig(name=name), model=ModelConfig(weights="imagenet"), out=Path(f"runs/{name}"), **options
    )


PRESETS = {
    "demo": (
        "Synthetic birds on a CPU, under a minute: the plain network and ours.",
        demo(Config, "subtle_differences", method=MethodConfig(compare_plain=True)),
    ),
    "folder": (
        "Your own images: ROOT/train/<class>/*.jpg and ROOT/test/<class>/*.jpg.",
        _paper("folder"),
    ),
    "cub": (
        "CUB-200-2011 with the paper's recipe: ResNet-50 from ImageNet weights, 448 px, 150 epochs. The batch of 32 is "
        "that of all processes together: the recipe holds for any number of GPUs.",
        _paper("cub"),
    ),
    "cars": ("Stanford Cars with the same recipe.", _paper("cars")),
    "aircraft": ("FGVC-Aircraft (variants, without the banner) with the same recipe.", _paper("aircraft")),
    "dogs": ("Stanford Dogs with the same recipe; its images come from ImageNet.", _paper("dogs")),
    "gtos": ("GTOS-mobile with the same recipe, evaluated on single crops.", _paper("gtos", five_crop=False)),
}


def build_task(config: Config, method: MethodConfig, classes: list[str], earlier: Results) -> Classification:
    """The network and its losses."""
    block = {"diversification": False}
    if method.diversification:
        block = {name: getattr(method, name) for name in ("p_peak", "p_patch", "patch_size", "alpha")}
    model = SubtleDifferences(config.model.build(), len(classes), **block)
    model.classes, model.preprocessing = classes, config.model.preprocessing(config.data)
    plain = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    if not method.gce:
        return Classification(model, plain)
    if config.optim.label_smoothing:
        raise ValueError("--optim.label-smoothing: expected 0 with --method.gce True, whose targets are single classes")
    boosted = GradientBoostingCrossEntropyLoss(k=method.k)
    return Classification(model, boosted, first_loss=plain, from_epoch=method.gce_from_epoch)


def with_rule(config: Config) -> MethodConfig:
    """The method with the numbers in place that are left out: what the block hides, by the size of the map."""
    method = dataclasses.replace(config.method, compare_plain=False)
    if method.diversification and None in (method.p_peak, method.p_patch, method.patch_size):
        for name, value in suppression_for(config.model.map_side(config.data.crop)).items():
            if getattr(method, name) is None:
                setattr(method, name, value)
    return method


def stages(config: Config, datasets: Datasets) -> list[Stage]:
    """ "ours", after "plain" where both are to be compared; the same seed gives both the same images in every step."""
    methods = {"ours": with_rule(config)}
    if config.method.compare_plain:
        methods = {"plain": MethodConfig(diversification=False, gce=False), **methods}
    prepare = config.model.preprocessing(config.data)

    def start(task: Classification) -> str:
        return config.model.start(task.model, config.out, config.optim.new_layers)

    train = training_samples(datasets, config.data, prepare, config.engine.broken_images)
    final = {"five_crop": five_crop_samples(datasets, prepare)} if config.five_crop else {}
    return [
        Stage(
            name=name,
            build=partial(build_task, config, method, datasets.train.classes),
            start=start,
            optim=config.optim,
            train=lambda earlier: train,
            evaluations=lambda earlier: evaluation_samples(datasets, prepare),
            final=lambda earlier: final,
            seed=config.seed,
            config={"data": config.data, "model": config.model, "method": method, "five_crop": config.five_crop},
            inputs=config.model.inputs(config.out),
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

    return dataclasses.replace(seen, masks=masks)


DRIVER = Driver("Subtle differences", PRESETS, stages, view)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
