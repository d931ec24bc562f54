"""The teacher's blocks, its first convolution, and how it starts."""

from __future__ import annotations

import copy

import pytest
import torch
from small_bottlenecks import small_bottlenecks
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from fgvc_ext import reference
from fgvc_ext.models import build_backbone
from fgvc_ext.models.deep_bilinear import (
    BilinearBottleneck,
    DeepBilinearBlock,
    TeacherNetwork,
    bilinear_groups,
    five_channels,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _stir(module: nn.Module) -> None:
    """BatchNorms as a training leaves them."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.bias, -0.5, 0.5)


def _mask(side: int = 64, samples: int = 2) -> torch.Tensor:
    mask = torch.zeros(samples, 1, side, side)
    mask[:, :, side // 4 : side // 2, : side // 2] = 1
    return mask


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 16), (512, 16), (1024, 32), (2048, 32), (128, 8), (1664, 26), (768, 24), (7, 7)]
)
def test_groups_of_a_map(channels, groups):
    assert bilinear_groups(channels) == groups


# ---------------------------------------------------------------- blocks


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_a_block_starts_as_its_convolution(training):
    block = DeepBilinearBlock(nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16))
    _stir(block.bn1)
    plain, norm = copy.deepcopy(block.conv1), copy.deepcopy(block.bn1).train(training)
    features, mask = torch.randn(2, 6, 8, 8), _mask()
    share = F.adaptive_avg_pool2d(mask, 8)
    found, grouped = block.train(training)(features, mask)
    expected = F.relu(norm(plain(features * share)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grouped.features, expected)
    assert grouped.groups == block.groups == 4


@torch.no_grad()
def test_a_block_adds_the_products_of_what_it_grouped():
    block = DeepBilinearBlock(nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16), groups=2, attention="off").eval()
    _stir(block)
    nn.init.uniform_(block.bilinear.norm.weight, 0.5, 2)
    found, grouped = block(torch.randn(2, 6, 8, 8), _mask())
    products = reference.group_bilinear(grouped.features, 2, position=block.bilinear.position)
    torch.testing.assert_close(found, grouped.features + block.bilinear.norm(products))
    plain = DeepBilinearBlock(block.conv1, block.bn1, bilinear=False)
    assert plain.bilinear is None
    alone, grouped = plain.eval()(torch.ones(1, 6, 8, 8), _mask(samples=1))
    assert torch.equal(alone, grouped.features)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_starts_as_it_was_where_everything_is_a_part(stride):
    shortcut = None if stride == 1 else nn.Conv2d(64, 64, 1, stride)
    before = Bottleneck(64, 16, stride, shortcut).eval()
    _stir(before)
    after = BilinearBottleneck(copy.deepcopy(before)).eval()
    features = torch.randn(2, 64, 8, 8)
    found, grouped = after(features, torch.ones(2, 1, 64, 64))
    torch.testing.assert_close(found, before(features))
    assert grouped.features.shape == (2, 16, 8, 8), "before the stride, which is the second convolution's"
    states = before.state_dict(), after.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@torch.no_grad()
def test_only_the_residual_branch_is_filtered():
    block = BilinearBottleneck(Bottleneck(64, 16)).eval()
    _stir(block)
    features, nothing = torch.randn(2, 64, 8, 8), torch.zeros(2, 1, 64, 64)
    found, grouped = block(features, nothing)
    assert (grouped.features[:, :, :1, :1] == grouped.features).all(), "a constant, and not nothing"
    branch = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(block.bilinear(grouped.features))))))
    torch.testing.assert_close(found, F.relu(branch + features))


@torch.no_grad()
def test_the_block_behind_a_backbone_starts_as_the_identity():
    block = DeepBilinearBlock.at_the_end(32).eval()
    features = torch.rand(2, 32, 4, 4)
    found, _ = block(features, torch.ones(2, 1, 8, 8))
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the teacher


@torch.no_grad()
@pytest.mark.parametrize("name", ["bottlenecks", "resnet10_narrow"])
def test_the_first_convolution_starts_as_that_of_images_alone(name):
    backbone = small_bottlenecks() if name == "bottlenecks" else build_backbone(name)
    before = copy.deepcopy(backbone)
    teacher = TeacherNetwork(backbone, 5)
    images, maps = torch.randn(2, 3, 64, 64), torch.rand(2, 2, 64, 64)
    wide = teacher.backbone.conv1(torch.cat([images, maps], 1))
    torch.testing.assert_close(wide, before.conv1(images), rtol=1e-5, atol=1e-6)
    assert torch.equal(teacher.backbone.conv1.weight[:, :3], before.conv1.weight)
    assert (teacher.backbone.conv1.weight[:, 3:] == 0).all()


@torch.no_grad()
def test_a_teacher_without_filter_starts_as_its_backbone():
    backbone = small_bottlenecks()
    _stir(backbone)
    before = copy.deepcopy(backbone).eval()
    teacher = TeacherNetwork(backbone, 5, attention="off").eval()
    images = torch.randn(2, 5, 64, 64)
    found = teacher.teach(images)
    for own, level in zip(found.levels, before.levels(images[:, :3], ["layer2", "layer3", "layer4"]), strict=True):
        torch.testing.assert_close(own, level, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.features, found.levels[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores, teacher.classifier(found.features.mean((2, 3))))
    assert torch.equal(teacher(images), found.scores)


@pytest.mark.parametrize(
    ("sites", "widths"),
    [
        (("res4", "res5", "last"), [16, 16, 32, 32, 128]),
        (("res5",), [32, 32]),
        (("last", "res4"), [16, 16, 128]),
        ((), []),
    ],
)
def test_sites(sites, widths):
    teacher = TeacherNetwork(small_bottlenecks(), 5, sites=sites)
    images = torch.cat([torch.randn(2, 3, 64, 64), torch.rand(2, 1, 64, 64), _mask()], 1)
    found = teacher.teach(images)
    assert [one.features.shape[1] for one in found.grouped] == widths
    found.scores.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in teacher.parameters())
    assert teacher.backbone.conv1.weight.grad[:, 3:].any(), "the new columns learn"
    known = {id(p) for p in teacher.new_parameters()}
    old = {name for name, p in teacher.backbone.named_parameters() if id(p) not in known}
    assert old == {name for name, _ in small_bottlenecks().named_parameters()}


def test_without_bottlenecks_there_is_the_last_site_alone():
    teacher = TeacherNetwork(build_backbone("resnet10_narrow"), 5)
    found = teacher.teach(torch.rand(2, 5, 64, 64))
    assert [(one.features.shape[1], one.groups) for one in found.grouped] == [(256, 16)]
    assert teacher.new_parameters() == list(teacher.last.parameters())


@torch.no_grad()
def test_the_blocks_are_filtered_by_the_fifth_channel():
    teacher = TeacherNetwork(small_bottlenecks(), 5).eval()
    images = torch.rand(1, 5, 64, 64)
    images[:, 4] = 0
    found = teacher.teach(images)
    for one in found.grouped:
        assert (one.features[:, :, :1, :1] == one.features).all()
    images[:, 3:] = torch.tensor([0.0, 1.0])[:, None, None]
    within = teacher.teach(images).grouped[0].features
    assert not (within[:, :, :1, :1] == within).all(), "the fifth, and not the fourth"


def test_a_frozen_backbone_keeps_its_first_layers():
    backbone = small_bottlenecks().freeze("layer2")
    teacher = TeacherNetwork(backbone, 5).train()
    assert not teacher.backbone.layer1[0].conv1.weight.requires_grad
    assert teacher.backbone.conv1.weight.requires_grad, "two of its channels are new"
    assert not teacher.backbone.bn1.training
    deeper = TeacherNetwork(small_bottlenecks().freeze("layer3"), 5)
    assert list(deeper.blocks()) == ["res5", "last"], "a frozen stage has no new layers"
    assert all(parameter.requires_grad for parameter in deeper.new_parameters())
    assert teacher.backbone.layer3[0].bilinear.norm.weight.requires_grad
    teacher(torch.rand(2, 5, 64, 64)).sum().backward()
    plain = TeacherNetwork(build_backbone("resnet10_narrow", frozen_until="layer2"), 5)
    assert plain.teach(torch.rand(2, 5, 64, 64)).levels[0].shape == (2, 64, 8, 8), "five channels are images too"


def test_what_a_teacher_refuses():
    with pytest.raises(ValueError, match="layer3: expected bottlenecks with the stride on the 3×3 convolution"):
        TeacherNetwork(build_backbone("resnet50", stride_on_first_conv=True), 5)
    with pytest.raises(ValueError, match="sites: expected some of res4, res5, last, got 'res3'"):
        TeacherNetwork(small_bottlenecks(), 5, sites=("res3",))
    other = small_bottlenecks()
    other.conv1 = nn.Sequential(nn.Conv2d(3, 8, 1, groups=1), nn.Conv2d(8, 8, 1))
    TeacherNetwork(other, 5)
    grouped = small_bottlenecks()
    grouped.conv1 = nn.Conv2d(12, 8, 1)
    with pytest.raises(
        ValueError, match=r"to see 5 channels, it must begin with a torch.nn.Conv2d of 3, got Conv2d\(12"
    ):
        TeacherNetwork(grouped, 5)


def test_maps_come_in_the_images_dtype():
    images = torch.rand(1, 3, 8, 8, dtype=torch.bfloat16)
    found = five_channels(images, torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    assert (found.shape, found.dtype) == ((1, 5, 8, 8), torch.bfloat16)
    assert torch.equal(found[:, :3], images)
    assert (found[:, 3] == 1).all()
