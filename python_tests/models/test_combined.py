"""Two heads on one feature map: each is that of its own paper, and their scores are averaged."""

from __future__ import annotations

import json

import pytest
import torch

from fgvc_ext import reference
from fgvc_ext.models import Combined, ELoPE, SubtleDifferences, build_backbone, load, load_weights, save

EMBEDDING = {"k": 3, "embedding_dim": 16}
MAPS = {"patch_size": 2, "p_peak": 0.4, "p_patch": 0.6, "alpha": 0.3}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _model(seed: int = 0, **options) -> Combined:
    torch.manual_seed(seed)
    model = Combined(build_backbone("resnet10_narrow"), 5, **{"embedding": EMBEDDING, "maps": MAPS, **options})
    with torch.no_grad():  # scores that differ
        for name, parameter in model.classifier.named_parameters():
            if "classifier" in name:
                parameter.mul_(20)
    return model.eval()


def _papers(model: Combined) -> dict[str, torch.nn.Module]:
    """The papers' own models, with the weights of this one's heads."""
    own = {"embedding": ELoPE(model.backbone, 5, **EMBEDDING), "maps": SubtleDifferences(model.backbone, 5, **MAPS)}
    for name, paper in own.items():
        head = model.classifier[name].state_dict()
        paper.load_state_dict({**paper.state_dict(), **head})
        assert {f"backbone.{key}" for key in model.backbone.state_dict()} | set(head) == set(paper.state_dict())
        paper.eval()
    return own


@torch.no_grad()
def test_every_head_is_its_papers_own(images):
    model = _model()
    scores, embeddings = model.head_scores(model.backbone(images))
    papers = _papers(model)
    assert list(scores) == ["embedding", "maps"]
    for name, paper in papers.items():
        torch.testing.assert_close(scores[name], paper(images))
    torch.testing.assert_close(embeddings, papers["embedding"].embed(images))


@torch.no_grad()
def test_the_answer_is_the_average_of_the_heads(images):
    model = _model()
    apart = [paper(images) for paper in _papers(model).values()]
    mean = sum(scores.softmax(1) for scores in apart) / 2
    torch.testing.assert_close(model(images), mean.log())
    heads = model.head_scores(model.backbone(images))[0]
    torch.testing.assert_close(model.averaged(heads, "logits"), sum(apart) / 2)
    other = _model(average="logits")
    torch.testing.assert_close(other(images), sum(apart) / 2)
    torch.testing.assert_close(other.averaged(heads, "probabilities"), mean.log())
    assert not torch.allclose(mean, (sum(apart) / 2).softmax(1), atol=1e-3), "or the test tells nothing"


@torch.no_grad()
@pytest.mark.parametrize(("left_out", "maps"), [("embedding", "class activation"), ("maps", "pooled")])
def test_one_head_alone_answers_as_its_paper(left_out, maps, images):
    model = _model(**{left_out: None})
    (name,) = model.classifier
    assert name != left_out
    scores, embeddings = model.head_scores(model.backbone(images))
    assert list(scores) == [name]
    assert (embeddings is None) == (left_out == "embedding")
    assert torch.equal(model(images), scores[name]), "and not their logarithmic probabilities"
    assert list(model.explain(images).maps) == ["attention", maps]
    assert model.settings()[left_out] is None


@torch.no_grad()
def test_training_goes_through_the_block_with_each_images_seed(images):
    model, seed = _model(), torch.tensor([5, 6, 7])
    model.train().backbone.eval()
    features = model.backbone(images)
    maps = model.map_head.maps(features)
    expected = reference.diversify(maps, p_peak=0.4, p_patch=0.6, patch_size=2, alpha=0.3, seed=seed)
    torch.testing.assert_close(model.head_scores(features, seed)[0]["maps"], expected)
    model.classifier["embedding"].eval()
    torch.testing.assert_close(model(images, seed), model.averaged(model.head_scores(features, seed)[0]))
    assert not torch.allclose(expected, maps.mean((2, 3)))
    plain = _model(maps={"diversification": False}).train()
    torch.testing.assert_close(plain.map_head(features, seed), plain.map_head.maps(features).mean((2, 3)))


def test_a_head_begins_with_the_weights_that_its_papers_model_begins_with():
    """So that a row with one part alone is that method's row, seed by seed."""
    for name, kind, options in (("embedding", ELoPE, EMBEDDING), ("maps", SubtleDifferences, MAPS)):
        torch.manual_seed(3)
        paper = kind(build_backbone("resnet10_narrow"), 5, **options).state_dict()
        torch.manual_seed(3)
        heads = {"embedding": None, "maps": None, name: options}
        own = Combined(build_backbone("resnet10_narrow"), 5, **heads).classifier[name].state_dict()
        assert all(torch.equal(value, paper[key]) for key, value in own.items())


@torch.no_grad()
def test_what_it_explains(images):
    model = _model()
    found, features = model.explain(images), model.backbone(images)
    assert list(found.maps) == ["attention", "class activation", "pooled"]
    attention = (features.mean((2, 3), keepdim=True) * features).mean(1)
    torch.testing.assert_close(found.maps["attention"][:, 0], attention)
    torch.testing.assert_close(model.attention(images), attention)
    papers = _papers(model)
    torch.testing.assert_close(found.maps["class activation"].mean((2, 3)), papers["maps"](images))
    pooled = papers["embedding"].pooling(features).mean(1)
    torch.testing.assert_close(found.maps["pooled"].sum((1, 2, 3)), pooled)
    torch.testing.assert_close(found.scores, model(images))


@torch.no_grad()
def test_a_file_gives_the_same_model(images, tmp_path):
    model = _model(average="logits")
    model.classes = list("abcde")
    json.dumps(model.settings())
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert torch.equal(again(images), model(images))
    assert (again.settings(), again.average, again.map_head.diversification.p_patch) == (
        model.settings(),
        "logits",
        0.6,
    )
    picture = torch.randint(0, 256, (3, 75, 131), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert again.predict([picture]) == model.predict([picture])


@torch.no_grad()
def test_it_starts_from_other_models_weights_and_others_from_its(images, tmp_path):
    """Both heads are one classifier, which weights may lack or have another of."""
    torch.manual_seed(7)
    file = tmp_path / "model.safetensors"
    save(SubtleDifferences(build_backbone("resnet10_narrow"), 5), file)
    model, before = _model(), _model().classifier.state_dict()
    load_weights(model, file)
    assert torch.equal(model.backbone.conv1.weight, load(file).backbone.conv1.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.classifier.state_dict().items())
    save(model, file)
    other = SubtleDifferences(build_backbone("resnet10_narrow"), 4)
    load_weights(other, file)
    assert torch.equal(other.backbone.conv1.weight, model.backbone.conv1.weight)


def test_gradients_reach_every_parameter_of_its_groups(images):
    model = _model().train()
    heads = model.head_scores(model.backbone(images), torch.arange(3))[0]
    sum(scores.square().sum() for scores in heads.values()).backward()
    groups = model.parameter_groups()
    assert list(groups)[-1] == "classifier"
    grouped = [parameter for group in groups.values() for parameter in group]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in grouped)


@torch.no_grad()
def test_it_is_exported(images):
    model = _model()
    sizes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=48, max=8192)}
    module = torch.export.export(model, (images,), dynamic_shapes=(sizes,)).module()
    torch.testing.assert_close(module(images), model(images))
    other = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(other), model(other))


@torch.no_grad()
def test_the_output_of_frozen_layers_stands_in_for_images(images):
    model = _model()
    model.backbone.freeze("all")
    features = model.backbone.frozen_features(images)
    assert torch.equal(model(features), model(images))
    assert torch.equal(model.attention(features), model.attention(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": None, "maps": None}, "expected an embedding head, a map head or both, got none"),
        ({"average": "votes"}, "average: expected one of probabilities, logits, got 'votes'"),
        ({"embedding": {"pooling": "mean"}}, "pooling: expected gap, gmp or gkmp, got 'mean'"),
        ({"embedding": {"embedding_dim": 0}}, "embedding_dim: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _model(**options)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        Combined(build_backbone("resnet10_narrow"), 0)
