"""Backbones of which the first groups of layers are frozen."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fgvc_ext.models import SubtleDifferences, build_backbone, load, load_weights, save
from fgvc_ext.models.config import ModelConfig

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CASES = [
    ("resnet10_narrow", "stem"),
    ("resnet10_narrow", "layer2"),
    ("resnet10_narrow", "all"),
    ("densenet121", "block3"),
    ("densenet121", "block4"),
    ("vgg11_bn", "block2"),
]


@pytest.mark.parametrize(("name", "until"), CASES)
def test_what_the_frozen_part_makes_stands_in_for_images(name, until):
    backbone = build_backbone(name, frozen_until=until).eval()
    with torch.no_grad():
        features, whole = backbone.frozen_features(IMAGES), backbone(IMAGES)
        assert torch.equal(backbone(features), whole)
        assert backbone(features.half()).dtype == torch.float32
        torch.testing.assert_close(backbone(features.half()), whole, rtol=0.01, atol=0.01)
        last = list(backbone.groups())[-1]
        assert torch.equal(backbone.levels(features, [last])[0], backbone.levels(IMAGES, [last])[0])


@pytest.mark.parametrize(("name", "until"), CASES)
def test_training_changes_nothing_of_the_frozen_part_and_all_behind_it(name, until):
    backbone = build_backbone(name, frozen_until=until).train()
    groups = list(backbone.groups())
    frozen = groups[: groups.index(backbone.frozen_until) + 1]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.eval().train()  # what an evaluation between two epochs does
    features = backbone(IMAGES)
    if features.requires_grad:
        features.square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == (backbone.group_of(key) in frozen), key
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    running = {key for key in before if "running_" in key and backbone.group_of(key) not in frozen}
    assert {key for key in changed if "running_" in key} == running
    assert set(backbone.frozen_state()) == {key for key in before if backbone.group_of(key) in frozen}


def test_dropout_of_a_frozen_layer_is_off():
    backbone = build_backbone("densenet121")
    for layer in backbone.modules():
        if type(layer).__name__ == "_DenseLayer":
            layer.drop_rate = 0.5  # it looks at its own `training`
    backbone.freeze("all").train()
    with torch.no_grad():
        assert torch.equal(backbone(IMAGES), backbone(IMAGES))


def test_a_group_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=re.escape("all or one of stem, layer1, layer2, layer3, layer4, got 'layer5'")):
        ModelConfig(backbone="resnet10_narrow", frozen_until="layer5").build()


def test_a_method_that_trains_the_map_refuses_a_backbone_that_is_frozen_whole():
    build_backbone("resnet10_narrow", frozen_until="layer3").require_trainable_map("knowledge transfer")
    build_backbone("resnet10_narrow").require_trainable_map("knowledge transfer")
    for name in ("all", "layer4"):
        with pytest.raises(ValueError, match=r"knowledge transfer .* none or one of stem, .*, layer3, got 'layer4'"):
            build_backbone("resnet10_narrow", frozen_until=name).require_trainable_map("knowledge transfer")


def test_frozen_features_need_a_frozen_part():
    with pytest.raises(ValueError, match="no frozen part"):
        build_backbone("resnet10_narrow").frozen_features(IMAGES)
    partly = build_backbone("resnet10_narrow", frozen_until="layer2").eval()
    with pytest.raises(ValueError, match="'layer1' lies within the frozen part"):
        partly.levels(partly.frozen_features(IMAGES), ["layer1"])


def test_freezing_can_be_taken_back():
    backbone = build_backbone("resnet10_narrow")
    backbone.bn1.weight.requires_grad_(False)
    backbone.freeze("layer2").freeze(None).train()
    assert [name for name, p in backbone.named_parameters() if not p.requires_grad] == ["bn1.weight"]
    assert all(module.training for module in backbone.modules())
    assert backbone.settings() == build_backbone("resnet10_narrow").settings()


def test_a_layer_that_is_frozen_in_part_has_no_features():
    """All of a timm model is one layer here, whose groups lie within it."""
    backbone = build_backbone("resnet10_narrow")
    inner = nn.Sequential(*backbone.children())
    for child in list(dict(backbone.named_children())):
        delattr(backbone, child)
    backbone.add_module("body", inner)
    backbone.group_of = lambda name: f"part{min(int(name.split('.')[1]), 5)}"
    backbone.freeze("part4").train()
    assert not backbone.has_frozen_features
    assert not inner[1].training
    assert inner[5].training
    assert backbone.freeze("all").has_frozen_features


def test_a_shipped_model_is_whole(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet10_narrow", frozen_until="layer4")
    model = SubtleDifferences(config.build(), 5).eval()
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        assert torch.equal(loaded(loaded.backbone.frozen_features(IMAGES)), model(IMAGES))
    tuned = SubtleDifferences(build_backbone("resnet10_narrow"), 5)  # what fine-tuning starts from
    load_weights(tuned, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(tuned.eval()(IMAGES), model(IMAGES))
    assert all(parameter.requires_grad for parameter in tuned.parameters())
