"""How a run ends early: a request to stop, and numbers that are no numbers."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that saved its state and can go on."""


class Preempted(Exception):  # noqa: N818 (says what happened)
    """The run was asked to stop and has saved its state."""

    status = "preempted"


class NonFiniteLoss(FloatingPointError):  # noqa: N818 (says what happened)
    """A loss or gradient that is NaN or infinite."""


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a flag that the engine reads between two steps.

    Use as a context manager; outside the main thread, where signals cannot be caught, the flag is never set.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.received = signal.Signals(number)
