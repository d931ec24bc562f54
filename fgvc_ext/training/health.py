"""Steps that were not finite: counted on the device, looked at now and then, so that no step waits for the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Findings:
    """What the host finds when it looks. Counts are since the training began."""

    skipped: int = 0
    """Steps left out because the loss or a gradient was not finite."""
    overflows: int = 0
    """Steps left out because the scale of fp16 was too large: it is halved then, and nothing is wrong."""
    failed_at: int | None = None
    """The first of more skipped steps in a row than are allowed: the training must stop."""
    problem: str = ""
    """What was wrong with that one."""


class Health:
    """Decides on the device whether a step may be taken, and counts there those that may not.

    Args:
        allowed: steps in a row that may be left out before the training must stop.
    """

    def __init__(self, device: torch.device, allowed: int) -> None:
        self.device, self.allowed = device, allowed
        zero = torch.zeros((), dtype=torch.float64, device=device)  # exact for integers too, so one read brings all
        self._skipped, self._overflows = zero, zero
        # Of the present row of skipped steps; once it is too long, nothing changes any more.
        self._in_a_row, self._first, self._loss, self._loss_is_finite = zero, zero, zero, zero

    def note(
        self, step: int, loss: Tensor, loss_is_finite: Tensor, gradients_are: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Count a step; returns whether it may be taken, bool [] on the device.

        Args:
            loss: this process' own. `loss_is_finite`, `gradients_are`: in all processes.
            scale: that of fp16. While it magnifies, gradients that are not finite are its own doing.
        """
        usable = loss_is_finite & gradients_are
        overflow = loss_is_finite & ~gradients_are & (scale >= 1) if scale is not None else torch.zeros_like(usable)
        bad, failed = ~usable & ~overflow, self._in_a_row > self.allowed
        begins = bad & (self._in_a_row == 0)
        self._first = torch.where(begins, float(step), self._first)
        self._loss = torch.where(begins, loss.double(), self._loss)
        self._loss_is_finite = torch.where(begins, loss_is_finite.double(), self._loss_is_finite)
        # A step that overflowed says nothing about the others: the row neither grows nor ends.
        self._in_a_row = torch.where(usable & ~failed, 0.0, self._in_a_row + bad)
        self._skipped, self._overflows = self._skipped + bad, self._overflows + overflow
        return usable

    def look(self) -> Findings:
        """Wait for the device, and read what it has counted."""
        skipped, overflows, in_a_row, first, loss, loss_is_finite = self._values().tolist()
        found = Findings(int(skipped), int(overflows))
        if in_a_row <= self.allowed:
            return found
        if loss_is_finite:
            problem = "a gradient is not finite"
        else:
            problem = "the loss of another process is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        return Findings(found.skipped, found.overflows, int(first), problem)

    def _values(self) -> Tensor:
        names = ("_skipped", "_overflows", "_in_a_row", "_first", "_loss", "_loss_is_finite")
        return torch.stack([getattr(self, name) for name in names])

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint."""
        return {"counts": self._values()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned."""
        values = state["counts"].to(self.device)
        self._skipped, self._overflows, self._in_a_row, self._first, self._loss, self._loss_is_finite = values.unbind()
