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

from torch import nn

from fgvc_ext.data.pipeline import DataConfig, Datasets, evaluation_samples, training_samples
from fgvc_ext.explain import ModelView, view_of
from fgvc_ext.explain.ensembles import explain_ensembles
from fgvc_ext.models import Ensemble, KnowledgeTransfer, Model, load
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.models.ensemble import Average
from fgvc_ext.models.knowledge_transfer import Head
from fgvc_ext.training import Artefact, OptimConfig, Results, RunConfig, Stage, at_least
from fgvc_ext.training.attention_transfer import AttentionTransfer, Balance
from fgvc_ext.training.device import choose_device
from fgvc_ext.training.driver import Driver
from fgvc_ext.training.ensembles import Epoch, ensemble_artefact, weights_of
from fgvc_ext.training.presets import demo
from fgvc_ext.training.sampling import derive_seed


@dataclass
class MethodConfig:
    """How models learn from earlier ones, and how they answer together."""

    models: int = at_least(1, 5)
    """N: models that are trained one after another."""
    alpha: float = at_least(0, 0.5)
    """Weight of the orthogonal loss; 0: no model has teachers."""
    balance: Balance = "absolute"
    """absolute: equation 6. relative: rescaled in every step to alpha times the cross-entropy (public code)."""
    teacher: Epoch = "last"
    """The epoch of a model that teaches and stands in the ensemble; best_val needs validation images."""
    no_teachers: tuple[str, ...] = ()
    """Models that teach no other, such as model2."""
    head: Head = "linear"
    """linear: mean pooling and one linear layer. official: that of the public code."""
    average: Average = "probabilities"
    """What the ensemble averages; both are reported."""
    baseline: bool = False
    """Train the baseline ensemble beside: as many models, of the same seeds, without teachers."""


@dataclass
class Config(RunConfig):
    """Knowledge transfer: attention maps and the orthogonal loss."""

    method: MethodConfig = field(default_factory=MethodConfig)


def recipe(data: DataConfig) -> Config:
    """The paper's, with its defaults of size (600, then 448 px) and batch (32)."""
    optim = OptimConfig(epochs=100, lr=0.001, new_layers_lr=0.01, weight_decay=5e-4, schedule="cosine")
    return Config(data=data, model=ModelConfig(weights="imagenet"), optim=optim, out=Path("runs") / f"kt_{data.name}")


PRESETS = {
    "demo": (
        "Synthetic birds on a CPU, under a minute: two models with the method, two without.",
        demo(Config, "knowledge_transfer", method=MethodConfig(models=2, baseline=True)),
    ),
    "folder": (
        "Your own images: ROOT/train/<class>/*.jpg and ROOT/test/<class>/*.jpg.",
        recipe(DataConfig(name="folder")),
    ),
    "cub": (
        "CUB-200-2011 with the paper's recipe: five ResNet-50 from ImageNet weights, 448 px, 100 epochs.",
        recipe(DataConfig(name="cub")),
    ),
    "cars": ("Stanford Cars with the same recipe.", recipe(DataConfig(name="cars"))),
    "aircraft": ("FGVC-Aircraft with the same recipe.", recipe(DataConfig(name="aircraft"))),
}


def build_task(config: Config, classes: list[str], earlier: Results) -> AttentionTransfer:
    """A model that learns from earlier ones."""
    method = config.method
    model = KnowledgeTransfer(config.model.build(), len(classes), head=method.head)
    model.classes, model.preprocessing = classes, config.model.preprocessing(config.data)
    if method.alpha > 0:
        model.backbone.require_trainable_map("knowledge transfer")
    teachers = [load(weights_of(result, method.teacher)) for result in earlier.values()]
    loss = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    return AttentionTransfer(model, loss, teachers, alpha=method.alpha, balance=method.balance)


def ensembles(method: MethodConfig) -> dict[str, list[str]]:
    """Ensembles and their models in order; the baseline's first model is the same, which has no teacher either."""
    numbers = range(2, method.models + 1)
    found = {"plain_ensemble": ["model1", *(f"plain{n}" for n in numbers)]} if method.baseline else {}
    return {**found, "ensemble": ["model1", *(f"model{n}" for n in numbers)]}  # the last is what the run ships


def stages(config: Config, datasets: Datasets) -> list[Stage | Artefact]:
    """The models one after another, then the ensembles. Models n with and without the method have the same seed."""
    method, prepare = config.method, config.model.preprocessing(config.data)
    names = ensembles(method)["ensemble"]
    if unknown := [name for name in method.no_teachers if name not in names]:
        raise ValueError(f"--method.no-teachers: expected some of {', '.join(names)}, got {unknown[0]!r}")
    if method.teacher == "best_val" and datasets.val is None:
        raise ValueError("--method.teacher best_val: expected validation images (--data.val-fraction), got none")
    train = training_samples(datasets, config.data, prepare, config.engine.broken_images)
    evaluations = evaluation_samples(datasets, prepare)

    def model_stage(name: str, n: int) -> Stage:
        taught = name.startswith("model") and method.alpha > 0
        teachers = [other for other in names[: n - 1] if taught and other not in method.no_teachers]
        transfer = {"alpha": method.alpha, "balance": method.balance, "teacher": method.teacher} if teachers else {}
        return Stage(
            name=name,
            needs=teachers,
            build=partial(build_task, config, datasets.train.classes),
            start=lambda task: config.model.start(task.model, config.out, config.optim.new_layers),
            optim=config.optim,
            train=lambda earlier: train,
            evaluations=lambda earlier: evaluations,
            seed=derive_seed(config.seed, f"model {n}"),
            config={"data": config.data, "model": config.model, "method": {"head": method.head, **transfer}},
            inputs=config.model.inputs(config.out),
        )

    models = {name: n for members in reversed(ensembles(method).values()) for n, name in enumerate(members, start=1)}
    how = partial(ensemble_artefact, average=method.average, epoch=method.teacher, config={"data": config.data})
    together = [how(name, of, evaluations, config.engine) for name, of in ensembles(method).items()]
    return [*(model_stage(name, n) for name, n in models.items()), *together]


def view(model: Model) -> ModelView | None:
    """The ensembles side by side; where their members look is shown by `figures`."""
    return view_of(model) if isinstance(model, Ensemble) else None


def figures(config: Config, datasets: Datasets, results: Results) -> None:
    """Table 3, Figure 5, and how differently the models look."""
    files = {name: weights_of(result, config.method.teacher) for name, result in results.items()}
    device = choose_device(config.engine.device)
    explain_ensembles(config.out, datasets.test, files, ensembles(config.method), device=device)


DRIVER = Driver("Knowledge transfer", PRESETS, stages, view, figures)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
