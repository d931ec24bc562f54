"""What a feature extractor is: layers in groups, maps at the ends of the groups."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

from torch import Tensor, nn

from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD

IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
"""What torchvision's weights expect of images."""


Self = TypeVar("Self", bound="Backbone")


class Backbone(nn.Sequential):
    """The layers up to the last feature map, under the names of the model they come from.

    Of the first groups of layers some may be frozen (`freeze`): they get no gradients, and stay in evaluation mode
    whatever `train()` says, so that BatchNorm keeps its statistics. What they make of images (`frozen_features`) may be
    given to `forward` in the images' place, which goes on from there.

    Attributes:
        channels: C of the features [N,C,h,w].
        in_channels: of what it sees: 3, and more where `widen` has added some.
        input_weight: name of the parameter that `widen` has changed; None where it has not.
        frozen_until: the last frozen group; None where nothing is frozen.
        evaluate_cached: what is asked of the engine: the last epoch is evaluated on cached features too.
        group_of: name of a parameter → the group of layers that it belongs to, such as "layer4".
        preprocessing: mean, std and interpolation of the images with which its library's weights were trained.
    """

    def __init__(self, layers: Mapping[str, nn.Module], channels: int, group_of: Callable[[str], str]) -> None:
        super().__init__(OrderedDict(layers))
        self.channels, self.in_channels = channels, 3
        self.input_weight: str | None = None
        self.group_of = group_of
        self.preprocessing: dict[str, Any] = dict(IMAGENET)
        self.frozen_until: str | None = None
        self.evaluate_cached = False
        self._settings: dict[str, Any] = {}
        self._closed: list[str] = []  # frozen parameters that were trainable before
        self._still: list[str] = []  # modules whose parameters are all frozen
        self._before: list[str] = []  # layers of the frozen part
        self._behind: list[str] | None = None  # layers that go on from it; None where a layer is frozen in part

    def settings(self) -> dict[str, Any]:
        """The arguments of `build_backbone` that make the same layers, without any weights."""
        frozen = {} if self.frozen_until is None else {"frozen_until": self.frozen_until}
        return {**self._settings, **frozen}

    # ---------------------------------------------------------------- the frozen part

    def freeze(self: Self, until: str | None) -> Self:
        """Freeze the groups of layers up to and with `until`, "all" for the whole backbone, None for none of it.

        Raises:
            ValueError: a name that `groups()` does not have.
        """
        if until is None and self.frozen_until is None:
            return self
        groups = list(self.groups())
        if until is not None and until not in (*groups, "all"):
            raise ValueError(f"model.frozen_until: expected all or one of {', '.join(groups)}, got {until!r}")
        self.frozen_until = groups[-1] if until == "all" else until
        frozen = set(self.frozen_groups)
        parameters = dict(self.named_parameters())
        for name in self._closed:
            parameters[name].requires_grad_(True)
        chosen = {name for name in parameters if self.group_of(name) in frozen}
        self._closed = [name for name in chosen if parameters[name].requires_grad]
        for name in chosen:
            parameters[name].requires_grad_(False)
        self._still = [path for path, module in self.named_modules() if path and _is_within(path, module, chosen)]
        layers = [(group in frozen, path) for group, path, _ in self._layers()]
        self._before = [path for is_frozen, path in layers if is_frozen]
        self._behind = [path for is_frozen, path in layers if not is_frozen]
        held = {f"{path}.{name}" for path in self._before for name, _ in self.get_submodule(path).named_parameters()}
        if held != chosen:  # a layer that holds several groups, of which some are frozen
            self._behind = None
        return self.train(self.training)

    @property
    def frozen_groups(self) -> list[str]:
        """The names of the frozen groups, from input to output."""
        groups = list(self.groups())
        return [] if self.frozen_until is None else groups[: groups.index(self.frozen_until) + 1]

    @property
    def has_frozen_features(self) -> bool:
        """Whether there is a frozen part whose output can stand in for images."""
        return self.frozen_until is not None and self._behind is not None

    def require_trainable_map(self, method: str) -> None:
        """Raise ValueError where the whole backbone is frozen, for a method that trains the last feature map."""
        groups = list(self.groups())
        if self.frozen_until == groups[-1]:
            raise ValueError(
                f"model.frozen_until: {method} trains the backbone's last feature map, so the whole backbone cannot "
                f"be frozen: expected none or one of {', '.join(groups[:-1])}, got {self.frozen_until!r}"
            )

    def frozen_features(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → the output [N,C,h,w] of the frozen part, which `forward` goes on from."""
        if not self.has_frozen_features:
            raise ValueError(f"backbone: it has no frozen part of whole layers (frozen_until: {self.frozen_until})")
        return self._through(self._before, images)

    def frozen_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the frozen part, by name: what decides its output."""
        prefixes = tuple(f"{path}." for path in self._before)
        return {name: value for name, value in self.state_dict().items() if name.startswith(prefixes)}

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W], or the frozen part's output in any floating dtype → features [N,C,h,w]."""
        if self._behind is None or not self._is_frozen_features(images):
            features: Tensor = super().forward(images)
            return features
        return self._through(self._behind, images.to(next(self.parameters()).dtype))

    def _is_frozen_features(self, images: Tensor) -> bool:
        return self.has_frozen_features and images.shape[1] != self.in_channels  # feature maps have more

    def _through(self, layers: Sequence[str], features: Tensor) -> Tensor:
        for path in layers:  # by name: a layer may have been replaced, as SyncBatchNorm does
            features = self.get_submodule(path)(features)
        return features

    def train(self: Self, mode: bool = True) -> Self:
        """As usual, but frozen layers stay in evaluation mode."""
        super().train(mode)
        for path in self._still:
            self.get_submodule(path).train(False)
        return self

    # ---------------------------------------------------------------- more than images

    def widen(self: Self, channels: int) -> Self:
        """See `channels` channels instead of an image's three. The new ones' weights are zero: they change nothing yet.

        Raises:
            ValueError: a backbone that does not begin with one plain convolution of the image.
        """
        name, layer = next(((n, m) for n, m in self.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
        if type(layer) is not nn.Conv2d or layer.in_channels != 3 or layer.groups != 1:
            raise ValueError(
                f"backbone: to see {channels} channels, it must begin with a torch.nn.Conv2d of 3, got {layer}"
            )
        self.in_channels, self.input_weight = channels, f"{name}.weight"
        layer.weight = nn.Parameter(self.fitted(self.input_weight, layer.weight.detach()))
        layer.in_channels = channels
        return self

    def fitted(self, name: str, weight: Tensor) -> Tensor:
        """A weight as the backbone takes it: that of the first convolution for images alone with zeros for the rest."""
        missing = self.in_channels - weight.shape[1] if name == self.input_weight else 0
        return weight if missing <= 0 else nn.functional.pad(weight, (0, 0, 0, 0, 0, missing))

    # ---------------------------------------------------------------- maps within

    def level_names(self) -> list[str]:
        """What `levels` can give, from input to output."""
        return list(self.groups())

    def levels(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The feature maps [N,C,h,w] at the ends of these groups of layers, in the order of `names`.

        Names are those of `groups()`. What lies behind the deepest of them is not computed. Of the frozen part's output
        in the images' place, the levels from there on can be had.

        Raises:
            ValueError: a name that `groups()` does not have, or one within the frozen part whose output was given.
        """
        known = list(self.groups())
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"backbone: levels: expected some of {', '.join(known)}, got {unknown[0]!r}")
        last = max((known.index(name) for name in names), default=-1)
        found: dict[str, Tensor] = {}
        features, layers = images, list(self._layers())
        if self.frozen_until is not None and self._is_frozen_features(images):
            features = found[self.frozen_until] = images.to(next(self.parameters()).dtype)
            if within := [name for name in names if known.index(name) < known.index(self.frozen_until)]:
                raise ValueError(f"backbone: levels: {within[0]!r} lies within the frozen part, whose output was given")
            layers = [layer for layer in layers if layer[1] not in self._before]
        for group, _, layer in layers:
            if known.index(group) > last:
                break
            features = found[group] = layer(features)
        return [found[name] for name in names]

    def _layers(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Layers with group and path, from input to output; one without parameters belongs to the group before it."""
        group = next(iter(self.groups()))
        for name, module in self.named_children():
            nested = isinstance(module, nn.Sequential) and name == "features"  # of a VGG or DenseNet
            children = [(f"{name}.{part}", layer) for part, layer in module.named_children()] if nested else []
            for path, layer in children or [(name, module)]:
                parameter = next((parameter for parameter, _ in layer.named_parameters()), None)
                group = group if parameter is None else self.group_of(f"{path}.{parameter}")
                yield group, path, layer

    def groups(self) -> dict[str, list[str]]:
        """Groups of layers from input to output, each with the names of its parameters."""
        found: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            found.setdefault(self.group_of(name), []).append(name)
        return found


def _is_within(path: str, module: nn.Module, parameters: Set[str]) -> bool:
    """Whether a module has parameters, all of them among these."""
    names = {f"{path}.{name}" for name, _ in module.named_parameters()}
    return bool(names) and names <= parameters
