"""Draws heatmap_to_boxes.jpg and spatial_attention_map.jpg: python docs/images/make_operator_pictures.py [WEIGHTS]

WEIGHTS: a ResNet-18 with ImageNet weights up to layer3; by default torchvision's, which are downloaded.
"""

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fgvc_ext import ops
from fgvc_ext.data import SyntheticBirds
from fgvc_ext.explain.maps import draw_boxes, heat, overlay
from fgvc_ext.models import build_backbone

FOLDER, SIZE, CELLS, THRESHOLD, BIRD = Path(__file__).parent, 448, 14, 0.3, 5
MEAN, DEVIATION = [[[0.485]], [[0.456]], [[0.406]]], [[[0.229]], [[0.224]], [[0.225]]]


def features_of(image: Tensor, weights: str | None) -> Tensor:
    """[256,14,14], after layer3, of the image at 224 pixels; mirrored beyond its edges, which then leave no trace."""
    backbone = build_backbone("resnet18", weights=weights or "imagenet", new_layers=["layer4"])
    network = nn.Sequential(*[layer for name, layer in backbone.named_children() if name != "layer4"]).eval()
    normal = (image[None] / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    with torch.no_grad():
        whole = network(F.pad(F.interpolate(normal, size=224, mode="area"), (64,) * 4, mode="reflect"))
    return whole[0, :, 4:-4, 4:-4].contiguous()


def heatmap_of(parts: Tensor) -> Tensor:
    """What a trained localisation module may give: warm where visible parts are, and noise."""
    y, x = torch.meshgrid(*[(torch.arange(CELLS) + 0.5) * SIZE / CELLS] * 2, indexing="ij")
    distances = torch.stack([(x - left) ** 2 + (y - top) ** 2 for left, top, visible in parts.tolist() if visible])
    return (-distances / (2 * 40**2)).exp().amax(0) + 0.04 * torch.randn(CELLS, CELLS, generator=torch.manual_seed(0))


def save(name: str, panels: list[tuple[str, Tensor]]) -> None:
    """Images [3,H,W] and maps [h,w] beside each other, each map scaled by its own minimum and maximum."""
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.9), layout="constrained")
    for place, (title, picture) in zip(axes, panels, strict=True):
        place.set_title(title, fontsize=9)
        place.axis("off")
        place.imshow(picture.permute(1, 2, 0) if picture.ndim == 3 else picture, cmap="inferno")
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110)
    Image.open(memory).convert("RGB").save(FOLDER / f"{name}.jpg", quality=80, optimize=True)


def main(weights: str | None) -> None:
    birds = SyntheticBirds("test", classes=8, test_per_class=1, image_size=SIZE, cache=False)
    image = birds.load(BIRD)
    features = features_of(image.float(), weights)
    attention = ops.spatial_attention_map(features[None])[0]
    gains = features.mean((1, 2))
    strong, *_, weak = gains.argsort(descending=True).tolist()
    channels = [
        (f"{word} channel, g = {gains[c]:.3f}", features[c]) for word, c in (("strongest", strong), ("weakest", weak))
    ]
    attentive = [("attention map of all 256", attention), ("laid over the image", overlay(image, attention))]
    save("spatial_attention_map", [("image", image), *channels, *attentive])

    heatmap = heatmap_of(birds.parts[BIRD])
    (box,) = ops.heatmap_to_boxes(heatmap[None], threshold=THRESHOLD, image_size=SIZE)
    kept = (heat(heatmap) > THRESHOLD).float()
    x1, y1, x2, y2 = box.int().tolist()
    shown = [("heat map, 14 × 14", heatmap), (f"kept: above {THRESHOLD} of its range", kept)]
    boxed = draw_boxes(overlay(image, F.interpolate(kept[None, None], size=SIZE)[0, 0], opacity=0.3), box)
    save("heatmap_to_boxes", [*shown, ("box around what is kept", boxed), ("cut out", image[:, y1:y2, x1:x2])])
    print("box", box.tolist(), "of the bird", birds.boxes[BIRD].tolist())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
