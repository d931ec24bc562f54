"""Files that appear whole or not at all: what is synced, in which order, and whose left-overs are removed."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from toy_training import ToyConfig, open_run

from fgvc_ext.atomic_files import write_atomically
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.metrics import MetricFiles


def _write(file, content: bytes = b"new"):
    return write_atomically(file, lambda stream: stream.write(content))


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What is asked of the system, in its order: ("sync", inode) and ("rename", inode)."""
    found: list[tuple] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(("sync", os.fstat(handle).st_ino)) or sync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: found.append(("rename", os.stat(a).st_ino)) or rename(a, b))
    return found


def test_content_is_synced_before_the_name_and_the_name_after(calls, tmp_path):
    """Else a power failure leaves an empty file under the new name, or the old one."""
    file = tmp_path / "file"
    _write(file)
    content, folder = file.stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("sync", content), ("rename", content), ("sync", folder)]


def test_a_checkpoint_and_its_manifest_are_synced_in_their_order(calls, tmp_path):
    file = Checkpoints(tmp_path, "s").save({"step": 1}, epoch=0, step=1)
    renamed = [inode for kind, inode in calls if kind == "rename"]
    assert renamed == [file.stat().st_ino, file.with_suffix(".json").stat().st_ino]
    assert len([kind for kind, _ in calls if kind == "sync"]) == 4


def test_lines_of_metrics_are_synced(calls, tmp_path):
    """A checkpoint is written after them: it must not know of a line that is lost in a power failure."""
    metrics = MetricFiles(tmp_path)
    for epoch in (1, 2):
        calls.clear()
        metrics.append({"stage": "a", "epoch": epoch, "step": epoch})
    files = [(tmp_path / name).stat().st_ino for name in ("metrics.csv", "metrics.jsonl")]
    assert calls == [("sync", inode) for inode in files]


@pytest.fixture
def folders_answer(monkeypatch):
    """Lets syncing a folder fail with an error; files are synced as ever."""

    def answer(code: int) -> None:
        sync = os.fsync

        def refuse(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(code, os.strerror(code))
            sync(handle)

        monkeypatch.setattr(os, "fsync", refuse)

    return answer


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_syncing_of_folders_is_good_enough(code, folders_answer, tmp_path):
    folders_answer(code)
    assert _write(tmp_path / "file")[0] == 3
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_folder_that_could_not_be_synced_is_an_error_that_names_the_file(code, folders_answer, tmp_path):
    folders_answer(code)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file: {os.strerror(code)}") as caught:
        _write(tmp_path / "file")
    assert caught.value.errno == code


def test_a_folder_that_may_not_be_read_is_written_to(monkeypatch, tmp_path):
    usual = os.open

    def refuse(path, flags, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    _write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"


def _left_by_a_killed_process(folder) -> list[str]:
    """Kills a process within `write_atomically`; the names of what it has left."""
    folder.mkdir(exist_ok=True)
    before = set(os.listdir(folder))
    child = os.fork()
    if child == 0:
        write_atomically(folder / "file", lambda stream: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    return sorted(set(os.listdir(folder)) - before)


def test_of_unfinished_files_only_our_own_are_removed(tmp_path):
    """`--out .` may be a folder of the user's."""
    own = [".notes.2024.tmp", ".a.1.tmp", ".run.json.17.tmp", "x.tmp", ".tmp", ".file.123.swp"]
    for name in own:
        (tmp_path / name).write_text("mine")
    folders = [tmp_path, *(tmp_path / name for name in ("checkpoints", "weights", "artefacts"))]
    left = [folder / name for folder in folders for name in _left_by_a_killed_process(folder)]
    assert len(left) == 4
    with open_run(tmp_path, ToyConfig()):
        assert not any(file.exists() for file in left)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == sorted(own)
