"""Feature extractors by name: images [N,3,H,W] → features [N,C,h,w]."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

TORCHVISION_FAMILIES = ("resnet", "vgg", "densenet")
HEADS = ("fc.", "classifier.", "head.")  # classifiers of torchvision's, timm's and our models, left out of backbones
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
PARENTS = ("backbone.", "body.model.", "backbone.body.model.")  # where a model of ours keeps its layers, timm's too


class Backbone(nn.Sequential):
    """The layers up to the last feature map, under the names of the model they come from.

    Attributes:
        channels: C of the features [N,C,h,w].
        group_of: name of a parameter → the group of layers that it belongs to, such as "layer4".
    """

    def __init__(self, layers: Mapping[str, nn.Module], channels: int, group_of: Callable[[str], str]) -> None:
        super().__init__(OrderedDict(layers))
        self.channels = channels
        self.group_of = group_of

    def groups(self) -> dict[str, list[str]]:
        """Groups of layers from input to output, each with the names of its parameters."""
        found: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            found.setdefault(self.group_of(name), []).append(name)
        return found


def build_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    stride_on_first_conv: bool = False,
    report: Callable[[str], Any] | None = None,
) -> Backbone:
    """Build a feature extractor.

    Args:
        name: a torchvision ResNet, VGG or DenseNet ("resnet50", "vgg16_bn", "densenet169"), "resnet10_narrow" for
            small images on a CPU, or "timm/<name>" where timm is installed: its convolutional networks and Swin
            transformers, whose features are maps.
        weights: file to start from, see `load_weights`.
        pretrained: start from the library's ImageNet weights, which it downloads.
        stride_on_first_conv: put a bottleneck's stride on its first 1×1 convolution, as Caffe's ResNets have it.
        report: called with a text that tells what of `weights` did not match.

    Raises:
        ValueError: an unknown name, or arguments that do not go together.
    """
    if weights is not None and pretrained:
        raise ValueError("backbone: give either weights (a file) or pretrained, not both")
    if name.startswith("timm/"):
        backbone = _timm(name.removeprefix("timm/"), pretrained)
    elif name == "resnet10_narrow":
        if pretrained:
            raise ValueError("backbone: resnet10_narrow has no pretrained weights")
        backbone = _resnet10_narrow()
    else:
        backbone = _torchvision(name, pretrained)
    if stride_on_first_conv:
        _move_stride(backbone, name)
    if weights is not None:
        result = load_weights(backbone, weights)
        if report is not None:
            report(result.text())
    return backbone


def available_backbones() -> list[str]:
    """Names that `build_backbone` knows without timm."""
    names = torchvision.models.list_models(torchvision.models)
    return ["resnet10_narrow", *(n for n in names if n.startswith(TORCHVISION_FAMILIES))]


def _torchvision(name: str, pretrained: bool) -> Backbone:
    if name not in available_backbones():
        raise ValueError(f"backbone: expected one of {', '.join(available_backbones())} or timm/<name>, got {name!r}")
    model: Any = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    if name.startswith("resnet"):
        layers = {n: m for n, m in model.named_children() if n not in ("avgpool", "fc")}
        return Backbone(layers, model.fc.in_features, _resnet_group)
    if name.startswith("densenet"):
        layers = {"features": model.features, "relu": nn.ReLU(inplace=True)}
        return Backbone(layers, model.classifier.in_features, _densenet_group)
    channels = next(m.out_channels for m in reversed(list(model.features)) if isinstance(m, nn.Conv2d))
    return Backbone({"features": model.features}, channels, _vgg_group(model.features))


def _resnet_group(parameter: str) -> str:
    first = parameter.partition(".")[0]
    return first if first.startswith("layer") else "stem"


def _densenet_group(parameter: str) -> str:
    part = parameter.split(".")[1]
    if part.endswith("0"):  # conv0, norm0
        return "stem"
    number = 4 if part == "norm5" else int(part[-1])
    return f"block{number}"  # a transition goes with the block before it


def _vgg_group(features: nn.Sequential) -> Callable[[str], str]:
    blocks, block = {}, 1
    for index, layer in enumerate(features):
        blocks[str(index)] = f"block{block}"
        block += isinstance(layer, nn.MaxPool2d)
    return _VggGroups(blocks)


@dataclass
class _VggGroups:
    blocks: dict[str, str]

    def __call__(self, parameter: str) -> str:
        return self.blocks[parameter.split(".")[1]]


def _resnet10_narrow() -> Backbone:
    """A ResNet of four basic blocks, 32 to 256 channels, total stride 16: made for 96–128 px on a CPU."""
    widths, strides = (32, 64, 128, 256), (1, 2, 2, 1)
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(widths[0]),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    before = widths[0]
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        shortcut = None
        if stride != 1 or before != width:
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers[f"layer{number}"] = nn.Sequential(BasicBlock(before, width, stride, shortcut))
        before = width
    backbone = Backbone(layers, widths[-1], _resnet_group)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _move_stride(backbone: Backbone, name: str) -> None:
    blocks = [m for m in backbone.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(f"backbone: stride_on_first_conv needs a ResNet of bottlenecks (resnet50 …), got {name!r}")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


class _TimmFeatures(nn.Module):
    """A timm model's last feature map [N,C,h,w], from `forward_features`."""

    def __init__(self, model: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def _timm(name: str, pretrained: bool) -> Backbone:
    try:
        import timm
    except ImportError:
        raise ValueError(f"backbone: timm/{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm {timm.__version__} has no model {name!r}")
    # Swin transformers insist on the image size of their training unless told otherwise; their weights do not.
    options = {"strict_img_size": False} if name.startswith(("swin_", "swinv2_")) else {}
    model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    return Backbone(
        {"body": _TimmFeatures(model, channels_last=_probe_timm(name, model))}, model.num_features, _timm_group
    )


def _probe_timm(name: str, model: Any) -> bool:
    """True where features come as [N,h,w,C]; freezes what they do not depend on. ValueError where they are no maps."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    training = model.training
    features = model.eval().forward_features(torch.zeros(1, *size))
    shape = list(features.shape) if isinstance(features, Tensor) else [type(features).__name__]
    if len(shape) != 4 or model.num_features not in (shape[1], shape[3]):
        raise ValueError(
            f"backbone: timm/{name}: expected feature maps [N,{model.num_features},h,w] or [N,h,w,"
            f"{model.num_features}], got {shape}: convolutional networks and Swin transformers are supported, "
            "transformers whose features are tokens (vit, deit, levit, ...) are not"
        )
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:  # a layer of the head that timm keeps (convnext's head.norm)
            parameter.requires_grad_(False)
    model.train(training)
    return bool(shape[1] != model.num_features)


def _timm_group(parameter: str) -> str:
    return parameter.split(".")[2]  # body.model.<group>…


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
