"""What is measured: a case is one operator on one shape in one direction, with the targets that it must meet there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import Contender, Times
from torch import Tensor

from fgvc_ext import _library

OURS, EAGER, COMPILED, REFERENCE = "fgvc_ext", "eager", "torch.compile", "reference"
READ_ONCE, COPY, FLOOR = "read once", "copy", "floor"
Function = Callable[..., Tensor]
FLOOR_FACTOR, FLOOR_MARGIN = 5, 1e-6  # below 5 call floors of eager PyTorch, ours may take the floor and a microsecond


@dataclass(frozen=True)
class Target:
    """``at_most``: time(ours) / time(other); ``at_least``: time(other) / time(ours)."""

    other: str
    at_least: float | None = None
    at_most: float | None = None
    text: str = ""

    def verdict(self, times: Times) -> "Verdict":
        if self.at_least is not None:
            ratio = times.ratio(self.other, OURS)
            what, wanted, passed = f"{self.other} / ours", f"≥ {self.at_least:g}", ratio >= self.at_least
        else:
            ratio = times.ratio(OURS, self.other)
            what, wanted, passed = f"ours / {self.other}", f"≤ {self.at_most:g}", ratio <= self.at_most
        return Verdict(self.text or what, f"{ratio:.3g}", wanted, passed)


@dataclass(frozen=True)
class Verdict:
    what: str
    measured: str
    wanted: str
    passed: bool


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    backward: bool = False
    targets: tuple[Target, ...] = ()
    sweep: bool = False

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        layout = "" if self.layout == "contiguous" else f" {self.layout}"
        return f"{list(self.shape)} {self.dtype_name}{layout} {self.direction}"

    def verdicts(self, times: Times) -> list[Verdict]:
        return [*(target.verdict(times) for target in self.targets), never_slower(times)]

    def input(self, device: str) -> Tensor:
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(device, self.dtype)
        if self.layout == "channels_last":
            values = values.to(memory_format=torch.channels_last)
        return values.requires_grad_(self.backward)


def never_slower(times: Times) -> Verdict:
    """Every shape: no slower than plain PyTorch or, where that is little more than calls cost, than the bare call."""
    floor = times.median(FLOOR)
    if times.median(EAGER) < FLOOR_FACTOR * floor:
        over = times.median(OURS) - floor
        return Verdict("ours − floor", f"{over * 1e6:.2f} µs", f"≤ {FLOOR_MARGIN * 1e6:g} µs", over <= FLOOR_MARGIN)
    slower = max((name for name in (EAGER, COMPILED) if name in times.samples), key=times.median)
    ratio = times.ratio(OURS, slower)
    return Verdict("ours / max(eager, torch.compile)", f"{ratio:.3g}", "≤ 1", ratio <= 1)


def contenders(
    case: Case,
    instruction_sets: list[str],
    arguments: tuple[Tensor, ...],
    *,
    our: Function,
    plain: Function,
    nothing: Function,
    slow: Function | None = None,
) -> list[Contender]:
    """Ours, plain PyTorch, the same compiled, yardsticks, the do-nothing operator; ``slow``: the reference."""
    every = [
        *ours(instruction_sets, direction(case, our, *arguments)),
        Contender(EAGER, direction(case, plain, *arguments)),
        Contender(COMPILED, direction(case, compiled(plain, case), *arguments)),
        *yardsticks(case, arguments[0]),
        Contender(FLOOR, direction(case, nothing, *arguments)),
    ]
    if slow is not None and not case.sweep:
        every.append(Contender(REFERENCE, direction(case, slow, *arguments)))
    return every


def direction(case: Case, function: Function, first: Tensor, *rest: Any) -> Callable[[], Any]:
    """The call that is timed: ``function(first, *rest)``, with the gradient to ``first`` where the case asks for it."""
    if not case.backward:
        return lambda: function(first, *rest)
    grad = torch.ones_like(function(first, *rest))
    return lambda: torch.autograd.grad(function(first, *rest), first, grad)


def ours(instruction_sets: list[str], call: Callable[[], Any]) -> list[Contender]:
    """Our operator, once for each instruction set; the first one is held to the targets."""
    if not instruction_sets:
        return [Contender(OURS, call)]
    return [
        Contender(OURS if number == 0 else f"{OURS} {name}", call, lambda name=name: use_instruction_set(name))
        for number, name in enumerate(instruction_sets)
    ]


def use_instruction_set(name: str) -> None:
    _library._module.use_instruction_set(name)


def yardsticks(case: Case, x: Tensor) -> list[Contender]:
    """The time to move the bytes that must move: forward reads the tensor, backward also writes one of its size."""
    values = x.detach()
    other = torch.empty_like(values)
    if not case.backward:
        sticks = [Contender(READ_ONCE, values.sum)]
    else:
        sticks = [Contender("read and write once", lambda: (values.sum(), other.zero_()))]
    if x.device.type == "cuda":
        sticks.append(Contender(COPY, lambda: other.copy_(values)))
    return sticks


_compiled: dict[tuple[Function, bool], Function] = {}


def compiled(function: Function, case: Case) -> Function:
    """A headline case gets code for its own shape; the sweep shares one compilation with dynamic shapes."""
    key = (function, case.sweep)
    if key not in _compiled:
        _compiled[key] = torch.compile(function, dynamic=case.sweep)
    return _compiled[key]
