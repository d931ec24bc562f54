"""The folder of a run: its lock, `config.json` and `run.json`."""

from __future__ import annotations

import json
import platform
import socket
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from fgvc_ext._version import __version__
from fgvc_ext.training.config import ConfigMismatch, check_limits, differences, digest, identity, save_config
from fgvc_ext.training.distributed import current_process
from fgvc_ext.training.metrics import MetricFiles
from fgvc_ext.training.run_lock import RunLock, RunLocked
from fgvc_ext.training.state import file_sha256, write_json

__all__ = ["RunFolder", "RunLocked"]


class RunFolder:
    """A run on disk. Use as a context manager: it holds the lock and records how the run ended.

    Args:
        path: the folder; made if missing.
        config: the resolved configuration, a dataclass.
        resume: "auto" goes on with a run that is there, "must" demands one, "never" demands that there is none, and a
            path is a checkpoint of this folder to start the stage from that it belongs to.
        facts: further entries of run.json; `data` (class names, fingerprints) counts as part of the configuration.

    Raises:
        ConfigMismatch: the folder holds a run with another configuration or other data; the message lists what differs.
        RunLocked: another process works in it. ValueError: a field of the configuration is out of its range.
    """

    def __init__(self, path: str | Path, config: Any, *, resume: str = "auto", facts: Mapping[str, Any]) -> None:
        check_limits(config)
        self.path, self.config, self.resume = Path(path), config, resume
        self.identity = {**identity(config), **{f"data set: {k}": v for k, v in facts.get("data", {}).items()}}
        self.config_hash = digest(self.identity)
        self.metrics = MetricFiles(self.path)
        self.file = self.path / "run.json"
        self.data: dict[str, Any] = {}
        self._facts = dict(facts)
        self._lock = RunLock(self.path)
        self._begun = False

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
        current_process()  # several processes are refused before one of them has written anything
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
            self.metrics.events.close()
            status = "finished" if error is None else getattr(error, "status", "failed")
            # A configuration error is the caller's; the run that the folder holds has not changed.
            if self._begun and not isinstance(error, ConfigMismatch):
                self.update(status=status, error=f"{type(error).__name__}: {error}" if status == "failed" else None)
        finally:
            self._begun = False
            self._lock.release()

    def _open(self) -> None:
        there = self.file.exists()
        if self.resume == "never" and there:
            raise FileExistsError(f"{self.path} holds a run already: choose another --out, or --resume auto to go on")
        if self.resume == "must" and not there:
            raise FileNotFoundError(f"nothing to resume: {self.path} holds no run")
        if self.starts_from is not None:
            self._check_start(self.starts_from)
        if there:
            self.data = self._read()
            self.refuse_other(self.data.get("identity", {}), f"the run in {self.path}")
        else:
            save_config(self.config, self.path / "config.json")
            self.data = {**self._facts, "started": _now(), "identity": self.identity, "stages": []}
        self._remove_left_overs()

    def _check_start(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"resume: expected auto, must, never or a checkpoint file, got {self.resume!r}")
        if file.resolve().parent != self.checkpoints.resolve():
            # Its metrics and the stages before it are in the folder it comes from.
            raise ValueError(f"resume: expected a checkpoint in {self.checkpoints}, got {file}: set --out to its run")

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.file.read_text())
        except ValueError as error:
            raise ValueError(f"{self.file} is damaged: {error}; choose another --out to start anew") from None
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
            raise ValueError(f"{self.file} is damaged: no list of stages; choose another --out to start anew")
        return data

    def _remove_left_overs(self) -> None:
        """Unfinished files of a process that was killed while writing: the lock is ours, so it is none that lives."""
        for folder in (self.path, self.checkpoints, self.weights):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)

    def begin(self) -> None:
        """Everything is checked, and training begins: record status and session. Again within a session: nothing."""
        if self._begun:
            return
        self._begun = True
        sessions = self.data.get("sessions", [])
        if not sessions and "command" in self.data:  # an earlier version kept the last session only
            old = {name: self.data.get(name) for name in ("started", "command", "versions", "machine")}
            sessions = [old]
        self.update(
            status="running",
            config_hash=self.config_hash,
            sessions=[*sessions, _session()],
            command=None,
            versions=None,
            machine=None,
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


def _session() -> dict[str, Any]:
    """What one start of the run was: when, how, with what and where."""
    return {
        "started": _now(),
        "command": [sys.executable, *sys.argv],
        "versions": {
            "fgvc_ext": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "machine": {"host": socket.gethostname(), "system": platform.platform(), "threads": torch.get_num_threads()},
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
