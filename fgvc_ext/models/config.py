"""Which network a run begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fgvc_ext.atomic_files import file_sha256
from fgvc_ext.data.pipeline import DataConfig, preprocessing
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.by_name import backbone_preprocessing, build_backbone
from fgvc_ext.models.pretrained import load_weights


@dataclass
class ModelConfig:
    """The network that extracts features, and what it starts from."""

    backbone: str = "resnet50"
    """A torchvision ResNet, VGG or DenseNet, resnet10_narrow, or timm/<name>."""
    weights: Path | None = None
    """File of weights to start from (safetensors or .pth)."""
    pretrained: bool = False
    """Start from the library's ImageNet weights, which it downloads."""
    stride_on_first_conv: bool = False
    """A bottleneck's stride on its first 1×1 convolution, for weights in Caffe's form."""

    def build(self) -> Backbone:
        """The backbone, with the library's weights where they are asked for; a file is read by `start`."""
        if self.weights is not None and self.pretrained:
            raise ValueError("give either --model.weights (a file) or --model.pretrained True, not both")
        return build_backbone(self.backbone, pretrained=self.pretrained, stride_on_first_conv=self.stride_on_first_conv)

    def start(self, model: nn.Module) -> None:
        """Load the file of weights, if there is one, into a whole model, and print what did not match."""
        if self.weights is not None:
            print(load_weights(model, self.weights).text(), flush=True)

    def inputs(self) -> dict[str, str]:
        """The hash of the file, which is part of the identity of every stage that starts from it."""
        return {} if self.weights is None else {"weights": file_sha256(self.weights)}

    def preprocessing(self, data: DataConfig) -> Preprocessing:
        """What an image goes through: the run's sizes, and the normalisation that the backbone's weights expect."""
        return preprocessing(data, backbone_preprocessing(self.backbone))
