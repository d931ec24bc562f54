"""The task of two heads: its loss is the sum of what the papers' own tasks compute, its evaluation tells the heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fgvc_ext import reference
from fgvc_ext.models import Backbone, Combined, ELoPE, SubtleDifferences
from fgvc_ext.nn import ClassMeanLoss, GradientBoostingCrossEntropyLoss
from fgvc_ext.training import Classification
from fgvc_ext.training.combined import CombinedTraining
from fgvc_ext.training.embedding import EmbeddingClassification

EMBEDDING, MAPS = {"k": 3, "embedding_dim": 6}, {"patch_size": 2, "p_peak": 0.4, "p_patch": 0.6}


def _backbone() -> Backbone:
    layers = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "relu": nn.ReLU()}
    return Backbone(layers, 8, lambda name: "stem")


def _model(seed: int = 0, heads: tuple[str, ...] = ("embedding", "maps"), **options) -> Combined:
    torch.manual_seed(seed)
    given = {"embedding": EMBEDDING, "maps": MAPS}
    model = Combined(_backbone(), 3, **{name: given[name] if name in heads else None for name in given}, **options)
    with torch.no_grad():
        for name, parameter in model.classifier.named_parameters():
            if "classifier" in name:  # losses of which none is near the logarithm of the number of classes
                parameter.mul_(20)
    return model


def _embedding() -> dict:
    torch.manual_seed(9)
    return {"loss": nn.CrossEntropyLoss(), "embedding_loss": ClassMeanLoss(3, 6), "weight": 1.5}


def _maps() -> dict:
    return {"loss": GradientBoostingCrossEntropyLoss(k=1), "first_loss": nn.CrossEntropyLoss(), "from_epoch": 2}


def _task(teachers: int = 0, heads: tuple[str, ...] = ("embedding", "maps"), **options) -> CombinedTraining:
    taught = [_model(seed) for seed in range(1, teachers + 1)]
    losses = {"embedding": _embedding() if "embedding" in heads else None, "maps": _maps() if "maps" in heads else None}
    return CombinedTraining(_model(heads=heads), **losses, teachers=taught, **options)


def _batch(n: int = 8) -> dict[str, torch.Tensor]:
    images = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"image": images, "label": torch.arange(n) % 3, "seed": torch.arange(n), "index": torch.arange(n)}


def _papers(model: Combined) -> dict[str, Classification]:
    """The papers' own tasks, which begin with the weights of this model's heads."""
    own = {"embedding": ELoPE(_backbone(), 3, **EMBEDDING), "maps": SubtleDifferences(_backbone(), 3, **MAPS)}
    for name, head in model.classifier.items():
        own[name].load_state_dict(model.backbone.state_dict(prefix="backbone.") | head.state_dict())
    tasks = {
        "embedding": EmbeddingClassification(own["embedding"], **_embedding()),
        "maps": Classification(own["maps"], **_maps()),
    }
    for task in tasks.values():
        task.start_epoch(2)
    return tasks


@pytest.mark.parametrize("heads", [("embedding",), ("maps",), ("embedding", "maps")])
def test_the_loss_is_the_sum_of_the_papers_losses(heads):
    task = _task(heads=heads).train()
    papers = _papers(task.model)
    task.start_epoch(2)
    answer = task.step(_batch())
    apart = {name: papers[name].train().step(_batch()) for name in heads}
    torch.testing.assert_close(answer["loss"], sum(found["loss"] for found in apart.values()))
    assert answer["n"] == 8
    logs = {"correct", *(["within", "between"] if "embedding" in heads else [])}
    assert set(answer["logs"]) == logs
    for name in logs - {"correct"}:
        torch.testing.assert_close(answer["logs"][name], apart["embedding"]["logs"][name])
    answer["loss"].backward()
    for name in heads:
        apart[name]["loss"].backward()
        for key, parameter in task.model.classifier[name].named_parameters():
            expected = papers[name].model.get_parameter(key).grad
            torch.testing.assert_close(parameter.grad, expected, msg=f"{name}.{key}")
    if "embedding" in heads:
        means = [each.losses["embedding"].class_means for each in (task, papers["embedding"])]
        torch.testing.assert_close(*means)
        assert not torch.equal(means[0], _embedding()["embedding_loss"].class_means), "they have moved"


def test_the_map_heads_first_epochs_are_of_cross_entropy():
    losses = []
    for epoch in (0, 1, 2):
        task = _task().train()
        papers = _papers(task.model)
        for each in (task, papers["maps"]):
            each.start_epoch(epoch)
        losses.append(task.step(_batch())["loss"] - papers["embedding"].train().step(_batch())["loss"])
        torch.testing.assert_close(losses[-1], papers["maps"].train().step(_batch())["loss"])
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[1], losses[2])


@pytest.mark.parametrize("balance", ["absolute", "relative"])
def test_teachers_add_the_orthogonal_loss_to_both(balance):
    plain, taught = _task().train(), _task(2, alpha=0.7, balance=balance).train()
    batch = _batch()
    both = plain.step(batch)["loss"]
    own = reference.spatial_attention_map(_model().train().backbone(batch["image"]))
    maps = [teacher.module.eval().attention(batch["image"]) for teacher in taught.teachers]
    shared = torch.stack([reference.orthogonal_loss(own, each[None]) for each in maps]).mean()
    answer = taught.step(batch)
    torch.testing.assert_close(answer["loss"], both + 0.7 * (shared if balance == "absolute" else both))
    torch.testing.assert_close(answer["logs"]["orthogonal"], (8 * shared).detach())
    assert {"correct", "within", "between"} < set(answer["logs"])
    answer["loss"].backward()
    assert not any(p.requires_grad for teacher in taught.teachers for p in teacher.module.parameters())


@torch.no_grad()
def test_a_training_step_counts_what_the_average_of_the_heads_gets_right():
    task, batch = _task().train(), _batch()
    scores = _model().train().head_scores(_model().train().backbone(batch["image"]), batch["seed"])[0]
    mean = sum(each.softmax(1) for each in scores.values())
    assert task.step(batch)["logs"]["correct"] == (mean.argmax(1) == batch["label"]).sum()


@torch.no_grad()
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_an_evaluation_tells_the_average_either_way_and_each_head(average, monkeypatch):
    task, batch = CombinedTraining(_model(average=average), embedding=_embedding(), maps=_maps()).eval(), _batch(200)
    random, right = torch.Generator().manual_seed(1), nn.functional.one_hot(batch["label"], 3)
    noise = torch.randn(2, 200, 3, generator=random)
    heads = {"embedding": 3 * (right + noise[0]), "maps": 2 * right + noise[1]}
    monkeypatch.setattr(task.model, "head_scores", lambda features: (heads, None))
    sums = task.eval_step(batch)
    answers = heads | {
        "probabilities": sum(scores.softmax(1) for scores in heads.values()),
        "logits": sum(heads.values()),
    }
    correct = {name: int((answer.argmax(1) == batch["label"]).sum()) for name, answer in answers.items()}
    assert {name: int(sums[f"{name}_accuracy"]) for name in answers} == correct
    assert int(sums["correct"]) == correct[average]
    assert task.measures(sums)["accuracy"] == correct[average] / 200
    assert len(set(correct.values())) == 4, "or the test tells nothing"
    alone = _task(heads=("maps",)).eval().eval_step(batch)
    assert not any(name.endswith("_accuracy") for name in alone), "there is nothing to average"


def test_losses_and_heads_must_agree():
    with pytest.raises(ValueError, match="for the heads embedding, maps of the model, got them for maps"):
        CombinedTraining(_model(), embedding=None, maps=_maps())
    with pytest.raises(ValueError, match="for the heads maps of the model, got them for embedding, maps"):
        CombinedTraining(_model(heads=("maps",)), embedding=_embedding(), maps=_maps())
