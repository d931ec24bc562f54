"""Times dual attention fusion's step beside two slower ways to write it: ``python benchmarks/naive.py --help``.

Forward and backward of the whole loss, on the CPU, on the same images: with our operators; with their references, plain
PyTorch over the whole batch; and as one would write the paper first, image by image and box by box, which is what the
tests compare the step with (``python_tests/training/naive_dual_attention.py``). The three take turns in one process.
"""

import argparse
import csv
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from results import machine, table
from steps import CLASSES, WHAT, parser_of_steps, random_batch
from timing import Contender, keep_freed_memory, measure
from torch import nn

from fgvc_ext import use_reference
from fgvc_ext.models import DualAttention, build_backbone
from fgvc_ext.training.dual_attention import DualAttentionClassification, DualAttentionConfig

sys.path.append(str(Path(__file__).parents[1] / "python_tests" / "training"))
from naive_dual_attention import naive_step

OURS, REFERENCE, NAIVE = "our operators", "their references", "image by image"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of_steps("Times the step of dual attention fusion beside naive ones.", "naive", rounds=20)
    parser.add_argument("--seconds", type=float, default=60, help="of each contender, at most, about")
    args = parser.parse_args(words)
    if (args.device, args.precision) != ("cpu", "fp32"):
        parser.error("the naive step runs on the CPU in fp32: --device cpu --precision fp32")
    return args


def contenders(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Each runs forward and backward and returns the loss."""
    batch, method = random_batch(args), DualAttentionConfig(dropout=0.0)
    torch.manual_seed(0)
    model = DualAttention(build_backbone(args.backbone), CLASSES, **method.network())
    task = DualAttentionClassification(model, nn.CrossEntropyLoss(), method).train()

    def timed(step: Callable[[], dict[str, torch.Tensor]]) -> torch.Tensor:
        task.zero_grad(set_to_none=True)
        loss = step()["loss"]
        loss.backward()
        return loss.detach()

    def with_references() -> torch.Tensor:
        with use_reference():
            return timed(lambda: task.step(batch))

    return {
        OURS: lambda: timed(lambda: task.step(batch)),
        REFERENCE: with_references,
        NAIVE: lambda: timed(lambda: naive_step(task, batch)),
    }


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    keep_freed_memory()
    calls = contenders(args)
    losses = {name: float(call()) for name, call in calls.items()}
    # NaN, too, is no agreement.
    if not all(abs(loss - losses[OURS]) <= 1e-2 * abs(losses[OURS]) for loss in losses.values()):
        raise SystemExit(f"the steps differ, so their times mean nothing: {losses}")
    times = measure([Contender(*one) for one in calls.items()], args.device, rounds=args.rounds, seconds=args.seconds)
    path = args.out or Path(__file__).parent / "results" / f"naive-{args.device}-{datetime.date.today()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    what, facts = {name: getattr(args, name) for name in WHAT}, machine(args.device)
    rows = [["", "p10 ms", "median ms", "p90 ms", "over ours", "95 % interval"]]
    for name in calls:
        p10, p90 = times.spread(name)
        low, high = times.ratio_interval(name, OURS)
        spread = [f"{1e3 * value:.1f}" for value in (p10, times.median(name), p90)]
        rows.append([name, *spread, f"{times.ratio(name, OURS):.2f}", f"{low:.2f} to {high:.2f}"])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*rows[0], "rounds", *what, *facts])
        writer.writerows([*row, times.rounds(), *what.values(), *facts.values()] for row in rows[1:])
    print(table(rows))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
