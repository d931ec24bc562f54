"""The lock of a run folder: one process at a time, whoever comes between opening and locking."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket

import pytest
from toy_training import ToyConfig, open_run

from fgvc_ext.training.run_lock import RunLock, RunLocked


def test_it_says_whose_it_is_and_is_gone_afterwards(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads(lock.file.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    with pytest.raises(RunLocked, match=f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}"):
        RunLock(tmp_path).acquire()
    lock.release()
    assert not lock.file.exists()
    RunLock(tmp_path).acquire()


def test_one_that_never_had_it_does_not_remove_it(tmp_path):
    lock, other = RunLock(tmp_path), RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(RunLocked):
        other.acquire()
    other.release()
    assert lock.file.exists()
    with pytest.raises(RunLocked):
        other.acquire()


def _before_the_first_lock(monkeypatch, happens) -> None:
    """Lets something happen after the file was opened, before it is locked for the first time."""
    usual, calls = fcntl.flock, []

    def flock(stream, kind):
        calls.append(1)
        if len(calls) == 1:
            happens()
        usual(stream, kind)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_that_its_owner_has_just_removed_is_not_the_lock(monkeypatch, tmp_path):
    former, lock = RunLock(tmp_path), RunLock(tmp_path)
    former.acquire()
    _before_the_first_lock(monkeypatch, former.release)
    lock.acquire()
    assert lock.file.exists()
    with pytest.raises(RunLocked):
        RunLock(tmp_path).acquire()


def test_a_file_that_another_has_made_anew_is_the_others(monkeypatch, tmp_path):
    """Opened before the former owner removed it, locked after the next has made and locked its own."""
    former, following, lock = (RunLock(tmp_path) for _ in range(3))
    former.acquire()

    def hand_over() -> None:
        former.release()
        following.acquire()

    _before_the_first_lock(monkeypatch, hand_over)
    with pytest.raises(RunLocked):
        lock.acquire()
    following.release()
    lock.acquire()


def test_a_file_system_without_locks_is_warned_of(monkeypatch, tmp_path):
    def refuse(stream, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="lies on a file system without locks: start no second run"):
        RunLock(tmp_path).acquire()


def test_another_error_of_the_system_is_raised(monkeypatch, tmp_path):
    def fail(stream, kind):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path).acquire()


def test_a_folder_that_cannot_be_opened_is_not_locked(tmp_path):
    (tmp_path / "run.json").write_text("{")
    run = open_run(tmp_path, ToyConfig())
    with pytest.raises(ValueError, match="damaged"), run:
        pytest.fail("it was opened")
    RunLock(tmp_path).acquire()


def test_a_fork_does_not_hold_it(tmp_path):
    """A process that loads images lives a little longer than the run: the next one must not wait for it."""
    lock = RunLock(tmp_path)
    lock.acquire()
    (wait, go_on), (ready, say) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go_on)
        os.write(say, b"!")
        os.read(wait, 1)  # lives until the test is over
        os._exit(0)
    os.read(ready, 1)
    lock._stream.close()  # as the end of a killed process does; the file stays
    RunLock(tmp_path).acquire()
    os.close(go_on)
    os.waitpid(child, 0)
