"""Tables of ensembles from run folders, and how much their members' maps have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fgvc_ext.explain.cam import grad_cam
from fgvc_ext.explain.ensembles import alpha_table, class_map, overlap, prefix_table
from fgvc_ext.explain.figures import share_figure
from fgvc_ext.models import Combined, KnowledgeTransfer, build_backbone


def _run(folder: Path, accuracy: float, *, alpha: float = 0.5, models: int = 2) -> Path:
    folder.mkdir()
    measures = {
        "accuracy": accuracy,
        "single_1_accuracy": 0.5,
        "single_2_accuracy": 0.25,
        "probabilities_1_accuracy": 0.5,
        "probabilities_2_accuracy": accuracy,
        "logits_1_accuracy": 0.5,
        "logits_2_accuracy": 0.75,
    }
    entries = [{"name": "model1", "measures": {"test": {"accuracy": 0.5}}}]
    entries.append({"name": "ensemble", "measures": {"test": measures, "val": {"accuracy": 0.1}}})
    (folder / "run.json").write_text(json.dumps({"stages": entries}))
    (folder / "config.json").write_text(json.dumps({"method": {"alpha": alpha, "models": models}}))
    return folder


def test_the_prefixes_are_table_3(tmp_path):
    assert prefix_table(_run(tmp_path / "run", 0.6)) == [
        {"ensemble": "ensemble", "accuracy": "each alone", "n = 1": "50.0 %", "n = 2": "25.0 %"},
        {"ensemble": "ensemble", "accuracy": "first n, mean probabilities", "n = 1": "50.0 %", "n = 2": "60.0 %"},
        {"ensemble": "ensemble", "accuracy": "first n, mean logits", "n = 1": "50.0 %", "n = 2": "75.0 %"},
    ]
    assert prefix_table(tmp_path / "run", "val") == prefix_table(tmp_path) == []


def test_runs_with_the_same_alpha_are_one_row(tmp_path):
    runs = [_run(tmp_path / f"a{n}", accuracy) for n, accuracy in enumerate((0.5, 0.7))]
    runs += [_run(tmp_path / "b", 0.9, alpha=0.05), _run(tmp_path / "c", 0.8, models=3), tmp_path / "none"]
    assert alpha_table(runs) == [
        {"α": "0.05", "models": "2", "accuracy": "90.0 ± 0.0 %", "runs": "1"},
        {"α": "0.5", "models": "2", "accuracy": "60.0 ± 10.0 %", "runs": "2"},
        {"α": "0.5", "models": "3", "accuracy": "80.0 ± 0.0 %", "runs": "1"},
    ]


def test_runs_of_other_settings_make_no_row(tmp_path):
    runs = [_run(tmp_path / "a", 0.5), _run(tmp_path / "b", 0.7)]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps({**config, "optim": {"epochs": 3}}))
    with pytest.raises(ValueError, match=r"expected runs that differ in α and N alone, .*b does in optim\.epochs"):
        alpha_table(runs)


def test_the_settings_of_members_may_be_a_group_of_the_methods(tmp_path):
    """As the combination has them, whose heads have an alpha of their own."""
    for name, accuracy, alpha, models in (("a", 0.5, 0.5, 2), ("b", 0.9, 0.05, 2), ("c", 0.7, 0.5, 3)):
        _run(tmp_path / name, accuracy)
        members = {"alpha": alpha, "models": models, "baseline": False, "balance": "absolute"}
        method = {"average": "logits", "maps": {"alpha": 0.1}, "members": members}
        (tmp_path / name / "config.json").write_text(json.dumps({"method": method}))
    runs = sorted(tmp_path.iterdir())
    assert [(row["α"], row["models"], row["accuracy"]) for row in alpha_table(runs)] == [
        ("0.05", "2", "90.0 ± 0.0 %"),
        ("0.5", "2", "50.0 ± 0.0 %"),
        ("0.5", "3", "70.0 ± 0.0 %"),
    ]
    method["members"]["balance"] = "relative"
    (runs[2] / "config.json").write_text(json.dumps({"method": method}))
    with pytest.raises(ValueError, match=r"c does in method\.members\.balance"):
        alpha_table(runs)


def test_the_overlap_is_what_two_maps_share():
    left, right = torch.tensor([[2.0, 2.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    half = torch.tensor([[3.0, 7.0, 7.0, 3.0]])
    found = overlap(torch.stack([left, left, half]), torch.stack([10 * left + 3, right, left]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.5]))


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "official"])
def test_the_evidence_for_a_class_is_exact_where_the_head_allows_it(head):
    torch.manual_seed(0)
    model = KnowledgeTransfer(build_backbone("resnet10_narrow"), 3, head=head).eval()
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([2, 0])
    found, scores = class_map(model, images, labels), model(images)
    assert found.shape == (2, 4, 4)
    if head == "linear":
        torch.testing.assert_close(found.mean((1, 2)), scores[torch.arange(2), labels])
    else:
        assert (found >= 0).all()
        assert (found > 0).any()


@torch.no_grad()
@pytest.mark.parametrize("maps", [{}, None])
def test_the_evidence_of_two_heads_is_the_map_heads_or_else_grad_cam(maps):
    torch.manual_seed(0)
    model = Combined(build_backbone("resnet10_narrow"), 3, embedding={"embedding_dim": 8}, maps=maps).eval()
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([2, 0])
    found, features = class_map(model, images, labels), model.backbone(images)
    if maps is not None:
        heads = model.head_scores(features)[0]
        torch.testing.assert_close(found.mean((1, 2)), heads["maps"][torch.arange(2), labels])
    else:
        torch.testing.assert_close(found, grad_cam(features, model.scores, labels))


def test_shares_are_drawn_with_their_numbers():
    values = torch.tensor([[0.125, torch.nan], [0.5, 1.0]])
    figure = share_figure({"one": (values, ["a", "b"], ["x", "y"]), "two": (values[:1], ["c"], ["x", "y"])}, "percent")
    first, second = figure.axes
    assert [text.get_text() for text in first.texts] == ["12", "50", "100"]
    assert [text.get_text() for text in second.texts] == ["12"]
    assert (first.get_title(), [t.get_text() for t in first.get_yticklabels()]) == ("one", ["a", "b"])
