"""Train ELoPE (WACV 2020): localisation module, k-max pooling and embedding layer, four stages to one network.

python train/elope.py demo
python train/elope.py cub --data.root CUB_200_2011
python train/elope.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/elope.py demo --method.localisation off --method.weights False --method.embedding-loss within

From an installed package: fgvc-ext train elope demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgvc_ext.data.boxed import boxes_of
from fgvc_ext.data.pipeline import DataConfig, Datasets
from fgvc_ext.models import load
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.training import Artefact, OptimConfig, Results, RunConfig, Stage
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.elope import ELoPEConfig, ELoPEStages
from fgvc_ext.training.presets import demo, demo_data, presets

if TYPE_CHECKING:  # it needs matplotlib, and only a report does
    from fgvc_ext.explain.document import Section


LOCALISER = partial(OptimConfig, epochs=45, batch_size=16, lr=0.003, weight_decay=0.001, step_epochs=15, new_layers=())
POOLING = partial(OptimConfig, epochs=30, batch_size=14, lr=0.001, weight_decay=0.001, step_epochs=20)


@dataclass
class Config(RunConfig):
    """ELoPE: efficient localisation, pooling, embedding. `optim` trains the classifier, on images and on crops."""

    method: ELoPEConfig = field(default_factory=ELoPEConfig)
    localiser: OptimConfig = field(default_factory=LOCALISER)
    """Stage 2, the localisation module."""
    fine_tuning: OptimConfig = field(default_factory=POOLING)
    """Stage 4: its rate is that of the pooling weights; all else goes on at the classifier's last rate."""
    k_runs: tuple[Path, ...] = ()
    """Folders of other, finished runs, whose accuracies over K the report draws."""


def recipe(name: Any) -> Config:
    """The recipe of section 6, and of the public code where the paper is silent."""
    augmentation: dict[str, Any] = {"jitter": 0.4, "rotation": 20.0, "lighting": 0.1}
    return Config(
        data=DataConfig(name=name, resize=896, crop=448, keep_ratio=False, **augmentation),
        model=ModelConfig(weights="imagenet"),
        method=ELoPEConfig(threshold=0.2 if name in ("cars", "aircraft") else 0.3),
        optim=OptimConfig(epochs=90, batch_size=14, lr=0.003, weight_decay=0.001, step_epochs=30),
        out=Path("runs") / f"elope-{name}",
    )


PRESETS = presets(
    (
        "Synthetic birds on a CPU, in less than a minute: all four stages.",
        demo(
            Config,
            "elope",
            data=demo_data(image_size=224, resize=224, keep_ratio=False),
            method=ELoPEConfig(embedding_dim=128, localiser_rotation=0.0),
            localiser=OptimConfig(epochs=6, batch_size=30, lr=0.01, schedule="cosine", new_layers=()),
            fine_tuning=OptimConfig(epochs=2, batch_size=30, lr=0.01, schedule="constant", weight_decay=5e-4),
        ),
    ),
    recipe,
    cub="CUB-200-2011 with the paper's recipe: ResNet-50, 448 px, 90 epochs.",
    cars="Stanford Cars with the paper's recipe, τ = 0.2.",
    aircraft="FGVC-Aircraft with the paper's recipe, τ = 0.2.",
)


def pipeline(config: Config, datasets: Datasets) -> ELoPEStages:
    return ELoPEStages(config, datasets, config.method, config.fine_tuning)


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    """The four stages, as far as the method has them."""
    return pipeline(config, datasets).stages(config.localiser)


def figures(config: Config, datasets: Datasets, results: Results) -> list[Section]:
    """The paper's Figures 2, 4, 6 and 7, its Tables 3 and 4."""
    from fgvc_ext.explain import elope
    from fgvc_ext.explain.document import read_json

    run, test = pipeline(config, datasets), datasets.test
    if run.finder is not None:
        finder: Any = run.localiser(results)
        boxes = boxes_of(results["boxes"].path, test, "test")
        elope.save_localisation(config.out, test, run.mean_map(results), finder, boxes)
    if config.k_runs:
        elope.save_accuracy_over_k(config.out, config.k_runs)
    shipped = [result.path for result in results.values() if result.path.parent.name == "weights"][-1]
    network: Any = load(shipped)
    sections = [elope.cost_section(network, config.data.crop)]
    if "localisation" in results:
        sections.append(elope.localisation_section(read_json(results["localisation"].path)))
    return sections


DRIVER = Driver("ELoPE", PRESETS, stages, figures=figures)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
