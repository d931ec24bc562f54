"""ELoPE's own figures and tables: activations, heat maps, boxes, what a network costs, accuracy over K.

Figures 2, 4, 6 and 7, Tables 3 and 4 of Hanselmann and Ney, "ELoPE" (WACV 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor, nn

from fgvc_ext.data.dataset import ImageDataset
from fgvc_ext.explain.document import Section, read_json, save_figure
from fgvc_ext.explain.figures import cam_comparison
from fgvc_ext.explain.maps import draw_boxes
from fgvc_ext.explain.palette import MARK, OURS, PLAIN, QUIET, WIDTH, as_picture, drawing, percent
from fgvc_ext.explain.scene import shown_rows
from fgvc_ext.models.cost import cost
from fgvc_ext.models.elope import ELoPE
from fgvc_ext.models.localiser import Localiser, MeanFeatureMap, resized_to


@torch.no_grad()
def save_localisation(
    run: Path,
    dataset: ImageDataset,
    teacher: MeanFeatureMap,
    localiser: Localiser,
    boxes: Tensor,
    *,
    rows: int = 6,
) -> None:
    """Keeps Figures 2, 4 and 6 for the report of a run.

    Args:
        dataset: the test images; those shown are spread evenly over it, not chosen.
        teacher: the trained classifier's mean feature map.
        localiser: what was trained on it.
        boxes: the box [N,4] xyxy of every image, in its pixels.
    """
    shown = shown_rows(dataset, rows)
    images = [dataset.load(row) for row in shown]
    titles = [dataset.classes[int(dataset.labels[row])] for row in shown]
    pictures, means, predicted = [], [], []
    activations: list[list[Tensor]] = [[], [], []]
    for image in images:
        prepared = localiser.preprocessing.normalise(image)[None]
        features = teacher.backbone(resized_to(prepared, teacher.size))[0].float()
        strongest = features.amax((1, 2)).argsort(descending=True, stable=True)[:3].tolist()
        for column, channel in zip(activations, [*strongest, *strongest[:1] * 2], strict=False):
            column.append(features[channel])
        means.append(features.mean(0))
        predicted.append(localiser(prepared)[0].float())
        pictures.append(resized_to(image[None].float(), min(image.shape[-2:]))[0].round().clamp(0, 255).to(torch.uint8))
    maps = {f"map {n + 1}": torch.stack(column) for n, column in enumerate(activations)}
    maps |= {"mean of all": torch.stack(means)}
    caption = (
        "Last feature maps of the classifier that was trained on whole images, each from its lowest to its highest "
        "value: the three with the strongest single value, and the mean of all, whose high values are where the object "
        "is. Images are squeezed into squares, as the network sees them."
    )
    save_figure(run, "activations", cam_comparison(pictures, maps, titles), title="Activations", caption=caption)
    if not isinstance(localiser, MeanFeatureMap):
        pair = {"true mean": torch.stack(means), "predicted": torch.stack(predicted)}
        caption = (
            "The classifier's mean feature map, and what the localisation module predicts of it from 64 × 64 pixels."
        )
        save_figure(run, "heat_maps", cam_comparison(pictures, pair, titles), title="Heat maps", caption=caption)
    true = None if dataset.boxes is None else dataset.boxes[shown]
    caption = "The boxes that are cut, orange" + (", and the true ones, green." if true is not None else ".")
    save_figure(run, "boxes", boxes_figure(images, boxes[shown], true), title="Boxes", caption=caption)


def boxes_figure(images: Sequence[Tensor], found: Tensor, true: Tensor | None = None) -> Figure:
    """Images uint8 [3,H,W], three in a line, with boxes [N,4] that were found and true ones (Figure 6)."""
    lines = max(1, -(-len(images) // 3))
    with drawing(WIDTH, lines * WIDTH / 3, gap=0.03) as figure:
        grid = figure.subplots(lines, 3, squeeze=False)
        for axes in grid.flat:
            as_picture(axes)
        for n, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
            picture = image.contiguous() if true is None else draw_boxes(image, true[n], MARK)
            axes.imshow(draw_boxes(picture, found[n], PLAIN).permute(1, 2, 0).numpy())
    return figure


def cost_section(model: ELoPE, side: int) -> Section:
    """Multiply-adds and parameters of the model and of its backbone with one linear layer, for one image (Table 3)."""
    plain = nn.Sequential(model.backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classes = model.classifier.out_features
    plain.append(nn.Linear(model.backbone.channels, classes).to(model.classifier.weight.device))
    lines = []
    for name, network in (("backbone and one linear layer", plain), ("this network", model)):
        found = cost(network, side)
        lines.append([name, f"{found.with_elementwise:.4g}", f"{found.multiply_adds:.4g}", f"{found.parameters:,}"])
    header = ["network", "multiply-adds", "of convolutions and matrix products alone", "parameters"]
    caption = (
        f"One image of {side} × {side} pixels. The first number counts two for each element that a BatchNorm gives and "
        "one for each of a ReLU, as the paper's Table 3 seems to; pooling and additions count nothing."
    )
    return Section("What it costs").table(header, lines, caption=caption)


def localisation_section(accuracies: Mapping[str, Mapping[str, float]]) -> Section:
    """Table 4, from `training.localisation.localisation_accuracy`."""
    lines = [[name, percent(row["accuracy"], 1), f"{row['mean_iou']:.3f}"] for name, row in accuracies.items()]
    caption = "Test images whose box and true box cover in common at least half of what at least one of them covers."
    return Section("Localisation").table(["boxes of", "IoU ≥ 0.5", "mean IoU"], lines, caption=caption)


def save_accuracy_over_k(run: Path, runs: Sequence[Path]) -> None:
    """Keeps Figure 7 for the report of a run, from the folders of others."""
    caption = f"Accuracy on the test images, last epoch, of {len(runs)} runs: a point a run, the line their means."
    save_figure(run, "accuracy_over_k", accuracy_over_k(runs), title="Accuracy over K", caption=caption)


def accuracy_over_k(runs: Sequence[Path]) -> Figure:
    """Test accuracy of the last stage of finished runs over their K (Figure 7); several runs of one K are averaged.

    A run with global max pooling counts as K = 1.

    Raises:
        ValueError: a folder that holds no finished run of this method, or one that pools by averaging.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        k, accuracy = _k_and_accuracy(Path(run))
        found.setdefault(k, []).append(accuracy)
    with drawing(WIDTH * 0.6, 3.0) as figure:
        axes = figure.subplots()
        points = sorted(found.items())
        axes.plot([k for k, _ in points], [sum(v) / len(v) for _, v in points], "-o", color=OURS)
        for k, values in points:
            axes.plot([k] * len(values), values, ".", color=QUIET, markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks([k for k, _ in points], [str(k) for k, _ in points])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("K")
        axes.set_ylabel("test accuracy")
    return figure


def _k_and_accuracy(run: Path) -> tuple[int, float]:
    method: Any = read_json(run / "config.json").get("method")
    found = read_json(run / "run.json")
    stages = [stage for stage in found.get("stages", []) if "accuracy" in stage]
    pooling = method.get("pooling") if isinstance(method, dict) else None
    # A stage that is done may not be the last: those to come have no entry yet.
    if pooling not in ("gmp", "gkmp") or not stages or found.get("status") != "finished":
        raise ValueError(f"accuracy over K: expected a finished ELoPE run with pooling gkmp or gmp, got {run}")
    return (1 if pooling == "gmp" else int(method["k"])), float(stages[-1]["accuracy"]["last"])
