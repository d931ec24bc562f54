"""Train the diversification block and the gradient-boosting cross-entropy (AAAI 2020) on fine-grained images.

python train/subtle_differences.py demo
python train/subtle_differences.py cub --data.root CUB_200_2011 --model.pretrained True
python train/subtle_differences.py folder --data.root my_images      # my_images/{train,test}/<class>/*.jpg
python train/subtle_differences.py --config runs/demo/config.json --out runs/again
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tyro
from torch import Tensor, nn

from fgvc_ext.data import BrokenImageError, eval_transform
from fgvc_ext.explain.comparison import ModelView, explain_models
from fgvc_ext.explain.crop import CentreCrop
from fgvc_ext.models import SubtleDifferences, build_backbone, load_weights
from fgvc_ext.nn import GradientBoostingCrossEntropyLoss
from fgvc_ext.training import (
    EXIT_PREEMPTED,
    CheckpointCorrupt,
    EngineConfig,
    NonFiniteLoss,
    OptimConfig,
    Preempted,
    RunFolder,
    RunLocked,
    Stage,
    Task,
    load_config,
    run_stages,
)
from fgvc_ext.training.classification import (
    Classification,
    DataConfig,
    Datasets,
    evaluation_samples,
    five_crop_samples,
    load_datasets,
    preprocessing,
    training_samples,
)
from fgvc_ext.training.config import at_least, check_limits
from fgvc_ext.training.report import write_run_report
from fgvc_ext.training.state import file_sha256


@dataclass
class ModelConfig:
    """The network below the class activation maps."""

    backbone: str = "resnet50"
    """A torchvision ResNet, VGG or DenseNet, resnet10_narrow, or timm/<name>."""
    weights: Path | None = None
    """File of weights to start from (safetensors or .pth)."""
    pretrained: bool = False
    """Start from the library's ImageNet weights, which it downloads."""
    stride_on_first_conv: bool = False
    """A bottleneck's stride on its first 1×1 convolution, for weights in Caffe's form."""


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
class Config:
    """Diversification block and gradient-boosting cross-entropy."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    out: Path = Path("runs/subtle_differences")
    """Folder of the run."""
    seed: int = 0
    resume: str = "auto"
    """auto: go on with the run in --out, if there is one. must, never: demand or refuse one. PATH: its checkpoint."""
    five_crop: bool = True
    """Evaluate the final model with five crops as well."""
    limit_train: int | None = at_least(1, None)
    """Use only so many training images."""
    limit_test: int | None = at_least(1, None)
    """Use only so many test images."""
    report: bool = True
    """Write report.html with curves, activation maps and confusions at the end."""
    dry_run: bool = False
    """Show configuration, data and shapes of one batch, then stop."""


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
        Config(data=DataConfig(name="folder"), out=Path("runs/folder")),
    ),
    "cub": (
        "CUB-200-2011 with the paper's recipe: ResNet-50, 448 px, 150 epochs.",
        Config(data=DataConfig(name="cub"), out=Path("runs/cub")),
    ),
}

USAGE = """Diversification block and gradient-boosting cross-entropy.

Give a preset and changes to it, or repeat a run: --config RUN/config.json [changes]."""


def build_task(config: Config, method: MethodConfig, num_classes: int) -> Classification:
    """The network and its losses."""
    if config.model.weights is not None and config.model.pretrained:
        raise ValueError("give either --model.weights (a file) or --model.pretrained True, not both")
    backbone = build_backbone(
        config.model.backbone,
        pretrained=config.model.pretrained,
        stride_on_first_conv=config.model.stride_on_first_conv,
    )
    model = SubtleDifferences(
        backbone,
        num_classes,
        diversification=method.diversification,
        p_peak=method.p_peak,
        p_patch=method.p_patch,
        patch_size=method.patch_size,
        alpha=method.alpha,
    )
    if config.model.weights is not None:
        print(load_weights(model, config.model.weights).text())
    plain, boosted = nn.CrossEntropyLoss(), GradientBoostingCrossEntropyLoss(k=method.k)
    if not method.gce:
        return Classification(model, plain)
    return Classification(model, boosted, lambda epoch: boosted if epoch >= method.gce_from_epoch else plain)


def stages(config: Config, datasets: Datasets) -> list[Stage]:
    """ "ours", after "plain" where both are to be compared; the same seed gives both the same images in every step."""
    methods = {"ours": config.method}
    if config.method.compare_plain:
        methods = {"plain": dataclasses.replace(config.method, diversification=False, gce=False), **methods}
    weights = config.model.weights
    return [
        Stage(
            name=name,
            build=partial(build_task, config, method, len(datasets.train.classes)),
            optim=config.optim,
            train=training_samples(datasets, config.data, config.engine),
            evaluations=evaluation_samples(datasets, config.data),
            final={"five_crop": five_crop_samples(datasets, config.data)} if config.five_crop else {},
            seed=config.seed,
            inputs={"weights": file_sha256(weights)} if weights else {},
            metadata={
                "method": "subtle_differences",
                "backbone": {"name": config.model.backbone, "stride_on_first_conv": config.model.stride_on_first_conv},
                "classes": datasets.train.classes,
                "preprocessing": preprocessing(config.data),
                "diversification": method.diversification,
            },
        )
        for name, method in methods.items()
    ]


def network(task: Task) -> SubtleDifferences:
    """The network within a task, in evaluation mode."""
    model = task.eval().model
    assert isinstance(model, SubtleDifferences)
    return model


def view(model: SubtleDifferences) -> ModelView:
    """A trained network as the report sees it: functions of images on the CPU."""
    device = next(model.parameters()).device

    def masks(images: Tensor, seed: Tensor) -> Tensor:
        return model.suppression_mask(images.to(device), seed.to(device))

    return ModelView(
        maps=lambda images: model.class_activation_maps(images.to(device)),
        features=lambda images: model.backbone(images.to(device)).mean((2, 3)),
        masks=masks if model.diversification is not None else None,
    )


def write_report(config: Config, datasets: Datasets, tasks: dict[str, Task]) -> Path:
    """Figures of the test images, seen by every stage's network, and report.html; returns its path."""
    crop = (config.data.resize, config.data.crop)
    models = {name: view(network(task)) for name, task in tasks.items()}
    prepare, frame = eval_transform(*crop), CentreCrop(*crop)
    explain_models(config.out, datasets.test, models, prepare=prepare, frame=frame, seed=config.seed)
    return write_run_report(config.out)


def show_plan(config: Config, datasets: Datasets) -> None:
    """--dry-run: the resolved configuration, the data, and one batch through every stage."""
    for name, value in dataclasses.asdict(config).items():
        print(f"{name}: {value}")
    for stage in stages(config, datasets):
        model = network(stage.build())
        image = eval_transform(config.data.resize, config.data.crop)(datasets.train.load(0))
        maps = model.class_activation_maps(image[None])
        print(f"{stage.name}: {len(stage.train)} images {list(image.shape)} -> maps {list(maps.shape)}")


def main(arguments: list[str] | None = None) -> int:
    """Read the configuration, train, report; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = read_arguments(arguments)
        datasets = load_datasets(config.data, config.seed, config.limit_train, config.limit_test)
        if config.dry_run:
            show_plan(config, datasets)
            return 0
        facts = {"title": "Subtle differences", "data": datasets.facts(), "seed": config.seed}
        with RunFolder(config.out, config, resume=config.resume, facts=facts) as run:
            tasks = run_stages(stages(config, datasets), run, config.engine)
        for stage in run.data["stages"]:
            print(f"{stage['name']}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in stage["accuracy"].items()))
        if config.report:
            print(f"report: {write_report(config, datasets, tasks)}")
    except Preempted as stop:
        print(f"{stop}. To go on: {command_to_go_on(arguments)}")
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_PREEMPTED
    except (ValueError, OSError, BrokenImageError, RunLocked, CheckpointCorrupt, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def command_to_go_on(arguments: list[str]) -> str:
    """The command that continues a run from its newest checkpoint, ready for a shell."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        skip = argument == "--resume"  # the next one is its value
    return shlex.join([sys.executable, sys.argv[0], *kept, "--resume", "auto"])


def read_arguments(arguments: list[str]) -> Config:
    """A preset and changes to it, or --config FILE and changes to that."""
    markers = (tyro.conf.FlagConversionOff,)
    if arguments[:1] == ["--config"]:
        if len(arguments) < 2:
            raise ValueError("--config: expected the config.json of a run")
        base = load_config(Config, arguments[1])
        config = tyro.cli(Config, default=base, args=arguments[2:], config=markers)
    else:
        config = tyro.extras.overridable_config_cli(PRESETS, args=arguments, config=markers, description=USAGE)
    check_limits(config)
    return config


if __name__ == "__main__":
    sys.exit(main())
