"""What each switch of the engine changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from toy_training import ToyImages, ToyModel, centre, open_run, toy_config, toy_stages, train

from fgvc_ext.data.loading import Samples
from fgvc_ext.models.weights_file import load_weights_file
from fgvc_ext.training import (
    Classification,
    ConfigMismatch,
    EngineConfig,
    NonFiniteLoss,
    run_stages,
)
from fgvc_ext.training.checkpoints import Checkpoints
from fgvc_ext.training.device import choose_precision, configure_backends, hint_of_bf16
from fgvc_ext.training.evaluation import evaluate
from fgvc_ext.training.sampling import EpochBatches, evaluation_loader
from fgvc_ext.training.stop_request import StopRequest
from fgvc_ext.training.trainer import Trainer


@pytest.mark.parametrize("look_every", [2, 3, 100])
def test_between_two_looks_a_nan_loss_still_names_its_step(look_every, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 5: the loss is nan.*-s000000004\.pt") as caught:
        train(tmp_path, toy_config(nan_at=6, look_every=look_every))
    (stage,) = toy_stages(toy_config())
    expected = EpochBatches(33, 8, stage.seed).samples_of(1, 1)
    assert str(caught.value).partition("Samples: ")[2] == ", ".join(f"train/{index}" for index in expected)
    newest = max((tmp_path / "checkpoints").glob("*.pt"))
    assert newest.name == "first-e00001-s000000004.pt", "nothing is saved after a step that ends the run"


def test_images_are_channels_last_unless_told_otherwise(tmp_path):
    for channels_last in (True, False):
        seen = []
        config = toy_config(epochs=1, channels_last=channels_last)
        (stage,) = toy_stages(config)
        build = stage.build

        def hooked(earlier, build=build, seen=seen):
            task = build(earlier)
            convolution = task.model.backbone[0]
            convolution.register_forward_pre_hook(lambda module, args: seen.append((args[0], module.weight)))
            return task

        stage.build = hooked
        with open_run(tmp_path / str(channels_last), config) as run:
            run_stages([stage], run, config.engine)
        for tensor in (t for pair in seen for t in pair):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert EngineConfig().channels_last


def test_the_averaged_weights_are_evaluated_and_saved(tmp_path):
    plain = load_weights_file(train(tmp_path / "plain", toy_config(ema_decay=None))["first"].path)[0]
    average = load_weights_file(train(tmp_path / "average", toy_config(ema_decay=0.99))["first"].path)[0]
    checkpoint = Checkpoints(tmp_path / "average/checkpoints", "first").load_latest()[0]["step"]
    for name, value in average.items():
        assert torch.equal(value, checkpoint["average"][f"module.model.{name}"])
        torch.testing.assert_close(checkpoint["task"][f"model.{name}"], plain[name])
    assert not torch.equal(average["classifier.weight"], plain["classifier.weight"])


def test_the_best_weights_on_validation_are_kept(tmp_path):
    config = toy_config(epochs=6, lr=0.5, ema_decay=None)
    (stage,) = toy_stages(config)
    val = Samples(ToyImages(12, "val"), centre)
    evaluations = stage.evaluations({})
    stage.evaluations = lambda earlier: {**evaluations, "val": val}
    with open_run(tmp_path, config) as run:
        run_stages([stage], run, config.engine)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row["val_accuracy"] for row in rows]
    state, metadata = load_weights_file(tmp_path / "weights/first.best.safetensors")
    assert metadata["epoch"] == found.index(max(found)) + 1 == run.entry("first")["best"]["val"]["epoch"]
    task = Classification(ToyModel(), nn.CrossEntropyLoss())
    task.model.load_state_dict(state)
    sums = evaluate(task, evaluation_loader(val, range(12), 64, workers=0), lambda batch: batch)
    assert int(sums["correct"]) / 12 == max(found)


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch):
    train(tmp_path, toy_config(epochs=1))
    assert json.loads((tmp_path / "run.json").read_text())["precision"] == "fp32"
    seen = []
    monkeypatch.setattr("fgvc_ext.training.stages.choose_precision", lambda engine, device: seen.append(1) or "bf16")
    train(tmp_path, toy_config(epochs=1))
    assert not seen
    train(tmp_path / "other", toy_config(epochs=1))
    assert json.loads((tmp_path / "other/run.json").read_text())["precision"] == "bf16"
    with pytest.raises(ConfigMismatch, match=r'engine\.precision: "fp32" in the run, "bf16" now'):
        train(tmp_path, toy_config(epochs=1, precision="bf16"))


def test_auto_is_decided_from_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
        assert choose_precision(EngineConfig(), cuda) == ("bf16" if supported else "fp32")
        assert choose_precision(EngineConfig(), cpu) == "fp32"
        assert choose_precision(EngineConfig(precision="fp16"), cpu) == "fp16"
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)  # noqa: B023
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert (hint_of_bf16(cpu) is not None) == supported
        assert hint_of_bf16(cuda) is None


def test_backends_do_as_they_are_told(monkeypatch):
    for deterministic, other in ((True, False), (False, True)):
        engine = EngineConfig(deterministic=deterministic, tf32=other, cudnn_benchmark=True)
        configure_backends(engine)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.deterministic == deterministic
        assert torch.backends.cudnn.benchmark == (not deterministic)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == other


def test_a_balanced_epoch_draws_every_class_equally_often(tmp_path):
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    batches = EpochBatches(100, 10, seed=0, labels=labels)
    drawn = torch.zeros(3)
    for epoch in range(30):
        batches.start(epoch)
        keys = [key for batch in batches for key in batch]
        assert len(keys) == len({seed for _, seed in keys}) == 100, "a sample that comes again looks different"
        drawn += torch.bincount(labels[[index for index, _ in keys]], minlength=3)
    assert (drawn / 3000 - 1 / 3).abs().max() < 0.03
    config = toy_config(balanced=True)
    (stage,) = toy_stages(config)
    samples = stage.train({})
    samples.dataset.labels = torch.tensor([0] * 31 + [1, 2])
    with open_run(tmp_path, config) as run:
        trainer = Trainer(stage.training({}), run, config.engine, StopRequest())
    assert torch.equal(trainer.batches.labels, samples.dataset.labels)
