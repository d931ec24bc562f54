"""Checkpoint files under real faults."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch
from toy_training import Child, save_forever, save_more_than_fits

from fgvc_ext.atomic_files import file_sha256, write_atomically
from fgvc_ext.training.checkpoints import CheckpointCorrupt, Checkpoints, load_checkpoint, stage_of
from fgvc_ext.training.random_state import random_state, restore_random_state, seed_everything


def test_the_newest_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, "s")
    for step in range(5):
        checkpoints.save({"step": step}, epoch=step // 2, step=step)
    assert [m.stem for m in checkpoints.manifests()] == ["s-e00002-s000000004", "s-e00001-s000000003"]
    assert len(list(tmp_path.iterdir())) == 4
    state, file = checkpoints.load_latest()
    assert state == {"step": 4}
    manifest = json.loads(file.with_suffix(".json").read_text())
    assert manifest["sha256"] == file_sha256(file)
    assert manifest["size"] == file.stat().st_size


def test_stages_do_not_touch_each_other(tmp_path):
    # some names begin like the files of others do
    names = ("model", "model-ema", "model-e", "m", "model-e00000-s000000001")
    for step in range(4):
        for stage in names:
            Checkpoints(tmp_path, stage).save({"stage": stage}, epoch=0, step=step)
    for stage in names:
        kept = Checkpoints(tmp_path, stage).manifests()
        assert [int(file.stem[-9:]) for file in kept] == [3, 2]
        assert Checkpoints(tmp_path, stage).load_latest()[0] == {"stage": stage}
        assert {stage_of(file) for file in kept} == {stage}
    Checkpoints(tmp_path, "model").discard_newer(None)
    assert Checkpoints(tmp_path, "model").load_latest() is None
    assert Checkpoints(tmp_path, "model-ema").load_latest()[0] == {"stage": "model-ema"}


def test_killed_while_saving_again_and_again(tmp_path):
    """SIGKILL at random times: there is always a whole checkpoint, and it never goes back."""
    checkpoints, dice, latest = Checkpoints(tmp_path, "s"), random.Random(1), 0
    checkpoints.save({"step": 0, "data": torch.zeros(300_000)}, epoch=0, step=0)
    for number in range(20):
        child = Child(tmp_path / "output", save_forever, tmp_path, latest)
        before = set(tmp_path.glob("s-*.json"))
        while number < 2 and set(tmp_path.glob("s-*.json")) == before and child.process.is_alive():
            time.sleep(0.01)  # the server may take seconds to start
        time.sleep(dice.uniform(0.01, 0.1))
        child.process.kill()
        assert child.ended()[0] == -signal.SIGKILL, child.text()
        state, _ = checkpoints.load_latest()
        assert state["step"] >= latest
        assert (state["data"] == state["step"]).all()
        latest = state["step"]
    assert latest > 2


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, "s")
    checkpoints.save({"step": 1}, epoch=0, step=1)

    code, output = Child(tmp_path / "output", save_more_than_fits, tmp_path).ended()
    assert code == 7, output
    assert f"cannot write {tmp_path}/s-e00000-s000000002.pt: File too large" in output
    assert checkpoints.load_latest()[0] == {"step": 1}
    assert len(list(tmp_path.glob("*s-*"))) == 2, "the unfinished file is still there"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def fail(stream):
        stream.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


class _Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_not_executed(writer, tmp_path):
    target = tmp_path / "executed"
    file = tmp_path / "s-e00000-s000000000.pt"
    if writer == "torch":
        torch.save({"state": _Attack(target)}, file)
    else:
        file.write_bytes(pickle.dumps(_Attack(target)))
    manifest = {"schema": 1, "size": file.stat().st_size, "sha256": file_sha256(file)}
    file.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointCorrupt):
        load_checkpoint(file)
    assert not target.exists()


@pytest.mark.parametrize("manifest", ["", "[]", '{"schema": 99}', None])
def test_a_bad_manifest_is_named(manifest, tmp_path):
    file = Checkpoints(tmp_path, "s").save({"step": 1}, epoch=0, step=1)
    if manifest is None:
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text(manifest)
    with pytest.raises(CheckpointCorrupt, match=str(file)):
        load_checkpoint(file)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    file = Checkpoints(tmp_path, "s").save({"step": 1}, epoch=0, step=1)
    manifest = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(CheckpointCorrupt, match="expected a manifest of schema 1"):
        load_checkpoint(file)


def test_a_checkpoint_without_a_manifest_does_not_stay(tmp_path):
    """A process that was killed between the two has left it; nothing else would ever remove it."""
    checkpoints, other = Checkpoints(tmp_path, "s"), Checkpoints(tmp_path, "other")
    left, kept = (of.save({"step": 1}, epoch=0, step=1) for of in (checkpoints, other))
    for file in (left, kept):
        file.with_suffix(".json").unlink()
    new = checkpoints.save({"step": 2}, epoch=0, step=2)
    assert sorted(tmp_path.glob("*.pt")) == sorted([kept, new]), "that of another stage is its own business"


def test_newer_checkpoints_are_discarded_and_the_named_one_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, "s", keep=9)
    files = [checkpoints.save({"step": step}, epoch=step // 2, step=step) for step in range(4)]
    assert checkpoints.newest_epoch() == 1
    checkpoints.discard_newer(files[1])
    assert sorted(tmp_path.glob("*.pt")) == files[:2]
    assert len(checkpoints.manifests()) == 2
    assert (checkpoints.newest_epoch(), Checkpoints(tmp_path, "t").newest_epoch()) == (0, 0)


def _draws() -> list:
    return [torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def test_one_seed_is_for_all_generators():
    def drawn(seed: int) -> list:
        seed_everything(seed)
        return _draws()

    expected = drawn(3)
    assert drawn(3) == expected
    assert not [pair for pair in zip(drawn(4), expected, strict=True) if pair[0] == pair[1]]
    assert drawn(2**62 + 3) == drawn(2**62 + 3), "NumPy takes 32 bits"


def test_random_state_survives_a_file(tmp_path):
    _draws()
    Checkpoints(tmp_path, "s").save(random_state(), epoch=0, step=0)
    expected = _draws()
    _draws()
    restore_random_state(Checkpoints(tmp_path, "s").load_latest()[0])
    assert _draws() == expected
