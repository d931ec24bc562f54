"""Batches: the same ones from any number of processes, which stay for the next round until they are told to end."""

import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch

from fgvc_ext.data import SyntheticBirds
from fgvc_ext.data.loading import Samples, make_loader, to_device
from fgvc_ext.data.transforms import Preprocessing

PREPARE = Preprocessing(resize=40, crop=32)
BATCHES = [[(row, 1000 * step + row) for row in range(step, 12, 3)] for step in range(3)]


@pytest.fixture(scope="module")
def samples():
    birds = SyntheticBirds("train", classes=2, train_per_class=6, image_size=48, cache=False)
    return Samples(birds, PREPARE.train_crop(jitter=0.2), normalise=PREPARE.normalise)


def batches(loader):
    found = [{name: value.clone() for name, value in batch.items()} for batch in loader]
    assert [batch["index"].tolist() for batch in found] == [[row for row, _ in batch] for batch in BATCHES]
    return torch.cat([batch["image"] for batch in found])


@pytest.fixture(scope="module")
def expected(samples):
    images = batches(make_loader(samples, BATCHES, workers=0))
    assert images.shape == (12, 3, 32, 32)
    assert images.dtype == torch.uint8
    return images


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "persistent", "method"),
    [(1, True, "fork"), (3, True, "fork"), (1, False, "fork"), (3, False, "fork"), (1, True, "spawn")],
)
def test_any_number_of_processes_gives_the_same_batches(samples, expected, workers, persistent, method):
    options = {"persistent_workers": persistent, "multiprocessing_context": method}
    loader = make_loader(samples, BATCHES, workers=workers, **options)
    try:
        before = torch.get_rng_state()
        for _ in range(2):
            assert torch.equal(batches(loader), expected)
        assert torch.equal(torch.get_rng_state(), before), "as if nothing had been drawn"
    finally:
        loader.close()


def test_processes_stay_until_the_loader_is_closed(samples, expected):
    loader = make_loader(samples, BATCHES, workers=2)
    seen = []
    for _ in range(2):
        assert torch.equal(batches(loader), expected)
        seen.append([process.pid for process in loader._running._workers])
    assert seen[0] == seen[1]
    next(iter(loader))  # an evaluation that was interrupted
    assert torch.equal(batches(loader), expected)
    processes = loader._running._workers
    assert [process.pid for process in processes] == seen[0]
    loader.close()
    assert not any(process.is_alive() for process in processes)
    assert torch.equal(batches(loader), expected), "closed, it can be used again"
    loader.close()
    loader.close()


def test_several_loaders_live_side_by_side(samples, expected):
    loaders = [make_loader(samples, BATCHES, workers=1) for _ in range(2)]
    try:
        for first, second in zip(*loaders, strict=True):
            assert torch.equal(first["image"], second["image"])
        assert torch.equal(batches(loaders[0]), expected)
    finally:
        for loader in loaders:
            loader.close()


def _signal_and_crop(crop, signals, image):
    for number in signals:
        os.kill(os.getpid(), number)
    return crop(image)


def test_a_scheduler_that_signals_every_process_ends_no_loading(samples):
    crop = partial(_signal_and_crop, PREPARE.eval_crop(), (signal.SIGTERM, signal.SIGINT))
    loader = make_loader(Samples(samples.dataset, crop), BATCHES, workers=2)
    try:
        for _ in range(2):
            assert len(batches(loader)) == 12
    finally:
        loader.close()
    assert not multiprocessing.active_children()


def test_batches_reach_the_device_normalised_as_single_images_are(samples):
    data = samples.dataset
    evaluation = Samples(data, PREPARE.eval_crop(), normalise=PREPARE.normalise)
    prepare, found = PREPARE.transform(), []
    for batch in make_loader(evaluation, BATCHES, workers=0):
        found.append(to_device(batch, torch.device("cpu"), normalise=evaluation.normalise))
    order = [row for batch in BATCHES for row, _ in batch]
    assert torch.equal(torch.cat([b["image"] for b in found]), torch.stack([prepare(data.load(row)) for row in order]))
    assert torch.cat([b["label"] for b in found]).tolist() == data.labels[order].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_normalises_without_waiting_and_to_the_same_bits(samples):
    torch.ones(1, device="cuda")
    (first, *_) = make_loader(samples, BATCHES, workers=0, pin_memory=True)
    expected = to_device(first, torch.device("cpu"), normalise=samples.normalise)["image"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [to_device(first, torch.device("cuda"), normalise=samples.normalise, channels_last=c) for c in (0, 1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in moved:
        assert torch.equal(batch["image"].cpu(), expected)


def test_a_sample_draws_from_its_own_seed(samples):
    first, again, other = (samples[0, seed]["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_of_a_transform_of_ones_own_are_left_as_they_are():
    images = torch.rand(2, 3, 4, 4)
    moved = to_device({"image": images.clone()}, torch.device("cpu"), normalise=PREPARE.normalise)
    assert torch.equal(moved["image"], images)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_have_the_order_in_memory_that_is_asked_for(channels_last):
    batch = {"image": torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)}
    image = to_device(batch, torch.device("cpu"), normalise=PREPARE.normalise, channels_last=channels_last)["image"]
    assert image.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert image.is_contiguous() != channels_last
