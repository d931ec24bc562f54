"""What a report says of regions: which parts they cover, and whether every risk has its curve."""

from __future__ import annotations

import csv
import math

import torch

from fgvc_ext.data.birds import PARTS, SyntheticBirds
from fgvc_ext.explain.crop import CentreCrop
from fgvc_ext.explain.dual_attention import RISKS, _save_coverage, covered, risk_figure, separating_points
from fgvc_ext.explain.scene import Scene


def test_a_point_is_covered_by_any_box_and_counts_only_where_it_is_visible():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    points = torch.tensor([[[5.0, 5, 1], [25, 20, 1], [15, 15, 1], [10, 5, 1], [5, 5, 0]]])
    found = covered(boxes, points)[0].tolist()
    assert found[:4] == [1, 1, 0, 0], "a box ends before its right and lower sides"
    assert math.isnan(found[4])


def test_every_image_has_the_part_that_tells_its_class_from_its_twin():
    birds = SyntheticBirds("test", classes=5, test_per_class=2, image_size=48, cache=False)
    names = list(PARTS)
    found = separating_points(birds, birds.parts, names)
    for row, label in enumerate(birds.labels.tolist()):
        twin = label ^ 1
        part = birds.separating_part(label, twin) if twin < 5 else ""
        if part in names:
            assert torch.equal(found[row, 0], birds.parts[row, names.index(part)])
        else:
            assert found[row, 0, 2] == 0, "the fifth has no twin"


def test_coverage_is_of_visible_parts_and_says_what_boxes_would_cover_by_chance(tmp_path):
    birds = SyntheticBirds("test", classes=4, test_per_class=2, image_size=48, cache=False)
    scene = Scene(birds, CentreCrop(48, 48, True), lambda image: image.float())
    for _ in scene.batches(4):
        pass
    beak = scene.part_names.index("beak")
    places = scene.parts[:, beak, :2]
    boxes = torch.cat([places - 1, places + 1], dim=1)[:, None]
    _save_coverage(tmp_path, scene, scene.parts, scene.boxes, boxes)
    with (tmp_path / "tables/parts_covered.csv").open(newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    assert rows["beak"]["in a proposed box"] == "100.0 %"
    assert int(rows["beak"]["images"]) == int((scene.parts[:, beak, 2] > 0).sum())
    assert rows["tail"]["in a proposed box"] == "0.0 %"


def test_every_risk_has_a_curve():
    measures = [measure for curves in RISKS.values() for measure in curves.values()]
    rows = [{"epoch": str(epoch), **{f"train_{name}": "0.5" for name in measures}} for epoch in (1, 2)]
    figure = risk_figure(rows)
    assert [len(axes.lines) for axes in figure.axes] == [len(curves) for curves in RISKS.values()]
    assert all(line.get_ydata().tolist() == [0.5, 0.5] for axes in figure.axes for line in axes.lines)
    assert not any(axes.lines for axes in risk_figure([{"epoch": "1"}]).axes)
