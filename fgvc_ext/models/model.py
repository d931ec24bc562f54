"""What every model here offers: scores, explanations, predictions, and the way to a file and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fgvc_ext.data.dataset import decode_image
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import Backbone
from fgvc_ext.models.weights_file import WeightsFileError, load_weights_file, save_weights

_METHODS: dict[str, type[Model]] = {}


@dataclass(frozen=True)
class Explanation:
    """What a model really uses of its images.

    Attributes:
        maps: name → maps [N,K,h,w].
            Maps and boxes lie in the frame of the images that the model was given. The first map is the one that is
            shown: of K classes that of the image's class, of K = 1 this one.
        boxes: name → boxes [N,M,4], xyxy in pixels of the images that the model was given.
        scores: [N,C], those of `forward`, where the model has them at hand: scores and what they rest on in one call.
    """

    maps: Mapping[str, Tensor] = field(default_factory=dict)
    boxes: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, the most probable first.

    Attributes:
        names, probabilities: of the classes.
        box: xyxy in pixels of the image, the part of it that the model looked at; None for the whole image.
    """

    names: list[str]
    probabilities: list[float]
    box: tuple[float, float, float, float] | None = None


class Model(nn.Module):
    """A classifier of prepared images. `class MyModel(Model, method="my_model")` can be loaded by `load`.

    Attributes:
        method: its name in weights files.
        is_classifier: False for a part of a pipeline whose `forward` gives no scores, such as a localisation module.
        trained_before: parts that come trained from elsewhere; weights to start from are not loaded into them.
        classes: names of the classes; empty until a training sets them.
        preprocessing: from an image file to what `forward` takes.
    """

    method: ClassVar[str]
    is_classifier: ClassVar[bool] = True
    trained_before: ClassVar[tuple[str, ...]] = ()
    classes: list[str]
    preprocessing: Preprocessing

    def __init_subclass__(cls, *, method: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if method is not None:
            cls.method = method
            _METHODS[method] = cls

    def __init__(self, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        self.classes = []
        self.preprocessing = Preprocessing() if preprocessing is None else preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] → scores [N,C]; in evaluation by the method's whole inference path."""
        raise NotImplementedError

    def explain(self, images: Tensor) -> Explanation:
        """What the model uses of images [N,3,H,W]."""
        raise NotImplementedError

    def boxes(self, images: Tensor) -> Tensor | None:
        """The box [N,4] that the model looks at, in pixels of `images`; None where it looks at whole images."""
        return None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter in its group of layers, from input to output."""
        raise NotImplementedError

    def networks(self) -> dict[str, Backbone]:
        """Of a model of several backbones, each by the prefix of its names. Weights to start from are for each."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs to build the model again, as JSON."""
        raise NotImplementedError

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Model:
        """The model that `settings` describes, with initial weights: nothing is downloaded."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(
        self, images: Sequence[str | os.PathLike[str] | Tensor], top: int = 5, *, batch_size: int = 32
    ) -> list[Prediction]:
        """The `top` best classes of image files, or of images uint8 [3,H,W], in evaluation mode.

        Raises:
            BrokenImageError: a file that cannot be decoded.
        """
        device, training = next(self.parameters()).device, self.training
        prepare, found = self.preprocessing.transform(), []
        self.eval()
        try:
            for first in range(0, len(images), batch_size):
                pixels = [pixels_of(image) for image in images[first : first + batch_size]]
                batch = torch.stack([prepare(image) for image in pixels]).to(device)
                probabilities, boxes = self(batch).float().softmax(1).cpu(), self.boxes(batch)
                for row, image in enumerate(pixels):
                    box = None if boxes is None else self.preprocessing.in_image(boxes[row].cpu(), *image.shape[-2:])
                    found.append(self._prediction(probabilities[row], top, box))
        finally:
            self.train(training)
        return found

    def _prediction(self, probabilities: Tensor, top: int, box: Tensor | None) -> Prediction:
        best = probabilities.argsort(descending=True, stable=True)[:top].tolist()
        names = [self.classes[index] if self.classes else str(index) for index in best]
        corners = None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
        return Prediction(names, [float(probabilities[index]) for index in best], corners)


def pixels_of(image: str | os.PathLike[str] | Tensor) -> Tensor:
    """An image as uint8 [3,H,W], from its file or as it is. ValueError for a tensor of another kind."""
    if not isinstance(image, Tensor):
        return decode_image(image)
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"predict: expected image files or uint8 [3,H,W], got {image.dtype} {list(image.shape)}")
    return image


def backbone_groups(backbone: Backbone) -> dict[str, list[nn.Parameter]]:
    """The parameters of a backbone by group of layers."""
    named = dict(backbone.named_parameters())
    return {group: [named[name] for name in names] for group, names in backbone.groups().items()}


def activation_maps(features: Tensor, linear: nn.Linear) -> Tensor:
    """M_c = Σ_d w_cd F_d + b_c, [N,C,h,w]; its mean over the positions is the score of c."""
    return nn.functional.conv2d(features, linear.weight[:, :, None, None], linear.bias)


def describe(model: Model) -> dict[str, Any]:
    """The metadata from which `load` builds a model again, as JSON."""
    return {
        "method": model.method,
        "settings": model.settings(),
        "classes": list(model.classes),
        "preprocessing": model.preprocessing.options(),
    }


def from_description(description: Mapping[str, Any]) -> Model:
    """The model that `describe` has described, with initial weights."""
    model = _METHODS[description["method"]].from_settings(description["settings"])
    model.classes = [str(name) for name in description["classes"]]
    model.preprocessing = Preprocessing.from_json(description["preprocessing"])
    return model


def save(model: Model, file: str | Path) -> str:
    """Write a model to a file that `load` reads; returns the file's sha256."""
    return save_weights(Path(file), model.state_dict(), describe(model))


def load(file: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a weights file, in evaluation mode. Everything comes from the file, and no code of it is run.

    Raises:
        WeightsFileError: no weights file of this package, of an unknown method, or of other layers than it says.
    """
    state, metadata = load_weights_file(file)
    method = metadata.get("method")
    if method not in _METHODS:
        raise WeightsFileError(f"weights {file}: expected a model of {', '.join(sorted(_METHODS))}, got {method!r}")
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: no draw shall be seen
            model = from_description(metadata)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsFileError(f"weights {file}: {method}: {type(error).__name__}: {error}") from error
    return model.eval().to(device)
