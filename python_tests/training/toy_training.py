"""A training run small enough to be killed many times: random images, a net with BatchNorm and dropout.

`main([FOLDER, "key=value", …])` is what a child process runs.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgvc_ext.data import BrokenImageError, ImageDataset
from fgvc_ext.data.loading import Samples
from fgvc_ext.training import (
    EXIT_PREEMPTED,
    Classification,
    EngineConfig,
    OptimConfig,
    Preempted,
    Result,
    RunFolder,
    Stage,
    run_stages,
)
from fgvc_ext.training.checkpoints import Checkpoints, stage_of


class ToyImages(ImageDataset):
    """Noise around a colour for each class; `broken` indices cannot be read, `slow` makes each image take its time."""

    def __init__(self, count: int, split: str = "train", classes: int = 3, broken: tuple[int, ...] = ()) -> None:
        labels = torch.arange(count) % classes
        super().__init__(
            "toy", split, [f"class {c}" for c in range(classes)], labels, [f"{split}/{i}" for i in range(count)]
        )
        self.broken = broken

    def load(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise BrokenImageError(f"cannot decode image {self.ids[index]} (index {index}): planted")
        generator = torch.Generator().manual_seed(index + (1000 if self.split == "test" else 0))
        noise = torch.randint(0, 160, (3, 16, 16), generator=generator, dtype=torch.uint8)
        noise[int(self.labels[index])] += 60
        return noise

    def content_key(self) -> str:
        return "1"


def jitter(image: torch.Tensor) -> torch.Tensor:
    """A random crop and noise, from torch's global generator."""
    top, left = torch.randint(0, 5, (2,)).tolist()
    return image[:, top : top + 12, left : left + 12] / 255 + 0.05 * torch.randn(3, 12, 12)


def centre(image: torch.Tensor) -> torch.Tensor:
    return image[:, 2:14, 2:14] / 255


class ToyModel(nn.Module):
    def __init__(self, classes: int = 3, nan_at: int = -1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.classifier = nn.Conv2d(8, classes, 1)
        self.nan_at, self.calls = nan_at, 0

    def forward(self, images: torch.Tensor, seed: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            self.calls += 1
            if self.calls == self.nan_at:
                images = images * float("nan")
        return self.classifier(self.backbone(images)).mean((2, 3))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": list(self.backbone.parameters()), "classifier": list(self.classifier.parameters())}


@dataclass
class ToyConfig:
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=3, batch_size=8, lr=0.05, schedule="cosine", warmup_epochs=0.5, new_layers_lr=0.1, ema_decay=0.9
        )
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(device="cpu", workers=0, checkpoint_every=2))
    images: int = 33
    classes: int = 3
    nan_at: int = -1
    seed: int = 7
    stages: int = 2
    resume: str = "auto"


def toy_config(**changes: Any) -> ToyConfig:
    """One stage, with changed fields of its groups or of its own."""
    config = ToyConfig(stages=1)
    for name, value in changes.items():
        group = "optim" if hasattr(config.optim, name) else "engine" if hasattr(config.engine, name) else None
        setattr(getattr(config, group) if group else config, name, value)
    return config


def toy_stages(config: ToyConfig, transform: Any = jitter) -> list[Stage]:
    train, test = ToyImages(config.images, classes=config.classes), ToyImages(21, "test", config.classes)
    return [
        Stage(
            name=name,
            build=lambda earlier: Classification(ToyModel(config.classes, config.nan_at), nn.CrossEntropyLoss()),
            optim=config.optim,
            train=lambda earlier: Samples(train, transform, config.engine.broken_images),
            evaluations=lambda earlier: {"test": Samples(test, centre)},
            seed=config.seed,
            metadata={"classes": train.classes},
        )
        for name in ("first", "second")[: config.stages]
    ]


def open_run(folder: Path, config: ToyConfig) -> RunFolder:
    train = ToyImages(config.images, classes=config.classes)
    facts = {"data": {"classes": train.classes, "train_fingerprint": train.fingerprint()}}
    return RunFolder(folder, config, resume=config.resume, facts=facts)


def train(folder: Path, config: ToyConfig, transform: Any = jitter) -> dict[str, Result]:
    with open_run(folder, config) as run:
        return run_stages(toy_stages(config, transform), run, config.engine)


def traces(folder: Path) -> dict[str, str]:
    """What two equal runs have in common, byte for byte: weights, each stage's final state, metrics but for times."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((folder / "weights").iterdir())}
    for stage in {stage_of(file) for file in (folder / "checkpoints").glob("*.pt")}:
        file = max((folder / "checkpoints").glob(f"{stage}-e*.pt"))
        state = torch.load(file, weights_only=True)
        for name in ("seconds", "waited"):
            state["position"].pop(name)
        found[file.name] = hashlib.sha256(repr(_plain(state)).encode()).hexdigest()
    with (folder / "metrics.csv").open() as stream:
        found["metrics.csv"] = repr([_without_times(row) for row in csv.DictReader(stream)])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found["metrics.jsonl"] = repr([_without_times(json.loads(line)) for line in lines])
    return found


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("seconds", "images_per_second", "data_wait")}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def slow_jitter(image: torch.Tensor) -> torch.Tensor:
    time.sleep(0.002)
    return jitter(image)


def main(arguments: list[str]) -> int:
    """Train in the folder arguments[0]; returns the exit code."""
    torch.set_num_threads(1)
    config = ToyConfig()
    for item in arguments[1:]:
        name, _, value = item.partition("=")
        owner: Any = config
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, type(getattr(owner, last))(value))
    try:
        train(Path(arguments[0]), config, slow_jitter)
    except Preempted as stop:
        print(stop)
        return EXIT_PREEMPTED
    return 0


def save_forever(folder: Path, step: int) -> int:
    """Save checkpoints of 1.2 MB from step + 1 on, until killed."""
    torch.set_num_threads(1)
    while True:
        step += 1
        state = {"step": step, "data": torch.full((300_000,), float(step))}
        Checkpoints(folder, "s").save(state, epoch=0, step=step)


def save_more_than_fits(folder: Path) -> int:
    """Save where no file can grow beyond 100 kB; 7 if that was noticed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        Checkpoints(folder, "s").save({"step": 2, "data": torch.zeros(1_000_000)}, epoch=0, step=2)
    except OSError as error:
        print(error)
        return 7 if error.errno == errno.EFBIG else 8
    return 0


# A server that has imported torch, and computed nothing, forks the children: they start in milliseconds. A fork of
# the test process itself would inherit the locks of OpenMP's threads without the threads.
_children = multiprocessing.get_context("forkserver")
_children.set_forkserver_preload(["toy_driver"])


def _start_server() -> None:
    """It looks for what it imports beforehand on PYTHONPATH alone, and passes over in silence what it does not find."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Child:
    """A function in a process of its own, with its output in a file."""

    def __init__(self, output: Path, function: Callable[..., int], *arguments: Any) -> None:
        self.output = output
        _start_server()
        self.process = _children.Process(target=_run, args=(output, function, arguments), daemon=True)
        self.process.start()

    def ended(self, seconds: float = 120.0) -> tuple[int, str]:
        """Wait for its end: exit code (negative: the signal) and output."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"timed out: {self.text()}"
        return self.process.exitcode, self.text()

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def _run(output: Path, function: Callable[..., int], arguments: tuple) -> None:
    # A child of a fork server would start its loading processes through a server of their own, in seconds.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config["daemon"] = False  # a daemon may not have children
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.exit(function(*arguments))


def steps_and_weights(steps: dict[str, int], left: dict[str, list[str]] | None = None) -> list[str]:
    """The files that a run leaves, in their order: a checkpoint a step of each stage, its weights, its artefacts."""
    return [
        event
        for stage, count in steps.items()
        for event in (
            *(f"checkpoints/{stage}-e*-s{step:09d}.json" for step in range(1, count + 1)),
            f"weights/{stage}.safetensors",
            *(f"artefacts/{name}" for name in (left or {}).get(stage, ())),
        )
    ]


def kill_at_random_moments(folder: Path, train: Callable[..., int], events: list[str], *arguments: Any) -> None:
    """`train(folder, *arguments)`, killed ten times soon after one of these files was there, leaves in folder/run the
    same bytes as one that nobody disturbs in folder/whole."""
    dice, output = random.Random(0), folder / "output"
    code, text = Child(output, train, folder / "whole", *arguments).ended()
    assert code == 0, text
    for place in sorted(dice.sample(range(len(events) - 1), 10)):
        child = Child(output, train, folder / "run", *arguments)
        while child.process.is_alive() and not list((folder / "run").glob(events[place])):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        child.process.kill()
        assert child.ended()[0] == -signal.SIGKILL, f"it ended before {events[place]} was there: {child.text()}"
    code, text = Child(output, train, folder / "run", *arguments).ended()
    assert code == 0, text
    assert traces(folder / "run") == traces(folder / "whole")
