"""What a driver tells people when something is wrong: one line for what they can mend, a traceback for a bug."""

from __future__ import annotations

import dis
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fgvc_ext.data import BrokenImageError
from fgvc_ext.models import WeightsFileError
from fgvc_ext.training.checkpoints import CheckpointCorrupt
from fgvc_ext.training.run_lock import RunLocked
from fgvc_ext.training.trainer import NonFiniteLoss

if TYPE_CHECKING:
    from fgvc_ext.training.config import RunConfig

PACKAGE = Path(__file__).parents[1]


class OutOfMemory(RuntimeError):  # noqa: N818 (says what happened)
    """A training that does not fit into memory, with the settings that decide how much it needs."""

    def __init__(self, stage: str, config: RunConfig) -> None:
        optim, crop = config.optim, config.data.crop
        size, parts = optim.batch_size, optim.accumulate
        less = f"--optim.accumulate {2 * parts} halves what a step needs, " if 2 * parts <= size else ""
        super().__init__(
            f"out of memory in stage {stage}, with --optim.batch-size {size}, --optim.accumulate {parts} (so "
            f"{-(-size // parts)} images at once), --data.crop {crop} and --engine.eval-batch-size "
            f"{config.engine.eval_batch_size}: {less}a smaller batch needs less in proportion, a smaller crop by its "
            f"square. What has begun keeps its settings: change them with another --out, or --force-stage {stage}"
        )


class ReportFailed(RuntimeError):  # noqa: N818 (says what happened)
    """The training is done, and its report could not be written; the cause is `__cause__`."""


TOLD_IN_ONE_LINE = (
    BrokenImageError, CheckpointCorrupt, NonFiniteLoss, OSError, OutOfMemory, RunLocked, WeightsFileError,
)  # fmt: skip


def is_told_in_one_line(error: BaseException | None, driver: str | None = None) -> bool:
    """Whether an error is an answer to what a user has given; anything else is a bug.

    The classes above are; so is a ValueError or ImportError that a `raise` in the package or in the driver's own file
    has made, as its text was written for people. One that Python, torch or another package has raised is none.
    """
    if isinstance(error, ReportFailed):
        return is_told_in_one_line(error.__cause__, driver)
    if isinstance(error, TOLD_IN_ONE_LINE):
        return True
    if not isinstance(error, (ValueError, ImportError)) or error.__traceback__ is None:
        return False
    frame, position = list(_frames(error))[-1]
    file = Path(frame.co_filename).resolve()
    ours = file.is_relative_to(PACKAGE.resolve()) or (driver is not None and file == Path(driver).resolve())
    return ours and dis.opname[frame.co_code[position]] == "RAISE_VARARGS"


def _frames(error: BaseException) -> Iterator[tuple[Any, int]]:
    """From where an error was caught to where it was raised: code, and the place of the instruction in it."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code, trace.tb_lasti
        trace = trace.tb_next


def is_out_of_memory(error: BaseException) -> bool:
    """True for what CUDA's, torch's CPU or Python's allocator raises that has found no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Within this context the package's own warnings are a line each, without a place in the code."""
    usual = warnings.formatwarning

    def line(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual
