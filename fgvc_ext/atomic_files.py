"""Files that appear whole or not at all, whatever happens to the process that writes them, their hashes and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})
"""What a file system without locks answers to who asks for one."""
_UNFINISHED = ".fgvc_ext-unfinished"  # how a file's name ends while it is written; no user's file ends so
# What a file system answers that has no such thing as syncing a folder, or does not let us: then nobody could do more.
_NOT_FOR_FOLDERS = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR,
}  # fmt: skip


def write_atomically(file: Path, write: Callable[[IO[bytes]], object]) -> tuple[int, str]:
    """Let `write` fill the file; it appears whole or not at all, and what was there before stays until then.

    Returns:
        Size in bytes and sha256 of what was written.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}{_UNFINISHED}")
    hashing = None
    try:
        with open(temporary, "wb") as raw:
            hashing = _HashingFile(raw)
            write(hashing)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, file)
        _sync_folder(file.parent)  # else the new name may be forgotten in a power failure
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save answers a full disk with a RuntimeError about its own file format: the cause is the first failure
        cause = hashing.failure if hashing is not None and hashing.failure is not None else error
        if isinstance(error, (OSError, RuntimeError)) and isinstance(cause, OSError):
            told = OSError(f"cannot write {file}: {cause.strerror or cause}")
            told.errno = cause.errno
            raise told from error
        raise
    return hashing.size, hashing.sha256.hexdigest()


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise


def remove_unfinished(folder: Path) -> None:
    """Remove what processes have left that were killed within `write_atomically`. Nobody may be writing there now."""
    for file in folder.glob(f".*{_UNFINISHED}"):
        file.unlink(missing_ok=True)


class _HashingFile:
    """Write-only file that hashes on the way (torch.save writes forwards only)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        self.size += len(view)
        try:
            written = self.file.write(view)
            if written != len(view):
                raise OSError(f"{written} of {len(view)} bytes were written")
        except OSError as error:
            self.failure = self.failure or error
            raise
        return written

    def flush(self) -> None:
        self.file.flush()


def file_sha256(file: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: IO[bytes]) -> str:
    result = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        result.update(chunk)
    return result.hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(file, lambda stream: stream.write((json.dumps(value, indent=2) + "\n").encode()))
