"""Backbones from timm, where it is installed: convolutional networks and transformers, all with maps [N,C,h,w]."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.timm_layers import (
    Calls,
    calls_of,
    group_name,
    layers_of,
    other_gains,
    pack_tokens,
    run_until,
    unpack_tokens,
)
from fgvc_ext.models.timm_library import create


class _TimmFeatures(nn.Module):
    """A timm model's last feature map [N,C,h,w]: what it pools in the end, without class and register tokens.

    Attributes:
        form: of what its `forward_features` gives: "NCHW", "NHWC" or "tokens".
        prefix: the number of tokens before those of the map.
        norm: False for the few models of tokens whose only norm lies behind the pooling.
        together: whether one pass gives the last map beside those of stages or blocks.
        deeper: whether the last map is a smaller one than that of the last stage.
        image_size: height and width of the images for which it is built.
    """

    def __init__(self, name: str, model: nn.Module, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.name, self.model, self.image_size = name, model, image_size
        self.form, self.prefix, self.norm = "NCHW", 0, True
        self.together, self.deeper = False, False

    def forward(self, images: Tensor) -> Tensor:
        try:
            if self.form == "tokens":
                return self.maps(images, 1, norm=self.norm)[0]
            return self.to_map(self.model.forward_features(images))  # type: ignore[operator]
        except (AssertionError, RuntimeError) as error:
            raise self.of_size(images, error) from error

    def maps(self, images: Tensor, indices: int | Sequence[int], *, norm: bool = False) -> list[Tensor]:
        """Feature maps [N,C,h,w] of stages or blocks by number, or of the last so many."""
        options = {"norm": norm, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
        return self.model.forward_intermediates(images, indices=indices, **options)  # type: ignore[operator]

    def maps_and_last(self, images: Tensor, indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Feature maps of stages or blocks by number, and the last map, as `forward` gives it."""
        if not self.together:
            return (self.maps(images, indices) if indices else []), self(images)
        return self._in_one_pass(images, indices)

    def _in_one_pass(self, images: Tensor, indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        model: Any = self.model
        taken = sorted({*indices, len(model.feature_info) - 1})  # that of the last stage has the shape of the last map
        last, maps = model.forward_intermediates(
            images, indices=taken, norm=False, output_fmt="NCHW", intermediates_only=False
        )
        if self.form == "tokens":
            last = last[:, self.prefix :].transpose(1, 2).unflatten(2, maps[-1].shape[-2:])
        else:
            last = self.to_map(last)
        return [one for number, one in zip(taken, maps, strict=True) if number in indices], last

    def compare_with_stages(self, images: Tensor) -> None:
        """Find out how the last map of images goes together with what timm gives of stages or blocks."""
        model: Any = self.model
        deepest = len(model.feature_info) - 1
        with other_gains(model):
            last = self(images)
            try:
                (of_stage,), found = self._in_one_pass(images, [deepest])
                # Not what every model returns beside its stages is the last map.
                self.together = found.shape == last.shape and torch.allclose(found, last, rtol=1e-3, atol=1e-4)
            except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
                of_stage = self.maps(images, [deepest])[0]
        self.deeper = of_stage.shape[-2:] != last.shape[-2:]

    def to_map(self, features: Tensor) -> Tensor:
        """The map [N,C,h,w] that a layer gives as [N,h,w,C] where this model's layers do."""
        return features.permute(0, 3, 1, 2) if self.form == "NHWC" else features

    def of_size(self, images: Tensor, error: Exception) -> Exception:
        """The error that tells the user of images of a size that the model does not take; else the error itself."""
        size, text = tuple(images.shape[-2:]), str(error)
        mismatch = ("size of tensor", "is invalid for input of size", "shapes cannot be", "sizes to match")
        if size == self.image_size or not (
            isinstance(error, AssertionError) or any(words in text for words in mismatch)
        ):
            return error
        return ValueError(
            f"backbone: timm/{self.name}: does not take images of {size[0]} × {size[1]} pixels: it is built for "
            f"{self.image_size[0]} × {self.image_size[1]} (--model.image-size) and said: {text}"
        )


@dataclass
class _TimmGroups:
    """The group of a parameter: the layer of the model that holds it.

    Tokens and positions, which no layer holds, belong to the first group; what the map does not depend on to the last.

    Attributes:
        order: the groups, from input to output.
        loose: parameters that the map depends on and that no layer holds.
    """

    calls: Calls = field(default_factory=lambda: Calls([], [], False))
    order: list[str] = field(default_factory=list)
    loose: frozenset[str] = frozenset()

    def __call__(self, parameter: str) -> str:
        path = parameter.removeprefix("body.model.")
        name = group_name(path)
        if name in self.order or not self.order:
            return name
        return self.order[0] if path in self.loose else self.order[-1]


class TimmBackbone(Backbone):
    """A timm model as a backbone. Its groups are timm's own stages: "layer1", "stages.0", "blocks.11", …

    The last map is what the model itself pools in the end: a final norm before the pooling is applied, class and
    register tokens are left out. A norm behind the pooling (`head.norm`, `fc_norm`) is a part of the classifier; it is
    frozen, like everything else that the map does not depend on.
    """

    body: _TimmFeatures
    group_of: _TimmGroups

    def groups(self) -> dict[str, list[str]]:
        """See `Backbone.groups`. Tokens and positions belong to the first group."""
        found = super().groups()
        order = self.group_of.order
        return {name: found[name] for name in order} if order else found

    # ---------------------------------------------------------------- the frozen part

    @property
    def has_frozen_features(self) -> bool:
        """See `Backbone`: whether one can go on from the end of the frozen part."""
        return self.frozen_until is not None and self.frozen_until in self._ends()

    def frozen_features(self, images: Tensor) -> Tensor:
        """See `Backbone`, and `until`: a transformer's class and register tokens lie in additional rows."""
        return self.until(images, self._frozen_group())

    def frozen_state(self) -> dict[str, Tensor]:
        """See `Backbone`."""
        groups = list(self.groups())
        frozen = groups[: groups.index(self._frozen_group()) + 1]
        return {name: value for name, value in self.state_dict().items() if self.group_of(name) in frozen}

    def forward(self, images: Tensor) -> Tensor:
        """See `Backbone`."""
        if self._is_frozen_features(images):
            return self.onward(images.to(next(self.parameters()).dtype), self._frozen_group())
        found: Tensor = self.body(images)
        return found

    def _frozen_group(self) -> str:
        if self.frozen_until is None:
            raise ValueError("backbone: nothing of it is frozen (frozen_until: None)")
        return self.frozen_until

    # ---------------------------------------------------------------- maps within

    def _stages(self) -> list[str]:
        """timm's names of the stages or blocks whose maps it gives."""
        model: Any = self.body.model
        return [str(info["module"]) for info in model.feature_info]

    def level_names(self) -> list[str]:
        """See `Backbone.level_names`: timm's stages or blocks. The last level is the last map, which may be that of the
        last stage behind a norm or a convolution; it stands in that one's place, not beside it."""
        stages, last = self._stages(), list(self.groups())[-1]
        return [*(name for name in (stages if self.body.deeper else stages[:-1]) if name != last), last]

    def levels(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """See `Backbone.levels`. Any of timm's stages or blocks may be asked for; blocks by number alone, as "11".

        A level is what its stage or block gives, and the last one of `level_names` what the backbone gives.
        """
        stages, last = self._stages(), self.level_names()[-1]
        numbers = {name: stages.index(name) for name in names if name in stages and name != last}
        numbers |= {name: int(name) for name in names if name.isdigit() and int(name) < len(stages)}
        if unknown := [name for name in names if name not in numbers and name != last]:
            known = ", ".join(dict.fromkeys([*stages, last]))
            raise ValueError(f"backbone: levels: expected some of {known}, got {unknown[0]!r}")
        if self._is_frozen_features(images):
            return self._levels_behind(images, [stages[numbers[name]] if name in numbers else name for name in names])
        order, found = sorted(set(numbers.values())), images
        try:
            if last in names:
                maps, found = self.body.maps_and_last(images, order)
            else:
                maps = self.body.maps(images, order)
        except (AssertionError, RuntimeError) as error:
            raise self.body.of_size(images, error) from error
        return [maps[order.index(numbers[name])] if name in numbers else found for name in names]

    def _levels_behind(self, features: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Levels from the end of the frozen part on, whose output was given."""
        group = self._frozen_group()
        found: dict[str, Tensor] = {}
        final = self._walk(features.to(next(self.parameters()).dtype), group, names, found)
        found.setdefault(list(self.groups())[-1], final)
        if within := [name for name in names if name not in found]:
            raise ValueError(f"backbone: levels: {within[0]!r} lies within the frozen part, whose output was given")
        return [found[name] for name in names]

    def until(self, images: Tensor, group: str) -> Tensor:
        """What the model has behind this group of layers: a map [N,C,h,w], from which `onward` goes on.

        A transformer's class and register tokens, which the blocks behind it need, lie in additional rows of the map.

        Raises:
            ValueError: a group behind which more is needed than what it gives.
        """
        if not self._layers_after(group):
            found: Tensor = self.body(images)
            return found
        model: Any = self.body.model
        features = run_until(model, layers_of(model)[group], images)
        if self.body.form != "tokens":
            return self.body.to_map(features)
        return pack_tokens(features, *model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))

    def onward(self, features: Tensor, group: str) -> Tensor:
        """From what `until` gave for this group to the last map: `onward(until(x, g), g)` is `forward(x)`."""
        return self._walk(features, group, (), {})

    def _walk(self, features: Tensor, group: str, keep: Sequence[str], kept: dict[str, Tensor]) -> Tensor:
        """The last map; into `kept` go the maps behind this group and behind later layers that `keep` names."""
        names = self._layers_after(group)
        if not names:
            return features
        model: Any = self.body.model
        form, prefix, options = self.body.form, self.body.prefix, {}
        height, width = features.shape[-2:]
        if form == "tokens":
            features, height, width = unpack_tokens(features, prefix)
            if self.group_of.calls.rotary:
                options["rope"] = model.rope.get_embed(shape=(height, width))
        elif form == "NHWC":
            features = features.permute(0, 2, 3, 1)

        def as_map() -> Tensor:
            if form != "tokens":
                return self.body.to_map(features)
            return features[:, prefix:].transpose(1, 2).unflatten(2, (height, width)).contiguous()

        layers = layers_of(model)
        for name in (group, *names):
            if name != group:
                features = layers[name](features, **(options if name.startswith("blocks.") else {}))
            if name in keep:
                kept[name] = as_map()
        return as_map()

    def _ends(self) -> list[str]:
        """The groups from whose end one can go on to the last map."""
        groups = list(self.groups())
        return [name for name in groups[:-1] if name in self.group_of.calls.in_a_row] + groups[-1:]

    def _layers_after(self, group: str) -> list[str]:
        """The layers that lead from the end of a group to the last map; none from that of the last group."""
        known, ends = self.group_of.calls.in_a_row, self._ends()
        if group not in ends:
            raise ValueError(f"backbone: timm/{self.body.name}: expected one of {', '.join(ends)}, got {group!r}")
        return [] if group == ends[-1] else known[known.index(group) + 1 :]

    def _layers(self) -> Iterator[tuple[str, str, nn.Module]]:
        layers, found = layers_of(self.body.model), self.groups()
        group = next(iter(found))
        for name in self.group_of.calls.order:
            group = name if name in found else group
            yield group, f"body.model.{name}", layers[name]

    def converted(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A file's tensors by the timm model's names, as timm itself would convert them for this model.

        That is: position embeddings and tables of another grid are interpolated, names of other libraries are changed.

        Returns:
            The tensors, and a line for each that has another shape than before.
        """
        own = self.body.model.state_dict()
        if all(name in state and state[name].shape == own[name].shape for name in own):
            return dict(state), []
        convert = getattr(sys.modules[type(self.body.model).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return dict(state), []
        try:
            found = dict(convert(dict(state), self.body.model))
        except (
            KeyError,
            AttributeError,
            RuntimeError,
            TypeError,
        ):  # no file of this model: what is wrong is said later
            return dict(state), []
        changed = [
            f"{name}: {list(state[name].shape)} in the file, {list(tensor.shape)} in the model"
            for name, tensor in found.items()
            if name in state and state[name].shape != tensor.shape
        ]
        return found, changed


def build_timm(name: str, image_size: int | None = None) -> TimmBackbone:
    """A timm model without its classifier, with random weights; `image_size`: see `build_backbone`."""
    model, any_size = create(name, image_size)
    native = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    size = (int(native[1]), int(native[2])) if image_size is None else (image_size, image_size)
    body = _TimmFeatures(name, model, size)
    if any_size:  # a small image shows the same as a large one
        size = (4 * int(model.feature_info[-1]["reduction"]),) * 2
    return TimmBackbone({"body": body}, model.num_features, _look_at(body, size))


def _look_at(body: _TimmFeatures, size: tuple[int, int]) -> _TimmGroups:
    """Find out what features a model gives, freeze what they do not depend on, and put its layers in order.

    Raises:
        ValueError: features that are no maps.
    """
    model: Any = body.model
    images = torch.linspace(-1, 1, 3 * size[0] * size[1]).reshape(1, 3, *size)
    training = model.training
    model.eval()
    with torch.enable_grad():  # also where a caller has turned it off
        features, calls = calls_of(model, images)
        last = _map_in(body, features, images)
        total = last.sum()
    with torch.no_grad():
        body.compare_with_stages(images)
    model.train(training)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    used = {name for (name, _), gradient in zip(named.items(), gradients, strict=True) if gradient is not None}
    for name in named.keys() - used:  # of the head, or of layers for the class token alone
        named[name].requires_grad_(False)
    live = {group_name(name) for name in used}
    loose = frozenset(name for name in used if group_name(name) not in calls.order)
    if body.form == "tokens" and not hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
        calls = replace(calls, in_a_row=calls.in_a_row[-1:])  # the shape of the map between two blocks is not known
    return _TimmGroups(calls, [name for name in calls.order if name in live], loose)


def _last_map(body: _TimmFeatures, images: Tensor) -> Tensor:
    try:
        return body.maps(images, 1, norm=True)[0]
    except AssertionError:  # "normalization of features not supported"
        body.norm = False
        return body.maps(images, 1)[0]


def _map_in(body: _TimmFeatures, features: Any, images: Tensor) -> Tensor:
    """The map [N,C,h,w] in what a model's `forward_features` gave for images, after noting its form."""
    channels: Any = body.model.num_features
    shape: list[Any] = list(features.shape) if isinstance(features, Tensor) else [type(features).__name__]
    if len(shape) == 4 and channels in (shape[1], shape[3]):
        body.form = "NCHW" if shape[1] == channels else "NHWC"
        return body.to_map(features)
    reason = "no maps can be made of them"
    if len(shape) == 3:
        try:
            found = _last_map(body, images)
            count = found[0, 0].numel()
            # Those of the map come last; they must be the same tokens, whatever their order.
            if found.shape[1] == channels and torch.allclose(features[:, -count:].sum(1), found.sum((2, 3)), atol=1e-3):
                body.form, body.prefix = "tokens", shape[1] - count
                return found
            reason = f"timm makes a map of {list(found.shape)} of them, which is not the same"
        except (AttributeError, AssertionError, RuntimeError, TypeError) as error:
            reason = f"timm makes no map of them ({type(error).__name__}: {error})"
    raise ValueError(
        f"backbone: timm/{body.name}: expected feature maps [N,{channels},h,w] or tokens of which timm makes such, "
        f"got {shape}: {reason}"
    )
