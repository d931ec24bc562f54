"""Ensembles in a report: how good every beginning of them is, where their members look, and how much they differ.

The tables of accuracies are made of run folders alone; a sweep over α is a table of several runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fgvc_ext.data.pipeline import evenly_spaced
from fgvc_ext.explain.cam import grad_cam, share_by_part, summarise
from fgvc_ext.explain.crop import CentreCrop
from fgvc_ext.explain.document import read_json, save_figure, save_table
from fgvc_ext.explain.figures import cam_comparison, share_figure
from fgvc_ext.explain.palette import percent
from fgvc_ext.explain.scene import Scene, shown_rows
from fgvc_ext.explain.view import as_shares, shown_map, view_of
from fgvc_ext.models import Combined, KnowledgeTransfer, Model, load
from fgvc_ext.ops import orthogonal_loss

if TYPE_CHECKING:
    from fgvc_ext.data.dataset import ImageDataset

_KINDS = {"single": "each alone", "probabilities": "first n, mean probabilities", "logits": "first n, mean logits"}

# ------------------------------------------------------------------ tables of run folders


def prefix_table(run: Path, split: str = "test") -> list[dict[str, str]]:
    """The accuracies of every ensemble of a run (the paper's Table 3): a row for its members alone and one for each way
    to average, a column for each n. The columns are the sweep over the number of models."""
    rows = []
    for entry in _entries(run):
        measures = entry.get("measures", {}).get(split, {})
        for kind, text in _KINDS.items():
            values = {int(n): v for name, v in measures.items() for n in re.findall(rf"^{kind}_(\d+)_accuracy$", name)}
            if values:
                shown = {f"n = {n}": percent(values[n], 1) for n in sorted(values)}
                rows.append({"ensemble": str(entry["name"]), "accuracy": text, **shown})
    return rows


def alpha_table(runs: Iterable[Path], ensemble: str = "ensemble", split: str = "test") -> list[dict[str, str]]:
    """A sweep over α (the paper's Table 2): a row for each α and number of models among these runs, which may differ
    in their seeds: mean ± standard deviation (population) of the accuracy of the ensemble, and how many runs those are.

    Raises:
        ValueError: runs that differ in more than that.
    """
    found: dict[tuple[float, int], list[float]] = {}
    first: dict[str, Any] | None = None
    for run in map(Path, runs):
        config = read_json(run / "config.json")
        if not config:
            continue
        method, settings = config.get("method", {}), _without_swept(config)
        method = method.get("members", method)
        first = settings if first is None else first
        if differing := sorted(name for name in {*first, *settings} if first.get(name) != settings.get(name)):
            raise ValueError(f"alpha_table: expected runs that differ in α and N alone, {run} does in {differing[0]}")
        for entry in _entries(run):
            accuracy = entry.get("measures", {}).get(split, {}).get("accuracy")
            if entry.get("name") == ensemble and accuracy is not None:
                found.setdefault((float(method["alpha"]), int(method["models"])), []).append(float(accuracy))
    rows = []
    for (alpha, models), values in sorted(found.items()):
        summary = summarise(100 * torch.tensor(values))
        text = f"{summary.mean:.1f} ± {summary.std:.1f} %"
        rows.append({"α": f"{alpha:g}", "models": str(models), "accuracy": text, "runs": str(len(values))})
    return rows


def _without_swept(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that runs of one sweep have in common, flat."""
    groups = ("data", "model", "method", "optim")
    flat = {f"{group}.{name}": value for group in groups for name, value in config.get(group, {}).items()}
    # A driver has the settings of members as its method's own, or as a group of them.
    flat |= {f"method.members.{name}": value for name, value in (flat.pop("method.members", None) or {}).items()}
    members = [f"{group}.{name}" for group in ("method", "method.members") for name in ("alpha", "models", "baseline")]
    swept = (*members, "data.root", "data.cache", "model.weights")
    return {name: value for name, value in flat.items() if name not in swept}


def _entries(run: Path) -> list[dict[str, Any]]:
    stages = read_json(Path(run) / "run.json").get("stages", [])
    return [entry for entry in stages if isinstance(entry, dict)]


# ------------------------------------------------------------------ where the members look


def explain_ensembles(
    run: Path,
    dataset: ImageDataset,
    files: Mapping[str, Path],
    ensembles: Mapping[str, Sequence[str]],
    *,
    taught: bool = True,
    device: str | torch.device = "cpu",
    images: int = 1000,
    rows: int = 4,
    batch_size: int = 32,
) -> None:
    """Writes tables and figures of ensembles into a run folder; `write_run_report` then shows them.

    Args:
        run: folder of the run.
        dataset: the test images. Where it knows boxes and parts, as the synthetic birds do, the report tells how much
            of each model's attention lies on which part.
        files: name → weights file of every member.
        ensembles: name → its members in their order. The last ensemble is the method's, others are baselines.
        taught: whether the last ensemble's first model teaches its second.
        images: most images that are looked at, evenly spread over the data set.
        rows: images that are shown, evenly spread, not chosen.
    """
    run = Path(run)
    if table := prefix_table(run):
        save_table(run, "ensembles", table, title="Every model, and the first n together", caption=_TABLE)
    names = dict.fromkeys(name for key in reversed(list(ensembles)) for name in ensembles[key])  # the method's first
    models = {name: load(files[name], device) for name in names}
    prepare = next(iter(models.values())).preprocessing
    seen = dataset.subset(evenly_spaced(len(dataset), images))
    scene = Scene(seen, CentreCrop(prepare.resize, prepare.crop, prepare.keep_ratio), prepare.transform())
    chosen = shown_rows(seen, rows)
    maps = _looks(scene, models, batch_size, chosen)
    _save_maps(
        run,
        scene,
        {name: values[chosen] for name, values in maps.items()},
        chosen,
        name="members",
        title="Where the members look",
        caption="Attention maps of the ensembles' members on test images (evenly spread over the test set, not "
        "chosen). Each map is scaled by itself.",
    )
    _save_class_maps(run, scene, models, ensembles, chosen, taught)
    _save_parts(run, scene, maps)
    _save_overlap(run, maps, ensembles)


_TABLE = (
    "Accuracy on the test images, one crop. The first model of a series has no teacher, so a baseline shares it. "
    "Differences between ensembles are of single runs: their spread over seeds is not in this table."
)


def _looks(scene: Scene, models: Mapping[str, Model], batch_size: int, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Model → its maps [N,h,w] of all images."""
    views = {name: view for name, model in models.items() if (view := view_of(model)) is not None}
    labels, found = scene.dataset.labels, {name: list[Tensor]() for name in views}
    bar = tqdm(total=len(labels), desc="members", unit="img", leave=False, disable=None)
    with bar, torch.no_grad():
        for rows, images in scene.batches(batch_size, chosen):
            for name, view in views.items():
                found[name].append(view.look(images, labels[list(rows)])[1].float().cpu())
            bar.update(len(rows))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _save_class_maps(
    run: Path,
    scene: Scene,
    models: Mapping[str, Model],
    ensembles: Mapping[str, Sequence[str]],
    chosen: Sequence[int],
    taught: bool,
) -> None:
    """Figure 5: baseline, teacher, first student."""
    *others, ours = ensembles.values()
    if len(ours) < 2:
        return
    shown = {"baseline": others[0][1]} if others else {}
    first, second = ("teacher", "first student") if taught else ("first model", "second model")
    shown |= {first: ours[0], second: ours[1]}
    images, labels = scene.prepared(chosen), scene.dataset.labels[chosen]
    found = {title: class_map(models[name], images, labels) for title, name in shown.items()}
    names = ", ".join(f"{title} is {name}" for title, name in shown.items())
    _save_maps(
        run,
        scene,
        found,
        chosen,
        name="class_maps",
        title=f"Evidence for the class: {first} and {second}",
        caption=f"Class activation maps of the true class; {names}. They are exact for a linear layer after average "
        "pooling (of two heads, those of the map head), Grad-CAM for other heads. Each map is scaled by itself.",
    )


def class_map(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """The evidence for each image's class, [n,h,w] on the CPU: exact class activation maps where the model explains
    itself by them, else Grad-CAM; of a model that allows neither, the map that it shows."""
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    with torch.no_grad():
        found = model.explain(images)
        classes = (model(images) if found.scores is None else found.scores).shape[1]
        exact = [maps for maps in found.maps.values() if maps.shape[1] == classes]
        if exact or not isinstance(model, (KnowledgeTransfer, Combined)):
            return shown_map((exact or list(found.maps.values()))[0], labels, classes).float().cpu()
        return grad_cam(model.backbone(images), model.scores, labels).float().cpu()


def _save_maps(
    run: Path,
    scene: Scene,
    maps: Mapping[str, Tensor],
    chosen: Sequence[int],
    *,
    name: str,
    title: str,
    caption: str,
) -> None:
    classes = [scene.dataset.classes[label] for label in scene.dataset.labels[chosen].tolist()]
    boxes = None if scene.boxes is None else scene.boxes[chosen]
    figure = cam_comparison([scene.shown(row) for row in chosen], maps, classes, boxes=boxes)
    save_figure(run, name, figure, title=title, caption=caption)


def _save_parts(run: Path, scene: Scene, maps: Mapping[str, Tensor]) -> None:
    if scene.parts is None or scene.boxes is None:
        return
    size, columns = scene.frame.crop, [*scene.part_names, "outside the box"]
    spread = {name: as_shares(values) for name, values in maps.items()}
    spread["even attention"] = torch.ones(len(scene.boxes), 1, 1)
    shares = {name: share_by_part(values, scene.parts, scene.boxes, size) for name, values in spread.items()}
    table = [
        {"model": name, **{part: str(summarise(values[:, n])) for n, part in enumerate(columns)}}
        for name, values in shares.items()
    ]
    caption = (
        "Share of each model's attention map, above its own minimum, that lies on each part: mean ± standard deviation "
        f"over {len(scene.boxes):,} test images. Every point of the object's box belongs to the visible part nearest "
        "to it, so the shares of a row add up to 1. A map that is the same everywhere would have the last row."
    )
    save_table(run, "attention_by_part", table, title="Attention on each part", caption=caption)
    means = torch.stack([values.nanmean(0) for values in shares.values()])
    figure = share_figure({"": (means, list(shares), columns)}, "percent of the attention")
    title, caption = "Attention on each part, as a picture", "The means of the table."
    save_figure(run, "attention_by_part", figure, title=title, caption=caption)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """What two maps [N,h,w] have in common: Σ min of their shares (`as_shares`), [N] from 0, apart, to 1, the same."""
    return torch.minimum(as_shares(first), as_shares(second)).sum((1, 2))


def _save_overlap(run: Path, maps: Mapping[str, Tensor], ensembles: Mapping[str, Sequence[str]]) -> None:
    table, panels = [], {}
    for name, members in ensembles.items():
        if len(members) < 2:
            continue
        alike = torch.full((len(members), len(members)), torch.nan)
        common, losses = [], []
        for a, b in combinations(range(len(members)), 2):
            earlier, later = maps[members[a]], maps[members[b]]
            common.append(overlap(earlier, later))
            losses.append(float(orthogonal_loss(later, earlier[None])))
            alike[a, b] = alike[b, a] = common[-1].mean()
        table.append(
            {
                "ensemble": name,
                "pairs of members": len(common),
                "overlap": str(summarise(torch.stack(common).mean(0))),
                "orthogonal loss": f"{sum(losses) / len(losses):.3f}",
            }
        )
        panels[name] = (alike, list(members), list(members))
    if not table:
        return
    caption = (
        "How alike two members look, mean over all pairs and test images. Overlap: what their attention maps, each "
        "from its own minimum on and with total 1, have in common: 1 for the same map, 0 for maps apart (± standard "
        "deviation over the images). Orthogonal loss: the paper's, with the earlier model of a pair as the teacher; "
        "the lower, the less the later one looks where the earlier one does."
    )
    title = "How differently the members look"
    save_table(run, "attention_overlap", table, title=title, caption=caption)
    figure = share_figure(panels, "overlap of two members' attention, percent")
    save_figure(run, "attention_overlap", figure, title=f"{title}, pair by pair", caption="Overlap as in the table.")
