"""The lock of a run folder: held while the process lives, gone with it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import warnings
import weakref
from pathlib import Path
from typing import Any

from fgvc_ext.atomic_files import NO_LOCKS


class RunLocked(RuntimeError):  # noqa: N818 (says what happened)
    """Another process is working in the run folder."""


class RunLock:
    """`run.lock`, locked by the system for as long as its process lives, so that a killed run never blocks the next.

    The file says which process on which machine holds it; that is for people, the lock itself is the system's.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "run.lock"
        self._stream: io.TextIOWrapper | None = None

    def acquire(self) -> None:
        """Raises RunLocked while another process holds it."""
        stream = self._opened()
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        stream.flush()
        self._stream = stream
        _held.add(self)

    def release(self) -> None:
        if self._stream is not None:
            self.file.unlink(missing_ok=True)
            self.forget()

    def forget(self) -> None:
        """Close this process' handle; the lock lasts while another has it open."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _opened(self) -> io.TextIOWrapper:
        while True:
            stream = open(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644), "r+")  # noqa: SIM115
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _json_or_empty(stream.read())
                stream.close()
                raise RunLocked(
                    f"{self.file.parent} is in use by process {owner.get('pid')} on {owner.get('host')}"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                where = f"{self.file.parent} lies on a file system without locks"
                warnings.warn(f"{where}: start no second run in it", stacklevel=2)
            try:
                if os.fstat(stream.fileno()).st_ino == os.stat(self.file).st_ino:
                    return stream
            except FileNotFoundError:
                pass
            stream.close()  # its owner removed it between our opening and locking it: take the new one


def _json_or_empty(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# A process that loads images is a fork: with the handle it would hold the lock for seconds after a run was killed.
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)
