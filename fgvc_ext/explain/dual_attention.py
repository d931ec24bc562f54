"""The own figures and tables of dual attention fusion: proposals, part images, attention, and whether regions learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fgvc_ext.data.dataset import ImageDataset
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.explain.cam import summarise
from fgvc_ext.explain.crop import CentreCrop
from fgvc_ext.explain.document import save_figure, save_table
from fgvc_ext.explain.figures import cam_comparison, enlarged, picture_rows
from fgvc_ext.explain.maps import draw_boxes, overlay
from fgvc_ext.explain.palette import PLAIN, QUIET, WIDTH, drawing, percent, series_colour
from fgvc_ext.explain.report import read_rows
from fgvc_ext.explain.scene import Scene, shown_rows
from fgvc_ext.explain.view import shown_map
from fgvc_ext.models import DualAttention
from fgvc_ext.models.part_attention import box_union


@torch.no_grad()
def explain_parts(
    run: Path, dataset: ImageDataset, model: DualAttention, *, rows: int = 4, batch_size: int = 32, seed: int = 0
) -> None:
    """Writes a trained model's figures and tables into a run folder; `write_run_report` then shows them.

    Args:
        run: folder of the run.
        dataset: the test images. Where it knows parts, and pairs of classes that one part separates, as the synthetic
            birds do, a table tells how often a proposed box covers them.
        model: with part proposals; in evaluation mode.
        rows: images that are shown, evenly spread, not chosen.
        seed: of the noise in part images.
    """
    prepare = model.preprocessing
    scene = Scene(dataset, CentreCrop(prepare.resize, prepare.crop, prepare.keep_ratio), prepare.transform())
    chosen = shown_rows(dataset, rows)
    boxes = _boxes(model, scene, chosen, batch_size)
    _save_pipeline(run, scene, model, chosen, seed)
    if scene.parts is not None and scene.boxes is not None:
        _save_coverage(run, scene, scene.parts, scene.boxes, boxes)


def _boxes(model: DualAttention, scene: Scene, chosen: Sequence[int], batch_size: int) -> Tensor:
    """The proposed boxes [N,M,4] of all images."""
    device, found = next(model.parameters()).device, []
    for _, images in scene.batches(batch_size, chosen):
        proposals = model.look(images.to(device)).proposals
        assert proposals is not None
        found.append(proposals.boxes)
    return torch.cat(found).float().cpu()


def _save_pipeline(run: Path, scene: Scene, model: DualAttention, chosen: Sequence[int], seed: int) -> None:
    device = next(model.parameters()).device
    images, labels = scene.prepared(chosen).to(device), scene.dataset.labels[chosen]
    titles = [scene.dataset.classes[label] for label in labels.tolist()]
    explanation = model.explain(images)
    assert explanation.scores is not None
    classes = explanation.scores.shape[1]
    maps = {
        name: shown_map(values, labels.to(device), classes).float().cpu() for name, values in explanation.maps.items()
    }
    boxes = explanation.boxes["parts"]
    parts = _as_pictures(model.part_images(images, boxes, seed).cpu(), model.preprocessing)
    columns: dict[str, list[Tensor]] = {"proposals": []}
    for n, row in enumerate(chosen):
        image, scale = enlarged(scene.shown(row))
        known = image if scene.boxes is None else draw_boxes(image, scale * scene.boxes[row])
        columns["proposals"].append(draw_boxes(known, scale * boxes[n].float().cpu(), PLAIN))
        for name in ("heat map", "saliency mask"):
            if name in maps:
                columns.setdefault(name, []).append(overlay(image, maps[name][n]))
        for m, part in enumerate(parts[n], start=1):
            columns.setdefault(f"part {m}", []).append(part)
    caption = (
        "Proposed boxes, orange, best first in the part images (true boxes green, where there are some). Heat map: on "
        "how many of three levels a place is above the mean. Saliency mask: what lies in a box. Part images, which "
        "only a training looks at: the part, noise in the other parts, blurred elsewhere. The images are evenly spread "
        "over the test set, not chosen."
    )
    save_figure(run, "parts", picture_rows(columns, titles), title="From image to parts", caption=caption)
    caption = (
        "Class activation maps of the true class, of student and teacher, and what the teacher's deep bilinear blocks "
        "are filtered by: the share of each cell that lies in a box. Each map is scaled by itself."
    )
    attention = {name: values for name, values in maps.items() if name not in ("heat map", "saliency mask")}
    shown = [scene.shown(row) for row in chosen]
    figure = cam_comparison(shown, attention, titles)
    save_figure(run, "part_attention", figure, title="Where student and teacher look", caption=caption)


def _as_pictures(images: Tensor, prepare: Preprocessing) -> Tensor:
    """Prepared images [...,3,h,w] as they are shown: uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepare.mean, prepare.std))
    return (255 * (images.float() * std + mean)).round().clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------- on synthetic birds


def covered(boxes: Tensor, points: Tensor) -> Tensor:
    """Whether points lie in one of an image's boxes: 1 or 0, NaN for a point that is not visible; float32 [N,P].

    Args:
        boxes: [N,M,4] xyxy.
        points: [N,P,3]: x, y, and whether it is visible.
    """
    place, low, high = points[:, :, None, :2], boxes[:, None, :, :2], boxes[:, None, :, 2:]
    inside = ((low <= place) & (place < high)).all(-1).any(-1)
    return torch.where(points[..., 2] > 0, inside.float(), torch.nan)


def separating_points(dataset: ImageDataset, parts: Tensor, names: Sequence[str]) -> Tensor:
    """Of each image the part [N,1,3] that tells its class from its twin; invisible where there is none, or several.

    Args:
        dataset: its `pairs` are (class, class, name of the part that separates them).
        parts: [N,P,3], of these names.
    """
    column = torch.full((len(dataset.classes),), -1)
    for first, second, part in getattr(dataset, "pairs", []):
        if part in names:
            column[[first, second]] = list(names).index(part)
    own = column[dataset.labels]
    points = parts[torch.arange(len(parts)), own.clamp(min=0)].clone()
    points[own < 0, 2] = 0
    return points[:, None]


def _save_coverage(run: Path, scene: Scene, parts: Tensor, objects: Tensor, boxes: Tensor) -> None:
    size = (scene.frame.crop, scene.frame.crop)
    union, within = box_union(boxes, size), box_union(objects[:, None], size)
    share = (union * within).sum((1, 2, 3)) / within.sum((1, 2, 3)).clamp(min=1)
    rows = {"the part that separates the classes": separating_points(scene.dataset, parts, scene.part_names)}
    rows |= {name: parts[:, n : n + 1] for n, name in enumerate(scene.part_names)}
    table = []
    for name, points in rows.items():
        hits = covered(boxes, points)
        seen = ~hits.isnan()
        if seen.any():
            told = percent(float(hits[seen].mean()), 1)
            table.append({"part": name, "in a proposed box": told, "images": int(seen.sum())})
    caption = (
        "Test images in which the part is visible and lies in one of the proposed boxes. The boxes together cover "
        f"{summarise(union.mean((1, 2, 3)))} of an image and {summarise(share)} of the object's true box (mean ± "
        "standard deviation over the images): so often would boxes cover a place of the object that nobody looked for."
    )
    save_table(run, "parts_covered", table, title="What the proposals cover", caption=caption)


# -------------------------------------------------------------------- whether regions learn

RISKS: Mapping[str, Mapping[str, str]] = {
    "accuracy, training": {"fused": "accuracy", "student": "student_accuracy", "teacher": "teacher_accuracy"},
    "boxes, area of all / object's": {"": "union_to_object"},
    "box, area / a part's": {"10 %": "area_ratio_p10", "median": "area_ratio_p50", "90 %": "area_ratio_p90"},
    "ranked pairs with a gradient": {"": "active_share"},
    "share of images": {"foreground": "foreground", "by a fallback": "fallback"},
    "distillation": {"hint": "hint", "KL of soft targets": "soft_kl"},
}
"""Panel → name of a curve → measure of training."""


def save_training_figures(run: Path, stage: str) -> None:
    """Keeps the curves of a stage that show whether its regions still learn, from the run's metrics.csv."""
    rows = [row for row in read_rows(run / "metrics.csv") if row.get("stage") == stage]
    caption = (
        "Means over each epoch. Boxes that cover far less than the object hide it from the teacher's filtered layers; "
        "areas should come near 1 without all being 1; proposals whose pairs have no gradient do not change any more; "
        "the foreground should be a third to a half of an image, seldom by a fallback."
    )
    save_figure(run, "regions", risk_figure(rows), title="Whether the regions learn", caption=caption)


def risk_figure(rows: Sequence[Mapping[str, str]]) -> Figure:
    """The measures of `RISKS` over epochs, a panel each; lines of metrics.csv."""
    with drawing(WIDTH, 5.2) as figure:
        grid = figure.subplots(2, 3, sharex=True)
        for axes, (title, curves) in zip(grid.flat, RISKS.items(), strict=True):
            for position, (name, measure) in enumerate(curves.items()):
                _draw(axes, rows, f"train_{measure}", name, series_colour(name, position))
            axes.set_title(title, fontsize=9)
            axes.set_ylim(bottom=0)
            if len(curves) > 1 and axes.lines:
                axes.legend(fontsize=7.5, frameon=False)
        for axes in grid[-1]:
            axes.set_xlabel("epoch", fontsize=8.5, color=QUIET)
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, str]], column: str, name: str, colour: str) -> None:
    points = [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column)]
    if points:
        axes.plot(*zip(*points, strict=True), ".-", label=name, color=colour, linewidth=1.3, markersize=4)
