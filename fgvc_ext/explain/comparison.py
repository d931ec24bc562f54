"""Trained models side by side on the test images: what each looks at, what it confuses, how its features lie.

`explain_models` knows a model only as functions of prepared images, and writes what a report shows into a run folder.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fgvc_ext.explain.cam import effective_area, part_hits, share_in_box, summarise
from fgvc_ext.explain.confusions import (
    ConfusedPair,
    confusable_group,
    confused_pairs,
    confusion_matrix,
    write_confusions_csv,
)
from fgvc_ext.explain.crop import CentreCrop
from fgvc_ext.explain.document import save_figure
from fgvc_ext.explain.embeddings import embedding_figure
from fgvc_ext.explain.figures import PairExample, cam_comparison, confusion_figure, pairs_figure
from fgvc_ext.explain.palette import percent
from fgvc_ext.explain.scene import Scene, shown_rows
from fgvc_ext.explain.view import ModelView

if TYPE_CHECKING:
    from fgvc_ext.data.dataset import ImageDataset

MEASURES = (
    "Maps of the true class (of a model with one map for all classes, that one) over all test images, mean ± standard "
    "deviation. Measured is what rises above each map's own minimum: which class wins says nothing about the maps' "
    "zero level, and models differ in it. Share in box: how much of that lies in the object's box (even attention: the "
    "box's share of the image). Area used: how widely it spreads, exp(entropy) as a share of the cells. Parts touched: "
    "true parts under the three strongest peaks."
)


@dataclass
class _Answers:
    """What a model says of every image: the true class's map (above its minimum) and the predicted class."""

    maps: Tensor
    predicted: Tensor


def explain_models(
    run: Path,
    dataset: ImageDataset,
    models: Mapping[str, ModelView],
    *,
    prepare: Callable[[Tensor], Tensor],
    frame: CentreCrop,
    seed: int = 0,
    rows: int = 6,
    pairs: int = 4,
    group: int = 8,
    batch_size: int = 32,
) -> None:
    """Writes `measures.csv`, `confusions.csv` and the figures of a run; `write_run_report` then shows them.

    Args:
        run: folder of the run.
        dataset: the test images. Boxes, and `parts`, `part_names` and `separating_part` as the synthetic birds have
            them, are used where the data set has them.
        models: name → model, shown in this order; confusions are those of the last one.
        prepare: uint8 [3,H,W] → what the models take, [3,crop,crop] (`data.eval_transform`).
        frame: the same crop's geometry.
        seed: of the masks; image i of the data set has seed + i. These are examples: the images are of the test set,
            which training never masks, and the maps are those of the finished network.
        rows: images in the comparison of maps, evenly spread over the data set, not chosen.
        pairs: most confused pairs shown with examples.
        group: most classes in the scatter of features.
    """
    if not models or len(dataset) == 0:
        raise ValueError(f"explain_models: expected models and images, got {len(models)} and {len(dataset)}")
    run = Path(run)
    scene = Scene(dataset, frame, prepare)
    chosen = shown_rows(dataset, rows)
    print(f"report: {len(dataset):,} test images, seen by {', '.join(models)}", flush=True)
    answers = _ask(scene, models, batch_size, chosen)
    last = list(answers)[-1]
    _write_measures(run / "measures.csv", scene, answers)
    _save_comparison(run, scene, models, answers, chosen, seed)
    classes = list(dataset.classes)
    matrix = confusion_matrix(dataset.labels, answers[last].predicted, len(classes))
    found = confused_pairs(matrix, classes, top=50)
    write_confusions_csv(run / "confusions.csv", found)
    if found:
        _save_pairs(run, scene, answers[last].predicted, found[:pairs], last)
        caption = (
            f"Confusions of “{last}” on the test images. A row is a true class, a column what it was called, in "
            "percent of the true class's images; colours show the confusions alone, the diagonal is grey."
        )
        save_figure(run, "confusion", confusion_figure(matrix, classes), title="Confusion matrix", caption=caption)
    _save_embedding(run, scene, models, confusable_group(matrix, group), batch_size)


def _ask(
    scene: Scene, models: Mapping[str, ModelView], batch_size: int, chosen: Collection[int]
) -> dict[str, _Answers]:
    """What the models say of all images; those of the rows `chosen` are kept to be shown."""
    labels = scene.dataset.labels
    gathered: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    bar = tqdm(total=len(labels), desc="report", unit="img", leave=False, disable=None)  # quiet without a terminal
    with bar, torch.no_grad():
        for rows, images in scene.batches(batch_size, chosen):
            true = labels[list(rows)]
            for name, model in models.items():
                scores, maps = (answer.float().cpu() for answer in model.look(images, true))
                gathered[name].append((_above_minimum(maps), scores.argmax(1)))
            bar.update(len(true))
    return {name: _Answers(*map(torch.cat, zip(*parts, strict=True))) for name, parts in gathered.items()}


def _above_minimum(maps: Tensor) -> Tensor:
    """Maps [n,h,w] from 0 on: the same rule for every model, in the measures and under the pictures."""
    return maps - maps.amin((-2, -1), keepdim=True)


def _write_measures(path: Path, scene: Scene, answers: Mapping[str, _Answers]) -> None:
    size, lines = scene.frame.crop, []
    for name, answer in answers.items():
        line = {"model": name}
        if scene.boxes is not None:
            line["share in box"] = str(summarise(share_in_box(answer.maps, scene.boxes, size)))
        line["area used"] = str(summarise(effective_area(answer.maps)))
        if scene.parts is not None:
            line["parts touched"] = str(summarise(part_hits(answer.maps, scene.parts, size)))
        lines.append(line)
    if scene.boxes is not None:
        even = torch.ones(len(scene.boxes), 1, 1)
        lines.append({"model": "even attention", "share in box": str(summarise(share_in_box(even, scene.boxes, size)))})
        lines[-1]["area used"] = "1"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), restval="–")
        writer.writeheader()
        writer.writerows(lines)


def _save_comparison(
    run: Path,
    scene: Scene,
    models: Mapping[str, ModelView],
    answers: Mapping[str, _Answers],
    chosen: Sequence[int],
    seed: int,
) -> None:
    true = scene.dataset.labels[chosen]
    size, masks, measures = scene.frame.crop, None, {}
    drawing = [model.masks for model in models.values() if model.masks is not None]
    if drawing:
        with torch.no_grad():
            masks = drawing[-1](scene.prepared(chosen), seed + torch.tensor(chosen)).cpu()
        masks = masks[torch.arange(len(chosen)), true]
    boxes = None if scene.boxes is None else scene.boxes[chosen]
    for name, answer in answers.items():
        shares = [f"area used {percent(area)}" for area in effective_area(answer.maps[chosen]).tolist()]
        if boxes is not None:
            inside = share_in_box(answer.maps[chosen], boxes, size).tolist()
            shares = [f"in box {percent(share)} · {text}" for share, text in zip(inside, shares, strict=True)]
        measures[name] = [text.replace("nan %", "–") for text in shares]
    figure = cam_comparison(
        [scene.shown(row) for row in chosen],
        {name: answer.maps[chosen] for name, answer in answers.items()},
        [scene.dataset.classes[label] for label in true.tolist()],
        masks,
        boxes=boxes,
        measures=measures,
    )
    caption = (
        "Class activation maps of the true class on test images (evenly spread over the test set, not chosen). Each "
        "map is scaled by itself: bright is where the evidence for the class lies. The numbers measure what rises "
        "above each map's own minimum."
    )
    caption += (
        " Right: what the diversification block would hide from the class's map in a training step." if drawing else ""
    )
    save_figure(run, "activation_maps", figure, title="Where the models look", caption=caption)


def _save_pairs(run: Path, scene: Scene, predicted: Tensor, pairs: list[ConfusedPair], name: str) -> None:
    examples = []
    for pair in pairs:
        part = _separating_part(scene.dataset, pair)
        position = _position(scene, part)
        (image_a, point_a), (image_b, point_b) = (
            _example(scene, predicted, true, other, position) for true, other in ((pair.a, pair.b), (pair.b, pair.a))
        )
        shown = None if position is None else scene.part_names[position]
        examples.append(PairExample(pair, image_a, image_b, part, point_a, point_b, shown))
    caption = f"The classes that “{name}” confuses most on the test images, an example of each."
    if any(example.part for example in examples):
        caption += " Between them, enlarged, a part that truly separates the two."
    save_figure(run, "confused_pairs", pairs_figure(examples), title="What it confuses", caption=caption)


def _separating_part(dataset: ImageDataset, pair: ConfusedPair) -> str | None:
    separating: Callable[[int, int], str] | None = getattr(dataset, "separating_part", None)
    return None if separating is None else separating(pair.a, pair.b) or None


def _position(scene: Scene, part: str | None) -> int | None:
    """Index of a part's position; of several joined by " + " the first that has one."""
    known = [name for name in (part or "").split(" + ") if name in scene.part_names]
    return scene.part_names.index(known[0]) if known else None


def _example(
    scene: Scene, predicted: Tensor, true: int, other: int, position: int | None
) -> tuple[Tensor | None, tuple[float, float] | None]:
    """An image of class `true`, if possible one with the part in sight and taken for `other`; and the part's place.

    None for a class without test images: others can be taken for it all the same.
    """
    rows = (scene.dataset.labels == true).nonzero().flatten()
    if len(rows) == 0:
        return None, None
    worth = (predicted[rows] == other).long()
    place = None if scene.parts is None or position is None else scene.parts[rows, position]
    if place is not None:
        worth = worth + 2 * (place[:, 2] > 0)
    best = int(worth.argmax())
    point = None
    if place is not None and place[best, 2] > 0:
        point = (float(place[best, 0]), float(place[best, 1]))
    return scene.shown(int(rows[best])), point


def _save_embedding(
    run: Path, scene: Scene, models: Mapping[str, ModelView], group: list[int], batch_size: int
) -> None:
    """Each model runs once more, on the group's images alone: where there are many classes, they are a few."""
    pooled = {name: model.features for name, model in models.items() if model.features is not None}
    if len(group) < 2 or not pooled:
        return
    rows = torch.isin(scene.dataset.labels, torch.tensor(group, dtype=torch.int64)).nonzero().flatten()
    found: dict[str, list[Tensor]] = {name: [] for name in pooled}
    with torch.no_grad():
        for _, images in scene.batches(batch_size, rows=rows.tolist()):
            for name, features in pooled.items():
                found[name].append(features(images).float().cpu())
    features_of = {name: torch.cat(parts) for name, parts in found.items()}
    figure = embedding_figure(features_of, scene.dataset.labels[rows], scene.dataset.classes)
    caption = (
        "Pooled features of the test images of classes that are confused among themselves, on the plane of their "
        "largest variance (PCA). The share between classes is measured in all dimensions: the larger, the better the "
        "classes stand apart."
    )
    save_figure(run, "features", figure, title="Features of a confusable group", caption=caption)
