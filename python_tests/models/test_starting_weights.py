"""What a training starts from: named weights, files, what is downloaded when, and what a run remembers of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from fgvc_ext.atomic_files import file_sha256
from fgvc_ext.cli.train import drivers_folder, load_driver
from fgvc_ext.data import SyntheticBirds
from fgvc_ext.data.pipeline import DataConfig
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models import Backbone, SubtleDifferences, build_backbone, starting_weights
from fgvc_ext.models.config import ModelConfig
from fgvc_ext.training import OptimConfig

SPLITS = ("train", "test")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder in which torch keeps what it downloads."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints"


@pytest.fixture
def served(tmp_path, monkeypatch) -> Path:
    """ResNet-18 as torchvision's server would give it, at an address that needs no network."""
    torch.manual_seed(4)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    file = tmp_path / f"resnet18-{file_sha256(tmp_path / 'w.pth')[:8]}.pth"
    (tmp_path / "w.pth").rename(file)
    monkeypatch.setattr(starting_weights, "torchvision_weights", lambda name: (file.name, file.as_uri()))
    return file


def _model() -> SubtleDifferences:
    torch.manual_seed(0)
    return SubtleDifferences(build_backbone("resnet18"), 3)


def _begun(run: Path, facts: dict[str, str]) -> Path:
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"weights": facts}))
    return run


def test_imagenet_is_downloaded_once_and_said_before(hub, served, tmp_path, capsys):
    config = ModelConfig("resnet18", "imagenet")
    assert config.facts(tmp_path, download=False) == {"name": f"ImageNet weights {served.name}"}
    assert config.inputs(tmp_path) == {}
    assert not hub.exists()
    expected = {"name": f"ImageNet weights {served.name}", "sha256": file_sha256(served)}
    assert config.facts(tmp_path) == expected
    line = f"downloading ImageNet weights {served.name}: {served.as_uri()} to {hub / served.name}\n"
    assert capsys.readouterr().out == line
    served.unlink()
    assert config.facts(tmp_path) == expected
    assert config.inputs(tmp_path) == {"weights": expected["sha256"]}
    model = _model()
    before = model.classifier.weight.clone()
    text = config.start(model, tmp_path)
    assert capsys.readouterr().out == ""
    assert "120 tensors loaded" in text
    assert "classifier.weight" in text
    state = torch.load(hub / served.name)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(build_backbone("resnet18", weights="imagenet").conv1.weight, state["conv1.weight"])


def test_without_a_network_the_error_says_which_file_to_give(hub, monkeypatch, tmp_path):
    url = "http://127.0.0.1:9/resnet18-f37072fd.pth"
    monkeypatch.setattr(starting_weights, "torchvision_weights", lambda name: ("resnet18-f37072fd.pth", url))
    words = rf"cannot download ImageNet weights resnet18-f37072fd\.pth .*{url} .*--model\.weights FILE"
    with pytest.raises(OSError, match=words):
        ModelConfig("resnet18", "imagenet").facts(tmp_path)
    assert list(hub.iterdir()) == []


def test_a_download_with_other_bytes_is_refused(hub, served, monkeypatch, tmp_path):
    served.write_bytes(served.read_bytes()[:-1])
    with pytest.raises(OSError, match="invalid hash value"):
        ModelConfig("resnet18", "imagenet").facts(tmp_path)
    assert list(hub.iterdir()) == []
    (hub / served.name).write_bytes(served.read_bytes())
    with pytest.raises(ValueError, match=rf"{served.name}: damaged .*begin with {served.stem[-8:]}\): remove it"):
        ModelConfig("resnet18", "imagenet").facts(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "prefix"),
    [("resnet50", "resnet50-11ad3fa6.pth", "11ad3fa6"), ("vgg16_bn", "vgg16_bn-6c64b313.pth", "6c64b313")],
)
def test_torchvisions_newest_weights(name, file, prefix, hub):
    source = starting_weights.starting_weights("imagenet", name)
    assert source == starting_weights.StartingWeights(
        f"ImageNet weights {file}", hub / file, f"https://download.pytorch.org/models/{file}", prefix
    )


def test_timms_weights_come_from_its_hub(hub):
    pytest.importorskip("timm")
    source = starting_weights.starting_weights("imagenet", "timm/resnet10t")
    assert source.file == hub / "timm-resnet10t.c3_in1k.safetensors"
    assert source.url == "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"
    by_address = starting_weights.starting_weights("imagenet", "timm/gcvit_tiny")
    assert by_address.file.name == "gcvit_tiny_224_nvidia-ac783954.pth"
    assert by_address.hash_prefix == "ac783954"


def test_a_timm_model_starts_from_its_file(hub):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    original = timm.create_model("resnet10t")
    hub.mkdir(parents=True)
    safetensors.torch.save_file(original.state_dict(), hub / "timm-resnet10t.c3_in1k.safetensors")
    said: list[str] = []
    backbone = build_backbone("timm/resnet10t", weights="imagenet", report=said.append)
    assert torch.equal(next(backbone.parameters()), next(original.parameters()))
    assert len(said[0].splitlines()) == 1, said


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("resnet18", "birds", "birds are those of resnet10_narrow, got resnet18"),
        ("resnet10_narrow", "imagenet", "resnet10_narrow has no ImageNet weights: give none or a file"),
        ("resnet18", "imagnet", "weights imagnet: expected imagenet, birds, none or a file .*no such file"),
    ],
)
def test_weights_that_there_are_not(backbone, weights, message, hub, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ModelConfig(backbone, weights).facts(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_backbone(backbone, weights=weights)


def test_none_is_none(tmp_path):
    config, model = ModelConfig("resnet10_narrow"), SubtleDifferences(build_backbone("resnet10_narrow"), 2)
    assert config.weights == "none"
    assert config.facts(tmp_path) == {"name": "none"}
    assert config.inputs(tmp_path) == {}
    assert config.start(model, tmp_path) == ""


def test_frozen_layers_with_random_weights_are_said(tmp_path):
    frozen = ModelConfig(backbone="resnet10_narrow", frozen_until="layer2")
    assert frozen.start(frozen.build(), tmp_path).startswith("WARNING: frozen until layer2 without --model.weights")


def test_content_is_compared_and_not_the_path(tmp_path):
    torch.save(_model().state_dict(), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    first, second = (ModelConfig("resnet18", str(tmp_path / name)) for name in ("a.pth", "b.pth"))
    assert first.inputs(tmp_path) == second.inputs(tmp_path) == {"weights": file_sha256(tmp_path / "a.pth")}
    torch.save(torch.zeros(1), tmp_path / "a.pth")
    assert first.inputs(tmp_path) == {"weights": file_sha256(tmp_path / "a.pth")}, "the same path, another file"
    assert first.inputs(tmp_path) != second.inputs(tmp_path)


@pytest.mark.parametrize("weights", ["imagenet", "w.pth"])
def test_a_run_remembers_weights_whose_file_is_gone(weights, hub, served, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(_model().state_dict(), file)
    config = ModelConfig("resnet18", weights if weights == "imagenet" else str(file))
    facts = config.facts(tmp_path)
    run = _begun(tmp_path / "run", facts)
    for gone in (file, hub / served.name, served):
        gone.unlink(missing_ok=True)
    assert config.facts(run) == facts
    assert config.inputs(run) == {"weights": facts["sha256"]}
    with pytest.raises(OSError, match=r"no such file|--model\.weights FILE"):
        config.start(_model(), run)
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        ModelConfig("resnet18", str(tmp_path / "other.pth")).facts(run)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weights": 3}', '{"stages": []}', '{"weights": {"name": "w"}}'])
def test_a_run_that_remembers_nothing_needs_the_file(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FileNotFoundError, match=r"w\.pth"):
        ModelConfig("resnet18", str(tmp_path / "w.pth")).facts(tmp_path)


def test_a_file_that_has_changed_since_the_run_began_is_refused(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(_model().state_dict(), file)
    config = ModelConfig("resnet18", str(file))
    run = _begun(tmp_path / "run", config.facts(tmp_path))
    assert "tensors loaded" in config.start(_model(), run)
    model = _model()
    model.classifier.weight.data += 1
    torch.save(model.state_dict(), file)
    os.utime(file, (0, 0))
    with pytest.raises(ValueError, match=r"w\.pth: they have changed since the run began"):
        config.start(model, run)


def test_layers_that_start_at_random_may_be_missing(tmp_path):
    state = {name: value for name, value in torchvision.models.resnet18().state_dict().items() if "layer4" not in name}
    torch.save(state, tmp_path / "w.pth")
    config = ModelConfig("resnet18", str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=r"not in the file: backbone\.layer4"):
        config.start(_model(), tmp_path)
    text = config.start(_model(), tmp_path, ["layer4"])
    assert "keep their initial values: backbone.layer4.0.conv1.weight" in text
    assert "classifier.weight" in text, "beside the layers that are named"


def test_birds_tell_species_apart_that_they_have_not_seen():
    """The nearest class mean of five images is mostly right, where random layers are mostly wrong."""
    split = {name: SyntheticBirds(name, classes=20, train_per_class=5, test_per_class=5, seed=3) for name in SPLITS}

    def share_of_correct(backbone: Backbone) -> float:
        prepare = Preprocessing(128, 112).transform()
        features = {}
        with torch.no_grad():
            for name, birds in split.items():
                images = torch.stack([prepare(birds.load(i)) for i in range(len(birds))])
                features[name] = nn.functional.normalize(backbone.eval()(images).mean((2, 3)))
        means = features["train"].unflatten(0, (20, 5)).mean(1)
        nearest = torch.cdist(features["test"], means).argmin(1)
        return float((nearest == split["test"].labels).float().mean())

    torch.manual_seed(0)
    assert share_of_correct(build_backbone("resnet10_narrow")) < 0.3
    assert share_of_correct(build_backbone("resnet10_narrow", weights="birds")) > 0.5


def _birds_script() -> dict[str, Any]:
    file = Path(__file__).parents[2] / "scripts/birds_backbone.py"
    names: dict[str, Any] = {"__file__": str(file), "__name__": "birds_backbone"}
    exec(compile(file.read_text(), file.name, "exec"), names)
    return names


def test_the_birds_backbone_is_made_again_with_the_settings_that_it_was_made_with():
    """Whatever the preset becomes that the script begins with."""
    driver = load_driver(drivers_folder() / "subtle_differences.py").DRIVER
    config = driver.read_arguments(_birds_script()["ARGUMENTS"])
    optim = {"lr": 0.05, "new_layers_lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 1}
    assert config.optim == OptimConfig(epochs=30, batch_size=30, **optim)
    data = {"classes": 100, "species": 1000, "train_per_class": 30, "test_per_class": 10}
    assert config.data == DataConfig(resize=128, crop=112, **data)
    assert config.model == ModelConfig(backbone="resnet10_narrow")
    assert config.seed == 0


def test_no_species_of_a_preset_is_one_that_the_birds_backbone_has_seen():
    names = _birds_script()
    names["check_species"]()
    names["SHOWN"] = range(1000, 1001)
    with pytest.raises(ValueError, match="species 1000: one of them is also drawn from seed 1000"):
        names["check_species"]()
