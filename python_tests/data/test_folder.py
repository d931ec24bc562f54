"""People's own data: folders of images, what is wrong with them, and the check command."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fgvc_ext.cli.data import check_command
from fgvc_ext.data import (
    BrokenImageError,
    DatasetError,
    ImageDataset,
    ImageFolder,
    check,
    load_dataset,
    split_validation,
    verify_files,
)
from fgvc_ext.data.file_contents import content_of
from fgvc_ext.data.pipeline import DataConfig, load_datasets
from fgvc_ext.training.classification import Classification


@pytest.fixture
def root(tmp_path):
    random = np.random.RandomState(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("aluminum", "Painting", "zebra"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 256, (12, 10, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def kinds(problems):
    return [problem.kind for problem in problems]


def test_classes_in_ascii_order_and_stable_ids(root):
    data = ImageFolder(root, "train")
    assert data.classes == ["Painting", "aluminum", "zebra"]
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.ids[:2] == ["train/Painting/0.png", "train/Painting/1.png"]
    assert data.boxes is None
    image, label = data[5]
    assert image.shape == (3, 12, 10)
    assert label == 1


def test_nested_upper_case_and_hidden_files(root):
    (root / "train" / "zebra" / "more").mkdir()
    shutil.move(root / "train" / "zebra" / "0.png", root / "train" / "zebra" / "more" / "0.PNG")
    (root / "train" / "zebra" / ".hidden.png").write_bytes(b"no image")
    (root / "train" / ".cache").mkdir()
    assert ImageFolder(root, "train").ids[-4:] == [
        f"train/zebra/{name}" for name in ("1.png", "2.png", "3.png", "more/0.PNG")
    ]


def test_test_split_may_lack_classes_but_keeps_their_labels(root):
    shutil.rmtree(root / "test" / "Painting")
    data = ImageFolder(root, "test")
    assert len(data.classes) == 3
    assert data.labels.tolist() == [1, 1, 2, 2]
    assert kinds(check(ImageFolder(root, "train"), data)) == ["empty class"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root), "no such folder; expected .*/train/<class>/<image>.jpg"),
        (lambda root: shutil.rmtree(root / "train"), "no folder 'train'; expected"),
        (lambda root: [file.unlink() for file in (root / "train" / "zebra").iterdir()], "zebra: class folder without"),
        (lambda root: shutil.rmtree(root / "train" / "zebra"), "test: class folders that .*train lacks: 'zebra'"),
        (lambda root: Image.new("RGB", (2, 2)).save(root / "train" / "a.png"), "a.png: image beside the class folders"),
    ],
)  # fmt: skip
def test_wrong_layout(root, spoil, message):
    spoil(root)
    with pytest.raises(DatasetError, match=message):
        [ImageFolder(root, split) for split in ("train", "test")]


def test_check_finds_broken_files(root):
    whole = (root / "train" / "zebra" / "0.png").read_bytes()
    (root / "train" / "zebra" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "test" / "aluminum" / "1.png").write_bytes(b"")
    problems = check(ImageFolder(root, "train"), ImageFolder(root, "test"))
    assert kinds(problems) == ["broken image"] * 2
    assert "zebra/0.png (index 8)" in problems[0].message
    assert "0 bytes" in problems[1].message
    with pytest.raises(BrokenImageError, match="index 8"):
        ImageFolder(root, "train").load(8)


def test_check_finds_copies_in_and_between_splits(root):
    shutil.copy(root / "train" / "zebra" / "0.png", root / "test" / "zebra" / "new.png")
    shutil.copy(root / "train" / "zebra" / "1.png", root / "train" / "zebra" / "again.png")
    shutil.copy(root / "train" / "zebra" / "2.png", root / "train" / "aluminum" / "9.png")
    problems = check(ImageFolder(root, "train"), ImageFolder(root, "test"))
    assert sorted((p.kind, p.serious) for p in problems) == [
        ("duplicate image", False), ("duplicate image", True), ("image in two splits", True)]  # fmt: skip
    assert "zebra/0.png" in next(p.message for p in problems if p.kind == "image in two splits")


def test_check_sees_the_picture_not_the_file(root):
    Image.open(root / "train" / "zebra" / "0.png").save(root / "test" / "zebra" / "same.bmp")
    assert kinds(check(ImageFolder(root, "train"), ImageFolder(root, "test"))) == ["image in two splits"]


def test_check_finds_other_class_lists_and_outside_boxes(root):
    train, test = ImageFolder(root, "train"), ImageFolder(root, "test")
    test.classes = ["Painting", "aluminum", "horse"]
    test.boxes = torch.tensor([[0.0, 0, 5, 5]]).repeat(6, 1)
    test.boxes[2] = torch.tensor([11.0, 0, 15, 5])
    assert kinds(check(train, test)) == ["class list", "box"]


def test_check_command(root, capsys):
    assert check_command("folder", root) == 0
    assert "folder train: 12 images, 3 classes" in capsys.readouterr().out
    shutil.copytree(root / "test", root / "val")
    assert check_command("folder", root) == 1
    out = capsys.readouterr().out
    assert "folder val: 6 images" in out
    assert out.count("image in two splits") == 6
    assert "6 errors" in out
    assert check_command("folder", root / "missing") == 1
    assert "no such folder" in capsys.readouterr().out


def test_load_dataset_names_what_it_knows(root):
    assert isinstance(load_dataset("folder", root, "test"), ImageFolder)
    with pytest.raises(
        ValueError, match="expected one of aircraft, cars, cub, dogs, folder, gtos, synthetic, got 'boats'"
    ):
        load_dataset("boats", root)
    with pytest.raises(ValueError, match="'folder': expected the folder that holds it as root, got None"):
        load_dataset("folder")
    with pytest.raises(ValueError, match="takes no root"):
        load_dataset("synthetic", root)
    with pytest.raises(ValueError, match="expected one of train, val, test, got 'dev'"):
        load_dataset("folder", root, "dev")


def test_validation_split_is_stratified_and_stable(root):
    data = ImageFolder(root, "train")
    train, val = split_validation(data, 0.25, seed=3)
    assert val.split == "val"
    assert val.labels.tolist() == [0, 1, 2]
    assert len(train) == 9
    assert sorted(train.ids + val.ids) == sorted(data.ids)
    assert torch.equal(val.load(1), data.load(data.ids.index(val.ids[1])))
    shuffled = data.subset(list(reversed(range(12))))
    assert set(split_validation(shuffled, 0.25, seed=3)[1].ids) == set(val.ids)
    assert any(split_validation(data, 0.25, seed=s)[1].ids != val.ids for s in range(4, 9))
    assert len(split_validation(data, 0.99)[0]) == 3, "a class keeps at least one image to train on"


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 0.01])
def test_validation_split_of_nothing(root, fraction):
    with pytest.raises(ValueError, match="split_validation"):
        split_validation(ImageFolder(root, "train"), fraction)


def test_fingerprint_sees_every_change(root):
    first = ImageFolder(root, "train").fingerprint()
    assert first == ImageFolder(root, "train").fingerprint() != ImageFolder(root, "test").fingerprint()
    file = root / "train" / "zebra" / "0.png"
    file.write_bytes(file.read_bytes() + b"x")
    resized = ImageFolder(root, "train").fingerprint()
    shutil.move(file, root / "train" / "aluminum" / "8.png")
    assert len({first, resized, ImageFolder(root, "train").fingerprint()}) == 3


def test_fingerprint_sees_another_content_of_the_same_size(root):
    before = ImageFolder(root, "train").fingerprint()
    file = root / "train" / "zebra" / "0.png"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert ImageFolder(root, "train").fingerprint() != before


@pytest.mark.parametrize("attribute", ["labels", "boxes"])
def test_fingerprint_sees_a_changed_label_and_a_changed_box(root, attribute):
    data = ImageFolder(root, "train")
    data.boxes = torch.tensor([[0.0, 0, 5, 5]]).repeat(12, 1)
    before = data.fingerprint()
    values = getattr(data, attribute)
    values[3] = values[8] + 0.5 if attribute == "boxes" else values[8]
    assert data.fingerprint() != before


def test_fingerprint_is_the_same_in_another_place(root, tmp_path_factory, monkeypatch):
    before = ImageFolder(root, "train").fingerprint()
    copy = tmp_path_factory.mktemp("elsewhere") / "images"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # with times of its own
    assert ImageFolder(copy, "train").fingerprint() == before
    monkeypatch.chdir(copy.parent)
    assert ImageFolder("images", "train").fingerprint() == before
    assert ImageFolder(copy, "train").subset([0, 1]).fingerprint() != before


def test_contents_of_large_sets_are_sampled(tmp_path):
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(bytes(30_000))
    whole, sampled = content_of(files), content_of(files, read_whole=89_999)
    assert content_of(files, read_whole=90_000) == whole
    assert whole.split()[0] == "whole"
    assert sampled.split()[0] == "sampled"

    def changed(place, length=30_000):
        content = bytearray(length)
        content[place] = 1
        files[1].write_bytes(content)
        return content_of(files) != whole, content_of(files, read_whole=1) != sampled

    for place in (0, 4095, 15_000, 19_095, 25_904, 29_999):
        assert changed(place) == (True, True)
    assert changed(10_000) == (True, False), "between the samples"
    assert changed(10_000, 30_001) == (True, True), "but the length counts"
    for limit in (1, 10**9):
        files[1].write_bytes(b"")
        empty = content_of(files, read_whole=limit)
        files[1].unlink()
        assert content_of(files, read_whole=limit) != empty


def test_labels_are_checked():
    with pytest.raises(DatasetError, match=r"label 2 of sample b: expected 0\.\.1"):
        ImageDataset("x", "train", ["p", "q"], torch.tensor([0, 2]), ["a", "b"])
    with pytest.raises(TypeError, match="int64"):
        ImageDataset("x", "train", ["p", "q"], torch.tensor([0.0, 1.0]), ["a", "b"])


def test_other_endings_are_counted_and_jfif_is_read(root):
    zebra = root / "train" / "zebra"
    Image.new("RGB", (4, 4)).save(zebra / "a.jfif", format="JPEG")
    for name in ("b.heic", "c.HEIC", "notes.txt", "README"):
        (zebra / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"train: 4 files left out .*: \.heic \(2\), \.txt \(1\), no ending \(1\)"):
        data = ImageFolder(root, "train")
    assert data.ids[-1] == "train/zebra/a.jfif"
    assert data.load(len(data) - 1).shape == (3, 4, 4)
    for file in zebra.iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(DatasetError, match=r"class folder without images, .*, found \.heic"):
        ImageFolder(root, "train")


def test_val_is_checked_where_test_is_missing(root, capsys):
    (root / "test").rename(root / "val")
    assert check_command("folder", root) == 0
    out = capsys.readouterr().out
    assert "no folder 'test': 'val' is what a model is evaluated on" in out
    assert "folder val: 6 images" in out


def folder_config(root, **options):
    return DataConfig(name="folder", root=root, resize=16, crop=12, **options)


def test_a_run_uses_the_val_folder(root, capsys):
    assert load_datasets(folder_config(root), 0).val is None
    shutil.copytree(root / "test", root / "val")
    datasets = load_datasets(folder_config(root), 0)
    assert (datasets.test.split, datasets.val.split) == ("test", "val")
    assert "folder val: all 6 files decode" in capsys.readouterr().out
    with pytest.raises(ValueError, match="val is the validation set already"):
        load_datasets(folder_config(root, val_fraction=0.25), 0)
    shutil.rmtree(root / "test")
    datasets = load_datasets(folder_config(root, val_fraction=0.25), 0)
    assert datasets.test.ids[0].startswith("val/")
    assert datasets.val.ids[0].startswith("train/")
    assert "'val' is evaluated on in its place" in capsys.readouterr().out


def test_a_broken_test_image_stops_a_run_at_its_start(root):
    file = root / "test" / "zebra" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(BrokenImageError, match=r"zebra/1\.png \(index 5\).*1 of 6 images of folder test") as caught:
        load_datasets(folder_config(root), 0)
    assert caught.value.path == file
    load_datasets(folder_config(root), 0, limit_test=3)  # it is not among these
    file.write_bytes(b"")
    with pytest.raises(BrokenImageError, match="0 bytes"):
        verify_files(ImageFolder(root, "test"), decode_at_most=3)
    assert "headers of 12 files" in verify_files(ImageFolder(root, "train"), decode_at_most=3)


def test_broken_test_images_are_left_out_where_that_is_asked_for(root, capsys):
    shutil.copytree(root / "test", root / "val")
    for split, name in (("test", "zebra/1"), ("test", "Painting/0"), ("val", "zebra/0"), ("train", "zebra/2")):
        (root / split / f"{name}.png").write_bytes(b"no image")
    datasets = load_datasets(folder_config(root), 0, broken_images="skip")
    assert len(datasets.train) == 12, "training images are left out when they are met"
    assert datasets.test.ids == [
        f"test/{name}.png" for name in ("Painting/1", "aluminum/0", "aluminum/1", "zebra/0")]  # fmt: skip
    assert datasets.test.labels.tolist() == [0, 1, 1, 2]
    assert len(datasets.val) == 5
    facts = datasets.facts()
    assert (facts["test_images"], facts["test_images_left_out"], facts["val_images_left_out"]) == (4, 2, 1)
    out = capsys.readouterr().out
    assert (
        "WARNING: folder test: 2 of 6 images cannot be read and are left out: what is measured on test is of the others"
        in out
    )
    assert "test/zebra/1.png (index 5): not an image" in out
    assert out.count("WARNING") == 2
    with pytest.raises(BrokenImageError, match="2 of 6 images of folder test"):
        load_datasets(folder_config(root), 0)


def test_nothing_is_said_of_whole_images_and_none_readable_is_an_error(root, capsys):
    datasets = load_datasets(folder_config(root), 0, broken_images="skip")
    assert not [name for name in datasets.facts() if "left_out" in name]
    assert "WARNING" not in capsys.readouterr().out
    for file in (root / "test").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"folder test: none of the 6 images can be read: .*not an image"):
        load_datasets(folder_config(root), 0, broken_images="skip")


@pytest.mark.parametrize("target", ["train/zebra", "train", ".", "..", "/"])
def test_links_that_lead_back_are_left_out(root, target):
    expected = ImageFolder(root, "train")
    link = root / "train" / "zebra" / "more" / "loop"
    link.parent.mkdir()
    link.symlink_to(root / target if target != "/" else "/", target_is_directory=True)
    with pytest.warns(UserWarning, match=r"zebra/more/loop: left out, the link leads back to /"):
        data = ImageFolder(root, "train")
    assert data.ids == expected.ids
    link.unlink()
    (root / "train" / "all").symlink_to(root / target, target_is_directory=True)
    if target != "train/zebra":
        with pytest.warns(UserWarning, match="train/all: left out"):
            assert ImageFolder(root, "train").classes == expected.classes


def test_other_links_are_followed(root, tmp_path_factory):
    """Also from a relative place, to a folder that links back into the data set."""
    pool = tmp_path_factory.mktemp("pool") / "inner"
    pool.mkdir()
    shutil.move(root / "train" / "zebra" / "0.png", pool / "0.png")
    (root / "train" / "zebra" / "pool").symlink_to(pool, target_is_directory=True)
    assert ImageFolder(root, "train").ids[-1] == "train/zebra/pool/0.png"
    for target in (root / "train" / "zebra", pool, pool.parent):
        (pool / "back").symlink_to(target, target_is_directory=True)
        with pytest.warns(UserWarning, match="pool/back: left out"):
            data = ImageFolder(root, "train")
        assert data.labels.bincount().tolist() == [4, 4, 4]
        (pool / "back").unlink()


def test_crops_pass_through_the_network_one_batch_at_a_time():
    sizes = []

    class Mean(torch.nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            return images.mean((2, 3))

    images = torch.randn(3, 5, 3, 4, 4)
    scores = Classification(Mean(), torch.nn.CrossEntropyLoss()).scores(images)
    torch.testing.assert_close(scores, images.mean((1, 3, 4)))
    assert sizes == [3] * 5
