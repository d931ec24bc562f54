"""How a timm model calls its layers: in which order, and which of them can be called without the whole model."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTAINERS = ("stages", "layers", "blocks")
"""Where timm's models keep their stages or blocks, numbered."""


def group_name(path: str) -> str:
    """ "layer4.0.conv1.weight" → "layer4", "stages.2.blocks.0.…" → "stages.2"."""
    first, second, *_ = [*path.split("."), ""]
    return f"{first}.{second}" if second.isdigit() and first in CONTAINERS else first


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model by the names of their groups: its children, and of containers each stage or block."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        numbered = {f"{name}.{part}": layer for part, layer in child.named_children() if part.isdigit()}
        found |= numbered if name in CONTAINERS and numbered else {name: child}
    return found


@dataclass(frozen=True)
class Calls:
    """What one pass through a model has shown.

    Attributes:
        order: names of the layers of which something was called, in the order of the first call.
        in_a_row: the last of them, each of which is called once, takes what the one before gives and nothing else, up
            to the features: from the end of each of them one can go on by calling those behind it.
        rotary: whether they also take rotary positions, as "rope".
    """

    order: list[str]
    in_a_row: list[str]
    rotary: bool


def calls_of(model: Any, images: Tensor) -> tuple[Any, Calls]:
    """What `forward_features` gives for images, and how it came about."""
    calls: list[tuple[str, Any, dict[str, Any], Any]] = []
    order: dict[str, None] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: calls.append((name, args, kwargs, out))

    def begin(name: str) -> Callable[..., None]:
        return lambda module, args: order.setdefault(name)

    handles = []
    for name, layer in layers_of(model).items():
        handles.append(layer.register_forward_hook(remember(name), with_kwargs=True))
        handles += [part.register_forward_pre_hook(begin(name)) for part in layer.modules()]
    try:
        features = model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    in_a_row: list[str] = []
    expected, rotary = features, False
    times = Counter(name for name, *_ in calls)
    for name, args, kwargs, out in reversed(calls):
        if out is not expected or times[name] > 1:
            break
        in_a_row.insert(0, name)
        more = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
        if len(args) != 1 or (more and not (more == ["rope"] and _takes_rope(model))):
            break
        expected, rotary = args[0], rotary or bool(more)
    return features, Calls(list(order), in_a_row, rotary)


def _takes_rope(model: Any) -> bool:
    """Whether all blocks take the same rotary positions, which depend on the size of the map alone."""
    return hasattr(getattr(model, "rope", None), "get_embed") and not getattr(model, "rope_mixed", False)


@contextlib.contextmanager
def other_gains(model: nn.Module) -> Iterator[None]:
    """Other gains and biases than those of the beginning, which may hide a layer altogether."""
    generator = torch.Generator().manual_seed(0)
    before = [(one, one.data) for one in model.parameters() if one.dim() == 1]
    for one, value in before:
        one.data = value + torch.rand(value.shape, generator=generator).to(value)
    try:
        yield
    finally:
        for one, value in before:
            one.data = value


class _Reached(Exception):  # noqa: N818
    """Ends a pass through a model: what lies behind a layer is not computed."""


def run_until(model: Any, layer: nn.Module, images: Tensor) -> Tensor:
    """What a layer of the model gives for images."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out)
        raise _Reached

    handle = layer.register_forward_hook(stop)
    try:
        model.forward_features(images)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError("backbone: the model did not call this layer")


def pack_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [N,P+h·w,C], the first P of which are no positions → [N,C,h+r,w]: they fill the last r rows with zeros."""
    prefix = tokens.shape[1] - height * width
    rows = -(-prefix // width)
    first, positions = tokens[:, :prefix], tokens[:, prefix:]
    filled = F.pad(torch.cat((positions, first), dim=1), (0, 0, 0, rows * width - prefix))
    return filled.transpose(1, 2).unflatten(2, (height + rows, width))


def unpack_tokens(features: Tensor, prefix: int) -> tuple[Tensor, int, int]:
    """The tokens that `pack_tokens` packed, and the height and width of their map."""
    width = features.shape[3]
    height = features.shape[2] - -(-prefix // width)
    tokens = features.flatten(2).transpose(1, 2)
    positions = height * width
    return torch.cat((tokens[:, positions : positions + prefix], tokens[:, :positions]), dim=1), height, width
