"""Class-mean embedding loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc_ext import ops, reference

from ..generators import (
    DTYPES,
    FEW,
    MATRIX_LAYOUTS,
    NO_NUMBERS,
    Draw,
    arrange,
    boolean,
    drawn_floats,
    drawn_layout,
    drawn_vector,
    inf,
    largest_finite,
    nan,
    often,
    random,
    wide,
    wrong,
    wrong_first,
    wrong_int64s,
    wrong_label,
)
from ..spec import Benchmark, Case, Sample, Saved, Size, Spec, Target

DEFAULTS = {"alpha": 0.5, "margin": 0.75, "gamma": 16.0, "normalize": True}

# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, embeddings: Tensor, labels: Tensor, means: Tensor, **options: Any) -> Sample:
    tensors = {"embeddings": embeddings, "labels": labels, "class_means": means}
    return Sample(name, tensors, ("embeddings",), options)


def close(classes: int, size: int, dtype: torch.dtype, device: str, spread: float = 0.2) -> Tensor:
    """Means of a squared distance of about 2 · spread², well below the margin: every pair of classes repels."""
    middle = random(1, size, dtype=torch.float64, device=device, seed=2)
    around = random(classes, size, dtype=torch.float64, device=device) / size**0.5
    return (F.normalize(middle) + spread * around).to(dtype)


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    def some(*size: int, seed: int = 0) -> Tensor:
        return random(*size, dtype=dtype, device=device, seed=seed)

    def laid_out(name: str, embeddings: Tensor, labels: list[int], means: Tensor, **options: Any) -> Sample:
        return sample(name, arrange(embeddings, layout), torch.tensor(labels, device=device), means, **options)

    def near(classes: int, size: int) -> Tensor:
        return close(classes, size, dtype, device)

    embeddings, labels, means = some(6, 18), [3, 0, 4, 3, 3, 1], near(5, 18)
    zeros = embeddings.clone()
    zeros[[0, 2]] = 0
    far = []
    if dtype != torch.float16:  # its numbers are not so large nor so small
        far = [
            laid_out("squares beyond float32", embeddings * 1e20, labels, means),
            laid_out("squares below float32", embeddings * 1e-25, labels, means),
        ]
    return [
        laid_out("typical", embeddings, labels, means),
        laid_out("float32 means", embeddings, labels, means.to(wide(dtype))),
        laid_out("means of the same layout", embeddings, labels, arrange(means, layout)),
        laid_out("distant means", embeddings, labels, 5 * some(5, 18, seed=1)),
        laid_out("one class", embeddings, [2] * 6, means),
        laid_out("every sample a class", embeddings, [5, 3, 1, 0, 2, 4], near(7, 18)),
        laid_out("one sample", embeddings[:1], [4], means),
        laid_out("not normalised", embeddings * 0.1, labels, means, normalize=False),
        laid_out("equal embeddings", embeddings[:1].repeat(6, 1), labels, means),
        laid_out("equal means", embeddings, labels, means[:1].repeat(5, 1)),
        laid_out("zero embeddings", zeros, labels, means),
        laid_out("zero embeddings, not normalised", zeros, labels, means, normalize=False),
        laid_out("an embedding that is its mean", means[:5].clone(), [0, 1, 2, 3, 4], means, normalize=False),
        laid_out("one number", some(6, 1), labels, some(5, 1, seed=1), normalize=False),
        laid_out("prime size", some(7, 67), [0, 1, 2, 0, 1, 2, 0], near(3, 67)),
        laid_out("more classes than a vector has lanes", some(41, 37), [n % 37 for n in range(41)], near(37, 37)),
        laid_out("10,000 classes", some(4, 7), [9999, 0, 5000, 9999], near(10000, 7)),
        laid_out("other parameters", embeddings, labels, means, alpha=0.9, margin=2.0, gamma=1.5),
        laid_out("means that stay", embeddings, labels, means, alpha=0.0),
        laid_out("no margin", embeddings, labels, means, margin=0),
        laid_out("no repulsion", embeddings, labels, means, gamma=0),
        laid_out("long embeddings", embeddings * 1000, labels, means),
        laid_out("short embeddings", embeddings * 0.001, labels, means),
        laid_out("far from zero", embeddings + 100, labels, means),
        *far,
    ]


def empty() -> list[Sample]:
    nothing, labels = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    return [sample("empty", nothing, labels, torch.zeros(3, 5), normalize=normalize) for normalize in (True, False)]


def large() -> list[Sample]:
    embeddings, labels = random(400, 64, dtype=torch.float32, device="cpu"), torch.arange(400) * 7 % 150
    return [sample("large", embeddings, labels, close(200, 64, torch.float32, "cpu"))]


def of_size(size: Size, device: str) -> Sample:
    """Not normalised: tests that scale the embeddings would see no gradient to the scale."""
    samples, channels, height, width = size
    embeddings = random(samples, channels, dtype=torch.float32, device=device) / channels**0.5
    classes = max(1, height * width)
    labels = torch.arange(samples, device=device) % classes
    return sample("of size", embeddings, labels, close(classes, channels, torch.float32, device), normalize=False)


def shrunk(sample: Sample) -> Sample:
    tensors = {name: tensor if name == "labels" else tensor[:, :5] for name, tensor in sample.tensors.items()}
    return Sample(sample.name, tensors, sample.differentiable, sample.options)


def raw(sample: Sample) -> tuple[Any, ...]:
    options = {**DEFAULTS, **sample.options}
    return *sample.tensors.values(), options["alpha"], options["margin"], options["gamma"], options["normalize"]


# --- what must hold of them -------------------------------------------------------------------------------------------


def support(sample: Sample) -> dict[str, Tensor]:
    """An embedding of length zero has no direction in which it could move."""
    embeddings = sample.tensors["embeddings"]
    rows = torch.ones_like(embeddings, dtype=torch.bool)
    if sample.options.get("normalize", True):
        rows &= (embeddings != 0).any(1, keepdim=True)
    return {"embeddings": rows}


def cancelling(sample: Sample) -> float:
    """What is pulled and pushed along f, which its normalisation takes away again, divided by its length."""
    options = {**DEFAULTS, **sample.options}
    embeddings, labels = sample.tensors["embeddings"].double(), sample.tensors["labels"]
    classes = len(labels.unique())
    shortest, longest = 1.0, largest_finite(embeddings)
    if options["normalize"]:
        lengths = embeddings.norm(dim=1)
        lengths = lengths[lengths.isfinite() & (lengths > 0)]
        shortest, longest = float(lengths.min()) if len(lengths) else 1.0, 1.0
    pull = (1 + options["alpha"]) ** 2 * (longest + largest_finite(sample.tensors["class_means"])) / max(1, len(labels))
    push = options["gamma"] * options["alpha"] * options["margin"] ** 1.5 / max(1, classes)
    return (pull + push) / shortest


def saved() -> list[Saved]:
    """The gradients of both losses, in the dtype of sums."""
    calls = []
    for dtype, number in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        for normalize in (True, False):
            embeddings, labels = random(3, 40, dtype=dtype, device="cpu"), torch.arange(3)
            means = random(5, 40, dtype=dtype, device="cpu", seed=1)
            call = sample(f"normalize={normalize} {dtype}", embeddings, labels, means, normalize=normalize)
            calls.append(Saved(call, 2 * 3 * 40 * number))
    return calls


# --- random arguments -------------------------------------------------------------------------------------------------


def drawn(draw: Draw) -> Sample:
    rows, size = draw.choice([*FEW, 17]), draw.choice([1, 2, 7, 16, 33, 130])
    classes = draw.choice([1, 2, 5, 40, 10000])
    dtype = draw.choice(DTYPES)
    embeddings = drawn_floats(draw, (rows, size), dtype, draw.choice([0.01, 1.0, 20.0]))
    beside = draw.choice([dtype, wide(dtype)])
    means = close(classes, size, beside, "cpu", draw.choice([0.0, 0.2, 3.0]))
    few = draw.integer(0, classes - 1)
    labels = [draw.choice([draw.integer(0, classes - 1), few]) for _ in range(rows)]
    options = {
        "alpha": draw.choice([0, 0.5, 1, draw.number(0.001, 2)]),  # smaller ones are zero or not by the precision
        "margin": draw.choice([0, 0.75, draw.number(0, 4)]),
        "gamma": draw.choice([0, 16, draw.number(0, 20)]),
        "normalize": boolean(draw),
    }
    tensors = {
        "embeddings": embeddings,
        "labels": drawn_vector(draw, torch.tensor(labels, dtype=torch.int64)),
        "class_means": drawn_layout(draw, means),
    }
    return Sample("drawn", tensors, ("embeddings",) if often(draw) else (), options)


def no_numbers(draw: Draw, sample: Sample) -> tuple[str, Any]:
    return "embeddings", sample.tensors["embeddings"].new_zeros(len(sample.tensors["labels"]), 0)


def wrong_means(draw: Draw, sample: Sample) -> tuple[str, Any]:
    right, dtype = sample.tensors["class_means"], sample.tensors["embeddings"].dtype
    classes, size = right.shape
    sizes = [(0, size), (classes, size + 1), (classes, 0), (size * classes,), (1, classes, size)]
    other = right.to(torch.float16 if dtype in (torch.float64, torch.bfloat16) else torch.float64)
    values = [*(right.new_zeros(size) for size in sizes), other, right.long(), right.to(torch.complex64)]
    return "class_means", draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), None, "a"])


FAULTS = (
    wrong_first,
    no_numbers,
    wrong_int64s("labels"),
    wrong("labels", None),
    wrong_label("labels", lambda sample: sample.tensors["class_means"].shape[0]),
    wrong_means,
    *(wrong(name, -0.1, nan, inf, -inf, 1e39, 2**2000, *NO_NUMBERS) for name in ("alpha", "margin", "gamma")),
    wrong("normalize", None, 1, 0.0, "a"),
)

# --- benchmarks -------------------------------------------------------------------------------------------------------

CPU_TARGETS = (Target("eager", at_least=2), Target("torch.compile", at_least=1))
CUDA_TARGETS = (Target("eager", at_least=3),)


def timed(case: Case, device: str) -> Sample:
    samples, size = case.shape
    classes = 200 if size <= 512 else 10000
    embeddings = arrange(random(samples, size, dtype=case.dtype, device=device), case.layout)
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(0)).to(device)
    return sample("timed", embeddings, labels, close(classes, size, torch.float32, device))


def plain(embeddings: Tensor, labels: Tensor, class_means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As one writes it in PyTorch: a pair of classes is met once per pair of their samples, and divided by as many.

    Squared distances come from one matrix product, which loses digits where the reference keeps them.
    """
    alpha, margin, gamma, _ = DEFAULTS.values()
    f = F.normalize(embeddings.float())
    same = labels[:, None] == labels
    members = same.float()
    counts = members.sum(1, keepdim=True)
    before = class_means[labels]
    means = before - alpha * (counts * before - members @ f) / (1 + counts)
    within = (f - means).square().sum() / (2 * len(labels))

    squares = means.square().sum(1)
    distances = squares[:, None] + squares - 2 * (means @ means.T)
    hinges = (margin - distances).relu().square() / (counts * counts.T)
    classes = (1 / counts).sum()
    # Twice every pair, and half as many: 4 · |P| = 2 · classes · (classes − 1).
    total = torch.where(same, 0.0, hinges).sum() / 2
    between = gamma / 2 * total / (classes * (classes - 1)).clamp(min=1)
    return within, between, means.detach()


BENCHMARK = Benchmark(
    sample=timed,
    plain=plain,
    cpu=(Case((32, 512)), Case((32, 512), backward=True, targets=CPU_TARGETS)),
    cuda=(Case((32, 512)), Case((32, 512), backward=True, targets=CUDA_TARGETS)),
    sweep=tuple(
        Case((samples, size), dtype=dtype, backward=backward)
        for samples in (1, 16, 64)
        for size in (64, 512, 2048)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    saves="two numbers per element of the embeddings",
    others={"reference": reference.class_mean_loss},
)

SPEC = Spec(
    name="class_mean_loss",
    function=ops.class_mean_loss,
    reference=reference.class_mean_loss,
    samples=samples,
    empty=empty,
    large=large,
    of_size=of_size,
    raw=raw,
    drawn=drawn,
    faults=FAULTS,
    saved=saved,
    differentiable=("embeddings",),
    constant_results=("batch_means",),
    layouts=MATRIX_LAYOUTS,
    shape="[N,E]",
    shrunk=shrunk,
    support=support,
    cancelling=cancelling,
    benchmark=BENCHMARK,
)
