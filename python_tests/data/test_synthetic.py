"""The synthetic birds: deterministic, safely cached, and right in what they claim to know."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
from random import Random

import numpy as np
import PIL
import pytest
import torch

from fgvc_ext.data import SyntheticBirds, load_dataset, split_validation
from fgvc_ext.data.birds import dataset as birds_module
from fgvc_ext.data.birds.drawing import draw_bird
from fgvc_ext.data.birds.species import LOOKS, MAX_CLASSES, PARTS, differing_parts, make_species

SMALL = {"classes": 4, "train_per_class": 3, "test_per_class": 2, "image_size": 48}


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return SyntheticBirds("train", classes=20, train_per_class=4, image_size=96, cache=tmp_path_factory.mktemp("cache"))


def test_interface(birds):
    assert (birds.name, birds.split, len(birds), len(birds.classes)) == ("synthetic", "train", 80, 20)
    assert birds.labels.dtype == torch.int64
    assert birds.labels.bincount().tolist() == [4] * 20
    assert len(set(birds.ids)) == 80
    assert len(set(birds.classes)) == 20
    image = birds.load(5)
    assert image.shape == (3, 96, 96)
    assert image.dtype == torch.uint8
    assert birds.boxes.shape == (80, 4)
    assert birds.boxes.dtype == torch.float32
    assert birds.parts.shape == (80, len(birds.part_names), 3)
    assert birds.parts.dtype == torch.float32


def test_loaded_images_are_copies(birds):
    image = birds.load(0)
    birds.load(0).zero_()
    assert torch.equal(birds.load(0), image)
    assert image.any()


@pytest.mark.parametrize("count", [2, 5, 20, 200, MAX_CLASSES])
@pytest.mark.parametrize("seed", [0, 1])
def test_species_come_as_twins(count, seed):
    names, species = make_species(count, seed)
    assert len(set(names)) == len(names) == len(species) == count
    for looks in species:
        assert all(looks[part] in LOOKS[part] for part in PARTS)
        assert len(looks) == len(PARTS)
    for i, first in enumerate(species):
        for j, second in enumerate(species[:i]):
            twins = i // 2 == j // 2
            parts = differing_parts(first, second)
            assert (len(parts) == 1 and parts != ["body"]) if twins else len(parts) >= 2, (names[i], names[j])


def test_pairs_cover_every_small_part(birds):
    assert {part for _, _, part in birds.pairs} == set(PARTS) - {"body"}
    assert birds.separating_part(0, 1) == birds.pairs[0][2]
    assert birds.separating_part(3, 3) == ""
    far = birds.separating_part(0, 2)
    assert " + " in far
    assert far == birds.separating_part(2, 0)
    with pytest.raises(IndexError, match=r"expected 0\.\.19, got 20"):
        birds.separating_part(0, 20)


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_part_changes_pixels_at_its_position_only(part):
    """Two birds drawn from the same random numbers differ where `parts` says that the part is."""
    size, species = 128, make_species(20, 0)[1][0]
    near, total = 0.0, 0.0
    for number in range(6):
        looks = [{**species, "tail": "plain", part: look} for look in list(LOOKS[part])[:2]]
        first, second = (draw_bird(look, size, Random(f"same/{number}")) for look in looks)
        change = np.abs(np.asarray(first.image, np.float32) - np.asarray(second.image, np.float32)).sum(-1)
        change[change < 40] = 0  # the light of a changed outline reaches a little further
        x, y, _visible = first.parts[PARTS.index(part)]
        rows, columns = np.mgrid[:size, :size]
        near += change[np.hypot(columns - x, rows - y) < size * (0.5 if part == "body" else 0.17)].sum()
        total += change.sum()
    assert total > 0, "the part is drawn"
    assert near > 0.8 * total


def test_boxes_hold_the_bird_tightly():
    """The box and the parts against a bird that is seen by drawing it in another plumage."""
    species = make_species(20, 0)[1][0]
    for number in range(8):
        random = f"box/{number}"
        first, second = (draw_bird({**species, "body": body}, 128, Random(random)) for body in ("russet", "azure"))
        change = np.abs(np.asarray(first.image, np.int32) - np.asarray(second.image, np.int32)).max(-1) > 25
        ys, xs = change.nonzero()
        x0, y0, x1, y1 = first.box
        assert first.box == second.box
        assert 0 <= x0 < x1 <= 128
        assert 0 <= y0 < y1 <= 128
        assert x0 - 1 <= xs.min()
        assert xs.max() <= x1 + 1
        assert y0 - 1 <= ys.min()
        assert ys.max() <= y1 + 1
        assert (xs.max() - xs.min()) > 0.6 * (x1 - x0)


def test_parts_lie_in_the_box(birds):
    x, y, visible = birds.parts.unbind(-1)
    x0, y0, x1, y1 = birds.boxes[:, :, None].unbind(1)
    inside = (x >= x0 - 2) & (x <= x1 + 2) & (y >= y0 - 2) & (y <= y1 + 2)
    assert set(visible.unique().tolist()) <= {0.0, 1.0}
    assert 0.85 < visible.mean() < 1
    assert inside[visible == 1].all()
    assert birds.boxes.min() >= 0
    assert birds.boxes.max() <= 96
    area = ((x1 - x0) * (y1 - y0)).flatten() / 96**2
    assert area.min() > 0.05
    assert area.max() / area.min() > 2, "size varies"
    facing = x[:, PARTS.index("beak")] > x[:, PARTS.index("tail")]
    assert 0.3 < facing.float().mean() < 0.7


@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process(tmp_path):
    ours = SyntheticBirds("train", **SMALL, cache=False).fingerprint()
    make = f"SyntheticBirds('train', **{SMALL!r}, cache=False)"
    code = f"from fgvc_ext.data import SyntheticBirds; print({make}.fingerprint())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = run.stdout.strip()
    assert ours == theirs
    others = [("test", {}), ("train", {"seed": 1}), ("train", {"image_size": 40}), ("train", {"classes": 5})]
    prints = {SyntheticBirds(split, **{**SMALL, **change}, cache=False).fingerprint() for split, change in others}
    assert len(prints | {ours}) == 5


def test_more_images_extend_the_set():
    few = SyntheticBirds("train", **SMALL, cache=False)
    more = SyntheticBirds("train", **{**SMALL, "train_per_class": 5}, cache=False)
    for i, sample in enumerate(few.ids):
        assert torch.equal(few.load(i), more.load(more.ids.index(sample)))


def test_several_processes_draw_the_same(monkeypatch):
    alone = SyntheticBirds("train", **SMALL, cache=False)
    monkeypatch.setattr("fgvc_ext.data.birds.dataset._processes", lambda images: 3)
    together = SyntheticBirds("train", **SMALL, cache=False)
    assert together.fingerprint() == alone.fingerprint()
    assert torch.equal(together.parts, alone.parts)
    assert torch.equal(together.boxes, alone.boxes)


def test_rows_of_a_killed_process_are_drawn_again(monkeypatch):
    alone = SyntheticBirds("train", **SMALL, cache=False)
    parent = os.getpid()

    def draw(*args):
        if os.getpid() != parent:
            os.kill(os.getpid(), 9)
        return draw_bird(*args)

    monkeypatch.setattr("fgvc_ext.data.birds.dataset._processes", lambda images: 2)
    monkeypatch.setattr("fgvc_ext.data.birds.dataset.draw_bird", draw)
    assert SyntheticBirds("train", **SMALL, cache=False).fingerprint() == alone.fingerprint()


def cache_file(folder):
    (file,) = folder.iterdir()
    return file


def test_cache_is_used(tmp_path, monkeypatch):
    first = SyntheticBirds("train", **SMALL, cache=tmp_path)
    monkeypatch.setattr(SyntheticBirds, "_draw", lambda *args: pytest.fail("drew in spite of the cache"))
    second = SyntheticBirds("train", **SMALL, cache=tmp_path)
    assert first.fingerprint() == second.fingerprint()
    assert torch.equal(first.parts, second.parts)


def test_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FGVC_EXT_CACHE", str(tmp_path / "here"))
    load_dataset("synthetic", split="test", **SMALL)
    assert cache_file(tmp_path / "here").suffix == ".npz"


@pytest.mark.parametrize("fault", ["empty", "half", "last byte", "flipped bit", "foreign", "other recipe"])
def test_damaged_cache_is_drawn_again(tmp_path, fault):
    expected = SyntheticBirds("train", **SMALL, cache=tmp_path).fingerprint()
    file = cache_file(tmp_path)
    data = bytearray(file.read_bytes())
    if fault == "flipped bit":
        data[len(data) // 2] ^= 1
    if fault == "other recipe":
        SyntheticBirds("train", **{**SMALL, "seed": 9}, cache=tmp_path / "other")
        data = cache_file(tmp_path / "other").read_bytes()
    faults = {"empty": b"", "half": data[: len(data) // 2], "last byte": data[:-1], "foreign": b"no cache at all"}
    file.write_bytes(faults.get(fault, data))
    assert SyntheticBirds("train", **SMALL, cache=tmp_path).fingerprint() == expected
    assert SyntheticBirds("train", **SMALL, cache=tmp_path).fingerprint() == expected
    assert file.stat().st_size > 1000


def _use_cache(folder, results):
    for _ in range(4):
        results.put(SyntheticBirds("train", **SMALL, cache=folder).fingerprint())
        for file in folder.glob("*.npz"):
            file.unlink(missing_ok=True)  # another process may read or have renamed it just now


def test_processes_share_a_cache_that_keeps_vanishing(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    running = [context.Process(target=_use_cache, args=(tmp_path, results)) for _ in range(3)]
    for process in running:
        process.start()
    prints = {results.get() for _ in range(12)}
    for process in running:
        process.join(30)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert prints == {SyntheticBirds("train", **SMALL, cache=False).fingerprint()}
    assert not list(tmp_path.glob("*.partial")), "no partial file is left"


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="not cached"):
        birds = SyntheticBirds("train", **SMALL, cache=tmp_path / "file")
    assert birds.load(0).any()


def test_subsets_keep_what_is_known(birds):
    train, val = split_validation(birds, 0.25)
    assert len(val) == 20
    assert isinstance(val, SyntheticBirds)
    assert val.separating_part(0, 1) == birds.separating_part(0, 1)
    where = [birds.ids.index(sample) for sample in val.ids]
    assert torch.equal(val.parts, birds.parts[where])
    assert torch.equal(val.boxes, birds.boxes[where])
    assert torch.equal(val.load(7), birds.load(where[7]))
    assert val.fingerprint() != train.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"split": "val"}, "'train' or 'test', got 'val'"), ({"classes": 1}, r"2\.\.\d+, got 1"),
     ({"image_size": 8}, "32 pixels, got 30 and 8"), ({"train_per_class": 0}, "1 image a class")],
)  # fmt: skip
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticBirds(**{"split": "train", "cache": False, **options})


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason=f"drawn with Pillow 13.0.0, here is {PIL.__version__}")
def test_pixels_are_the_known_ones():
    """Who changes this digest on purpose changes every number that was measured on the birds."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        digest.update(SyntheticBirds(split, **SMALL, cache=False)._images.numpy().tobytes())
    assert digest.hexdigest()[:16] == "4e07e27d8405e8e1"


def test_other_drawing_code_and_another_pillow_do_not_share_a_cache_file(tmp_path, monkeypatch):
    first = SyntheticBirds("test", **SMALL, cache=tmp_path)
    key = birds_module.drawing_key()
    monkeypatch.setattr(PIL, "__version__", "0.0")
    birds_module.drawing_key.cache_clear()
    try:
        assert birds_module.drawing_key() != key
        second = SyntheticBirds("test", **SMALL, cache=tmp_path)
        assert len(list(tmp_path.glob("*.npz"))) == 2
        assert second.fingerprint() == first.fingerprint(), "same pixels, same data set"
        monkeypatch.setattr(birds_module, "DRAWING_SOURCES", ("scene",))
        other = birds_module.drawing_key()
        birds_module.drawing_key.cache_clear()
        assert birds_module.drawing_key() != other
    finally:
        birds_module.drawing_key.cache_clear()
