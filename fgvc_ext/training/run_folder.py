"""The folder of a run: its lock, `config.json`, `run.json`, and where everything else in it lies."""

from __future__ import annotations

import json
import platform
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from fgvc_ext._version import __version__
from fgvc_ext.atomic_files import file_sha256, remove_unfinished, write_json
from fgvc_ext.training import distributed
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.config import check_limits, defaults, differences, digest, identity, save_config
from fgvc_ext.training.device import describe_device
from fgvc_ext.training.metrics import MetricFiles
from fgvc_ext.training.run_lock import RunLock, RunLocked

__all__ = ["RunFolder", "RunLocked", "read_run"]


class RunFolder:
    """A run on disk. Use as a context manager: it holds the lock and records how the run ended.

    Only the main process reads and writes; what it finds is the same for all (`distributed.on_main`).

    Args:
        path: the folder; made if missing.
        config: the resolved configuration, a dataclass.
        resume: "auto" goes on with a run that is there, "must" demands one, "never" demands that there is none, and a
            path is a checkpoint of this folder to start the stage from that it belongs to.
        facts: further entries of run.json; `data` (class names, fingerprints) is part of the identity of every stage,
            the hash of `weights` (to start from) of the run's.

    Raises:
        RunLocked: another process works in it. ValueError: a field of the configuration is out of its range.
    """

    def __init__(self, path: str | Path, config: Any, *, resume: str = "auto", facts: Mapping[str, Any]) -> None:
        check_limits(config)
        self.path, self.config, self.resume = Path(path), config, resume
        self.data_identity = {f"data set: {name}": value for name, value in facts.get("data", {}).items()}
        weights = facts.get("weights", {})
        self.identity = {
            **identity(config),
            **self.data_identity,
            "weights": weights.get("sha256", weights.get("name")),
        }
        self.config_hash = digest(self.identity)
        self.metrics = MetricFiles(self.path)
        self.file = self.path / "run.json"
        self.data: dict[str, Any] = {}
        self._facts = dict(facts)
        self._lock = RunLock(self.path)
        self._begun = self._compared = False
        self._order: Sequence[str] = ()

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

    @property
    def artefacts(self) -> Path:
        return self.path / "artefacts"

    def best_weights_of(self, stage: str) -> Path:
        """The weights of a stage's best epoch on validation images; a dot cannot be in the name of another stage."""
        return self.weights / f"{stage}.best.safetensors"

    def checkpoints_of(self, stage: str) -> Checkpoints:
        return Checkpoints(self.checkpoints, stage)

    def __enter__(self) -> RunFolder:
        self.data = distributed.on_main(self._acquire)
        return self

    def _acquire(self) -> dict[str, Any]:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            return self._open()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.metrics.events.close()
            status = "finished" if error is None else getattr(error, "status", "failed")
            if self._begun:  # before that, the run that the folder holds has not changed
                self.update(status=status, error=f"{type(error).__name__}: {error}" if status == "failed" else None)
        finally:
            self._begun = False
            self._lock.release()

    def _open(self) -> dict[str, Any]:
        there = self.file.exists()
        if self.resume == "never" and there:
            raise FileExistsError(f"{self.path} holds a run already: choose another --out, or --resume auto to go on")
        if self.resume == "must" and not there:
            raise FileNotFoundError(f"nothing to resume: {self.path} holds no run")
        if self.starts_from is not None:
            self._check_start(self.starts_from)
        data = read_run(self.file) if there else {"started": _now(), "stages": []}
        self._remove_left_overs()
        return data

    def _check_start(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"resume: expected auto, must, never or a checkpoint file, got {self.resume!r}")
        if file.resolve().parent != self.checkpoints.resolve():
            # Its metrics and the stages before it are in the folder it comes from.
            raise ValueError(f"resume: expected a checkpoint in {self.checkpoints}, got {file}: set --out to its run")

    def _remove_left_overs(self) -> None:
        """Unfinished files of a process that was killed while writing: the lock is ours, so it is none that lives."""
        for folder in (self.path, self.checkpoints, self.weights, self.artefacts):
            remove_unfinished(folder)

    def is_of(self, run: Mapping[str, Any]) -> bool:
        """Whether a run.json is that of a run with this configuration and these data."""
        before = run.get("identity")
        return before is not None and not differences(before, self.identity, defaults(self.config))

    def begin(self, device: torch.device) -> None:
        """Everything is checked, and training begins: record configuration, status and session; once in a session."""
        if self._begun:
            return
        self._begun = True
        if distributed.is_main():
            save_config(self.config, self.path / "config.json")
        self.update(
            **self._facts,
            status="running",
            identity=self.identity,
            config_hash=self.config_hash,
            sessions=[*self.data.get("sessions", []), _session(device)],
            error=None,
        )

    def compare_sessions(self) -> None:
        """Something is to be computed: warn, once, if the last session had what gives other bits than this one."""
        sessions = self.data.get("sessions", [])
        if self._compared or len(sessions) < 2 or not distributed.is_main():
            return
        self._compared = True
        before, now = (_what_decides_bits(session) for session in sessions[-2:])
        changes = [f"{name} was {before[name]} and is {now[name]}" for name in now if before[name] != now[name]]
        if changes:
            bits = "the run goes on, but may not end with the bits of one that was never interrupted"
            warnings.warn(f"{self.path}: since the last session, {', '.join(changes)}: {bits}", stacklevel=2)

    def update(self, **values: Any) -> None:
        """Set entries of run.json (None removes one) and write it."""
        self.data.update(values, updated=_now())
        self.data = {name: value for name, value in self.data.items() if value is not None}
        if distributed.is_main():
            write_json(self.file, self.data)

    def entry(self, name: str) -> dict[str, Any] | None:
        """What run.json says of a stage or artefact; None for one that was never begun."""
        return next((entry for entry in self.data["stages"] if entry["name"] == name), None)

    def identity_of(self, name: str, unknown: Mapping[str, Any] = MappingProxyType({})) -> Mapping[str, Any]:
        """The identity under which a stage or artefact was begun; `unknown` for one that never was."""
        entry = self.entry(name)
        return unknown if entry is None else entry["identity"]

    def epochs_of(self, name: str) -> int:
        """How many epochs of a stage are trained, whole ones."""
        entry = self.entry(name) or {}
        return max(entry.get("epoch", 0), self.checkpoints_of(name).newest_epoch())

    def update_entry(self, name: str, **values: Any) -> None:
        """Set fields of a stage's entry, which is made where there is none."""
        entry = self.entry(name)
        if entry is None:
            self.data["stages"].append({"name": name, **values})
            self.arrange(self._order)
        else:
            entry.update(values)
        self.update()

    def arrange(self, names: Sequence[str]) -> None:
        """List the stages in this order, those that the run has no more before them: whoever reads run.json takes the
        last for the result, also where an earlier one is done again."""
        self._order = names
        place = {name: number for number, name in enumerate(names)}
        self.data["stages"] = sorted(self.data["stages"], key=lambda entry: place.get(entry["name"], -1))

    def forget(self, name: str) -> None:
        """Remove a stage's entry: it is to be done again, and what it has left is removed when it begins."""
        self.update(stages=[entry for entry in self.data["stages"] if entry["name"] != name])

    def is_done(self, name: str) -> bool:
        """True where a stage is finished and its output is the file that it wrote."""
        entry = self.entry(name)
        if entry is None or entry.get("status") != "done":
            return False
        outputs = {self.path / file: sha256 for file, sha256 in entry["outputs"].items()}
        return all(file.is_file() and file_sha256(file) == sha256 for file, sha256 in outputs.items())


def read_run(file: Path) -> dict[str, Any]:
    """The content of a run.json. ValueError where it is damaged."""
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; choose another --out to start anew") from None
    if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
        raise ValueError(f"{file} is damaged: no list of stages; choose another --out to start anew")
    return data


def _session(device: torch.device) -> dict[str, Any]:
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
        "processes": distributed.current_process().world_size,
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": describe_device(device),
        },
    }


def _what_decides_bits(session: Mapping[str, Any]) -> dict[str, Any]:
    """Of a session: what decides in which order sums are made. What an older version has not recorded is unknown."""
    machine = session.get("machine", {})
    found = {"torch": session.get("versions", {}).get("torch")}
    found |= {"number of threads": machine.get("threads"), "device": machine.get("device")}
    return {name: "unknown" if value is None else value for name, value in found.items()}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
