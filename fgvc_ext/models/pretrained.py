"""Weights to start from: files of torchvision, of timm or of our own, and a report of what did not match."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

HEADS = ("fc.", "classifier.", "head.")  # classifiers of torchvision's, timm's and our models, left out of backbones
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
PARENTS = ("backbone.", "body.model.", "backbone.body.model.")  # where a model of ours keeps its layers, timm's too


@dataclass
class LoadReport:
    """What of a weights file did not match; `resized`: our classifier, for another number of classes."""

    file: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Lines for people; a classifier that the backbone leaves out is not worth mentioning."""
        foreign = [name for name in self.unexpected if not name.startswith(HEADS)]
        lines = [f"{self.file}: {len(self.loaded)} tensors loaded"]
        if self.missing:
            lines.append(f"  not in the file, so they keep their initial values: {', '.join(self.missing)}")
        if self.resized:
            lines.append(f"  of another shape, so they keep their initial values: {', '.join(self.resized)}")
        if foreign:
            lines.append(f"  in the file, but not in the model: {', '.join(foreign)}")
        return "\n".join(lines)


def load_weights(module: nn.Module, file: str | Path) -> LoadReport:
    """Load a safetensors or `.pth` file into a module, as far as names agree; values become the module's dtype.

    A `.pth` is read with `weights_only=True`: it cannot run code. A state dict may lie under "state_dict" or "model",
    and the prefixes of wrappers ("module.", "_orig_mod.") are taken off. The file may be torchvision's, timm's, or one
    of ours (`weights/last.safetensors`), and the module a backbone or a whole model: the prefixes of `PARENTS` are put
    on or taken off where that makes more names agree. A classifier of our own for another number of classes is left
    out, and the report says so.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file of tensors, tensors of another shape (each is named),
            or not a single name that agrees.
    """
    own = module.state_dict()
    names = {_without_wrappers(name): tensor for name, tensor in _read(Path(file)).items()}
    rename = _to_own_names(names, own)
    state = {rename(name): tensor for name, tensor in names.items()}
    shapes = {
        name: f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    }
    resized = [name for name in shapes if name.startswith("classifier.")]
    if wrong := [text for name, text in shapes.items() if name not in resized]:
        raise ValueError(f"weights {file}: wrong shapes:\n  " + "\n  ".join(wrong))
    report = LoadReport(
        str(file),
        loaded=[name for name in own if name in state and name not in shapes],
        # older files lack the counters, which matter only to a BatchNorm without momentum
        missing=[name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        unexpected=[name for name in names if rename(name) not in own],
        resized=[shapes[name] for name in resized],
    )
    if not report.loaded:
        raise ValueError(
            f"weights {file}: no name agrees with the model: the file has {', '.join(list(names)[:3])} …, "
            f"the model {', '.join(list(own)[:3])} …"
        )
    module.load_state_dict({name: state[name].to(own[name].dtype) for name in report.loaded}, strict=False)
    return report


def _to_own_names(names: Collection[str], own: Collection[str]) -> Callable[[str], str]:
    """What to do with the names of a file: put a prefix on or take it off, such that most are the module's own."""
    ways: list[Callable[[str], str]] = [str]
    ways += [_prefix_off(parent) for parent in PARENTS]
    ways += [parent.__add__ for parent in PARENTS]
    return max(ways, key=lambda rename: sum(rename(name) in own for name in names))


def _prefix_off(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _without_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"weights {file} do not exist")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"weights {file}: cannot be read as tensors: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {file}: expected a dictionary of tensors, got {type(state).__name__}")
    return state
