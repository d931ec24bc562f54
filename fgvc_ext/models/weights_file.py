"""The file in which a trained model is kept: safetensors, with everything that is needed to build the model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fgvc_ext.atomic_files import write_atomically

FORMAT = 1
"""Version of what the metadata holds. A file of a later version is refused by name."""
METADATA_KEY = "fgvc_ext"


class WeightsFileError(RuntimeError):
    """A file that is no whole weights file of this package, or one that this version cannot read."""


def save_weights(file: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """Write a model's weights as safetensors and return the file's sha256.

    The metadata (class names, preprocessing, method, settings, …) is one JSON text under the key "fgvc_ext":
    safetensors writes several keys in random order, and the same model shall give the same bytes.
    """
    # Each tensor gets memory of its own: safetensors refuses names that share it.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    data = safetensors.torch.save(tensors, {METADATA_KEY: text})
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(file, lambda stream: stream.write(data))[1]


def load_weights_file(file: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and metadata that `save_weights` wrote, on the CPU.

    Raises:
        WeightsFileError: not a whole safetensors file with this package's metadata, or of a later format.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})[METADATA_KEY])
            if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
                found = metadata.get("format") if isinstance(metadata, dict) else metadata
                raise WeightsFileError(f"weights {file}: expected format {FORMAT}, got {found!r}")
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118 (no mapping)
    except KeyError:
        raise WeightsFileError(f"weights {file}: safetensors, but not written by fgvc_ext") from None
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise WeightsFileError(f"weights {file}: {type(error).__name__}: {error}") from error
