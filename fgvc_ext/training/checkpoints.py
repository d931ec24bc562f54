"""Checkpoints that survive what happens to machines.

A checkpoint is a file of `torch.save` and a manifest beside it with size and sha256, written in that order, each to a
temporary file that is synced and then renamed. So a process killed at any moment, or a full disk, leaves the previous
checkpoint as it was, and damage is noticed before anything is loaded. Only tensors and plain Python values are read
(`weights_only=True`): a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fgvc_ext.atomic_files import file_sha256, write_atomically, write_json

SCHEMA = 1
_NAME = re.compile(r"(?P<stage>.+)-e(?P<epoch>\d{5,})-s\d{9,}")


class CheckpointCorrupt(RuntimeError):  # noqa: N818 (says what happened)
    """A checkpoint whose bytes are not the ones that were written, or that cannot be read."""


def stage_of(file: Path) -> str | None:
    """The stage that a checkpoint belongs to, by its name; None for a file that is no checkpoint."""
    found = _NAME.fullmatch(file.stem)
    return None if found is None else found["stage"]


class Checkpoints:
    """The checkpoints of one stage: `<stage>-e<epoch>-s<step>.pt`, each with its manifest `.json`."""

    def __init__(self, folder: Path, stage: str, keep: int = 2) -> None:
        self.folder, self.stage, self.keep = folder, stage, keep

    def manifests(self) -> list[Path]:
        """Manifests, the newest first."""
        return sorted(self._own(".json"), reverse=True)

    def _own(self, suffix: str) -> list[Path]:
        # The whole name is compared: that of another stage may begin with this one's.
        return [file for file in self.folder.glob(f"*{suffix}") if stage_of(file) == self.stage]

    def newest_epoch(self) -> int:
        """How many whole epochs the newest checkpoint has behind it; 0 where there is none."""
        found = [_NAME.fullmatch(manifest.stem) for manifest in self.manifests()[:1]]
        return max((int(name["epoch"]) for name in found if name is not None), default=0)

    def save(self, state: Mapping[str, Any], *, epoch: int, step: int) -> Path:
        """Write a checkpoint, then remove all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_left_overs()
        file = self.folder / f"{self.stage}-e{epoch:05d}-s{step:09d}.pt"
        size, sha256 = write_atomically(file, lambda stream: torch.save(dict(state), stream))
        write_json(file.with_suffix(".json"), {"schema": SCHEMA, "size": size, "sha256": sha256})
        for manifest in self.manifests()[self.keep :]:
            manifest.unlink()
            manifest.with_suffix(".pt").unlink(missing_ok=True)
        return file

    def _remove_left_overs(self) -> None:
        """What a process that was killed between a checkpoint and its manifest has left."""
        for file in self._own(".pt"):
            if not file.with_suffix(".json").exists():
                file.unlink(missing_ok=True)

    def discard_newer(self, file: Path | None) -> None:
        """Remove the checkpoints after `file` (None: all): else the wrong ones would be kept."""
        for manifest in self.manifests():
            if file is None or manifest.stem > file.stem:
                manifest.unlink()
                manifest.with_suffix(".pt").unlink(missing_ok=True)

    def load_latest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest whole checkpoint and its path; None where none was written. Damaged ones are passed over loudly.

        Raises:
            CheckpointCorrupt: there are checkpoints, and none of them is whole.
        """
        failures = []
        for manifest in self.manifests():
            file = manifest.with_suffix(".pt")
            try:
                state = load_checkpoint(file)
            except CheckpointCorrupt as error:
                failures.append(str(error))
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
                continue
            return state, file
        if failures:
            raise CheckpointCorrupt(f"no checkpoint of {self.folder} is whole: " + "; ".join(failures))
        return None


def load_checkpoint(file: str | Path) -> dict[str, Any]:
    """Verify a checkpoint against its manifest and read it to the CPU.

    Raises:
        CheckpointCorrupt: missing, of another size or hash, of another schema, or holding anything but data.
    """
    path = Path(file)
    try:
        manifest = json.loads(path.with_suffix(".json").read_text())
        size, sha256 = path.stat().st_size, file_sha256(path)
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt(f"checkpoint {path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CheckpointCorrupt(f"checkpoint {path}: expected a manifest of schema {SCHEMA}, got {manifest!r}")
    if size != manifest.get("size"):
        raise CheckpointCorrupt(f"checkpoint {path}: expected {manifest.get('size')} bytes, found {size}")
    if sha256 != manifest.get("sha256"):
        raise CheckpointCorrupt(f"checkpoint {path}: its bytes are not those that were written (sha256 differs)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is not what it should be
        raise CheckpointCorrupt(f"checkpoint {path}: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointCorrupt(f"checkpoint {path}: expected a dictionary, got {type(state).__name__}")
    return state
