"""Backbones from timm, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fgvc_ext.models.backbone import Backbone


class _TimmFeatures(nn.Module):
    """A timm model's last feature map [N,C,h,w], from `forward_features`."""

    def __init__(self, model: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class TimmBackbone(Backbone):
    """A timm model as a backbone. Its groups are timm's own stages: "layer1", "stages.0", "blocks.11", …"""

    body: _TimmFeatures

    def levels(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """See `Backbone.levels`. A transformer's blocks may be given by number alone, as "11"."""
        model: Any = self.body.model
        known = [str(info["module"]) for info in model.feature_info]
        if unknown := [name for name in names if name not in known and not _is_block(name, len(known))]:
            raise ValueError(f"backbone: levels: expected some of {', '.join(known)}, got {unknown[0]!r}")
        wanted = [known.index(name) if name in known else int(name) for name in names]
        order = sorted(set(wanted))
        maps = model.forward_intermediates(images, indices=order, output_fmt="NCHW", intermediates_only=True)
        return [maps[order.index(index)] for index in wanted]


def _is_block(name: str, count: int) -> bool:
    return name.isdigit() and int(name) < count


def timm_preprocessing(name: str) -> dict[str, Any]:
    """Mean, std and interpolation of a timm model's pretrained weights."""
    config = _library(name).get_pretrained_cfg(name)
    bicubic = config is not None and config.interpolation == "bicubic"
    return {
        "mean": tuple(IMAGENET_MEAN if config is None else config.mean),
        "std": tuple(IMAGENET_STD if config is None else config.std),
        "interpolation": "bicubic" if bicubic else "bilinear",
    }


def timm_weights(name: str) -> tuple[str, str] | None:
    """Name and address of the file of a timm model's pretrained weights; None for a model without any."""
    config = _library(name).get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
        return f"{config.hf_hub_id.replace('/', '-')}{Path(file).suffix}", url
    return (config.url.rpartition("/")[2], config.url) if config is not None and config.url else None


def _library(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(f"backbone: timm/{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm {timm.__version__} has no model {name!r}")
    return timm


def build_timm(name: str) -> TimmBackbone:
    """A timm model without its classifier, with random weights."""
    timm = _library(name)
    # Swin transformers insist on the image size of their training unless told otherwise; their weights do not.
    options = {"strict_img_size": False} if name.startswith(("swin_", "swinv2_")) else {}
    model: Any = timm.create_model(name, num_classes=0, **options)
    return TimmBackbone(
        {"body": _TimmFeatures(model, channels_last=_probe_timm(name, model))}, model.num_features, _timm_group
    )


def _probe_timm(name: str, model: Any) -> bool:
    """True where features come as [N,h,w,C]; freezes what they do not depend on. ValueError where they are no maps."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    training = model.training
    with torch.enable_grad():  # also where a caller has turned it off
        features = model.eval().forward_features(torch.zeros(1, *size))
        total = features.sum() if isinstance(features, Tensor) else None
    shape = list(features.shape) if isinstance(features, Tensor) else [type(features).__name__]
    if len(shape) != 4 or model.num_features not in (shape[1], shape[3]):
        raise ValueError(
            f"backbone: timm/{name}: expected feature maps [N,{model.num_features},h,w] or [N,h,w,"
            f"{model.num_features}], got {shape}: convolutional networks and Swin transformers are supported, "
            "transformers whose features are tokens (vit, deit, levit, ...) are not"
        )
    assert total is not None
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:  # a layer of the head that timm keeps (convnext's head.norm)
            parameter.requires_grad_(False)
    model.train(training)
    return bool(shape[1] != model.num_features)


def _timm_group(parameter: str) -> str:
    """ "body.model.layer4.…" → "layer4", "body.model.stages.2.…" → "stages.2"."""
    first, second, *_ = [*parameter.split(".")[2:], ""]
    return f"{first}.{second}" if second.isdigit() and first in ("stages", "layers", "blocks") else first
