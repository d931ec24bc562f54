"""train/elope.py killed at any moment, and in two processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import job
import pytest
import torch
from small_elope import SMALL, elope, run
from toy_training import kill_at_random_moments, steps_and_weights

from fgvc_ext.training.checkpoints import load_checkpoint

STEPS = {"classifier": 6, "localiser": 2, "crops": 6, "weighted": 2}
LEFT = {"localiser": ["boxes.csv", "localisation.json"], "crops": ["means.safetensors"]}
EVENTS = steps_and_weights(STEPS, LEFT)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    kill_at_random_moments(tmp_path, run, EVENTS, "--engine.checkpoint-every", "1")
    for name in ("boxes.csv", "localisation.json", "means.safetensors"):
        assert (tmp_path / "run/artefacts" / name).read_bytes() == (tmp_path / "whole/artefacts" / name).read_bytes()


def without_statistics(folder: Path) -> int:
    """The classifier's stage, whose batch norms are taken out: their statistics are those of a process' share."""
    torch.set_num_threads(1)
    module = elope()
    usual = module.ELoPEStages.network

    def network(self, earlier, weighted=False):
        model = usual(self, earlier, weighted)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                    setattr(parent, name, torch.nn.Identity())
        return model

    module.ELoPEStages.network = network
    more = ["--method.localisation", "off", "--method.weights", "False", "--report", "False", "--optim.lr", "0.001"]
    more += ["--model.weights", "none"]
    # 24 images in batches of 9: shares of 5 and 4, and of 3 and 3
    return module.DRIVER.main(["demo", "--out", str(folder), *SMALL, *more, "--optim.batch-size", "9"])


def test_two_processes_train_what_one_does(tmp_path):
    job.run(tmp_path / "two-output", 2, without_statistics, tmp_path / "two")
    job.run(tmp_path / "one-output", 1, without_statistics, tmp_path / "one")
    one, two = (load_checkpoint(max((tmp_path / name / "checkpoints").glob("*.pt"))) for name in ("one", "two"))
    means = "losses.embedding.class_means"
    torch.testing.assert_close(two["step"]["task"][means], one["step"]["task"][means], rtol=1e-4, atol=1e-5)
    for name, value in one["step"]["task"].items():
        torch.testing.assert_close(two["step"]["task"][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_finish_all_stages(tmp_path):
    job.run(tmp_path / "output", 2, run, tmp_path / "run", "--optim.epochs", "1", "--optim.batch-size", "7")
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert (facts["status"], len(facts["stages"])) == ("finished", 7)
    with (tmp_path / "run/artefacts/boxes.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 36


def test_shares_of_one_image_are_refused_by_name(tmp_path):
    ended = [
        child.ended() for child in job.start(tmp_path / "output", 2, run, tmp_path / "run", "--optim.batch-size", "3")
    ]
    assert [code for code, _ in ended] == [1, 1]
    assert "expected at least 4 images for 2 process(es), got 3: model.embedding.1 (BatchNorm1d)" in ended[0][1]
