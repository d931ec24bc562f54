"""Measures a training step of the engine against a bare loop: ``python benchmarks/engine.py --help``.

The same model, loss, optimiser, precision and batch, which stays in memory: only what the engine adds is compared (the
check for finite gradients, sums, schedule). Both take turns in one process. Peak memory is that of a process of its own
for each.
"""

import argparse
import csv
import datetime
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from results import machine, table
from steps import CLASSES, WHAT, parser_of_steps, random_batch
from timing import Contender, keep_freed_memory, measure
from torch import nn

from fgvc_ext.models import SubtleDifferences, build_backbone
from fgvc_ext.training import Classification, EngineConfig, OptimConfig
from fgvc_ext.training.step import TrainingStep

ENGINE, BARE = "engine", "bare loop"
WANTED = 0.97
"""Images a second of the engine over those of the bare loop, at least."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of_steps("Times a training step beside a bare loop, and its peak memory.", "engine", rounds=20)
    parser.add_argument("--peak", choices=(ENGINE, BARE), help=argparse.SUPPRESS)  # what the process of its own does
    return parser.parse_args(words)


def contenders(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    device, batch = torch.device(args.device), random_batch(args)
    optim = OptimConfig(lr=1e-3, batch_size=args.batch_size)

    def task() -> Classification:
        model = SubtleDifferences(build_backbone(args.backbone), CLASSES)
        return Classification(model, nn.CrossEntropyLoss()).to(device).to(memory_format=torch.channels_last).train()

    def engine() -> Callable[[], object]:
        step = TrainingStep(task(), optim, EngineConfig(precision=args.precision), device, 100)
        return lambda: step(batch, 0, [args.batch_size])

    def bare() -> Callable[[], object]:
        module = task()
        groups = module.param_groups(optim)
        optimizer = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)

        def step() -> None:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = module.loss(module.model(batch["image"], batch["seed"]), batch["label"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return step

    return {name: make() for name, make in ((ENGINE, engine), (BARE, bare)) if args.peak in (None, name)}


def peak_bytes(args: argparse.Namespace) -> int:
    """Most memory that a process with one contender takes: on a GPU what torch allocates, else its resident set."""
    step = contenders(args)[args.peak]
    for _ in range(3):
        step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(name: str, words: Sequence[str]) -> int:
    command = [sys.executable, __file__, *words, "--peak", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    args = arguments(words)
    keep_freed_memory()
    if args.peak:
        print(peak_bytes(args))
        return 0
    found = [Contender(name, call) for name, call in contenders(args).items()]
    times = measure(found, args.device, rounds=args.rounds, seconds=60)
    peaks = {one.name: peak_of(one.name, words) for one in found}
    ratio = statistics.median(b / e for b, e in zip(times.samples[BARE], times.samples[ENGINE], strict=True))
    path = args.out or Path(__file__).parent / "results" / f"engine-{args.device}-{datetime.date.today()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    what = {name: getattr(args, name) for name in WHAT}
    facts = machine(args.device)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "images_per_second", "p10_ms", "median_ms", "p90_ms", "rounds", "peak_mib",
                         "bare_over_engine", *what, *facts])  # fmt: skip
        for one in found:
            low, high = times.spread(one.name)
            median = times.median(one.name)
            row = [f"{args.batch_size / median:.1f}", *(f"{1e3 * value:.2f}" for value in (low, median, high))]
            peak = f"{peaks[one.name] / 2**20:.0f}"
            writer.writerow([one.name, *row, times.rounds(), peak, f"{ratio:.3f}", *what.values(), *facts.values()])
    rows = [[one.name, f"{args.batch_size / times.median(one.name):.1f}", f"{peaks[one.name] / 2**20:.0f}"]
            for one in found]  # fmt: skip
    print(table([["", "images a second", "peak MiB"], *rows]))
    print(f"wanted: {ENGINE} / {BARE} at least {WANTED}: {ratio:.3f} {'pass' if ratio >= WANTED else 'FALL SHORT'}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
