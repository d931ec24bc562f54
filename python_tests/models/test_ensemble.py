"""Models that answer together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models import Ensemble, Explanation, KnowledgeTransfer, SubtleDifferences, build_backbone, load, save
from fgvc_ext.models.weights_file import load_weights_file

SMALL = Preprocessing(resize=72, crop=64)


def _member(kind=KnowledgeTransfer, seed: int = 0, **options):
    torch.manual_seed(seed)
    model = kind(build_backbone("resnet10_narrow"), 3, **options)
    model.classes, model.preprocessing = ["a", "b", "c"], SMALL
    with torch.no_grad():  # scores that differ
        for parameter in model.classifier.parameters():
            parameter.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def members() -> list:
    return [_member(), _member(SubtleDifferences, 1, patch_size=2), _member(seed=2, head="official")]


@torch.no_grad()
def test_probabilities_or_logits_are_averaged(members, images):
    apart = [member(images) for member in members]
    mean = sum(scores.softmax(1) for scores in apart) / 3
    torch.testing.assert_close(Ensemble(members)(images).softmax(1), mean)
    torch.testing.assert_close(Ensemble(members)(images), mean.log())
    torch.testing.assert_close(Ensemble(members, "logits")(images), sum(apart) / 3)
    assert not torch.allclose(mean, (sum(apart) / 3).softmax(1), atol=1e-3), "or the test tells nothing"


@torch.no_grad()
def test_confident_members_give_finite_scores(images):
    sure = [_member(), _member(seed=1)]
    for member, sign in zip(sure, (1, -1), strict=True):
        member.classifier.bias.copy_(sign * torch.tensor([500.0, -500.0, 0.0]))
    scores = Ensemble(sure)(images)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.softmax(1)[:, :2], torch.full((2, 2), 0.5))


@torch.no_grad()
def test_a_file_gives_scores_and_every_members_map_in_one_call(members, images, tmp_path):
    before = Ensemble(members, "logits")
    save(before, tmp_path / "e.safetensors")
    state, metadata = load_weights_file(tmp_path / "e.safetensors")
    assert {name.split(".")[1] for name in state} == {"0", "1", "2"}
    assert all(name.startswith("models.") for name in state)
    assert metadata["classes"] == ["a", "b", "c"]
    after = load(tmp_path / "e.safetensors")
    found = after.explain(images)
    torch.testing.assert_close(found.scores, before(images), rtol=0, atol=0)
    assert list(found.maps) == ["member 1", "member 2", "member 3"]
    assert [maps.shape[1] for maps in found.maps.values()] == [1, 3, 1]
    for member, maps in zip(members, found.maps.values(), strict=True):
        assert torch.equal(maps, next(iter(member.explain(images).maps.values())))
    assert [type(member) for member in after.members] == [type(member) for member in members]
    assert all((m.classes, m.preprocessing) == (["a", "b", "c"], SMALL) for m in [after, *after.members])
    assert after.average == "logits"
    assert after.predict([torch.zeros(3, 80, 80, dtype=torch.uint8)], top=1)[0].names[0] in "abc"


@torch.no_grad()
def test_scores_come_from_forward_where_an_explanation_has_none(members, images, monkeypatch):
    ensemble = Ensemble(members[:2])
    maps, boxes = torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4)
    monkeypatch.setattr(members[0], "explain", lambda images: Explanation(maps={"x": maps}, boxes={"y": boxes}))
    found = ensemble.explain(images)
    torch.testing.assert_close(found.scores, ensemble(images))
    assert found.maps["member 1"] is maps
    assert (list(found.boxes), found.boxes["member 1"] is boxes) == (["member 1"], True)


def test_groups_are_the_members(members):
    ensemble = Ensemble(members)
    groups = ensemble.parameter_groups()
    assert list(groups) == list(members[0].parameter_groups())
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in ensemble.parameters())


def test_members_that_do_not_fit_are_refused(members):
    other = _member()
    with pytest.raises(ValueError, match="members: expected at least one"):
        Ensemble([])
    with pytest.raises(ValueError, match="expected one of probabilities, logits, got 'votes'"):
        Ensemble(members, "votes")
    other.preprocessing = replace(SMALL, crop=32)
    with pytest.raises(ValueError, match="the same preprocessing"):
        Ensemble([members[0], other])
    other.preprocessing, other.classes = SMALL, ["a", "b", "d"]
    with pytest.raises(ValueError, match="the same classes"):
        Ensemble([members[0], other])
