"""How a run is asked to stop, and what it answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that saved its state and can go on."""


class Preempted(Exception):  # noqa: N818 (says what happened)
    """The run was asked to stop and has saved its state."""

    status = "preempted"


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a flag that the engine reads between two steps.

    Use as a context manager, also within itself; outside the main thread, where signals cannot be caught, the flag is
    never set.
    """

    _depth = 0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._nothing_to_save = ""

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """Within this context a signal raises Preempted where it arrives: `what` is made anew, so nothing is saved.

        One that has arrived before raises it at once.
        """
        self._nothing_to_save = what
        try:
            self._raise_if_received()
            yield
        finally:
            self._nothing_to_save = ""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.received = signal.Signals(number)
        if self._nothing_to_save:
            self._raise_if_received()

    def _raise_if_received(self) -> None:
        if self.received is not None:
            raise Preempted(f"{self.received.name} received; {self._nothing_to_save} will be made anew")
