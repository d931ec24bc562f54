"""What the ranks of test_class_means.py run: a small training with the class-mean loss, in one process or several."""

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fgvc_ext.nn import ClassMeanLoss, class_mean

CLASSES, INPUTS, SIZE = 6, 8, 5
PATIENCE = timedelta(seconds=20)


@dataclass(frozen=True)
class Case:
    """One training: how many samples each rank has, and of which classes they are in turn."""

    name: str
    sizes: tuple[int, ...]
    labels: tuple[int, ...] = (0, 1, 2, 3, 1, 0, 4)
    steps: int = 1
    dtype: torch.dtype = torch.float32
    variant: str = "paper"
    half: bool = False  # the loss sees bfloat16 embeddings
    sizes_known: bool = False  # and need not be asked for
    gather: str = "ours"


def cases(world_size: int) -> list[Case]:
    """Every shape of a global batch that a rank may meet."""
    even, uneven, empty, rare = {
        2: ((6, 6), (7, 3), (8, 0), (4, 4)),
        3: ((4, 4, 4), (5, 4, 2), (0, 6, 6), (3, 3, 3)),
    }[world_size]
    # Class 5 stands on the last rank only; with three ranks, class 4 on the last two.
    lacking = (0, 1, 2, 3, 0, 1, 2, 5) if world_size == 2 else (0, 1, 2, 4, 0, 1, 4, 5, 0)
    found = [
        Case("even", even),
        Case("even, float64", even, dtype=torch.float64),
        Case("uneven", uneven),
        Case("uneven, float64", uneven, dtype=torch.float64),
        Case("a rank without samples", empty),
        Case("a rank without samples, float64", empty, dtype=torch.float64),
        Case("a rank without some class", rare, labels=lacking),
        Case("all of one class", uneven, labels=(2,)),
        Case("every sample of another class", tuple(2 for _ in even), labels=(5, 4, 3, 2, 1, 0)),
        Case("sizes known", uneven, sizes_known=True),
        Case("no samples at all", tuple(0 for _ in even)),
        Case("half precision", uneven, half=True),
        Case("20 steps, even", even, steps=20),
        Case("20 steps, uneven", uneven, steps=20),
        Case("20 steps, uneven, float64", uneven, steps=20, dtype=torch.float64),
        Case("20 steps, a rank without samples", empty, steps=20),
        Case("official", uneven, variant="official"),
        Case("official, with a draw of pairs", tuple(14 for _ in even), variant="official", dtype=torch.float64),
    ]
    wrong = [Case(f"{gather}, {case.name}", case.sizes, steps=case.steps, dtype=case.dtype, gather=gather)
             for gather in ("all-reduce without its gradient", "every rank for itself")
             for case in found if case.name in ("even, float64", "20 steps, uneven, float64")]  # fmt: skip
    return found + wrong


class Task(nn.Module):
    """Embedding, classifier and loss in one forward, as the drivers have it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding, self.classifier = nn.Linear(INPUTS, SIZE), nn.Linear(SIZE, CLASSES)
        self.class_means = ClassMeanLoss(CLASSES, SIZE, margin=2.0, variant=case.variant)
        self.half = case.half

    def forward(self, images: Tensor, labels: Tensor, samples: int, ranks: int, sizes: Any) -> Tensor:
        embeddings = self.embedding(images)
        # The mean over ranks must be the mean over the global batch; the class-mean loss already is that on every rank.
        cross_entropy = F.cross_entropy(self.classifier(embeddings), labels, reduction="sum") * ranks / max(1, samples)
        seen = embeddings.bfloat16() if self.half else embeddings
        return cross_entropy + 2 * self.class_means(seen, labels, batch_sizes=sizes)


def train(case: Case, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Trains on the rank's part of every global batch; one rank has all of it."""
    torch.manual_seed(0)
    task = Task(case).to(case.dtype)
    model: nn.Module = _wrapped(task) if ranks > 1 else task
    optimiser = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
    total = sum(case.sizes)
    start = sum(case.sizes[:rank])
    own = slice(start, start + case.sizes[rank]) if ranks > 1 else slice(0, total)
    labels = torch.tensor([case.labels[n % len(case.labels)] for n in range(total)], dtype=torch.int64)
    losses = []
    torch.manual_seed(1 + rank)  # a rank's own generator: what must be common may not rely on it
    for step in range(case.steps):
        images = torch.randn(total, INPUTS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        images = images.to(case.dtype)
        sizes = case.sizes if case.sizes_known and ranks > 1 else None
        loss = model(images[own], labels[own], total, ranks, sizes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return {
        "state": {name: value.clone() for name, value in task.state_dict().items()},
        "grads": {name: value.grad.clone() for name, value in task.named_parameters()},
        "losses": torch.stack(losses),
        "within": task.class_means.within,
        "between": task.class_means.between,
    }


def _wrapped(task: nn.Module) -> DistributedDataParallel:
    """Without a broadcast of buffers, which would hide that the ranks' means differ."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistributedDataParallel(task, **{option: False})


def _all_reduce_without_gradient(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The common mistake: values as they should be, a gradient that is too small by the number of ranks."""
    start = sum(sizes[: distributed.get_rank()])
    padded = F.pad(rows, (0, 0, start, sum(sizes) - start - len(rows)))
    total = padded.detach().clone()
    distributed.all_reduce(total)
    return padded + (total - padded.detach())


@contextlib.contextmanager
def _gather_of(case: Case) -> Iterator[None]:
    before = class_mean._GatherRows.apply, class_mean._world_size
    try:
        if case.gather == "all-reduce without its gradient":
            class_mean._GatherRows.apply = _all_reduce_without_gradient
        elif case.gather == "every rank for itself":
            class_mean._world_size = lambda: 1
        yield
    finally:
        class_mean._GatherRows.apply, class_mean._world_size = before


def run(rank: int, world_size: int, folder: str) -> None:
    """All cases in one process group; the results go into a file of the rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder) / "store"), world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    results: dict[str, Any] = {}
    for case in cases(world_size):
        with _gather_of(case):
            results[case.name] = train(case, rank, world_size)
    results.update(_beside_training(rank, world_size))
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _beside_training(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = ClassMeanLoss(CLASSES, SIZE)
    labels = torch.tensor([0, 1])
    found: dict[str, Any] = {}

    module.eval()
    if rank == 0:  # shards of an evaluation are uneven: a rank may be done while another still computes
        found["evaluation"] = module(torch.ones(2, SIZE), labels)
    module.train()

    before = module.class_means.clone()
    spoilt = torch.ones(2, SIZE)
    spoilt[0] = float("nan") if rank == 0 else 1.0
    found["nan on one rank"] = module(spoilt, labels)
    found["means after nan"] = module.class_means - before

    wrong = labels.clone()
    wrong[1] = CLASSES if rank == 0 else 1
    try:
        module(torch.ones(2, SIZE), wrong)
    except IndexError as error:
        found["wrong label"] = str(error)
    try:
        module(torch.ones(2, SIZE), labels, batch_sizes=[2] * (world_size + 1))
    except ValueError as error:
        found["wrong sizes"] = str(error)
    return found
