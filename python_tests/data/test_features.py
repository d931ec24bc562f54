"""Features in the images' place: whole files or none, one maker, the same samples and flips."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fgvc_ext.data import BrokenImageError, ImageDataset
from fgvc_ext.data.features import SPARE, FeatureCache, Features, FeatureSamples, is_flipped
from fgvc_ext.data.loading import Samples, make_loader
from fgvc_ext.data.pipeline import DataConfig, Datasets, preprocessing, training_samples
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.models.backbone import IMAGENET

SHAPE = (5, 2, 3, 3, 4)
forked = multiprocessing.get_context("fork")


class Pictures(ImageDataset):
    def __init__(self, count: int = 5, broken: tuple[int, ...] = ()) -> None:
        super().__init__("pictures", "train", ["a", "b"], torch.arange(count) % 2, [str(i) for i in range(count)])
        self.broken = broken

    def load(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise BrokenImageError.of(Path(self.ids[index]), index, "planted")
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8)

    def content_key(self) -> str:
        return "1"


def write(
    cache: FeatureCache, values: np.ndarray, broken: frozenset[int] = frozenset(), precision: str = "fp32"
) -> None:
    with cache.lock(), cache.writing(values.shape, precision, set(broken)) as array:
        array[:] = values


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "new" / "folder", {"weights": "w"})


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def test_what_is_written_is_read(cache, values):
    assert cache.read() is None
    write(cache, values, frozenset({3}))
    found = cache.read()
    assert np.array_equal(found.array, values)
    assert found.broken == {3}
    assert isinstance(found.array, np.memmap)
    assert FeatureCache(cache.folder, {"weights": "other"}).read() is None
    batch = found.batch([4, 0], [1, 0])
    assert torch.equal(batch, torch.from_numpy(values[[4, 0], [1, 0]]).permute(0, 3, 1, 2))
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("damage", ["no description", "another's description", "short", "empty", "no array"])
def test_what_is_not_whole_is_not_there(cache, values, damage):
    write(cache, values)
    described = cache.file.with_suffix(".json")
    if damage == "no description":
        described.unlink()
    elif damage == "another's description":
        described.write_text(described.read_text().replace(cache.key, "0" * 64))
    elif damage == "no array":
        cache.file.unlink()
    else:
        os.truncate(cache.file, 0 if damage == "empty" else cache.file.stat().st_size - 4)
    assert cache.read() is None
    write(cache, values)
    assert np.array_equal(cache.read().array, values)


def test_an_error_leaves_nothing(cache):
    with pytest.raises(KeyError), cache.lock(), cache.writing(SHAPE, "fp16", set()):
        raise KeyError
    assert cache.read() is None
    assert [file.suffix for file in cache.folder.iterdir()] == [".lock"]


def _hold(lock, held) -> None:
    with open(lock, "w") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        held.set()
        time.sleep(60)


def test_a_killed_maker_leaves_nothing_and_no_lock(cache, values):
    def make() -> None:
        with cache.lock(), cache.writing(SHAPE, "fp32", set()) as array:
            array[0] = 1
            array.flush()
            started.set()
            time.sleep(60)

    started = forked.Event()
    process = forked.Process(target=make)
    process.start()
    assert started.wait(30)
    process.kill()
    process.join()
    assert len(list(cache.folder.glob(".*.partial"))) == 1
    assert cache.read() is None
    others = cache.folder / f".features-{'0' * 32}.npy.7.partial", cache.folder / f".features-{'1' * 32}.npy.8.partial"
    for other in others:  # of other features: nobody makes the first, and somebody the second
        other.touch()
    at_work = forked.Process(target=_hold, args=(cache.folder / f"features-{'1' * 32}.lock", started))
    started.clear()
    at_work.start()
    assert started.wait(30)
    write(cache, values)
    assert list(cache.folder.glob(".*.partial")) == [others[1]]
    at_work.kill()
    at_work.join()
    write(cache, values)
    assert not list(cache.folder.glob(".*.partial"))
    assert np.array_equal(cache.read().array, values)


def test_what_another_user_left_is_left_alone(cache, values):
    other = cache.folder / f".features-{'2' * 32}.npy.9.partial"
    cache.folder.mkdir(parents=True, exist_ok=True)
    other.touch()
    (cache.folder / f"features-{'2' * 32}.lock").mkdir()  # it cannot be opened
    write(cache, values)
    assert other.exists()
    assert cache.read() is not None


def test_one_process_makes_and_the_other_waits(cache, values):
    def make(number: int) -> None:
        with cache.lock():
            if cache.read() is None:
                with cache.writing(SHAPE, "fp32", set()) as array:
                    made.put(number)
                    time.sleep(0.3)
                    array[:] = values

    made = forked.Queue()
    processes = [forked.Process(target=make, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    made.get(timeout=5)
    assert made.empty()
    assert np.array_equal(cache.read().array, values)


def test_a_disk_that_is_too_small_is_said_beforehand(cache, monkeypatch):
    free = SPARE + 4 * int(np.prod(SHAPE)) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))
    with (
        pytest.raises(
            OSError, match=r"features: .* are needed in .*new/folder, where .* are free: --data.cache FOLDER"
        ),
        cache.lock(),
        cache.writing(SHAPE, "fp32", set()),
    ):
        pass
    assert not list(cache.folder.glob(".*.partial"))
    with cache.lock(), cache.writing(SHAPE, "fp16", set()):
        pass


def test_the_place_is_taken_before_anything_is_written(cache, values, monkeypatch):
    with cache.lock(), cache.writing(values.shape, "fp32", set()) as array:
        (partial,) = cache.folder.glob(".*.partial")
        assert partial.stat().st_blocks * 512 >= array.nbytes  # a file with holes has none yet
        array[:] = values

    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (
        pytest.raises(OSError, match=r"are needed in .*, but: Disk quota exceeded: --data\.cache"),
        cache.lock(),
        cache.writing(values.shape, "fp32", set()),
    ):
        raise AssertionError
    assert not list(cache.folder.glob(".*.partial"))


def test_flips_are_those_of_images():
    """The transform of a training and the features' views answer the same seed alike."""
    dataset, prepare = Pictures(), Preprocessing(20, 16)
    config = DataConfig(name="folder", resize=20, crop=16, random_crop=False, flip=0.3)
    samples = training_samples(Datasets(dataset, dataset), config, prepare)
    plain = samples.views.plain(dataset.load(0))
    seeds = range(1000, 1200)
    seen = [torch.equal(samples[0, seed]["image"], plain.flip(-1)) for seed in seeds]
    assert 30 < sum(seen) < 90
    assert [is_flipped(seed, 0.3) for seed in seeds] == seen
    assert not any(is_flipped(seed, 0.0) for seed in seeds)
    assert all(is_flipped(seed, 1.0) for seed in seeds)
    assert torch.equal(plain, prepare.eval_crop()(dataset.load(0)))  # the centre


def test_a_batch_is_the_same_but_for_its_images(values):
    dataset = Pictures()
    images = Samples(dataset, lambda image: image, normalise=lambda image: image / 0)
    features = FeatureSamples(images, Features(values), flip=0.5, rows=[4, 3, 2, 1, 0])
    keys = [(3, 1), (0, 3), (2, 4)]
    (batch,) = make_loader(features, [keys], workers=3)
    (whole,) = make_loader(images, [keys], workers=0)
    assert batch.keys() == whole.keys()
    for name in ("label", "index", "seed", "skipped"):
        assert torch.equal(batch[name], whole[name]), name
    views = [int(is_flipped(seed, 0.5)) for _, seed in keys]
    assert len(set(views)) == 2
    assert torch.equal(batch["image"], torch.from_numpy(values[[1, 4, 2], views]).permute(0, 3, 1, 2))
    assert torch.equal(features[3, 1]["image"], batch["image"][0])


def test_no_process_is_started_for_features(values):
    features = FeatureSamples(Samples(Pictures(), lambda image: image), Features(values))
    assert make_loader(features, [[(0, 0)]], workers=4).num_workers == 0


def test_broken_images_are_left_out_or_refused(values):
    dataset, features = Pictures(broken=(1,)), Features(values, frozenset({1}))
    skipping = FeatureSamples(Samples(dataset, lambda image: image, "skip"), features)
    batch = skipping.__getitems__([(0, 1), (1, 2), (2, 3)])
    assert (batch["index"].tolist(), int(batch["skipped"])) == ([0, 2], 1)
    assert skipping[1, 0] is None
    assert skipping.__getitems__([(1, 2)])["image"].shape == (0, 4, 3, 3)
    with pytest.raises(BrokenImageError, match=r"index 1.*planted"):
        FeatureSamples(Samples(dataset, lambda image: image), features)
    with pytest.raises(BrokenImageError, match=r"index 1.*when it was cached"):
        FeatureSamples(Samples(Pictures(), lambda image: image), features)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"random_crop": True}, "--data.random-crop True"),
        ({"jitter": 0.2}, "--data.jitter 0.2"),
        ({"features": "images"}, "--data.features"),
    ],
)
def test_augmentation_that_needs_pixels_is_named(change, reason):
    config = DataConfig(name="folder", resize=20, crop=16, **{"random_crop": False, **change})
    samples = training_samples(Datasets(Pictures(), Pictures()), config, preprocessing(config, IMAGENET))
    assert isinstance(samples.views, str)
    assert samples.views.startswith(reason)
