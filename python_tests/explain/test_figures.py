"""Figures: the right panels with the right pictures, readable files, and no trace in matplotlib's global state."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from fgvc_ext.explain.confusions import ConfusedPair
from fgvc_ext.explain.embeddings import class_separation, embedding_figure, principal_plane
from fgvc_ext.explain.figures import PairExample, cam_comparison, confusion_figure, curves_figure, pairs_figure
from fgvc_ext.explain.maps import draw_mask, overlay


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 288, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pictures(figure) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in figure.findobj(matplotlib.axes.Axes) if axes.images]


def words(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def same(picture: np.ndarray, image: torch.Tensor) -> bool:
    return np.array_equal(picture, image.permute(1, 2, 0).numpy())


def test_cam_comparison_shows_each_model_and_the_mask():
    photos, maps = images(2), {"plain": torch.rand(2, 4, 4), "ours": torch.rand(2, 4, 4)}
    masks = torch.rand(2, 4, 4) < 0.5
    figure = cam_comparison(photos, maps, ["wren", "tit"], masks, measures={"ours": ["62 % in box", "70 % in box"]})
    shown = pictures(figure)
    assert len(shown) == 8
    for n, photo in enumerate(photos):
        row = shown[4 * n : 4 * n + 4]
        assert same(row[0], photo)
        assert same(row[3], draw_mask(photo, masks[n]))
        assert same(row[1], overlay(photo, maps["plain"][n], opacity=0.55))
        assert same(row[2], overlay(photo, maps["ours"][n], opacity=0.55))
    measured = [axes for axes in figure.axes if axes.get_xlabel() == "70 % in box"]
    assert len(measured) == 1
    assert same(measured[0].images[0].get_array(), overlay(photos[1], maps["ours"][1], opacity=0.55))
    assert all(word in words(figure) for word in ("image", "plain", "ours", "wren", "tit"))


def test_cam_comparison_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(2\).*'ours': 3"):
        cam_comparison(images(2), {"ours": torch.rand(3, 4, 4)}, ["a", "b"])


def test_pairs_figure_enlarges_the_separating_part():
    pair = ConfusedPair(0, 1, "wren", "tit", 3, 1, 4, 0.25)
    a, b = images(2)
    figure = pairs_figure([PairExample(pair, a, b, "beak", (160.0, 144.0), (0.0, 0.0))], zoom=3.0)
    assert "confused 4 times, 25 % of their images; they differ in: beak" in words(figure)
    shown = pictures(figure)
    assert len(shown) == 4
    assert same(shown[1], a[:, 96:192, 112:208])  # 288 / 3 = 96 pixels around the point
    assert same(shown[2], b[:, :96, :96])  # moved inside the image
    assert not same(shown[0], a)  # the point is ringed


def test_pairs_figure_without_parts_shows_both_images():
    pair = ConfusedPair(0, 1, "wren", "tit", 1, 0, 1, 0.25)
    a, b = images(2)
    figure = pairs_figure([PairExample(pair, a, b)] * 3)
    assert "confused once" in words(figure)
    assert "differ" not in words(figure)
    assert [same(picture, (a, b)[n % 2]) for n, picture in enumerate(pictures(figure))] == [True] * 6
    invisible = PairExample(pair, a, b, "beak", (float("nan"), 1.0), None)
    assert len(pictures(pairs_figure([invisible]))) == 2


@pytest.mark.parametrize("part", [None, "beak"])
def test_a_class_without_test_images_is_said_to_have_none(part):
    pair, (a, _) = ConfusedPair(0, 1, "wren", "tit", 3, 0, 3, 0.25), images(2)
    figure = pairs_figure([PairExample(pair, a, None, part)])
    (shown,) = pictures(figure)
    assert same(shown, a)
    empty = [axes for axes in figure.findobj(matplotlib.axes.Axes) if axes.get_xlabel() == "tit"]
    assert [text.get_text() for text in empty[0].texts] == ["no test image"]


def test_small_images_are_enlarged_and_what_is_drawn_on_them_with_them():
    small = torch.zeros(1, 3, 36, 40, dtype=torch.uint8)
    figure = cam_comparison(small, {}, ["wren"], boxes=torch.tensor([[10.0, 10.0, 30.0, 30.0]]))
    (shown,) = pictures(figure)
    drawn = shown.any(2).nonzero()
    assert shown.shape == (288, 320, 3)
    assert [drawn[0].min(), drawn[0].max(), drawn[1].min(), drawn[1].max()] == [80, 240, 80, 240]


def test_many_separating_parts_are_counted_and_the_enlarged_one_named():
    pair = ConfusedPair(0, 1, "wren", "tit", 3, 1, 4, 0.25)
    a, b = images(2)
    parts = "body + beak + crown + tail"
    text = words(pairs_figure([PairExample(pair, a, b, parts, (9.0, 9.0), (9.0, 9.0), "tail")]))
    assert "they differ in 4 parts" in text
    assert text.splitlines().count("tail") == 2


def test_confusion_figure_keeps_the_diagonal_out_of_the_scale():
    with pytest.raises(ValueError, match=r"2 classes, got \[3, 3\]"):
        confusion_figure(torch.zeros(3, 3), ["wren", "tit"])
    figure = confusion_figure(torch.tensor([[9, 1], [0, 0]]), ["wren", "tit"])
    picture = figure.axes[0].images[0]
    assert picture.get_clim() == (0, 0.1)
    assert np.ma.getmaskarray(np.ma.masked_invalid(picture.get_array())).tolist() == [[True, False], [False, True]]
    assert {"90", "10"} <= set(words(figure).splitlines())


def test_curves_show_errors_of_each_stage():
    rows = [
        {"stage": s, "epoch": str(e), "lr": "0.1", "train_accuracy": str(e / 10), "test_accuracy": test}
        for s in ("plain", "ours")
        for e, test in ((1, "0.2"), (2, ""), (3, "0.6"))
    ]
    errors, rate = curves_figure(rows).axes
    lines = {line.get_label(): line for line in errors.lines}
    assert {"plain, test", "plain, train", "ours, test", "ours, train"} <= set(lines)
    assert lines["ours, test"].get_xdata().tolist() == [1, 3]
    assert lines["ours, test"].get_ydata() == pytest.approx([0.8, 0.4])
    assert lines["plain, test"].get_color() != lines["ours, test"].get_color()
    assert rate.lines[0].get_ydata().tolist() == [0.1] * 3


def test_curves_without_accuracy_show_the_loss_and_without_anything_stay_empty():
    rows = [{"stage": "a", "epoch": 1, "train_loss": 2.5}, {"stage": "a", "epoch": "x", "train_loss": "nan"}]
    (line,) = (line for line in curves_figure(rows).axes[0].lines if len(line.get_xdata()))
    assert line.get_ydata().tolist() == [2.5]
    curves_figure([]).canvas.draw()


def test_curves_of_other_measures_have_panels_of_their_own():
    def line(stage: str, epoch: int, **values: float) -> dict[str, object]:
        return {"stage": stage, "epoch": epoch, "lr": 0.1, "train_loss": 3.0 - epoch, **values}

    rows = [
        *(line("classifier", e, test_accuracy=e / 10, test_loss=9.0) for e in (1, 2)),
        *(line("localiser", e, test_iou=0.2 * e, train_iou=0.1 * e, test_accuracy=0.9) for e in (1, 2)),
        *(line("student", e, test_fused_accuracy=0.5 + e / 10) for e in (1, 2)),
        line("weights", 1, test_loss=0.7),
        line("begun", 1),
    ]
    measures = {"localiser": "iou", "student": "fused_accuracy", "weights": "loss", "begun": "iou"}
    figure = curves_figure(rows, measures)
    *panels, rate = figure.axes
    assert [axes.get_ylabel() for axes in panels] == ["error", "iou", "error, fused", "loss", "training loss"]
    shown = [{line.get_label(): line.get_ydata().tolist() for line in a.lines if len(line.get_xdata())} for a in panels]
    assert [list(lines) for lines in shown] == [
        ["classifier, test"],
        ["localiser, test", "localiser, train"],
        ["student, test"],
        ["weights, test", "weights, train"],
        ["begun, train"],
    ]
    assert shown[0]["classifier, test"] == pytest.approx([0.9, 0.8])
    assert shown[1]["localiser, test"] == pytest.approx([0.2, 0.4]), "no error: one minus an IoU is none"
    assert shown[2]["student, test"] == pytest.approx([0.4, 0.3])
    assert shown[4]["begun, train"] == [2.0]
    assert {"80.0 %", "0.4", "30.0 %", "0.7", "2"} <= set(words(figure).splitlines())
    assert len(rate.lines) == 5


@pytest.mark.parametrize("count", [1, 3, 60])
def test_figures_of_any_size_render(count, tmp_path):
    names = [f"class {n} with $ and _" for n in range(count)]
    for number, figure in enumerate(
        (
            confusion_figure(torch.ones(count, count, dtype=torch.int64), names),
            cam_comparison(images(min(count, 3)), {"ours": torch.zeros(min(count, 3), 2, 2)}, names[:3]),
            embedding_figure({"ours": torch.randn(count, 5)}, torch.arange(count), names),
            pairs_figure([]),
        )
    ):
        figure.savefig(tmp_path / f"{number}.png", dpi=30)


def test_figures_neither_follow_nor_change_the_callers_settings():
    with matplotlib.rc_context({"font.size": 31.0, "text.color": "red"}):
        before = dict(matplotlib.rcParams)
        figure = curves_figure([{"stage": "a", "epoch": 1, "test_accuracy": 0.5}])
        assert dict(matplotlib.rcParams) == before
    assert all(text.get_fontsize() < 12 for text in figure.findobj(matplotlib.text.Text))
    assert pyplot.get_fignums() == []


def test_principal_plane_finds_the_direction_of_a_line_and_fixes_its_sign():
    steps = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    features = torch.tensor([7.0, -2.0, 30.0]) + steps[:, None] * torch.tensor([-3.0, 0.0, 4.0])
    plane = principal_plane(features)
    torch.testing.assert_close(plane.points[:, 0], 5 * steps.double(), atol=1e-9, rtol=0)  # 4 has the largest size
    torch.testing.assert_close(plane.points[:, 1], torch.zeros(5).double(), atol=1e-9, rtol=0)
    assert plane.variance == pytest.approx((1.0, 0.0))
    torch.testing.assert_close(principal_plane(features.flip(0)).points, plane.points.flip(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 1), (4, 0)])
def test_principal_plane_of_too_little(shape):
    plane = principal_plane(torch.ones(shape))
    assert plane.points.shape == (shape[0], 2)
    assert plane.points.isfinite().all()
    assert plane.variance == (0.0, 0.0)


def test_class_separation_by_hand():
    labels = torch.tensor([4, 4, 9, 9])
    assert class_separation(torch.tensor([[0.0], [0], [2], [2]]), labels) == pytest.approx(1)
    assert class_separation(torch.tensor([[0.0], [2], [0], [2]]), labels) == pytest.approx(0)
    assert class_separation(torch.tensor([[0.0], [2], [2], [4]]), labels) == pytest.approx(0.5)
    # Means 0 and 4 around 3: one image 3 away and three 1 away, of a variance of 12 + 2 in all.
    uneven = torch.tensor([4, 9, 9, 9])
    assert class_separation(torch.tensor([[0.0], [3], [4], [5]]), uneven) == pytest.approx(12 / 14)
