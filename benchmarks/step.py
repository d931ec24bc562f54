"""Measures what a method adds to a training step of the plain network: ``python benchmarks/step.py --help``.

Both steps are the engine's, on the same images, which stay in memory; they take turns in one process, and each round
gives one ratio. The interval of their median comes from bootstrap samples of the rounds. The share of our operators in
the method's step is what torch's profiler finds under their names, forward and backward, of the time of all operators:
on a GPU of its time, on a CPU of the processor's.
"""

import argparse
import csv
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import machine, table
from steps import CLASSES, WHAT, parser_of_steps, random_batch
from timing import Contender, Times, keep_freed_memory, measure
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fgvc_ext.models import DualAttention, ELoPE, KnowledgeTransfer, SubtleDifferences, build_backbone
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.nn import ClassMeanLoss, GradientBoostingCrossEntropyLoss
from fgvc_ext.training import Classification, EngineConfig, OptimConfig
from fgvc_ext.training.attention_transfer import AttentionTransfer
from fgvc_ext.training.dual_attention import DualAttentionClassification, DualAttentionConfig
from fgvc_ext.training.embedding import EmbeddingClassification
from fgvc_ext.training.step import TrainingStep
from fgvc_ext.training.task import Task

PLAIN = "plain"
PROFILED_STEPS = 3
Network = Callable[[], Backbone]


@dataclass(frozen=True)
class Method:
    """A driver's task, and what its step may take.

    Attributes:
        task: from a function that builds the backbone.
        share: our operators' share of the step, at most.
        ratio: time of the step over that of the plain network, at most.
    """

    name: str
    task: Callable[[Network], Task]
    share: float | None = None
    ratio: float | None = None


def plain(network: Network) -> Task:
    """The backbone with mean pooling and a linear classifier, trained with cross-entropy."""
    return Classification(SubtleDifferences(network(), CLASSES, diversification=False), nn.CrossEntropyLoss())


def block_and_loss(network: Network) -> Task:
    return Classification(SubtleDifferences(network(), CLASSES), GradientBoostingCrossEntropyLoss())


def elope(network: Network) -> Task:
    loss = nn.CrossEntropyLoss()
    model = ELoPE(network(), CLASSES, weighted=True)
    return EmbeddingClassification(model, loss=loss, embedding_loss=ClassMeanLoss(CLASSES, 512))


def knowledge_transfer(teachers: int, network: Network) -> Task:
    models = [KnowledgeTransfer(network(), CLASSES) for _ in range(teachers + 1)]
    return AttentionTransfer(models[0], nn.CrossEntropyLoss(), models[1:], alpha=0.5)


def dual_attention(network: Network) -> Task:
    method = DualAttentionConfig()
    model = DualAttention(network(), CLASSES, **method.network())
    return DualAttentionClassification(model, nn.CrossEntropyLoss(), method)


METHODS = [
    Method("subtle_differences", block_and_loss, share=0.01),
    Method("elope", elope, share=0.02),
    *(
        Method(
            f"knowledge_transfer, {count} teachers", partial(knowledge_transfer, count), ratio=(1 + count / 3) * 1.05
        )
        for count in (1, 2, 4)
    ),
    # Four passes of the student and one of a larger network beside it: nothing was promised.
    Method("dual_attention", dual_attention),
]
"""A line for each paper's driver."""


@dataclass(frozen=True)
class Measured:
    method: Method
    times: Times
    share: float

    @property
    def ratio(self) -> float:
        return self.times.ratio(self.method.name, PLAIN)

    @property
    def interval(self) -> tuple[float, float]:
        return self.times.ratio_interval(self.method.name, PLAIN)

    def verdicts(self) -> list[tuple[str, float, float]]:
        """What was measured and wanted: (what, measured, at most)."""
        found = [
            ("share of our operators", self.share, self.method.share),
            ("step / plain", self.ratio, self.method.ratio),
        ]
        return [(what, measured, wanted) for what, measured, wanted in found if wanted is not None]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of_steps("Times the training step of every method beside the plain network's.", "step", rounds=40)
    parser.add_argument("--method", action="append", choices=[method.name for method in METHODS], help="default: all")
    parser.add_argument("--seconds", type=float, default=120, help="of each of the two steps, at most, about")
    return parser.parse_args(words)


def training_step(task: Callable[[Network], Task], args: argparse.Namespace) -> Callable[[], object]:
    """One step of the engine, again and again on the same batch."""
    device, batch = torch.device(args.device), random_batch(args)
    module = task(lambda: build_backbone(args.backbone)).to(device).to(memory_format=torch.channels_last).train()
    optim = OptimConfig(lr=1e-3, batch_size=args.batch_size)
    step = TrainingStep(module, optim, EngineConfig(precision=args.precision), device, 100)
    return lambda: step(batch, 0, [args.batch_size])


def share_of_ours(step: Callable[[], object], device: str) -> float:
    """The share of our operators in the time of all operators of a step."""
    step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as trace:
        for _ in range(PROFILED_STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    return share_in(trace.key_averages(), device)


def share_in(events: Sequence[Any], device: str) -> float:
    """The share of our operators in a profile's averages.

    A GPU's time stands there twice, as that of kernels and as that of the operators which launched them, and a third
    time where a stretch of it has a name. All of it is what kernels take, as in torch's own tables.
    """
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    ours = [event for event in operators if event.key.startswith("fgvc_ext::")]
    if device == "cuda":
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        return sum(event.device_time_total for event in ours) / sum(event.self_device_time_total for event in kernels)
    return sum(event.cpu_time_total for event in ours) / sum(event.self_cpu_time_total for event in operators)


def measure_method(method: Method, args: argparse.Namespace) -> Measured:
    calls = {PLAIN: training_step(plain, args), method.name: training_step(method.task, args)}
    contenders = [Contender(name, call) for name, call in calls.items()]
    times = measure(contenders, args.device, rounds=args.rounds, seconds=args.seconds)
    return Measured(method, times, share_of_ours(calls[method.name], args.device))


def write(path: Path, found: Sequence[Measured], args: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    what = {name: getattr(args, name) for name in WHAT}
    facts = machine(args.device)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "step_ms", "plain_ms", "ratio", "ratio_low", "ratio_high", "ratio_wanted", "share",
                         "share_wanted", "rounds", *what, *facts])  # fmt: skip
        for one in found:
            times = [f"{1e3 * one.times.median(name):.2f}" for name in (one.method.name, PLAIN)]
            ratios = [f"{value:.4f}" for value in (one.ratio, *one.interval)]
            row = [one.method.name, *times, *ratios, one.method.ratio, f"{one.share:.5f}", one.method.share]
            writer.writerow([*row, one.times.rounds(), *what.values(), *facts.values()])


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(sys.argv[1:] if words is None else words)
    keep_freed_memory()
    found = [measure_method(method, args) for method in METHODS if args.method is None or method.name in args.method]
    path = args.out or Path(__file__).parent / "results" / f"step-{args.device}-{datetime.date.today()}.csv"
    write(path, found, args)
    rows = [["", "ms", "plain ms", "step / plain", "95 % interval", "our operators"]]
    for one in found:
        low, high = one.interval
        milliseconds = [f"{1e3 * one.times.median(name):.1f}" for name in (one.method.name, PLAIN)]
        rows.append(
            [one.method.name, *milliseconds, f"{one.ratio:.4f}", f"{low:.4f} to {high:.4f}", f"{one.share:.3%}"]
        )
    print(table(rows))
    for one in found:
        for what, measured, wanted in one.verdicts():
            outcome = "pass" if measured <= wanted else "FALL SHORT"
            print(f"{one.method.name}: {what} {measured:.4f}, wanted at most {wanted:.4f}: {outcome}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
