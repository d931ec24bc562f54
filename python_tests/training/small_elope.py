"""The driver of ELoPE on a few small images: all stages in seconds."""

from __future__ import annotations

from pathlib import Path

import torch

from fgvc_ext.cli.train import load_driver

HERE = Path(__file__).parent
OPTIONS = {
    "data.classes": 4,
    "data.train-per-class": 6,
    "data.test-per-class": 3,
    "data.image-size": 48,
    "data.resize": 64,
    "data.crop": 32,
    "method.embedding-dim": 8,
    "method.min-size": 2,
    "optim.epochs": 2,
    "optim.batch-size": 8,
    "optim.warmup-epochs": 0,
    "localiser.epochs": 1,
    "localiser.batch-size": 12,
    "fine-tuning.epochs": 1,
    "fine-tuning.batch-size": 12,
    "engine.workers": 0,
    "engine.eval-every": 1,
}
SMALL = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def elope():
    return load_driver(HERE.parents[1] / "train/elope.py")


def run(folder: Path, *more: str) -> int:
    """What a child process runs: the whole pipeline, without a report."""
    torch.set_num_threads(1)
    return elope().DRIVER.main(["demo", "--out", str(folder), *SMALL, "--report", "False", *more])
