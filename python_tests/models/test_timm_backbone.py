"""timm's models as backbones: maps of every family, image sizes, groups, weights. All weights are random."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator

import pytest
import safetensors.torch
import torch

from fgvc_ext import models, ops
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models import SubtleDifferences, backbone_preprocessing, build_backbone, load_weights
from fgvc_ext.models.config import ModelConfig

timm = pytest.importorskip("timm")

DINOV2, DINOV3, EVA = "vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"
SWIN = "swin_tiny_patch4_window7_224"
# Tokens before those of the map. test_vit3 pools by attention, as SigLIP does; test_vit2 pools before its norm.
TOKENS = {
    "test_vit": 1,
    "test_vit2": 1,
    "test_vit3": 1,
    DINOV2: 5,
    DINOV3: 5,
    EVA: 1,
    "deit_tiny_distilled_patch16_224": 2,
}
MAPS = {"test_resnet": 32, "test_efficientnet": 32, "test_convnext": 32, "test_mambaout": 32, SWIN: 32}
FIXED = {"test_vit_relpos": 16, "test_maxvit": 32}


@functools.cache
def _backbone(name):
    torch.manual_seed(0)
    return build_backbone(f"timm/{name}").eval()


@pytest.mark.parametrize("name", [name for name in TOKENS if name != DINOV2])
@torch.no_grad()
def test_tokens_become_the_map_without_class_and_registers(name):
    """Beside the model as timm builds it for its own image size: normed as there, nothing moved."""
    original = timm.create_model(name, num_classes=0).eval()
    backbone = _backbone(name)
    original.load_state_dict(backbone.body.model.state_dict())
    images = torch.randn(2, *original.pretrained_cfg["input_size"])
    tokens = original.forward_features(images)
    height, width = original.patch_embed.grid_size
    expected = tokens[:, TOKENS[name] :].transpose(1, 2).reshape(2, backbone.channels, height, width)
    torch.testing.assert_close(backbone(images), expected)


@pytest.mark.parametrize("name", [*TOKENS, SWIN])
@torch.no_grad()
def test_transformers_take_images_of_other_sizes(name):
    """Also of other than square ones, whose sides are no multiples of the patch; cells lie where their pixels lie."""
    backbone = _backbone(name)
    stride = backbone.body.model.feature_info[-1]["reduction"]
    height, width = 3 * stride - 1, 5 * stride - stride // 2
    images = torch.randn(2, 3, height, width)
    features = backbone(images)
    assert features.shape == (2, backbone.channels, 3, 5)
    changed = images.clone()
    changed[:, :, stride : 2 * stride, 3 * stride : 4 * stride] += 3
    difference = (backbone(changed) - features).norm(dim=1)
    assert difference.flatten(1).argmax(1).tolist() == [1 * 5 + 3] * 2


@torch.no_grad()
def test_positions_are_interpolated_to_the_map():
    """The same patch everywhere, so that only positions differ: what is seen is the embedding of the new grid."""
    backbone = build_backbone("timm/test_vit").eval()
    model = backbone.body.model
    grid = (
        torch.linspace(0, 1, 10)[:, None] + 5 * torch.linspace(0, 1, 10)[None]
    )  # rises downwards, and faster to the right
    model.pos_embed[0, 1:] = grid.flatten()[:, None] * torch.linspace(-1, 1, 64)
    for block in model.blocks:  # nothing but the embedding
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
    model.norm = torch.nn.Identity()
    values = backbone(torch.zeros(1, 3, 4 * 16, 7 * 16))[0, -1]
    assert values.shape == (4, 7)
    assert (values.diff(dim=0) > 0).all()
    assert (values.diff(dim=1) > values.diff(dim=0).max()).all()


@pytest.mark.parametrize("name", [*TOKENS, *MAPS, *FIXED])
def test_methods_work_on_every_family(name):
    """The pooling, the attention map, the block and a localiser's heat map; parameters without use are frozen."""
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}")
    size = backbone.body.image_size if name in FIXED else (70, 84)
    model = SubtleDifferences(backbone, 3, patch_size=2).train()
    images = torch.randn(2, 3, *size)
    features = backbone(images)
    assert features.dim() == 4
    assert features.shape[1] == backbone.channels
    assert ops.global_k_max_pool(features, k=2).shape == (2, backbone.channels)
    assert ops.spatial_attention_map(features).shape == (2, *features.shape[2:])
    boxes = ops.heatmap_to_boxes(features.mean(1), threshold=0.5, image_size=size)
    assert boxes.shape == (2, 4)
    scores = model(images, seed=1)
    assert scores.shape == (2, 3)
    assert model.explain(images).maps["class activation"].shape == (2, 3, *features.shape[2:])
    scores.square().sum().backward()
    for parameter, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, parameter


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("test_vit", "patch_embed", "norm", 8),
        ("test_vit2", "patch_embed", "blocks.7", 9),  # the norm behind the pooling goes with the last group
        ("test_vit3", "patch_embed", "norm", 11),
        (DINOV3, "patch_embed", "norm", 14),
        (SWIN, "patch_embed", "norm", 6),
        ("test_convnext", "stem", "stages.3", 5),
        ("test_resnet", "conv1", "layer4", 6),
    ],
)
def test_groups_go_from_input_to_output(name, first, last, count):
    backbone = _backbone(name)
    groups = backbone.groups()
    assert next(iter(groups)) == first
    assert [*groups][-1] == last
    assert len(groups) == count
    named = functools.reduce(operator.iadd, groups.values(), [])
    assert sorted(named) == sorted(name for name, _ in backbone.named_parameters())
    for token in ("cls_token", "pos_embed", "reg_token"):
        if hasattr(backbone.body.model, token) and getattr(backbone.body.model, token) is not None:
            assert f"body.model.{token}" in groups[first]
    numbers = [int(group.rpartition(".")[2]) for group in groups if "." in group]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("name", ["test_vit", DINOV3, EVA])
@torch.no_grad()
def test_levels_are_the_outputs_of_blocks(name):
    backbone, images, found = _backbone(name), torch.randn(1, 3, 48, 80), {}
    blocks = backbone.body.model.blocks
    handles = [
        blocks[number].register_forward_hook(lambda module, args, out, number=number: found.update({number: out}))
        for number in (1, 3)
    ]
    backbone(images)
    for handle in handles:
        handle.remove()
    last, third, first = backbone.levels(images, ["norm" if name != EVA else "3", "3", "blocks.1"])
    for level, number in ((third, 3), (first, 1)):
        assert torch.equal(level.flatten(2).transpose(1, 2), found[number][:, TOKENS[name] :])
    if name != EVA:
        torch.testing.assert_close(last, backbone(images))
    with pytest.raises(ValueError, match=r"levels: expected some of blocks\.0, .*, got '99'"):
        backbone.levels(images, ["99"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # what is pooled is the last stage behind a norm, an activation, a convolution, under another name, or itself
        ("densenet121", ["features.denseblock2", "features.denseblock3", "features"]),
        ("vgg11", ["features.14", "features.19", "features"]),
        ("repvgg_a0", ["stages.1", "stages.2", "stages.3"]),
        ("nf_regnet_b0", ["stages.1", "stages.2", "final_conv"]),
        ("test_efficientnet", ["blocks.2", "blocks.3", "bn2"]),
        ("levit_128s", ["stages.0", "stages.1", "stages.2"]),
        ("test_vit", ["blocks.3", "blocks.4", "norm"]),
        ("test_resnet", ["layer2", "layer3", "layer4"]),
        ("xcit_nano_12_p16_224", ["blocks.9", "blocks.10", "norm"]),  # twice: what it returns went through more layers
    ],
)
@torch.no_grad()
def test_the_last_level_is_the_backbone_s_map_and_no_level_stands_there_twice(name, expected):
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}").eval()
    for parameter in backbone.parameters():
        if parameter.dim() == 1:
            parameter += torch.rand_like(parameter)  # as after a training: at first a layer may do nothing
    images = torch.randn(1, 3, *(backbone.body.image_size if name == "levit_128s" else (96, 64)))
    names = backbone.level_names()
    assert names[-3:] == expected
    levels = backbone.levels(images, names)
    torch.testing.assert_close(levels[-1], backbone(images))
    for one, other in itertools.combinations(levels, 2):
        assert one.shape != other.shape or (one - other).abs().max() > 1e-2 * one.abs().max()
    calls = []
    backbone.body.model.register_forward_hook(lambda *_: calls.append(1))
    first = next(module for module in backbone.body.model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(1))
    for one, other in zip(backbone.levels(images, expected), levels[-3:], strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 1 + name.startswith("xcit"), "one pass gives them all"


@torch.no_grad()
def test_a_model_that_returns_something_else_beside_its_levels_is_passed_twice(monkeypatch):
    torch.manual_seed(0)
    backbone = build_backbone("timm/test_vit").eval()
    usual, images = backbone.body.model.forward_intermediates, torch.randn(1, 3, 64, 64)
    expected = backbone.levels(images, ["blocks.1", "norm"])

    def without_norm(x, **options):
        found = usual(x, **options)
        return found if options["intermediates_only"] else (found[0] + 1, found[1])

    monkeypatch.setattr(backbone.body.model, "forward_intermediates", without_norm)
    backbone.body.compare_with_stages(images)
    for one, other in zip(backbone.levels(images, ["blocks.1", "norm"]), expected, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_levels_compute_nothing_beyond_the_deepest():
    backbone = build_backbone("timm/test_vit").eval()
    backbone.body.model.blocks[4].register_forward_hook(lambda *_: pytest.fail("block 4 was computed"))
    assert len(backbone.levels(torch.randn(1, 3, 32, 32), ["3", "0"])) == 2


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", DINOV3, EVA, SWIN, "test_convnext", "test_resnet", "test_maxvit"]
)
@torch.no_grad()
def test_one_can_go_on_from_the_end_of_a_group(name):
    backbone = _backbone(name)
    images = torch.randn(2, 3, *(backbone.body.image_size if name in FIXED else (60, 90)))
    expected, groups = backbone(images), list(backbone.groups())
    for group in (groups[-3], groups[-2], groups[-1]):
        features = backbone.until(images, group)
        assert features.dim() == 4
        torch.testing.assert_close(backbone.onward(features, group), expected)
    with pytest.raises(ValueError, match=rf"timm/{name}: expected one of .*{groups[-1]}, got 'nowhere'"):
        backbone.until(images, "nowhere")


@torch.no_grad()
def test_what_lies_behind_a_group_is_not_computed_for_its_output():
    backbone = build_backbone("timm/test_vit").eval()
    model = backbone.body.model
    images = torch.randn(1, 3, 64, 64)
    features = backbone.until(images, "blocks.2")
    handle = model.blocks[3].register_forward_hook(lambda *_: pytest.fail("block 3 was computed"))
    torch.testing.assert_close(backbone.until(images, "blocks.2"), features)
    handle.remove()
    model.blocks[2].register_forward_hook(lambda *_: pytest.fail("block 2 was computed"))
    assert backbone.onward(features, "blocks.2").shape == (1, 64, 4, 4)


@pytest.mark.parametrize(
    ("name", "until"), [("test_vit", "blocks.3"), (DINOV3, "blocks.9"), (SWIN, "layers.1"), ("test_vit3", "all")]
)
@torch.no_grad()
def test_the_frozen_part_s_output_stands_in_for_images(name, until):
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}", frozen_until=until).train()
    images = torch.randn(2, 3, 64, 96)
    features = backbone.frozen_features(images)
    groups = list(backbone.groups())
    frozen = groups[: groups.index(backbone.frozen_until) + 1]
    for group, names in backbone.groups().items():
        for parameter in names:
            assert group not in frozen or not backbone.get_parameter(parameter).requires_grad
    assert set(backbone.frozen_state()) >= {key for group in frozen for key in backbone.groups()[group]}
    assert not set(backbone.frozen_state()) & {
        key for group in groups if group not in frozen for key in backbone.groups()[group]
    }
    assert not backbone.body.model.get_submodule(frozen[-1]).training
    assert until == "all" or backbone.body.model.get_submodule(groups[-2]).training
    backbone.eval()  # in training, Swin transformers leave layers out at random
    torch.testing.assert_close(backbone(features.half()), backbone(images), atol=0.02, rtol=0.02)
    assert torch.equal(backbone(features), backbone(images)) or until != "all"
    expected = backbone.levels(images, groups[-2:])
    if until == "all":
        with pytest.raises(ValueError, match=rf"levels: '{groups[-2]}' lies within the frozen part"):
            backbone.levels(features, groups[-2:])
        return
    for ours, theirs in zip(backbone.levels(features, groups[-2:]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(backbone.levels(features, [frozen[-1]])[0], backbone.levels(images, [frozen[-1]])[0])
    with pytest.raises(ValueError, match=rf"levels: '{frozen[-2]}' lies within the frozen part"):
        backbone.levels(features, [frozen[-2]])


def test_a_group_from_whose_end_one_cannot_go_on_has_no_features_to_cache():
    backbone = build_backbone("timm/test_vit", frozen_until="patch_embed")
    assert not backbone.has_frozen_features
    with pytest.raises(ValueError, match=r"timm/test_vit: expected one of blocks\.0, .*, norm, got 'patch_embed'"):
        backbone.frozen_features(torch.zeros(1, 3, 32, 32))
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 2, 2)


def test_models_without_maps_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"timm/crossvit_tiny_240: expected feature maps \[N,288,h,w\].*got \['list'\]"
    ):
        build_backbone("timm/crossvit_tiny_240")


def test_a_model_of_one_size_says_so_and_can_be_built_for_another(tmp_path):
    with pytest.raises(
        ValueError, match=r"test_vit_relpos: .*images of 96 × 96 .*built for 160 × 160 .*--model.image-size"
    ):
        _backbone("test_vit_relpos")(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ValueError, match=r"test_vit_relpos: .*images of 96 × 96 "):
        _backbone("test_vit_relpos").levels(torch.zeros(1, 3, 96, 96), ["0"])
    model = SubtleDifferences(ModelConfig(backbone="timm/test_vit_relpos", image_size=96).build(), 2).eval()
    images = torch.randn(1, 3, 96, 96)
    assert model.backbone(images).shape == (1, 96, 6, 6)
    model.preprocessing = dataclasses.replace(Preprocessing(), resize=96, crop=96)
    models.save(model, tmp_path / "m.safetensors")
    assert torch.equal(models.load(tmp_path / "m.safetensors")(images), model(images))


@pytest.mark.parametrize(
    ("name", "options", "crop", "side"),
    [
        ("test_vit", {}, 96, 6),
        (EVA, {}, 100, 8),
        (DINOV3, {}, 64, 4),
        (SWIN, {}, 128, 4),
        ("test_vit_relpos", {"image_size": 96}, 96, 6),
    ],
)
def test_the_side_of_the_map_is_known_before_a_run(name, options, crop, side):
    assert ModelConfig(backbone=f"timm/{name}", **options).map_side(crop) == side


@pytest.mark.parametrize("name", ["timm/test_resnet", "resnet18"])
def test_an_image_size_for_a_model_that_takes_any_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} .*leave out image_size, got 96"):
        build_backbone(name, image_size=96)


def test_errors_of_other_kinds_stay_as_they_are():
    with pytest.raises(RuntimeError, match="expected input"):
        _backbone("test_vit")(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", EVA, "test_resnet", "test_convnext", "test_maxvit"])
def test_timms_own_files_load(name, tmp_path):
    torch.manual_seed(1)
    original = timm.create_model(name, num_classes=3)
    torch.save(original.state_dict(), tmp_path / "w.pth")
    said: list[str] = []
    backbone = build_backbone(f"timm/{name}", weights=tmp_path / "w.pth", report=said.append)
    assert len(said[0].splitlines()) == 1, said
    state = backbone.body.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items() if key in state)


@pytest.mark.parametrize(("name", "count"), [("test_vit", 1), ("test_maxvit", 8)])
@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_another_image_size_are_interpolated_and_it_is_said(name, count, whole, tmp_path):
    """As timm itself does: beside a model into which timm has loaded the same weights."""
    torch.manual_seed(1)
    trained = SubtleDifferences(build_backbone(f"timm/{name}", image_size=160), 3)
    model = SubtleDifferences(build_backbone(f"timm/{name}", image_size=96), 3)
    timms = {key: value.contiguous() for key, value in trained.backbone.body.model.state_dict().items()}
    safetensors.torch.save_file(timms, tmp_path / "timm.safetensors")
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "own.safetensors")
    report = load_weights(model, tmp_path / f"{'own' if whole else 'timm'}.safetensors")
    assert len(report.interpolated) == count, report.interpolated
    assert "of another grid, so they were interpolated: " in report.text()
    assert report.missing == ([] if whole else ["classifier.weight", "classifier.bias"])
    overlay = {"file": str(tmp_path / "timm.safetensors"), "num_classes": 0}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=96)
    state = model.backbone.body.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(timm.create_model("test_vit2").state_dict(), file)
    with pytest.raises(ValueError, match=r"w\.pth: do not fit the model"):
        build_backbone("timm/test_vit", weights=file)


def test_timms_weights_have_values_of_their_own():
    found = backbone_preprocessing("timm/vit_base_patch16_224")
    assert found == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    assert backbone_preprocessing("timm/convnext_atto")["mean"] == (0.485, 0.456, 0.406)
