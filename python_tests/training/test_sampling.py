"""Order, seeds and batches follow from (seed, epoch, index) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_training import ToyImages, jitter

from fgvc_ext.data import BrokenImageError
from fgvc_ext.data.loading import Samples
from fgvc_ext.data.pipeline import evenly_spaced
from fgvc_ext.training.sampling import (
    EpochBatches,
    derive_seed,
    evaluation_loader,
    mix64,
    parts,
    sample_seeds,
    training_loader,
)


def test_mix64_known_answers():
    # splitmix64 seeded with 0: its first outputs are m(0), m(γ), m(2γ) with γ the golden-ratio increment
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], np.uint64)
    assert [hex(x) for x in mix64(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_seeds_are_non_negative_int64_and_differ():
    seeds = np.concatenate([sample_seeds(seed, epoch, np.arange(500)) for seed in (0, 1, -1) for epoch in (0, 1)])
    assert seeds.dtype == np.int64
    assert (seeds >= 0).all()
    assert len(np.unique(seeds)) == len(seeds)
    assert sample_seeds(3, 4, [5]) == sample_seeds(3, 4, [1, 5])[1:]


def test_derived_seeds_differ_by_purpose():
    assert derive_seed(0, "a") != derive_seed(0, "b") != derive_seed(1, "b")
    assert derive_seed(0, "a") == derive_seed(0, "a")


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(32, 8, [8, 8, 8, 8]), (33, 8, [8, 8, 8, 9]), (34, 8, [8, 8, 8, 8, 2]), (3, 2, [3]), (3, 8, [3]), (2, 1, [1, 1])],
)
def test_each_sample_once_and_never_a_batch_of_one(count, batch_size, sizes):
    batches = EpochBatches(count, batch_size, seed=0)
    epoch = list(batches)
    assert [len(batch) for batch in epoch] == sizes
    assert len(batches) == batches.steps_per_epoch == len(sizes)
    assert sorted(index for batch in epoch for index, _ in batch) == list(range(count))


def test_an_epoch_can_start_anywhere():
    batches = EpochBatches(33, 8, seed=0)
    batches.start(3)
    whole = list(batches)
    batches.start(3, 2)
    assert list(batches) == whole[2:]
    assert len(batches) == 2
    batches.start(4)
    assert list(batches) != whole


@pytest.mark.parametrize(("count", "batch_size"), [(0, 8), (1, 8)])
def test_no_step_in_an_epoch_is_an_error(count, batch_size):
    with pytest.raises(ValueError, match="no step in an epoch"):
        EpochBatches(count, batch_size, seed=0)


def _epoch(workers: int, batch_size: int) -> dict[int, tuple[int, torch.Tensor]]:
    batches = EpochBatches(20, batch_size, seed=5)
    batches.start(1)
    loader = training_loader(Samples(ToyImages(20), jitter), batches, workers=workers)
    found = {}
    for batch in loader:
        assert batch["seed"].dtype == batch["label"].dtype == batch["index"].dtype == torch.int64
        for i, index in enumerate(batch["index"].tolist()):
            found[index] = int(batch["seed"][i]), batch["image"][i]
    return found


def test_neither_workers_nor_batches_change_a_sample():
    expected = _epoch(0, 4)
    assert [expected[i][0] for i in range(20)] == sample_seeds(5, 1, np.arange(20)).tolist()
    for workers, batch_size in ((2, 4), (0, 7)):
        found = _epoch(workers, batch_size)
        assert all(found[i][0] == expected[i][0] and torch.equal(found[i][1], expected[i][1]) for i in range(20))


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    _epoch(0, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_ignore_the_schedulers_signals():
    class Killed(Samples):
        def __getitem__(self, key):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(key)

    batches = EpochBatches(8, 4, seed=0)
    assert len(list(training_loader(Killed(ToyImages(8), jitter), batches, workers=1))) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_the_same_error_with_workers(workers):
    loader = training_loader(Samples(ToyImages(10, broken=(3,)), jitter), EpochBatches(10, 5, 0), workers=workers)
    with pytest.raises(BrokenImageError, match=r"^cannot decode image train/3 \(index 3\): planted$"):
        list(loader)
    loader.close()


def test_closing_ends_the_processes():
    loader = training_loader(Samples(ToyImages(20), jitter), EpochBatches(20, 4, 0), workers=2)
    next(iter(loader))
    processes = loader._running._workers
    loader.close()
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)
    assert len(list(loader)) == 5, "and it can be used again"
    loader.close()


def test_broken_images_stop_or_are_counted():
    images = ToyImages(10, broken=(3, 4))
    with pytest.raises(BrokenImageError, match=r"index [34]"):
        list(training_loader(Samples(images, jitter), EpochBatches(10, 5, 0), workers=0))
    batches = list(training_loader(Samples(images, jitter, "skip"), EpochBatches(10, 5, 0), workers=0))
    assert sum(int(batch["skipped"]) for batch in batches) == 2
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == [0, 1, 2, 5, 6, 7, 8, 9]


def test_evaluation_takes_each_image_once_in_order():
    loader = evaluation_loader(Samples(ToyImages(10), jitter), range(1, 10, 2), 2, workers=0)
    assert [batch["index"].tolist() for batch in loader] == [[1, 3], [5, 7], [9]]


def test_limits_keep_the_classes():
    assert evenly_spaced(10, None) == list(range(10))
    assert evenly_spaced(100, 4) == [0, 25, 50, 75]
    with pytest.raises(ValueError, match="positive"):
        evenly_spaced(10, 0)


@pytest.mark.parametrize(
    ("samples", "count", "sizes"), [(5, 4, [3, 2]), (8, 4, [2, 2, 2, 2]), (1, 2, [1]), (7, 2, [4, 3])]
)
def test_no_part_of_a_batch_is_one_sample_if_that_can_be_helped(samples, count, sizes):
    batch = {"label": torch.arange(samples), "image": torch.rand(samples, 3, 2, 2)}
    found = parts(batch, count)
    assert [len(part["label"]) for part in found] == sizes
    assert torch.equal(torch.cat([part["label"] for part in found]), batch["label"])
