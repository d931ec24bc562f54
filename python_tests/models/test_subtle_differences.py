"""The network: maps, block and scores."""

from __future__ import annotations

import pytest
import torch

from fgvc_ext import reference
from fgvc_ext.models import SubtleDifferences, build_backbone


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _model(**options) -> SubtleDifferences:
    torch.manual_seed(0)
    return SubtleDifferences(build_backbone("resnet10_narrow"), 5, **options)


@torch.no_grad()
def test_evaluation_is_the_plain_mean(images):
    model = _model().eval()
    maps = model.class_activation_maps(images)
    assert maps.shape == (3, 5, 4, 4)
    torch.testing.assert_close(model(images), maps.mean((2, 3)))
    torch.testing.assert_close(model(images, seed=torch.arange(3)), maps.mean((2, 3)))


@torch.no_grad()
def test_training_goes_through_the_block(images):
    model, seed = _model(patch_size=2, alpha=0.3, p_peak=0.4, p_patch=0.6).train(), torch.tensor([5, 6, 7])
    maps, scores = model.class_activation_maps(images), model(images, seed)
    expected = reference.diversify(maps, p_peak=0.4, p_patch=0.6, patch_size=2, alpha=0.3, seed=seed)
    torch.testing.assert_close(scores, expected)
    mask = model.suppression_mask(images, seed)
    torch.testing.assert_close(torch.where(mask, 0.3 * maps, maps).mean((2, 3)), scores)


@torch.no_grad()
def test_a_sample_keeps_its_mask_in_any_batch(images):
    model, seed = _model().train(), torch.tensor([5, 6, 7])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(model(images[1:2], seed[1:2]), model(images, seed)[1:2])


@torch.no_grad()
def test_without_the_block_training_is_the_plain_mean(images):
    model = _model(diversification=False).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(model(images, torch.arange(3)), model.class_activation_maps(images).mean((2, 3)))
    with pytest.raises(RuntimeError, match="without its diversification block"):
        model.suppression_mask(images)


def test_parameters_are_the_backbones_and_one_convolution():
    model = _model()
    groups = model.parameter_groups()
    assert list(groups)[-1] == "classifier"
    assert sum(len(parameters) for parameters in groups.values()) == len(list(model.parameters()))
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert sum(p.numel() for p in model.parameters()) == backbone + (model.backbone.channels + 1) * 5


def test_scores_are_small_at_the_start(images):
    """All classes are about as probable as each other: no class has to be unlearnt."""
    with torch.no_grad():
        model = _model().eval()
        assert model(images).abs().max() < 0.1 * model.backbone(images).abs().max()
        assert 0.009 < model.classifier.weight.std() < 0.011
        assert (model.classifier.bias == 0).all()


def test_gradients_reach_every_parameter(images):
    model = _model().train()
    model(images, torch.arange(3)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_classes_is_an_error():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        SubtleDifferences(build_backbone("resnet10_narrow"), 0)
