"""The whole model of dual attention fusion: what it sees, says, keeps and loads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from small_bottlenecks import small_bottlenecks
from torch import nn

from fgvc_ext import reference
from fgvc_ext.models import DualAttention, build_backbone, crop_and_resize, load, load_weights, save
from fgvc_ext.models.dual_attention import NEW_LAYERS, ScoreFusion, StudentNetwork
from fgvc_ext.models.part_attention import box_union, foreground

ROWS = [
    {"use_sppn": False, "use_lhm": False, "use_teacher": False},
    {"use_lhm": False, "use_teacher": False},
    {"use_teacher": False},
    {},
]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def _model(**options) -> DualAttention:
    torch.manual_seed(0)
    options = {"fpn_channels": 16, "head_depth": 1, **options}
    return DualAttention(build_backbone("resnet10_narrow"), 5, **options).eval()


def _narrow(**options) -> DualAttention:
    torch.manual_seed(0)
    return DualAttention(small_bottlenecks(), 5, fpn_channels=16, head_depth=1, **options).eval()


# ---------------------------------------------------------------- inference


@torch.no_grad()
@pytest.mark.parametrize("build", [_model, _narrow])
def test_inference_is_two_passes_and_their_fusion(build, images):
    model, passes = build(), []
    nn.init.normal_(model.fusion.linear.weight)
    for backbone in model.networks().values():
        backbone.conv1.register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    found = model.all_scores(images)
    assert passes == [(3, 3, 64, 64), (3, 5, 64, 64)], "no part images"
    student, teacher = model.student(images), found["teacher"]
    torch.testing.assert_close(found["student"], student)
    joined = torch.cat([student, teacher], 1)
    torch.testing.assert_close(found["fused"], model.fusion.linear(joined))
    assert torch.equal(model(images, seed=torch.arange(3)), found["fused"])


@torch.no_grad()
def test_the_teacher_sees_image_heat_map_and_boxes(images):
    model, seen_by = _narrow(), []
    model.teacher.backbone.conv1.register_forward_hook(lambda module, args, out: seen_by.append(args[0]))
    seen = model.look(images)
    model.teach(images, seen)
    levels = model.student.backbone.levels(images, ["layer2", "layer3", "layer4"])
    heat = reference.location_heatmap(levels, (64, 64))
    found = foreground(heat)
    assert torch.equal(seen.heat, heat)
    assert torch.equal(seen.object.mask, found.mask)
    boxes = model.proposals(levels, (64, 64), found.mask).boxes
    assert torch.equal(seen.proposals.boxes, boxes)
    assert torch.equal(seen_by[0], torch.cat([images, heat, box_union(boxes, (64, 64))], 1))


@torch.no_grad()
def test_the_fusion_starts_as_the_mean():
    fusion, scores = ScoreFusion(4), torch.randn(2, 3, 4)
    torch.testing.assert_close(fusion(*scores), scores.mean(0))
    assert fusion.linear.weight.shape == (4, 8)


@pytest.mark.parametrize("detach", [True, False])
def test_the_fusion_may_leave_the_networks_alone(detach):
    scores = torch.randn(2, 3, 4, requires_grad=True)
    ScoreFusion(4, detach=detach)(*scores).sum().backward()
    assert (scores.grad is None) == detach


def test_dropout_is_for_training_alone(images):
    student = StudentNetwork(build_backbone("resnet10_narrow"), 5, dropout=0.9)
    features = torch.ones(2, 256, 2, 2)
    assert not torch.equal(student.scores(features), student.scores(features))
    assert torch.equal(student.eval().scores(features), student.scores(features))


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_table_3(row, images):
    model = _model(**row)
    explained, scores = model.explain(images), model(images)
    torch.testing.assert_close(explained.scores, scores)
    maps, boxes = set(explained.maps), set(explained.boxes)
    assert ("heat map" in maps) == row.get("use_lhm", True)
    assert boxes == ({"parts"} if row.get("use_sppn", True) else set())
    assert ("teacher" in maps) == row.get("use_teacher", True)
    torch.testing.assert_close(explained.maps["student"].mean((2, 3)), model.student(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [_narrow, *[partial(_model, **row) for row in ROWS]])
def test_every_parameter_is_in_one_group(build):
    model = build()
    groups = model.parameter_groups()
    grouped = [parameter for group in groups.values() for parameter in group]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert list(groups)[:2] == ["stem", "layer1"]
    assert list(groups)[-3:] == ["bilinear", "proposals", "classifier"]
    assert model.student.classifier.bias in set(groups["classifier"])


@torch.no_grad()
def test_what_it_explains_with_all_of_it(images):
    model = _narrow()
    found = model.explain(images)
    assert list(found.maps) == [
        *("student", "heat map", "saliency mask", "teacher"),
        *("part attention res4", "part attention res5", "part attention last"),
    ], "the first is the one that a report shows"
    mask = box_union(found.boxes["parts"], (64, 64))
    assert torch.equal(found.maps["saliency mask"], mask)
    torch.testing.assert_close(found.maps["part attention res4"], nn.functional.adaptive_avg_pool2d(mask, 4))
    torch.testing.assert_close(found.maps["part attention last"], nn.functional.adaptive_avg_pool2d(mask, 2))
    teacher = model.all_scores(images)["teacher"]
    torch.testing.assert_close(found.maps["teacher"].mean((2, 3)), teacher, rtol=1e-4, atol=1e-5)
    assert not [name for name in _narrow(paf="off").explain(images).maps if "attention" in name]


@torch.no_grad()
def test_it_predicts_files_and_tensors():
    model = _model()
    model.classes = list("abcde")
    image = torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8)
    (found,) = model.predict([image], top=2)
    assert len(found.names) == 2
    assert found.box is None, "it looks at the whole image"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: _narrow(dbt_sites=("res5", "last")), id="two sites"),
        pytest.param(lambda: _narrow(), id="every site", marks=pytest.mark.slow),
        pytest.param(
            lambda: DualAttention(build_backbone("resnet10_narrow"), 4, paf_floor=0.1).eval(), id="that of the demo"
        ),
    ],
)
@torch.no_grad()
def test_inference_is_exported_as_one_program(images, model):
    torch.manual_seed(0)
    model = model()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    module = program.module()
    torch.testing.assert_close(module(images), model(images))
    other = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(other), model(other))


# ---------------------------------------------------------------- part images


def test_part_images_are_composed_with_a_blur_of_the_images_size(images):
    model, boxes = _model(noise_std=0.5), torch.tensor([[[4.0, 4, 30, 30], [20, 20, 60, 64]]]).expand(3, -1, -1)
    seed = torch.tensor([3, 4, 5])
    found = model.part_images(images.requires_grad_(), boxes, seed)
    expected = reference.compose_parts(images, boxes, blur_sigma=20 * 64 / 448, noise_std=0.5, seed=seed)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    images.requires_grad_(False)
    small = _model(noise_std=0.5, part_size=32).part_images(images, boxes, seed)
    torch.testing.assert_close(small, nn.functional.avg_pool2d(expected.flatten(0, 1), 2).view_as(small))
    scores = model.part_scores(found)
    torch.testing.assert_close(scores[1, 1], model.student(found[1, 1][None])[0], rtol=1e-4, atol=1e-5)


def test_or_cut_out(images):
    boxes = torch.tensor([[[4.0, 4, 30, 30], [20, 20, 60, 64]]]).expand(3, -1, -1)
    found = _model(part_images="crops").part_images(images, boxes)
    assert found.shape == (3, 2, 3, 32, 32)
    torch.testing.assert_close(found[1, 1], crop_and_resize(images[1:2], boxes[1, 1:], 32)[0])
    assert _model(part_images="crops", part_size=20).part_images(images, boxes).shape[-1] == 20


# ---------------------------------------------------------------- files


@torch.no_grad()
@pytest.mark.parametrize("row", [*ROWS, {"dbt_sites": (), "paf_floor": 0.1, "regions": 2, "anchor_sizes": (8, 16, 32)}])
def test_a_file_gives_the_same_model(row, images, tmp_path):
    model = _model(**row)
    model.classes = list("abcde")
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(again(images), model(images))
    assert (again.settings(), again.classes) == (model.settings(), model.classes)


def _file(backbone, path, prefix: str = "", **more):
    state = {prefix + name: torch.randn_like(value) if value.is_floating_point() else value for name, value in
             backbone.state_dict().items()}  # fmt: skip
    save_file({**state, **more}, path)
    return {name.removeprefix(prefix): value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_pretrained_weights_load_unchanged_into_both_networks(prefix, tmp_path):
    source, model = small_bottlenecks(), _narrow()
    state = _file(source, tmp_path / "w.safetensors", prefix, **{"fc.weight": torch.zeros(9, 128)})
    report = load_weights(model, tmp_path / "w.safetensors", new_layers=NEW_LAYERS)
    own = model.state_dict()
    for name, value in state.items():
        assert torch.equal(own[f"student.backbone.{name}"], value)
        taught = own[f"teacher.backbone.{name}"]
        assert torch.equal(taught[:, :3] if name == "conv1.weight" else taught, value)
    assert (own["teacher.backbone.conv1.weight"][:, 3:] == 0).all()
    assert len(report.loaded) == 2 * len(state)
    assert report.left_out == ["fc.weight"]
    assert all(name.startswith(("student.c", "teacher.", "proposals.", "fusion.")) for name in report.missing)


def test_its_own_file_loads_for_other_classes(tmp_path):
    model = _narrow()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    other = DualAttention(small_bottlenecks(), 7, fpn_channels=16, head_depth=1)
    report = load_weights(other, tmp_path / "own.safetensors", new_layers=NEW_LAYERS)
    assert len(report.resized) == 6
    assert torch.equal(other.teacher.backbone.conv1.weight, model.teacher.backbone.conv1.weight)
    assert torch.equal(other.proposals.score[-1].weight, model.proposals.score[-1].weight)


def test_layers_that_a_file_lacks_are_named(tmp_path):
    _file(small_bottlenecks(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"not in the file: .*proposals"):
        load_weights(_narrow(), tmp_path / "w.safetensors", new_layers=("bilinear",))


# ---------------------------------------------------------------- what is refused, other backbones


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_sppn": False, "use_teacher": False}, "use_lhm: expected False without use_sppn"),
        ({"use_lhm": False}, "use_teacher: expected False without use_lhm"),
        ({"dbt_sites": ("res2",)}, "sites: expected some of"),
        ({"paf": "mean"}, "PartAttentionFilter: expected one of"),
        ({"anchor_sizes": (48, 96)}, "each of the 3 levels"),
        ({"regions": 0}, "at least one region.*got 0,"),
        ({"iou_threshold": 1.5}, "iou_threshold from 0 to 1, got .*1.5"),
        ({"fpn_channels": 0}, "one region and channel"),
        ({"head_depth": -1}, "no fewer than 0 convolutions"),
        ({"fg_threshold": float("nan")}, "fg_threshold: expected a number from 0 on, got nan"),
        ({"part_images": "cut"}, "part_images: expected one of composed, crops, got 'cut'"),
        ({"part_statistics": "mine"}, "part_statistics: expected one of shared, own, got 'mine'"),
        ({"noise_mode": "more"}, "noise_mode: expected one of add, replace, got 'more'"),
        ({"noise_std": float("inf")}, "noise_std: expected a number from 0 on, got inf"),
        ({"blur_sigma": -1.0}, "blur_sigma: expected a number from 0 on, got -1.0"),
        ({"part_size": 0}, "part_size: expected None or at least 1, got 0"),
        ({"regions": 2.5}, "at least one region.*got 2.5,"),
        ({"regions": float("nan")}, "at least one region.*got nan,"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        _model(**options)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        DualAttention(build_backbone("resnet10_narrow"), 0)


@torch.no_grad()
def test_a_backbone_that_is_no_resnet():
    torch.manual_seed(0)
    model = DualAttention(build_backbone("densenet121"), 3, fpn_channels=8, head_depth=0).eval()
    found = model.explain(torch.randn(1, 3, 64, 64))
    assert found.scores.shape == (1, 3)
    assert list(found.boxes) == ["parts"]


@torch.no_grad()
def test_backbones_of_timm_give_the_levels_that_they_have(images):
    for name in ("timm/test_efficientnet", "timm/test_resnet", "timm/test_vit"):
        backbone = build_backbone(name).eval()
        model = DualAttention(backbone, 4, fpn_channels=8, head_depth=1).eval()
        assert model.student.names == backbone.level_names()[-3:] == model.teacher.names
        assert model(images).shape == (len(images), 4)
        assert torch.equal(model.student.levels(images)[-1], backbone(images)), "the map that is classified is pooled"
