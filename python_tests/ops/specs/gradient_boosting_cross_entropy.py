"""Gradient-boosting cross-entropy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    MATRIX_LAYOUTS,
    NO_INTS,
    TOO_LARGE,
    Draw,
    arrange,
    drawn_floats,
    drawn_vector,
    int64,
    often,
    random,
    wrong,
    wrong_first,
    wrong_int64s,
    wrong_label,
)
from ..spec import Benchmark, Case, Sample, Saved, Size, Spec, Target

REDUCTIONS = ("none", "mean", "sum")  # as the raw operator numbers them

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, scores: Tensor, target: Tensor, **options: Any) -> Sample:
    return Sample(name, {"scores": scores, "target": target}, ("scores",), options)


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def laid_out(name: str, scores: Tensor, target: list[int], **options: Any) -> Sample:
        return sample(name, arrange(scores, layout), torch.tensor(target, device=device), **options)

    def some(*size: int) -> Tensor:
        return random(*size, dtype=dtype, device=device)

    scores, target, many = some(5, 37), [0, 36, 17, 3, 3], some(2, 1031)
    return [
        laid_out("typical", scores, target),
        laid_out("one rival", scores, target, k=1),
        laid_out("none reduced", scores, target, k=5, reduction="none"),
        laid_out("summed", scores, target, k=5, reduction="sum"),
        laid_out("k of C-2", scores, target, k=35),
        laid_out("k of C-1", scores, target, k=36),
        laid_out("k above C", scores, target, k=1000),
        laid_out("ignored", scores, [0, -100, 17, -100, 3]),
        laid_out("another ignored", scores, [0, 7, 17, 7, 3], ignore_index=7, reduction="none"),
        laid_out("ties", (scores * 2).round(), target, k=4),
        laid_out("all tied", torch.zeros_like(scores), target, k=4),
        laid_out("one class", some(3, 1), [0, 0, 0]),
        laid_out("two classes", some(3, 2), [0, 1, 0], k=1),
        laid_out("many classes", many, [1030, 5]),
        laid_out("the highest of many classes", many, many.argmax(dim=1).tolist()),
        laid_out("large scores", scores * 60, target),
        # Here a logarithm of a sum of exponentials keeps few digits of what makes the gradient.
        laid_out("far from zero", scores + 1000, target),
        laid_out("far from zero, all classes", scores - 1000, target, k=36),
    ]


def empty() -> list[Sample]:
    return [sample("empty", torch.zeros(0, 5), torch.zeros(0).long(), reduction=name) for name in REDUCTIONS]


def large() -> list[Sample]:
    scores, target = random(600, 200, dtype=torch.float32, device="cpu"), torch.arange(600) % 200
    return [sample("large", scores, target, reduction=reduction) for reduction in ("mean", "none")]


def of_size(size: Size, device: str) -> Sample:
    rows, classes, *_ = size
    scores = random(rows, classes, dtype=torch.float32, device=device)
    return sample("of size", scores, torch.arange(rows, device=device) % classes)


def raw(sample: Sample) -> tuple[Any, ...]:
    options = {"k": 15, "reduction": "mean", "ignore_index": -100, **sample.options}
    scores, target = sample.tensors["scores"], sample.tensors["target"]
    return scores, target, options["k"], REDUCTIONS.index(options["reduction"]), options["ignore_index"]


# --- what must hold of them -------------------------------------------------------------------------------------------


def support(sample: Sample) -> dict[str, Tensor]:
    """The label and the negatives that reach the k-th highest of them; nothing in a row that is ignored."""
    scores, target = sample.tensors["scores"].detach(), sample.tensors["target"]
    ignored = target == sample.options.get("ignore_index", -100)
    own = F.one_hot(torch.where(ignored, 0, target), scores.shape[1]).bool()
    negatives = scores.masked_fill(own, float("-inf"))
    k = min(sample.options.get("k", 15), scores.shape[1] - 1)
    threshold = negatives.topk(k, dim=1).values[:, -1:] if k else float("inf")
    return {"scores": (own | (negatives >= threshold)) & ~ignored[:, None]}


def cancelling(sample: Sample) -> float:
    """softmax − 1."""
    return 2.0 if sample.options.get("reduction") == "none" else 1.0


def saved() -> list[Saved]:
    """Scores and target as they are, and four numbers per sample."""
    calls = []
    for dtype, number in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        for reduction in REDUCTIONS:
            scores = random(3, 40, dtype=dtype, device="cpu")
            call = sample(f"{reduction} {dtype}", scores, torch.arange(3), k=5, reduction=reduction)
            calls.append(Saved(call, 4 * 3 * number, keeps=("scores", "target")))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    rows, classes = draw.choice(FEW), draw.choice([1, 2, 3, 15, 16, 17, 18, 37, 200, 1030])
    scores = drawn_floats(draw, (rows, classes), draw.choice(DTYPES), draw.choice([0.01, 1.0, 20.0]))
    ignore_index = draw.choice([-100, int64(draw), draw.integer(0, classes - 1)])
    labels = [draw.choice([draw.integer(0, classes - 1), ignore_index]) for _ in range(rows)]
    options = {
        "k": draw.choice([draw.integer(1, classes + 2), 15, 2**31, 2**63 - 1]),
        "reduction": draw.choice(REDUCTIONS),
        "ignore_index": ignore_index,
    }
    tensors = {"scores": scores, "target": drawn_vector(draw, torch.tensor(labels, dtype=torch.int64))}
    return Sample("drawn", tensors, ("scores",) if often(draw) else (), options)


def no_classes(draw: Draw, sample: Sample) -> tuple[str, Any]:
    return "scores", sample.tensors["scores"].new_zeros(len(sample.tensors["target"]), 0)


FAULTS = (
    wrong_first,
    no_classes,
    wrong_int64s("target"),
    wrong("target", None),
    wrong_label("target", lambda sample: sample.tensors["scores"].shape[1], ignored="ignore_index"),
    wrong("k", 0, -1, *TOO_LARGE, *NO_INTS),
    wrong("ignore_index", *TOO_LARGE, *NO_INTS),
    wrong("reduction", "average", "", "MEAN", None, 1, True, ["mean"], ("none", "mean")),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

K = 15
CPU_TARGETS = (Target("eager", at_least=2), Target("torch.compile", at_least=1))
CUDA_TARGETS = (Target("eager", at_least=3),)


def timed(case: Case, device: str) -> Sample:
    scores = arrange(random(*case.shape, dtype=case.dtype, device=device), case.layout)
    return sample("timed", scores, torch.arange(case.shape[0], device=device) % case.shape[1])


def plain(scores: Tensor, target: Tensor) -> Tensor:
    """As one writes it in PyTorch, without the reference's care for ignored samples, bad labels and NaN."""
    negatives = scores.detach().float().scatter(1, target[:, None], float("-inf"))
    k = min(K, scores.shape[1] - 1)
    dropped = negatives < negatives.topk(k, dim=1).values[:, -1:]
    dropped = dropped.scatter(1, target[:, None], False)
    return F.cross_entropy(scores.float().masked_fill(dropped, float("-inf")), target)


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(Case((32, 200)), Case((32, 200), backward=True, targets=CPU_TARGETS)),
    cuda=(Case((32, 200)), Case((32, 200), backward=True, targets=CUDA_TARGETS)),
    sweep=tuple(
        Case((samples, classes), dtype=dtype, backward=backward)
        for samples in (1, 16, 64)
        for classes in (20, 200, 2000, 10000)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    saves="4 numbers per sample",
    # cross_entropy: torch's own, over all classes, which is another loss.
    others={
        "reference": reference.gradient_boosting_cross_entropy,
        "cross_entropy": lambda scores, target: F.cross_entropy(scores, target),
    },
)

SPEC = Spec(
    name="gradient_boosting_cross_entropy",
    function=ops.gradient_boosting_cross_entropy,
    reference=reference.gradient_boosting_cross_entropy,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    saved=saved,
    differentiable=("scores",),
    layouts=MATRIX_LAYOUTS,
    shape="[N,C]",
    support=support,
    cancelling=cancelling,
    benchmark=BENCHMARK,
)
