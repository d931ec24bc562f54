"""A member of the ensemble: attention, heads, files; and the public code's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fgvc_ext.models import Backbone, KnowledgeTransfer, build_backbone, load, save
from fgvc_ext.training.attention_transfer import AttentionTransfer

OFFICIAL = json.loads((Path(__file__).parent / "fixtures/knowledge_transfer_official.json").read_text())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _model(**options) -> KnowledgeTransfer:
    torch.manual_seed(0)
    return KnowledgeTransfer(build_backbone("resnet10_narrow"), 5, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "official"])
def test_what_it_explains_is_the_attention_of_the_last_stage(head, images):
    model = _model(head=head)
    features = model.backbone(images)
    by_hand = (features.mean((2, 3), keepdim=True) * features).mean(1)
    found = model.explain(images)
    assert next(iter(found.maps)) == "attention"
    torch.testing.assert_close(found.maps["attention"][:, 0], by_hand)
    torch.testing.assert_close(model.attention(images), by_hand)
    torch.testing.assert_close(found.scores, model(images))
    torch.testing.assert_close(found.scores, model.scores(features))
    assert list(found.maps) == ["attention", "class activation"][: 2 if head == "linear" else 1]


@torch.no_grad()
def test_with_the_linear_head_the_class_activation_maps_are_exact(images):
    model = _model()
    torch.testing.assert_close(model.explain(images).maps["class activation"].mean((2, 3)), model(images))
    assert model.classifier.weight.shape == (5, model.backbone.channels)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "official"])
def test_a_file_gives_the_same_model(head, images, tmp_path):
    model = _model(head=head)
    model.classes = list("abcde")
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(again(images), model(images))
    assert (again.settings(), again.classes) == (model.settings(), model.classes)


@pytest.mark.parametrize("head", ["linear", "official"])
def test_gradients_reach_every_parameter_of_its_groups(head, images):
    model = _model(head=head).train()
    model(images).logsumexp(1).sum().backward()
    groups = model.parameter_groups()
    assert list(groups)[-1] == "classifier"
    grouped = [parameter for group in groups.values() for parameter in group]
    assert len(grouped) == len(list(model.parameters()))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in grouped)


@pytest.mark.parametrize("count", [0, 1])
def test_the_official_head_trains_on_a_share_of_one_image(count, images):
    model = _model(head="official").train()
    scores = model(images[:count])
    assert scores.shape == (count, 5)
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.classifier.parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        KnowledgeTransfer(build_backbone("resnet10_narrow"), 0)
    with pytest.raises(ValueError, match="head: expected one of linear, official, got 'deep'"):
        KnowledgeTransfer(build_backbone("resnet10_narrow"), 5, head="deep")


# ------------------------------------------------------------------ the public code's numbers


def _wave(shape: tuple[int, ...], speed: float, phase: float) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(speed * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


def _official() -> KnowledgeTransfer:
    """The identity as backbone, and a head with the fixture's weights."""
    backbone = Backbone({"same": nn.Conv2d(3, 3, 1, bias=False)}, 3, lambda name: "same")
    model = KnowledgeTransfer(backbone, 5, head="official").double()
    first, last = model.classifier[1], model.classifier[4]
    with torch.no_grad():
        backbone.same.weight.copy_(torch.eye(3)[..., None, None])
        first.weight.copy_(_wave((512, 3), 0.7, 0.1))
        first.bias.copy_(0.1 * _wave((512,), 0.3, 0.2))
        last.weight.copy_(0.05 * _wave((5, 512), 1.1, 0.4))
        last.bias.copy_(0.1 * _wave((5,), 0.9, 0.5))
    return model


class _Teacher(KnowledgeTransfer):
    """A model whose features are known, whatever it sees."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__(Backbone({"same": nn.Conv2d(3, 3, 1)}, 3, lambda name: "same"), 5)
        self.features = features

    def attention(self, images: torch.Tensor) -> torch.Tensor:
        return (self.features.mean((2, 3), keepdim=True) * self.features).mean(1)


def test_head_losses_and_gradient_are_the_public_codes():
    """Its deviation divides by n − 1, ours by n: with the relative balance that changes no gradient."""
    images = (1 + _wave((4, 3, 2, 3), 1.7, 0.3)).requires_grad_()
    teachers = [_Teacher(1 + _wave((4, 3, 2, 3), 2.3, float(phase))) for phase in range(2)]
    task = AttentionTransfer(_official(), nn.CrossEntropyLoss(), teachers, alpha=0.1, balance="relative").train()
    scores = []
    task.model.classifier.register_forward_hook(lambda module, args, out: scores.append(out.detach()))
    answer = task.step({"image": images, "label": torch.arange(4) % 5, "seed": torch.arange(4)})
    answer["loss"].backward()

    def check(found: torch.Tensor, name: str) -> None:
        expected = torch.tensor(OFFICIAL[name], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)

    check(task.model.attention(images).detach(), "attention")
    check(scores[0], "scores")
    check(answer["loss"].detach(), "total")
    check(answer["logs"]["orthogonal"] / 4 * (5 / 6), "orthogonal")
    check(images.grad, "gradient")
