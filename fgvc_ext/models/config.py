"""Which network a run begins with."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fgvc_ext.data.pipeline import DataConfig, preprocessing
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import backbone_preprocessing, build_backbone
from fgvc_ext.models.pretrained import load_weights
from fgvc_ext.models.starting_weights import starting_weights


@dataclass
class ModelConfig:
    """The network that extracts features, and what it starts from."""

    backbone: str = "resnet50"
    """A torchvision ResNet, VGG or DenseNet, resnet10_narrow, or timm/<name>."""
    weights: str = "none"
    """What it starts from: imagenet (its library's weights, downloaded once), birds (resnet10_narrow's, pretrained on
    synthetic birds, in the package), none, or a FILE (safetensors, .pth)."""
    stride_on_first_conv: bool = False
    """A bottleneck's stride on its first 1×1 convolution, for weights in Caffe's form."""
    image_size: int | None = None
    """timm/<name>: side of the images for which a transformer is built, for those that take one size only."""
    frozen_until: str | None = None
    """Freeze the backbone up to and with this group of layers (layer3, block4, …; all: the whole). Where only flips
    augment (--data.random-crop False), its output is computed once: see --data.features."""
    evaluate_cached: bool = False
    """Evaluate the last epoch on cached features too; False: the accuracy that is reported is that of images."""

    def build(self) -> Backbone:
        """The backbone with random weights: those that a training starts from are loaded by `start`."""
        backbone = build_backbone(
            self.backbone,
            stride_on_first_conv=self.stride_on_first_conv,
            image_size=self.image_size,
            frozen_until=self.frozen_until,
        )
        backbone.evaluate_cached = self.evaluate_cached
        return backbone

    def map_side(self, crop: int) -> int:
        """How many cells a side the backbone's last map has for images of `crop` × `crop` pixels. Only shapes are
        computed."""
        where = "cpu" if self.backbone.startswith("timm/") else "meta"  # some of timm's read numbers as they are built
        with torch.random.fork_rng(devices=[]), torch.device(where):
            backbone = build_backbone(
                self.backbone, stride_on_first_conv=self.stride_on_first_conv, image_size=self.image_size
            )
        features = backbone.to("meta").eval()(torch.zeros(1, 3, crop, crop, device="meta"))
        return min(features.shape[-2:])

    def start(self, model: nn.Module, run: Path, new_layers: Collection[str] = ("classifier",)) -> str:
        """Load the weights that a training starts from into a whole model; what was loaded, for people.

        Only a training that begins needs them: one that goes on has its checkpoint, and a model its weights file.

        Args:
            run: folder of the run. The weights must be those that its run.json names (see `facts`).
            new_layers: groups of layers that the file may lack, see `load_weights`.

        Raises:
            ValueError: weights that do not fit, or are no longer those of the run. OSError: there is no such file,
                or it cannot be downloaded.
        """
        source = starting_weights(self.weights, self.backbone)
        if source is None:
            if self.frozen_until is None:
                return ""
            return (
                f"WARNING: frozen until {self.frozen_until} without --model.weights: the frozen layers keep random "
                "weights"
            )
        file, known = source.fetch(), _recorded(run).get("sha256")
        if known is not None and source.sha256() != known:
            raise ValueError(
                f"weights {file}: they have changed since the run began: sha256 {source.sha256()}, was {known}"
            )
        return load_weights(model, file, new_layers=new_layers).text()

    def facts(self, run: Path, *, download: bool = True) -> dict[str, str]:
        """Name and sha256 of the weights to start from, as run.json keeps them under "weights".

        They are those of the file. A run that has begun with weights of this name needs their file no more for this,
        nor the network: where they are not there, its own record serves.

        Args:
            run: folder of the run.
            download: fetch a library's weights that are neither there nor recorded; else the hash is left out.

        Raises:
            ValueError: weights that there are not, or damaged ones. OSError: no such file, or it cannot be downloaded.
        """
        source = starting_weights(self.weights, self.backbone)
        if source is None:
            return {"name": "none"}
        if not source.file.is_file():
            known = _recorded(run)
            if known.get("name") == source.name and "sha256" in known:
                return {"name": source.name, "sha256": known["sha256"]}
            if not download:
                return {"name": source.name}
            source.fetch()
        return {"name": source.name, "sha256": source.sha256()}

    def inputs(self, run: Path) -> dict[str, str]:
        """The hash of the weights, which is part of the identity of every stage that starts from them."""
        sha256 = self.facts(run, download=False).get("sha256")
        return {} if sha256 is None else {"weights": sha256}

    def preprocessing(self, data: DataConfig) -> Preprocessing:
        """What an image goes through: the run's sizes, and the normalisation that the backbone's weights expect."""
        return preprocessing(data, backbone_preprocessing(self.backbone))


def _recorded(run: Path) -> dict[str, str]:
    """What run.json says of the weights; nothing for a run that has not begun, or whose run.json is damaged."""
    try:
        found = json.loads((run / "run.json").read_text())["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
