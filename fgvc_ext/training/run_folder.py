"""The folder of a run: its lock, `config.json`, `run.json` and the metric files."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torchvision

from fgvc_ext._version import __version__
from fgvc_ext.training.config import ConfigMismatch, differences, digest, identity, save_config
from fgvc_ext.training.state import file_sha256, write_json

COLUMNS = (
    "stage", "epoch", "step", "lr", "train_loss", "train_accuracy", "test_accuracy", "val_accuracy",
    "images_per_second", "data_wait", "seconds",
)  # fmt: skip


class RunLocked(RuntimeError):  # noqa: N818 (says what happened)
    """Another process is working in the run folder."""


class RunLock:
    """`run.lock` holds host and process of the run that is going on; that of a dead process is taken over."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "run.lock"
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}

    def acquire(self) -> None:
        """Raises RunLocked while the owner lives, or may live on another machine."""
        with self._opened() as stream:
            held = _json_or_none(stream.read())
            if held:
                elsewhere = held.get("host") != self.owner["host"]
                if elsewhere or (held.get("started") is not None and _started(held.get("pid")) == held["started"]):
                    hint = f"; if that run is dead, delete {self.file}" if elsewhere else ""
                    raise RunLocked(
                        f"{self.file.parent} is in use by process {held.get('pid')} on {held.get('host')}{hint}"
                    )
            stream.seek(0)
            stream.truncate()
            stream.write(json.dumps(self.owner))

    def release(self) -> None:
        with self._opened() as stream:
            if _json_or_none(stream.read()) == self.owner:
                self.file.unlink(missing_ok=True)

    def _opened(self) -> io.TextIOWrapper:
        """The lock file, held by this process alone until it is closed."""
        while True:
            stream = open(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644), "r+")  # noqa: SIM115
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                if os.fstat(stream.fileno()).st_ino == os.stat(self.file).st_ino:
                    return stream
            except FileNotFoundError:
                pass
            stream.close()  # its owner removed it while we waited: take the new one


def _json_or_none(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _started(pid: Any) -> str | None:
    """When a process started, in clock ticks since boot, which tells it from a later one of the same number."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, ValueError, TypeError, IndexError):
        return "alive" if not Path("/proc/self/stat").exists() and _responds(pid) else None


def _responds(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return False
    return True


class MetricFiles:
    """`metrics.csv` (fixed columns) and `metrics.jsonl` (everything), one line an epoch and stage."""

    def __init__(self, folder: Path) -> None:
        self.csv, self.jsonl = folder / "metrics.csv", folder / "metrics.jsonl"

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one epoch to both and sync them, so that a checkpoint never knows of a line that is not there."""
        line = io.StringIO()
        writer = csv.DictWriter(line, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        if not self.csv.exists() or self.csv.stat().st_size == 0:
            writer.writeheader()
        writer.writerow({name: _short(value) for name, value in row.items()})
        for file, text in ((self.csv, line.getvalue()), (self.jsonl, json.dumps(dict(row)) + "\n")):
            with open(file, "ab") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())

    def offsets(self) -> dict[str, int]:
        """Sizes in bytes, to be kept in a checkpoint."""
        return {file.name: file.stat().st_size if file.exists() else 0 for file in (self.csv, self.jsonl)}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Remove the lines that were written after `offsets` was taken."""
        for file in (self.csv, self.jsonl):
            if file.exists() and file.stat().st_size > offsets[file.name]:
                os.truncate(file, offsets[file.name])


def _short(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


class RunFolder:
    """A run on disk. Use as a context manager: it holds the lock and records how the run ended.

    Args:
        path: the folder; made if missing.
        config: the resolved configuration, a dataclass.
        resume: "auto" goes on with a run that is there, "must" demands one, "never" demands that there is none, and a
            path is a checkpoint to start the stage from that it belongs to.
        facts: further entries of run.json; `data` (class names, fingerprints) counts as part of the configuration.

    Raises:
        ConfigMismatch: the folder holds a run with another configuration or other data; the message lists what differs.
    """

    def __init__(self, path: str | Path, config: Any, *, resume: str = "auto", facts: Mapping[str, Any]) -> None:
        self.path, self.config, self.resume = Path(path), config, resume
        self.identity = {**identity(config), **{f"data set: {k}": v for k, v in facts.get("data", {}).items()}}
        self.config_hash = digest(self.identity)
        self.metrics = MetricFiles(self.path)
        self.file = self.path / "run.json"
        self.data: dict[str, Any] = {}
        self._facts = dict(facts)
        self._lock = RunLock(self.path)

    @property
    def starts_from(self) -> Path | None:
        """The checkpoint that was asked for by path."""
        return None if self.resume in ("auto", "must", "never") else Path(self.resume)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            status = "finished" if error is None else getattr(error, "status", "failed")
            # A configuration error is the caller's; the run that the folder holds has not changed.
            if not isinstance(error, ConfigMismatch):
                self.update(status=status, error=f"{type(error).__name__}: {error}" if status == "failed" else None)
        finally:
            self._lock.release()

    def _open(self) -> None:
        there = self.file.exists()
        if self.resume == "never" and there:
            raise FileExistsError(f"{self.path} holds a run already: choose another --out, or --resume auto to go on")
        if self.resume == "must" and not there:
            raise FileNotFoundError(f"nothing to resume: {self.path} holds no run")
        if self.starts_from is not None and not self.starts_from.is_file():
            raise FileNotFoundError(f"resume: expected auto, must, never or a checkpoint file, got {self.resume!r}")
        if there:
            self.data = json.loads(self.file.read_text())
            self.refuse_other(self.data.get("identity", {}), f"the run in {self.path}")
        else:
            save_config(self.config, self.path / "config.json")
            self.data = {**self._facts, "started": _now(), "identity": self.identity, "stages": []}
        self.update(
            status="running",
            config_hash=self.config_hash,
            command=[sys.executable, *sys.argv],
            versions={
                "fgvc_ext": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            machine={"host": socket.gethostname(), "system": platform.platform(), "threads": torch.get_num_threads()},
        )

    def refuse_other(self, before: Mapping[str, Any], what: str) -> None:
        """Raise ConfigMismatch with the list of differences unless `before` is this run's identity."""
        if lines := differences(before, self.identity):
            raise ConfigMismatch(
                f"{what} has another configuration:\n  " + "\n  ".join(lines) + "\nchoose another --out to start anew"
            )

    def update(self, **values: Any) -> None:
        """Set entries of run.json (None removes one) and write it."""
        self.data.update(values, updated=_now())
        self.data = {name: value for name, value in self.data.items() if value is not None}
        write_json(self.file, self.data)

    def stage(self, name: str) -> dict[str, Any] | None:
        """The entry of a stage in run.json."""
        return next((stage for stage in self.data["stages"] if stage["name"] == name), None)

    def update_stage(self, name: str, **values: Any) -> None:
        stage = self.stage(name)
        if stage is None:
            self.data["stages"].append({"name": name, **values})
        else:
            stage.update(values)
        self.update()

    def is_done(self, name: str) -> bool:
        """True where a stage is finished and its outputs are the files that it wrote."""
        stage = self.stage(name)
        if stage is None or stage.get("status") != "done":
            return False
        outputs = {self.path / file: sha256 for file, sha256 in stage["outputs"].items()}
        return all(file.is_file() and file_sha256(file) == sha256 for file, sha256 in outputs.items())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
