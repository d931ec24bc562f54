"""The figures of a report: what the model looks at, what it confuses, how it learnt.

All of them are matplotlib figures without pyplot state, as wide as a report's column; `figure.savefig(path)` writes
one. Images are uint8 RGB tensors [3,H,W].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from torch.nn import functional as F

from fgvc_ext.explain.confusions import ConfusedPair
from fgvc_ext.explain.maps import draw_boxes, draw_mask, draw_points, overlay
from fgvc_ext.explain.palette import INK, MARK, QUIET, WIDTH, as_picture, drawing, percent, series_colour

MASK_TITLE = "would be hidden"
MIN_SIDE = 288
"""Pixels to which small images are enlarged before something is drawn on them."""


def cam_comparison(
    images: Sequence[Tensor] | Tensor,
    maps: Mapping[str, Tensor],
    titles: Sequence[str],
    masks: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
    measures: Mapping[str, Sequence[str]] | None = None,
    opacity: float = 0.55,
) -> Figure:
    """One row an image: the image, each model's activation map over it, the mask that the block draws (Figure 4).

    Args:
        images: N images, uint8 [3,H,W].
        maps: a model's name → its maps [N,h,w] (as from `class_activation_maps`), drawn in this order.
        titles: N texts that stand left of the rows, wrapped (the class, for example).
        masks: bool [N,h,w], True = suppressed (as from `suppression_mask`, at the class of the map).
        boxes: true boxes [N,4] xyxy, drawn on the image.
        points: a true part's position [N,2] or several [N,P,2], ringed on the image; NaN = none.
        measures: a model's name → N short texts, written under its maps ("62 % in box").
        opacity: of the maps' colours.
    """
    columns = ["image", *maps, *([MASK_TITLE] if masks is not None else [])]
    counts = {"titles": len(titles), **{name: len(values) for name, values in maps.items()}}
    counts |= {} if masks is None else {"masks": len(masks)}
    wrong = {name: count for name, count in counts.items() if count != len(images)}
    if wrong:
        raise ValueError(f"cam_comparison: expected one entry an image ({len(images)}), got {wrong}")
    pictures: dict[str, list[Tensor]] = {name: [] for name in columns}
    for n, image in enumerate(images):
        image, scale = enlarged(image)
        shown = draw_boxes(image, scale * boxes[n]) if boxes is not None else image
        shown = draw_points(shown, scale * points[n]) if points is not None else shown
        drawn = [shown, *[overlay(image, values[n], opacity=opacity) for values in maps.values()]]
        drawn += [draw_mask(image, masks[n])] if masks is not None else []
        for name, picture in zip(columns, drawn, strict=True):
            pictures[name].append(picture)
    return picture_rows(pictures, titles, measures)


def picture_rows(
    columns: Mapping[str, Sequence[Tensor]], titles: Sequence[str], measures: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Pictures uint8 [3,H,W] in rows: each column with its name above, each row with its title on the left.

    Args:
        columns: name → a picture for every row.
        titles: texts, wrapped.
        measures: a column's name → short texts that stand under its pictures.
    """
    text_share, lines = 0.62, max(1, len(titles))
    cell = WIDTH / (len(columns) + text_share)
    caption = 0.18 if measures else 0.04
    with drawing(WIDTH, 0.3 + lines * (cell + caption), gap=0.02) as figure:
        ratios = [text_share, *[1] * len(columns)]
        grid = figure.subplots(lines, len(ratios), squeeze=False, width_ratios=ratios)
        for axes in grid.flat:
            as_picture(axes)
        for n, title in enumerate(titles):
            grid[n, 0].text(0.96, 0.5, fill(title, 14), ha="right", va="center", fontsize=8.5, color=INK)
        for (name, pictures), column in zip(columns.items(), grid.T[1:], strict=True):
            column[0].set_title(name, pad=5)
            for n, (axes, picture) in enumerate(zip(column, pictures, strict=False)):
                _show(axes, picture)
                if measures and name in measures:
                    axes.set_xlabel(measures[name][n], fontsize=8, labelpad=2)
    return figure


@dataclass(frozen=True)
class PairExample:
    """An example of each class of a confused pair, and the part that separates them, where it is known."""

    pair: ConfusedPair
    image_a: Tensor | None
    """None for a class without test images, which others were taken for."""
    image_b: Tensor | None
    part: str | None = None
    """Name of the separating part ("beak")."""
    point_a: tuple[float, float] | None = None
    """Its position in the image of a, x and y in pixels; None or NaN where it is not visible."""
    point_b: tuple[float, float] | None = None
    enlarged: str | None = None
    """Name of what the points show, where `part` names several parts."""


def pairs_figure(examples: Sequence[PairExample], *, zoom: float = 3.2) -> Figure:
    """One row a confused pair: an example of each class, and between them the part that separates the two, enlarged.

    `zoom` is the enlargement of the part. A pair without a part's name shows the two images alone; where no pair has
    one, two pairs share a row.
    """
    columns = 1 if any(example.part for example in examples) else 2
    lines = max(1, -(-len(examples) // columns))
    with drawing(WIDTH, lines * (WIDTH / 4.55 + 0.46), gap=0.03) as figure:
        blocks = figure.subfigures(lines, columns, squeeze=False).flat
        for block, example in zip(blocks, examples, strict=False):
            _draw_pair(block, example, zoom, 4 // columns)
    return figure


def confusion_figure(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """The confusion matrix, each row as shares of the true class's images; names up to 40 classes, numbers up to 12.

    The colour scale belongs to the confusions: the diagonal is shown by numbers or a grey tone, so that what goes
    wrong is not drowned by what goes right.
    """
    count = len(classes)
    if count == 0 or tuple(matrix.shape) != (count, count):
        raise ValueError(f"confusion_figure: matrix: expected [C,C] for {count} classes, got {list(matrix.shape)}")
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    wrong = shares.clone().fill_diagonal_(torch.nan)
    highest = wrong.nan_to_num(nan=0.0).max().item()
    named = count <= 40
    with drawing(WIDTH, WIDTH * 0.86 if named else WIDTH * 0.8) as figure:
        axes = figure.subplots()
        axes.set_facecolor("#e3e7ec")
        picture = axes.imshow(wrong.numpy(), cmap="Blues", vmin=0, vmax=max(highest, 1e-9), interpolation="nearest")
        bar = figure.colorbar(
            picture, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1, decimals=0, symbol=" %")
        )
        bar.set_label("share of the true class's images")
        bar.outline.set_visible(False)
        axes.set(xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if named:
            names = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
            axes.set_xticks(range(count), names, rotation=90)
            axes.set_yticks(range(count), names)
        if count <= 22:
            _write_shares(axes, shares, highest, 7.5 if count <= 12 else 6.0)
    return figure


def share_figure(panels: Mapping[str, tuple[Tensor, Sequence[str], Sequence[str]]], label: str) -> Figure:
    """Tables of shares as colours with their numbers, side by side.

    `panels`: title → values [R,K] from 0 to 1, names of the R rows, names of the K columns; NaN is an empty field.
    `label` says what the numbers are. All panels share one scale of colours.
    """
    highest = max(values.nan_to_num(nan=0.0).max().item() for values, _, _ in panels.values())
    tallest = max(len(rows) for _, rows, _ in panels.values())
    ratios = [len(columns) + 1.5 for _, _, columns in panels.values()]
    with drawing(WIDTH, 1.3 + 0.32 * tallest) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
        for axes, (title, (values, rows, columns)) in zip(grid, panels.items(), strict=True):
            axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=max(highest, 1e-9), aspect="auto")
            axes.set_title(title)
            axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            for row, column in (~values.isnan()).nonzero().tolist():
                value = values[row, column].item()
                colour = "white" if value > 0.6 * highest else INK
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
        figure.supxlabel(label, fontsize=8.5, color=QUIET)
    return figure


def curves_figure(rows: Sequence[Mapping[str, object]], measures: Mapping[str, str] | None = None) -> Figure:
    """The main measure of every stage over epochs (Figure 5 of the paper), the learning rate below.

    `rows` are lines of `metrics.csv` (texts or numbers): `stage`, `epoch`, and where known `lr` and
    `<split>_<measure>` for the splits train, test and val. `measures`: a stage's name → its main measure, "accuracy"
    for one that is not named. Accuracies are drawn as errors. A stage without any value of its measure shows its
    `train_loss`. Stages with the same measure share a panel.
    """
    stages: dict[str, list[Mapping[str, object]]] = {}
    for row in rows:
        stages.setdefault(str(row.get("stage", "")), []).append(row)
    panels: dict[str, list[str]] = {}
    for stage, lines in stages.items():
        measure = (measures or {}).get(stage, "accuracy")
        known = any(_curve(lines, f"{split}_{measure}")[1] for split in _SPLITS)
        panels.setdefault(measure if known else "", []).append(stage)
    colours = {stage: series_colour(stage, position) for position, stage in enumerate(stages)}
    heights = [4.2] * max(1, len(panels))
    with drawing(WIDTH, 1.0 + 3.3 * len(heights)) as figure:
        *curves, rate = figure.subplots(len(heights) + 1, 1, sharex=True, height_ratios=[*heights, 1])
        for axes, (measure, names) in zip(curves, panels.items(), strict=False):
            for stage in names:
                _draw_curves(axes, stage, stages[stage], measure, colours[stage])
            _finish_curves(axes, measure)
        for stage, lines in stages.items():
            epochs, values = _curve(lines, "lr")
            rate.step(epochs, values, where="post", color=colours[stage], linewidth=1.3, alpha=0.85)
        _finish_rate(rate)
    return figure


_SPLITS = {"test": ("-", 2.2, 1.0), "val": (":", 1.8, 1.0), "train": ("--", 1.3, 0.75)}
"""Line, width and opacity of the splits' curves."""


def _draw_curves(axes: Axes, stage: str, lines: Sequence[Mapping[str, object]], measure: str, colour: str) -> None:
    """The curves of a stage: of accuracies the error, without a measure the training loss."""
    accuracy = measure.endswith("accuracy")
    for split, (line, width, alpha) in _SPLITS.items() if measure else [("train", _SPLITS["train"])]:
        epochs, values = _curve(lines, f"{split}_{measure or 'loss'}")
        values = [1 - value for value in values] if accuracy else values
        label = f"{stage}, {split}".lstrip(", ") if values else None
        marker = "o" if len(values) == 1 else None
        axes.plot(epochs, values, line, linewidth=width, label=label, marker=marker, color=colour, alpha=alpha)
        if values and not (measure and split == "train"):
            text = percent(values[-1], 1) if accuracy else f"{values[-1]:.3g}"
            place = (epochs[-1], values[-1])
            axes.annotate(text, place, (5, 0), textcoords="offset points", color=colour, va="center")


def _finish_curves(axes: Axes, measure: str) -> None:
    of = measure.removesuffix("accuracy").strip("_").replace("_", " ")
    error = ", ".join(["error", of] if of else ["error"])
    axes.set_ylabel(error if measure.endswith("accuracy") else of or "training loss")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.margins(x=0.02)
    if measure.endswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_ylim(0, min(1.0, axes.get_ylim()[1]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, loc="best", ncols=2, handlelength=2.6)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _finish_rate(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set(xlabel="epoch", ylabel="learning\nrate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curve(rows: Sequence[Mapping[str, object]], column: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a column, without the lines where either is missing or not finite."""
    epochs, values = [], []
    for row in rows:
        try:
            epoch, value = float(str(row["epoch"])), float(str(row[column]))
        except (KeyError, ValueError):
            continue
        if math.isfinite(epoch) and math.isfinite(value):
            epochs.append(epoch)
            values.append(value)
    return epochs, values


def _draw_pair(block: SubFigure, example: PairExample, zoom: float, panels: int) -> None:
    pair = example.pair
    grid = block.subplots(1, panels, squeeze=False)[0]
    for axes in grid:
        as_picture(axes)
    order = (0, 1, 2, 3) if example.part else (0, -1, -1, 1)  # image a, part of a, part of b, image b
    sides = (
        (pair.name_a, example.image_a, example.point_a, order[0], order[1]),
        (pair.name_b, example.image_b, example.point_b, order[3], order[2]),
    )
    for name, image, point, whole, close in sides:
        grid[whole].set_xlabel(name, fontsize=8.5, color=INK, labelpad=3)
        if image is None:
            grid[whole].text(0.5, 0.5, "no test image", ha="center", va="center", fontsize=8.5, color=QUIET)
            continue
        if example.part and point is not None and all(map(math.isfinite, point)):
            reach = min(image.shape[-2:]) / (2 * zoom)
            _show(grid[close], _around(image, point, reach))
            grid[close].set_xlabel(fill(example.enlarged or example.part, 26), fontsize=8.5, color=QUIET, labelpad=3)
            grid[close].spines[:].set(visible=True, color=MARK, linewidth=1.6)
            image, scale = enlarged(image)
            image = draw_points(image, scale * torch.tensor(point), MARK, radius=scale * reach)
        _show(grid[whole], image)
    block.suptitle(_heading(example), x=0.012 * 4 / panels, ha="left", fontsize=9, fontweight="bold", color=INK)


def _heading(example: PairExample) -> str:
    pair, parts = example.pair, (example.part or "").split(" + ")
    times = "once" if pair.count == 1 else f"{pair.count} times"
    parting = f"in: {example.part}" if len(parts) <= 3 else f"in {len(parts)} parts"
    return f"confused {times}, {percent(pair.share)} of their images" + (
        f"; they differ {parting}" if example.part else ""
    )


def enlarged(image: Tensor) -> tuple[Tensor, int]:
    """A small image enlarged by a whole factor, so that lines drawn on it are fine; and the factor."""
    scale = max(1, math.ceil(MIN_SIDE / min(image.shape[-2:])))
    if scale == 1:
        return image, 1
    larger = F.interpolate(image[None].cpu().float(), scale_factor=scale, mode="bicubic", align_corners=False)[0]
    return larger.round().clamp(0, 255).to(torch.uint8), scale


def _around(image: Tensor, point: tuple[float, float], reach: float) -> Tensor:
    """The square of `reach` pixels around a point, moved inside the image where it would stick out."""
    height, width = image.shape[-2:]
    side = min(max(4, round(2 * reach)), height, width)
    left = min(max(0, round(point[0] - side / 2)), width - side)
    upper = min(max(0, round(point[1] - side / 2)), height - side)
    return image[:, upper : upper + side, left : left + side]


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.cpu().permute(1, 2, 0).numpy(), interpolation="bicubic")


def _write_shares(axes: Axes, shares: Tensor, highest: float, size: float) -> None:
    for true, called in shares.nonzero().tolist():
        share = shares[true, called].item()
        colour = QUIET if true == called else "white" if share > 0.6 * highest else INK
        axes.text(called, true, f"{100 * share:.0f}", ha="center", va="center", fontsize=size, color=colour)
