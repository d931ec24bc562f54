"""What the benchmarks of training steps have in common: the network, its images, and where they are."""

import argparse
from pathlib import Path

import torch

CLASSES = 200
WHAT = ("backbone", "size", "batch_size", "precision")
"""The options that say what was timed."""


def parser_of_steps(description: str, name: str, rounds: int) -> argparse.ArgumentParser:
    """Options of a benchmark whose CSV file is called after `name`."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--backbone", default="resnet50" if gpu else "resnet18")
    parser.add_argument("--size", type=int, default=448 if gpu else 160, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=32 if gpu else 16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, help=f"CSV file (default: benchmarks/results/{name}-<device>-<date>.csv)")
    return parser


def random_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A batch on the device; each class twice: losses within and between classes have both kinds of pairs."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.size, args.size, device=device)
    number = torch.arange(args.batch_size, device=device)
    return {
        "image": images.contiguous(memory_format=torch.channels_last),
        "label": number // 2 % CLASSES,
        "seed": number,
        "index": number,
    }
