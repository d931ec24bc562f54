"""Two-dimensional views of features, best of a few confusable classes rather than of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fgvc_ext.explain.palette import FAINT, MARKERS, QUIET, SERIES, WIDTH, drawing, percent


@dataclass(frozen=True)
class Projection:
    """Points on the plane of the largest variance."""

    points: Tensor
    """float64 [N,2]."""
    variance: tuple[float, float]
    """Share of the whole variance that each axis shows."""


def principal_plane(features: Tensor) -> Projection:
    """Projects features [N,D] onto their first two principal components.

    Computed in float64 and the same on every run: in each component the loading of the largest size (the first among
    equals) is positive. With fewer than two directions of variance the missing coordinates are 0.
    """
    if features.ndim != 2:
        raise ValueError(f"principal_plane: features: expected [N,D], got {list(features.shape)}")
    points = torch.zeros(len(features), 2, dtype=torch.float64)
    if features.numel() == 0:
        return Projection(points, (0.0, 0.0))
    centred = features.detach().cpu().double()
    centred = centred - centred.mean(0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    strongest = directions.abs().argmax(1, keepdim=True)
    directions = directions * torch.where(directions.gather(1, strongest) < 0, -1.0, 1.0)
    points[:, : len(directions)] = centred @ directions.T
    power = torch.cat([lengths**2, torch.zeros(2, dtype=torch.float64)])
    shares = power[:2] / power.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Projection(points, (shares[0].item(), shares[1].item()))


def class_separation(features: Tensor, labels: Tensor) -> float:
    """Share of the variance of features [N,D] that lies between the classes' means, over all D dimensions.

    0 = the means coincide, 1 = every class is one point (η², the correlation ratio). NaN without variance.
    """
    if features.ndim != 2 or tuple(labels.shape) != (len(features),):
        raise ValueError(
            "class_separation: expected features [N,D] and labels [N], "
            f"got {list(features.shape)} and {list(labels.shape)}"
        )
    values = features.detach().cpu().double()
    names, index, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    means = torch.zeros(len(names), values.shape[1], dtype=torch.float64).index_add_(0, index, values)
    means /= counts[:, None]
    whole = ((values - values.mean(0)) ** 2).sum()
    between = ((means - values.mean(0)) ** 2).sum(1) @ counts.double()
    return float(between / whole)


def embedding_figure(features: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str]) -> Figure:
    """A scatter of each model's features side by side, coloured by class.

    `features` maps a model's name to features [N,D] of the same N images, `labels` int64 [N] index `classes`; every
    panel has a plane of its own. Colours repeat after eight classes, with another marker.
    """
    present = sorted(set(labels.tolist()))
    with drawing(WIDTH, 0.4 + WIDTH / max(2, len(features)) * 0.92 + 0.22 * -(-len(present) // 3)) as figure:
        panels = figure.subplots(1, len(features), squeeze=False)[0]
        for axes, (name, values) in zip(panels, features.items(), strict=True):
            _panel(axes, name, values, labels.cpu(), present, classes)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def _panel(
    axes: Axes, name: str, features: Tensor, labels: Tensor, present: Sequence[int], classes: Sequence[str]
) -> None:
    plane = principal_plane(features)
    for position, label in enumerate(present):
        points = plane.points[labels == label]
        marker = MARKERS[(position // len(SERIES) + position) % len(MARKERS)]
        colour = SERIES[position % len(SERIES)]
        size = 58 if marker == "*" else 34 if marker in "PX" else 26
        axes.scatter(
            points[:, 0].numpy(),
            points[:, 1].numpy(),
            s=size,
            c=colour,
            marker=marker,
            label=classes[label],
            linewidths=0.6,
            edgecolors="white",
            alpha=0.9,
        )
    between = percent(class_separation(features, labels))
    axes.set_title(name, loc="left")
    axes.set_title(f"{between} of the variance between classes", loc="right", fontweight="normal", fontsize=8.5)
    axes.set_xlabel(f"component 1 ({percent(plane.variance[0])} of the variance)", color=QUIET)
    axes.set_ylabel(f"component 2 ({percent(plane.variance[1])})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_color(FAINT)
