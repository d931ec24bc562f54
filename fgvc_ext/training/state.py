"""Checkpoints that survive what happens to machines.

A checkpoint is a file of `torch.save` and a manifest beside it with size and sha256, written in that order, each to a
temporary file that is synced and then renamed. So a process killed at any moment, or a full disk, leaves the previous
checkpoint as it was, and damage is noticed before anything is loaded. Only tensors and plain Python values are read
(`weights_only=True`): a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

SCHEMA = 1
METADATA_KEY = "fgvc_ext"


class CheckpointCorrupt(RuntimeError):  # noqa: N818 (says what happened)
    """A checkpoint whose bytes are not the ones that were written, or that cannot be read."""


def write_atomically(file: Path, write: Callable[[IO[bytes]], object]) -> tuple[int, str]:
    """Let `write` fill the file; it appears whole or not at all, and what was there before stays until then.

    Returns:
        Size in bytes and sha256 of what was written.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    hashing = None
    try:
        with open(temporary, "wb") as raw:
            hashing = _HashingFile(raw)
            write(hashing)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save answers a full disk with a RuntimeError about its own file format: the cause is the first failure
        cause = hashing.failure if hashing is not None and hashing.failure is not None else error
        if isinstance(error, (OSError, RuntimeError)) and isinstance(cause, OSError):
            told = OSError(f"cannot write {file}: {cause.strerror or cause}")
            told.errno = cause.errno
            raise told from error
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashing.size, hashing.sha256.hexdigest()


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


class Checkpoints:
    """The checkpoints of one stage: `<stage>-e<epoch>-s<step>.pt`, each with its manifest `.json`."""

    def __init__(self, folder: Path, stage: str, keep: int = 2) -> None:
        self.folder, self.stage, self.keep = folder, stage, keep

    def manifests(self) -> list[Path]:
        """Manifests, the newest first."""
        return sorted(self.folder.glob(f"{self.stage}-e*-s*.json"), reverse=True)

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
        """What a process that was killed while writing has left: unfinished files, and checkpoints without manifest."""
        unfinished = self.folder.glob(f".{self.stage}-e*.tmp")
        unnamed = (f for f in self.folder.glob(f"{self.stage}-e*.pt") if not f.with_suffix(".json").exists())
        for file in [*unfinished, *unnamed]:
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


def random_state() -> dict[str, Any]:
    """The generators of torch, Python and NumPy, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))


def save_weights(file: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """Write a model's weights as safetensors and return their sha256.

    The metadata (class names, preprocessing, method, …) is one JSON text under the key "fgvc_ext": safetensors writes
    several keys in random order, and the same model shall give the same bytes.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = json.dumps(metadata, sort_keys=True)
    data = safetensors.torch.save(tensors, {METADATA_KEY: text})
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(file, lambda stream: stream.write(data))[1]


def load_weights_file(file: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and metadata that `save_weights` wrote.

    Raises:
        CheckpointCorrupt: not a whole safetensors file with this package's metadata.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})[METADATA_KEY])
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointCorrupt(f"weights {file}: {type(error).__name__}: {error}") from error
