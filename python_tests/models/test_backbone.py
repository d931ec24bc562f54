"""Backbones: shapes, groups, weights."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from fgvc_ext.models import (
    SubtleDifferences,
    available_backbones,
    backbone_preprocessing,
    build_backbone,
    load_weights,
)


@pytest.mark.parametrize(
    ("name", "size", "stride", "groups"),
    [
        ("resnet10_narrow", 64, 16, ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("resnet18", 64, 32, ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("resnet50", 64, 32, ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", 32, 32, ["block1", "block2", "block3", "block4", "block5"]),
        ("vgg11_bn", 32, 32, ["block1", "block2", "block3", "block4", "block5"]),
        ("densenet121", 64, 32, ["stem", "block1", "block2", "block3", "block4"]),
    ],
)
def test_features_and_groups(name, size, stride, groups):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, size, size))
    assert features.shape == (1, backbone.channels, size // stride, size // stride)
    assert list(backbone.groups()) == groups
    named = functools.reduce(operator.iadd, backbone.groups().values(), [])
    assert sorted(named) == sorted(name for name, _ in backbone.named_parameters())


def test_features_are_those_of_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.densenet121().eval()
    backbone = build_backbone("densenet121").eval()
    backbone.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.classifier(backbone(images).mean((2, 3))), model(images))


@pytest.mark.parametrize("name", ["resnet17", "alexnet", "", "fgvc"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match=r"expected one of resnet10_narrow, .*resnet50.*timm/<name>"):
        build_backbone(name)
    assert name not in available_backbones()


def test_timm_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/convnext_tiny needs timm, .*pip install timm"):
        build_backbone("timm/convnext_tiny")


def test_stride_on_the_first_convolution():
    backbone = build_backbone("resnet50", stride_on_first_conv=True)
    assert backbone.layer2[0].conv1.stride == (2, 2)
    assert backbone.layer2[0].conv2.stride == (1, 1)
    assert backbone.layer1[0].conv1.stride == (1, 1)
    with pytest.raises(ValueError, match="bottlenecks"):
        build_backbone("resnet18", stride_on_first_conv=True)


def _state(name: str = "resnet10_narrow") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: value.clone() for name, value in build_backbone(name).state_dict().items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_load_with_prefixes_and_in_half(suffix, prefix, tmp_path):
    state, file = _state(), tmp_path / f"w{suffix}"
    half = {prefix + name: value.half() if value.dim() > 1 else value for name, value in state.items()}
    safetensors.torch.save_file(half, file) if suffix == ".safetensors" else torch.save({"state_dict": half}, file)
    if suffix == ".safetensors" and prefix:
        assert all(name.startswith(prefix) for name in half)
    backbone = build_backbone("resnet10_narrow", weights=file)
    for name, value in backbone.state_dict().items():
        assert value.dtype == state[name].dtype
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-6)


def test_a_classifier_is_all_that_may_differ(tmp_path):
    state, said, file = _state(), [], tmp_path / "w.pth"
    torch.save({**state, "fc.weight": torch.zeros(2), "head.bias": torch.zeros(2)}, file)
    build_backbone("resnet10_narrow", weights=file, report=said.append)
    assert said == [f"{file}: {len(state)} tensors loaded"]
    layers = [name for name in state if name.startswith("layer4.") and not name.endswith("num_batches_tracked")]
    torch.save({name: value for name, value in state.items() if name not in layers}, file)
    backbone = build_backbone("resnet10_narrow")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    more = f", and {len(layers) - 8} more"
    with pytest.raises(ValueError, match=f"not in the file: {', '.join(layers[:8])}{more} .*--optim.new-layers"):
        load_weights(backbone, file)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert load_weights(backbone, file, new_layers=["layer4"]).missing == layers
    with pytest.raises(ValueError, match="not in the file: layer4"):
        load_weights(backbone, file, new_layers=["layer3"])
    torch.save({**state, "extra.weight": torch.zeros(2), "headless.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"in the file, but not in the model: extra\.weight, headless\.weight$"):
        load_weights(build_backbone("resnet10_narrow"), file)


def test_a_whole_model_may_lack_its_classifier_and_nothing_else(tmp_path):
    state, file = _state(), tmp_path / "w.pth"
    model = SubtleDifferences(build_backbone("resnet10_narrow"), 3)
    torch.save(state, file)
    assert load_weights(model, file, new_layers=()).missing == ["classifier.weight", "classifier.bias"]
    del state["bn1.running_mean"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"not in the file: backbone\.bn1\.running_mean "):
        load_weights(model, file)
    assert load_weights(model, file, new_layers=["stem"]).missing[0] == "backbone.bn1.running_mean"


def test_counters_of_batches_may_be_missing(tmp_path):
    state = {name: value for name, value in _state().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(build_backbone("resnet10_narrow"), tmp_path / "w.pth").missing == []


def test_torchvisions_old_densenet_names(tmp_path):
    """Its own files hold "denselayer1.norm.1.weight"."""
    torch.manual_seed(2)
    state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value for name, value in state.items()}
    assert len(set(old) - set(state)) == 58 * (5 + 1) * 2
    torch.save(old, tmp_path / "w.pth")
    backbone = build_backbone("densenet121", weights=tmp_path / "w.pth")
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conv1.weight": torch.zeros(1, 3, 3, 3)},
            r"of another shape: conv1\.weight: \[1, 3, 3, 3\] in the file, \[32, 3, 3, 3\] in the",
        ),
        (None, "no name agrees"),
        ("text", "expected a dictionary of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    state = {**_state(), **change} if isinstance(change, dict) else {"a": torch.zeros(1)} if change is None else change
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(build_backbone("resnet10_narrow"), tmp_path / "w.pth")


def test_bad_weight_files_are_named(tmp_path):
    backbone = build_backbone("resnet10_narrow")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_weights(backbone, tmp_path / "missing.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=name):
            load_weights(backbone, tmp_path / name)


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_weights_cannot_run_code(tmp_path):
    torch.save({"conv1.weight": _Attack(tmp_path / "executed")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: cannot be read as tensors: [^\n]+$"):
        load_weights(build_backbone("resnet10_narrow"), tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


def test_real_weights():
    folder = os.environ.get("FGVC_EXT_TEST_DATA")
    if not folder:
        pytest.skip("FGVC_EXT_TEST_DATA is not set")
    file = Path(folder) / "weights/resnet18_imagenet_conv1_to_layer3.pth"
    said: list[str] = []
    build_backbone("resnet18", weights=file, new_layers=["layer4"], report=said.append)
    missing = said[0].splitlines()[1]
    assert missing.count("conv1.weight") == missing.count("conv2.weight") == 2
    assert "layer3" not in missing


def _own_file(folder: Path, classes: int) -> tuple[Path, SubtleDifferences]:
    torch.manual_seed(3)
    model = SubtleDifferences(build_backbone("resnet10_narrow"), classes)
    safetensors.torch.save_file(model.state_dict(), folder / "last.safetensors")
    return folder / "last.safetensors", model


def test_a_file_of_our_own_starts_a_backbone_and_a_whole_model(tmp_path):
    file, trained = _own_file(tmp_path, 4)
    said: list[str] = []
    backbone = build_backbone("resnet10_narrow", weights=file, report=said.append)
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert len(said[0].splitlines()) == 1

    same = SubtleDifferences(build_backbone("resnet10_narrow"), 4)
    report = load_weights(same, file)
    assert report.missing == report.left_out == report.resized == []
    assert torch.equal(same.classifier.weight, trained.classifier.weight)


def test_a_classifier_for_other_classes_keeps_its_values_and_is_named(tmp_path):
    file, _ = _own_file(tmp_path, 4)
    model = SubtleDifferences(build_backbone("resnet10_narrow"), 7)
    before = model.classifier.weight.detach().clone()
    text = load_weights(model, file).text()
    assert "keep their initial values: classifier.weight: [4, 256, 1, 1] in the file, [7, 256, 1, 1]" in text
    assert torch.equal(model.classifier.weight, before)


def test_a_library_file_loads_into_a_whole_model(tmp_path):
    state = torchvision.models.densenet121().state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = SubtleDifferences(build_backbone("densenet121"), 5)
    report = load_weights(model, tmp_path / "w.pth")
    assert report.missing == ["classifier.weight", "classifier.bias"]
    assert report.left_out == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.backbone.features.conv0.weight, state["features.conv0.weight"])


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet10_narrow", {"stem": 32, "layer1": 32, "layer2": 64, "layer3": 128, "layer4": 256}),
        ("resnet18", {"stem": 64, "layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}),
        ("vgg11_bn", {"block1": 64, "block2": 128, "block3": 256, "block4": 512, "block5": 512}),
        ("densenet121", {"stem": 64, "block1": 128, "block2": 256, "block3": 512, "block4": 1024}),
    ],
)
@torch.no_grad()
def test_levels_are_the_maps_at_the_ends_of_groups(name, channels):
    backbone, images = build_backbone(name).eval(), torch.randn(1, 3, 64, 64)
    maps = backbone.levels(images, list(channels))
    assert [level.shape[1] for level in maps] == list(channels.values())
    assert torch.equal(maps[-1], backbone(images))
    names = list(channels)
    last, first = backbone.levels(images, [names[3], names[0]])
    assert torch.equal(last, maps[3]), "in the order of the names"
    assert torch.equal(first, maps[0])
    assert all(a.shape[2] >= b.shape[2] for a, b in itertools.pairwise(maps))


def test_levels_compute_nothing_beyond_the_deepest():
    backbone = build_backbone("resnet10_narrow").eval()
    backbone.layer3.register_forward_hook(lambda *_: pytest.fail("layer3 was computed"))
    assert len(backbone.levels(torch.randn(1, 3, 32, 32), ["layer2"])) == 1
    with pytest.raises(ValueError, match=r"levels: expected some of stem, layer1, .*, got 'layer9'"):
        backbone.levels(torch.randn(1, 3, 32, 32), ["layer9"])


@pytest.mark.parametrize("name", ["resnet10_narrow", "resnet50", "vgg16_bn", "densenet169"])
def test_torchvisions_weights_expect_imagenets_values(name):
    expected = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}
    assert backbone_preprocessing(name) == expected
    if name == "resnet10_narrow":
        assert build_backbone(name).preprocessing == expected
