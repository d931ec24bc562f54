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

from torch import Tensor, nn

from fgvc_ext.data.pipeline import DataConfig, Datasets, evaluation_samples, five_crop_samples, training_samples
from fgvc_ext.explain import ModelView, view_of
from fgvc_ext.models import SubtleDifferences
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.nn import GradientBoostingCrossEntropyLoss
from fgvc_ext.training import Classification, EngineConfig, OptimConfig, Results, RunConfig, Stage, at_least
from fgvc_ext.training.driver import Driver


@dataclass
class MethodConfig:
    """The paper's two parts, each of which can be switched off."""

    diversification: bool = True
    """The diversification block (equations 1–8)."""
    p_peak: float = 0.5
    """Probability that the peaks of a map are hidden."""
    p_patch: float = 0.5
    """Probability that a patch is hidden."""
    patch_size: int = at_least(1, 3)
    """G: side of a patch, in cells of the map."""
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


PRESETS = {
    "demo": (
        "Synthetic birds on a CPU, about two minutes: the plain network and ours.",
        Config(
            data=DataConfig(name="synthetic", resize=128, crop=112),
            model=ModelConfig(backbone="resnet10_narrow"),
            method=MethodConfig(compare_plain=True, patch_size=2),
            optim=OptimConfig(epochs=12, batch_size=30, lr=0.05, weight_decay=5e-4, schedule="cosine", warmup_epochs=1),
            engine=EngineConfig(channels_last=True, eval_every=2),
            out=Path("runs/demo"),
        ),
    ),
    "folder": (
        "Your own images: ROOT/train/<class>/*.jpg and ROOT/test/<class>/*.jpg.",
        Config(data=DataConfig(name="folder"), model=ModelConfig(weights="imagenet"), out=Path("runs/folder")),
    ),
    "cub": (
        "CUB-200-2011 with the paper's recipe: ResNet-50 from ImageNet weights, 448 px, 150 epochs.",
        Config(data=DataConfig(name="cub"), model=ModelConfig(weights="imagenet"), out=Path("runs/cub")),
    ),
}


def build_task(config: Config, method: MethodConfig, classes: list[str], earlier: Results) -> Classification:
    """The network and its losses."""
    block = {name: getattr(method, name) for name in ("diversification", "p_peak", "p_patch", "patch_size", "alpha")}
    model = SubtleDifferences(config.model.build(), len(classes), **block)
    model.classes, model.preprocessing = classes, config.model.preprocessing(config.data)
    plain = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    if not method.gce:
        return Classification(model, plain)
    if config.optim.label_smoothing:
        raise ValueError("--optim.label-smoothing: expected 0 with --method.gce True, whose targets are single classes")
    boosted = GradientBoostingCrossEntropyLoss(k=method.k)
    return Classification(model, boosted, first_loss=plain, from_epoch=method.gce_from_epoch)


def stages(config: Config, datasets: Datasets) -> list[Stage]:
    """ "ours", after "plain" where both are to be compared; the same seed gives both the same images in every step."""
    methods = {"ours": dataclasses.replace(config.method, compare_plain=False)}
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
