"""The format in which an operator describes itself to the tests and benchmarks: one file, ``specs/<op>.py``.

To add an operator, copy ``specs/global_k_max_pool.py``, which shows nearly every field, and edit nothing else: SPECS
below finds the file, and test_contract.py, test_fuzzing.py, test_hostile.py, test_saved_memory.py, the sanitizers and
benchmarks/ take what they need from it. A file may define several specs (``specs/diversify.py``).

A sample is one call of the public function. Its ``tensors`` are keyword arguments, each a tensor or a list of tensors;
the first of them has the layout that was asked for. ``options`` are the other arguments. The function may return a
tensor, a tuple or a NamedTuple, in any dtype.

What has no gradient is said once: an operator without gradient has no ``differentiable`` arguments; results without
gradient stand in ``constant_results``; a floating tensor that is not among ``differentiable`` is a constant, and the
tests check that it gets no gradient even where it requires one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .generators import IMAGE_LAYOUTS, Draw

Size = tuple[int, int, int, int]
Fault = Callable[[Draw, "Sample"], tuple[str, Any]]  # the argument's name and a value that it must not have


@dataclass(frozen=True)
class Sample:
    """A call: ``function(**tensors, **options)``. ``differentiable`` names the tensors that take gradients in it."""

    name: str
    tensors: dict[str, Any]
    differentiable: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> str:
        return next(iter(self.tensors))


@dataclass(frozen=True)
class Saved:
    """What a call keeps for backward: this many new bytes, and of its arguments those in ``keeps``, without a copy."""

    sample: Sample
    new_bytes: int
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """``at_most``: time(ours) / time(other); ``at_least``: time(other) / time(ours)."""

    other: str  # a contender of the case: "eager", "torch.compile", "read once", …
    at_least: float | None = None
    at_most: float | None = None
    text: str = ""  # what the ratio is called in the table
    otherwise: "Target | None" = None  # to meet this one is as good


@dataclass(frozen=True)
class Case:
    """One benchmark: the operator on one shape of its first tensor, in one direction, with the targets it must meet.

    With ``alone``, which goes with ``backward``, forward is not timed: `Benchmark.backward` and plain PyTorch's own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    backward: bool = False
    targets: tuple[Target, ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class Benchmark:
    sample: Callable[[Case, str], Sample]  # (case, device) -> the call that is timed
    plain: Callable[..., Any]  # the same in the best plain PyTorch that we know; takes the sample's arguments
    cpu: tuple[Case, ...]
    cuda: tuple[Case, ...]
    sweep: tuple[Case, ...]  # shapes, dtypes and layouts on which ours must not be slower than plain PyTorch
    # The raw backward operator on what forward saves, for cases of backward alone: its result is the first gradient.
    backward: Callable[[Sample], Callable[[], Tensor]] | None = None
    saves: str = ""  # what is kept for backward, in words, for the table of memory
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # further contenders, for information
    # Ours and plain PyTorch are compared before they are timed. Where `plain` draws random numbers of its own, these
    # options make ours comparable, with the reference in place of `plain`.
    comparable_options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Spec:
    """An operator. The fields up to ``faults`` must be given; the others say what is special about it."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    # (dtype, device, layout) -> samples; the first one is the typical one, with everything on that the operator has.
    samples: Callable[[torch.dtype, str, str], list[Sample]]
    empty: Callable[[], list[Sample]]  # N = 0
    large: Callable[[], list[Sample]]  # float32 on the CPU, enough work for several parallel tasks
    # ((samples, channels, height, width), device) -> a float32 sample as large as that, with what it has of the four.
    # Sizes of other tensors must not equal one of these by chance: torch.compile takes equal sizes for the same. The
    # further maps of a list have multiples of height and width, and as many channels or 32 more: then they begin at a
    # sector of memory where the first one does.
    of_size: Callable[[Size, str], Sample]
    # The arguments of torch.ops.fgvc_ext.<name> for a sample. Its results begin with those of the public function.
    raw: Callable[[Sample], tuple[Any, ...]]
    drawn: Callable[[Draw], Sample]  # a random valid call, for fuzzing
    faults: Sequence[Fault]  # random invalid arguments: an error that begins with the operator's name
    saved: Callable[[], list[Saved]] = list
    differentiable: tuple[str, ...] = ()  # the arguments that have a gradient
    constant_results: tuple[str, ...] = ()  # the results that have none, by the names that `comparison.results` gives
    layouts: tuple[str, ...] = IMAGE_LAYOUTS  # that `samples` makes; MATRIX_LAYOUTS for a first tensor [N,C]
    shape: str = "[N,C,H,W]"  # of the first tensor, as error messages name it
    channels: int | None = None  # of the first tensor, where the operator takes no other number of them
    # A sample with few enough values for gradcheck, which calls the operator twice for each of them.
    shrunk: Callable[[Sample], Sample] = lambda sample: sample
    # Where gradients may differ from zero: {argument: bool tensor}. Elsewhere they must be exactly zero.
    support: Callable[[Sample], dict[str, Tensor]] | None = None
    # The size of terms that may cancel in a gradient, for output gradients of up to 2: fuzzing allows their roundings.
    cancelling: Callable[[Sample], float] = lambda sample: 0.0
    # The same of the results, where their terms may be larger than the arguments.
    cancelling_results: Callable[[Sample], float] = lambda sample: 0.0
    folds_vmap: bool = False  # vmap over the first tensor is one call on a larger batch, not one call per element
    benchmark: Benchmark | None = None

    @property
    def image_like(self) -> bool:
        return "channels_last" in self.layouts


def _found() -> list[Spec]:
    names = sorted(path.stem for path in (Path(__file__).parent / "specs").glob("[a-z]*.py"))
    modules = [import_module(f"{__package__}.specs.{name}") for name in names]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Spec)]


def __getattr__(name: str) -> Any:
    """``SPECS``, at its first use: the specs import this module."""
    if name != "SPECS":
        raise AttributeError(name)
    globals()["SPECS"] = _found()
    return globals()["SPECS"]
