"""Weights files, and the models that are built from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models import Model, SubtleDifferences, WeightsFileError, build_backbone, load, save
from fgvc_ext.models.weights_file import METADATA_KEY, load_weights_file, save_weights


def test_weights_are_the_same_bytes_each_time(tmp_path):
    state = {"w": torch.randn(3, 4).t(), "n": torch.tensor(3)}
    metadata = {"classes": ["a", "b"], "preprocessing": {"crop": 8}, "method": "m", "z": 1}
    hashes = {save_weights(tmp_path / f"{i}.safetensors", state, metadata) for i in range(3)}
    hashes.add(save_weights(tmp_path / "3.safetensors", state, dict(reversed(metadata.items()))))
    assert len(hashes) == 1
    loaded, found = load_weights_file(tmp_path / "0.safetensors")
    assert found == {"format": 1, **metadata}
    assert torch.equal(loaded["w"], state["w"])
    assert loaded["n"] == 3


def test_names_that_share_their_memory_are_saved(tmp_path):
    """As tied layers do."""
    tied = torch.randn(3)
    save_weights(tmp_path / "w.safetensors", {"a": tied, "b": tied, "c": tied[1:]}, {})
    loaded, _ = load_weights_file(tmp_path / "w.safetensors")
    assert [value.tolist() for value in loaded.values()] == [tied.tolist(), tied.tolist(), tied[1:].tolist()]


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 16])
def test_broken_weights_are_named(content, tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsFileError, match=r"w\.safetensors"):
        load_weights_file(file)


def _trained() -> SubtleDifferences:
    torch.manual_seed(3)
    model = SubtleDifferences(build_backbone("resnet10_narrow"), 4, patch_size=2, alpha=0.3)
    model.classes = ["wren", "robin", "tit", "jay"]
    model.preprocessing = Preprocessing(resize=40, crop=32, std=(0.5, 0.5, 0.5), interpolation="bicubic")
    return model.eval()


def test_a_model_comes_back_from_its_file_alone(tmp_path):
    model = _trained()
    save(model, tmp_path / "m.safetensors")
    drawn = torch.get_rng_state()
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), drawn), "loading draws no random numbers"
    assert type(again) is SubtleDifferences
    assert not again.training
    assert again.settings() == model.settings()
    assert {"num_classes": 4, "patch_size": 2, "alpha": 0.3}.items() <= again.settings().items()
    assert (again.classes, again.preprocessing) == (model.classes, model.preprocessing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        assert torch.equal(again.train()(images, seed=5), model.train()(images, seed=5))


def test_a_stride_that_was_moved_is_in_the_settings(tmp_path):
    model = SubtleDifferences(build_backbone("resnet50", stride_on_first_conv=True), 2)
    save(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").backbone.layer2[0].conv1.stride == (2, 2)


def test_explain_gives_the_maps_whose_means_are_the_scores():
    model, images = _trained(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        explanation = model.explain(images)
        torch.testing.assert_close(explanation.maps["class activation"].mean((2, 3)), model(images))
    assert explanation.boxes == {}


def test_predict_names_classes_of_files_and_tensors(tmp_path):
    from PIL import Image

    model, image = _trained().train(), torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "bird.png")
    first, second = model.predict([tmp_path / "bird.png", image], top=3)
    assert first == second
    assert model.training, "the mode is put back"
    with torch.no_grad():
        expected = model.eval()(model.preprocessing.transform()(image)[None]).softmax(1)[0]
    assert first.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True)[:3], rel=1e-4)
    assert first.names[0] == model.classes[int(expected.argmax())]
    assert first.box is None
    with pytest.raises(ValueError, match=r"expected image files or uint8 \[3,H,W\], got torch.float32"):
        model.predict([image.float()])


@pytest.mark.parametrize("training", [True, False])
def test_predictions_do_not_depend_on_the_batch_and_put_the_mode_back(training):
    model = _trained().train(training)
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, 44, 40 + n), dtype=torch.uint8, generator=generator) for n in range(5)]
    alone = [model.predict([image], top=4)[0] for image in images]
    together = model.predict(images, top=4, batch_size=2)
    assert [prediction.names for prediction in together] == [prediction.names for prediction in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)
    assert model.training == training


def test_the_box_of_a_prediction_is_in_pixels_of_the_image():
    class Boxed(SubtleDifferences):
        def boxes(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(len(images), 4)

    model = Boxed(build_backbone("resnet10_narrow"), 2)
    model.preprocessing = Preprocessing(resize=40, crop=32)
    (found,) = model.predict([torch.zeros(3, 80, 120, dtype=torch.uint8)])
    # 120 x 80 becomes 60 x 40, of which the crop takes columns 14 to 46 and rows 4 to 36
    assert found.box == pytest.approx((28.0, 8.0, 92.0, 72.0))


def _file(folder: Path, state: Mapping[str, torch.Tensor], **metadata: object) -> Path:
    file = folder / "w.safetensors"
    file.write_bytes(safetensors.torch.save(dict(state), {METADATA_KEY: json.dumps(metadata)}))
    return file


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": 2}, "expected format 1, got 2"),
        ({}, "expected format 1, got None"),
        ({"format": 1, "method": "magic"}, "expected a model of .*subtle_differences.*, got 'magic'"),
        ({"format": 1, "method": "os.system"}, "got 'os.system'"),
        ({"format": 1, "method": "subtle_differences"}, "KeyError: 'settings'"),
        (
            {"format": 1, "method": "subtle_differences", "settings": {"backbone": {"name": "resnet17"}}},
            "expected one of resnet10_narrow",
        ),
    ],
)
def test_a_file_that_describes_no_model_is_refused(metadata, message, tmp_path):
    with pytest.raises(WeightsFileError, match=message):
        load(_file(tmp_path, {"w": torch.zeros(1)}, **metadata))


def test_weights_of_other_layers_are_refused(tmp_path):
    model = _trained()
    save(model, tmp_path / "m.safetensors")
    state, metadata = load_weights_file(tmp_path / "m.safetensors")
    state.pop("classifier.weight")
    save_weights(tmp_path / "m.safetensors", state, metadata)
    with pytest.raises(WeightsFileError, match=r"Missing key.*classifier\.weight"):
        load(tmp_path / "m.safetensors")


def test_foreign_safetensors_are_named(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsFileError, match="not written by fgvc_ext"):
        load(tmp_path / "w.safetensors")


def test_every_model_is_registered_under_its_method():
    assert SubtleDifferences.method == "subtle_differences"

    class Other(Model, method="other_of_a_test"):
        pass

    assert Other.method == "other_of_a_test"
