"""Loading a file of weights into a network: torchvision's, timm's or one of our own, and saying what did not match."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.model import Model, backbone_groups
from fgvc_ext.models.timm_backbone import TimmBackbone

HEADS = ("fc.", "classifier.", "head.")  # classifiers of torchvision's, timm's and our models, left out of backbones
LATER = ("localiser.", "pooling.")  # what ELoPE's network has from later stages than the one that starts from a file
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # "denselayer3.norm.1.weight"
PARENTS = ("backbone.", "body.model.", "backbone.body.model.")  # where a model of ours keeps its layers, timm's too


@dataclass
class LoadReport:
    """What was loaded from a weights file, and what kept its initial values."""

    file: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names that the file lacks: of the classifier, and of other layers that start at random."""
    resized: list[str] = field(default_factory=list)
    """Our classifier, for another number of classes."""
    interpolated: list[str] = field(default_factory=list)
    """Position embeddings and the like of another grid, which timm has fitted to the model's."""
    left_out: list[str] = field(default_factory=list)
    """What the file has and the model lacks: a classifier, or what later stages of a run have added."""

    def text(self) -> str:
        """Lines for people; that a backbone has no use for the file's classifier is not worth mentioning."""
        lines = [f"{self.file}: {len(self.loaded)} tensors loaded"]
        if self.missing:
            lines.append(f"  not in the file, so they keep their initial values: {', '.join(self.missing)}")
        if self.resized:
            lines.append(f"  of another shape, so they keep their initial values: {', '.join(self.resized)}")
        if self.interpolated:
            lines.append(f"  of another grid, so they were interpolated: {', '.join(self.interpolated)}")
        return "\n".join(lines)


def load_weights(module: nn.Module, file: str | Path, *, new_layers: Collection[str] = ("classifier",)) -> LoadReport:
    """Load a safetensors or `.pth` file into a module; values become the module's dtype.

    A `.pth` is read with `weights_only=True`: it cannot run code. A state dict may lie under "state_dict" or "model",
    and the prefixes of wrappers ("module.", "_orig_mod.") are taken off. The file may be torchvision's, timm's, or one
    of ours (`weights/last.safetensors`), and the module a backbone or a whole model: the prefixes of `PARENTS` are put
    on or taken off where that makes more names agree. For a backbone of timm, timm itself converts what does not fit:
    it interpolates position embeddings of another grid, and the report says so.

    The names must be the module's, but for classifiers: the module's own may be missing or be for another number of
    classes (it then keeps its initial values, and the report says so), the file's may be one that the module lacks.
    Parts that a model names in `trained_before` stay as they are, whatever the file has. A model of several backbones
    (`networks()`) takes a file of one backbone for each of them; a file of its own has their names.

    Args:
        new_layers: groups of layers (`parameter_groups()` of a model, `groups()` of a backbone) that the file may lack
            beside "classifier", because they are to start at random.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file of tensors, names that are missing or that the module
            does not have, or tensors of another shape (each is named).
    """
    kept = tuple(f"{part}." for part in getattr(module, "trained_before", ()))
    own = {name: value for name, value in module.state_dict().items() if not name.startswith(kept)}
    names = {_own_spelling(name): tensor for name, tensor in _read(Path(file)).items()}
    names, interpolated = _converted_by_timm(module, names)
    names = _for_each_network(module, names)
    rename = _to_own_names(names, own)
    state = {rename(name): tensor for name, tensor in names.items()}
    shapes = {
        name: f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    }
    heads = _layers_of(module, ())
    resized = [name for name in shapes if name.startswith("classifier.") or name.rpartition(".")[0] in heads]
    # older files lack the counters, which matter only to a BatchNorm without momentum
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in names if rename(name) not in own]
    if len(unexpected) == len(names):
        raise ValueError(
            f"weights {file}: no name agrees with the model: the file has {_listed(list(names))}, "
            f"the model {_listed(list(own))}"
        )
    fresh = _layers_of(module, new_layers)
    _refuse(
        file,
        missing=[name for name in missing if name.rpartition(".")[0] not in fresh],
        unexpected=[name for name in unexpected if not name.startswith((*HEADS, *LATER))],
        reshaped=[text for name, text in shapes.items() if name not in resized],
    )
    loaded = [name for name in own if name in state and name not in shapes]
    module.load_state_dict({name: state[name] for name in loaded}, strict=False)
    return LoadReport(str(file), loaded, missing, [shapes[name] for name in resized], interpolated, unexpected)


def _converted_by_timm(module: nn.Module, names: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file as timm converts them, where the module has a backbone of timm; and what changed shape."""
    backbone = next((part for part in module.modules() if isinstance(part, TimmBackbone)), None)
    if backbone is None:
        return names, []
    prefix = next((parent for parent in PARENTS[::-1] if any(name.startswith(parent) for name in names)), "")
    found, changed = backbone.converted(
        {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}
    )
    others = {name: tensor for name, tensor in names.items() if not name.startswith(prefix)}
    return {**others, **{prefix + name: tensor for name, tensor in found.items()}}, changed


def _for_each_network(module: nn.Module, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of one backbone under the names of each backbone of a model; other files as they are."""
    networks: Mapping[str, Backbone] = module.networks() if isinstance(module, Model) else {}
    found, used = dict[str, Tensor](), set[str]()
    for prefix, backbone in networks.items():
        own = backbone.state_dict()
        rename = _to_own_names(names, own)
        for name, tensor in names.items():
            if rename(name) in own:
                found[prefix + rename(name)] = backbone.fitted(rename(name), tensor)
                used.add(name)
    return {**found, **{name: tensor for name, tensor in names.items() if name not in used}}


def _refuse(file: str | Path, *, missing: list[str], unexpected: list[str], reshaped: list[str]) -> None:
    """Raise ValueError for whatever does not fit."""
    lines = []
    if missing:
        lines.append(f"not in the file: {_listed(missing)} (layers that start at random: --optim.new-layers)")
    if unexpected:
        lines.append(f"in the file, but not in the model: {_listed(unexpected)}")
    if reshaped:
        lines.append(f"of another shape: {_listed(reshaped)}")
    if lines:
        raise ValueError(f"weights {file}: do not fit the model:\n  " + "\n  ".join(lines))


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _layers_of(module: nn.Module, groups: Collection[str]) -> set[str]:
    """The names of the layers that belong to the classifier or to these groups; their buffers belong to them too."""
    found: Mapping[str, Sequence[nn.Parameter]] = {}
    if isinstance(module, Model):
        found = module.parameter_groups()
    elif isinstance(module, Backbone):
        found = backbone_groups(module)
    chosen = {id(parameter) for group in ("classifier", *groups) for parameter in found.get(group, ())}
    return {name.rpartition(".")[0] for name, parameter in module.named_parameters() if id(parameter) in chosen}


def _to_own_names(names: Collection[str], own: Collection[str]) -> Callable[[str], str]:
    """What to do with the names of a file: put a prefix on or take it off, such that most are the module's own."""
    ways: list[Callable[[str], str]] = [str]
    ways += [_prefix_off(parent) for parent in PARENTS]
    ways += [parent.__add__ for parent in PARENTS]
    return max(ways, key=lambda rename: sum(rename(name) in own for name in names))


def _prefix_off(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _own_spelling(name: str) -> str:
    """Without the prefixes of wrappers; and torchvision's own DenseNet files are older than its names."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return _OLD_DENSENET.sub(r"\1\2", name)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"weights {file} do not exist")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types for a file that is not what it should be
        reason = str(error).partition("\n")[0]  # torch goes on with advice to run the file's code
        raise ValueError(f"weights {file}: cannot be read as tensors: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {file}: expected a dictionary of tensors, got {type(state).__name__}")
    return state
