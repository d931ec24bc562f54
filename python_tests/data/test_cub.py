"""CUB-200-2011: a small set in the official layout with every kind of fault, and the real files."""

import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from fgvc_ext.data import CUB, DatasetError, check

FILES = {
    "classes.txt": "1 001.Auk\n2 002.Wren\n",
    "images.txt": "1 001.Auk/a.jpg\n2 001.Auk/b.jpg\n3 002.Wren/c.jpg\n4 002.Wren/d.jpg\n",
    "image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n",
    "train_test_split.txt": "1 1\n2 0\n3 1\n4 0\n",
    "bounding_boxes.txt": "1 1.0 2.0 3.0 4.0\n2 0 0 5 5\n3 2.5 1.0 4.0 4.0\n4 0 0 8 8\n",
    "parts/parts.txt": "1 back\n2 left eye\n",
    "parts/part_locs.txt": "".join(f"{i} {part} {i}.5 {part}.0 {part % 2}\n" for i in range(1, 5) for part in (1, 2)),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:CUB at")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "CUB_200_2011"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for line in FILES["images.txt"].splitlines():
        file = root / "images" / line.split()[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (int(line[0]) * 50, 0, 0)).save(file)
    return root


def test_official_layout(root):
    data = CUB(root, "train", parts=True)
    assert data.classes == ["001.Auk", "002.Wren"]
    assert data.ids == ["1", "3"]
    assert data.labels.tolist() == [0, 1]
    assert data.boxes.tolist() == [[1, 2, 4, 6], [2.5, 1, 6.5, 5]]
    assert data.part_names == ["back", "left eye"]
    assert data.parts.tolist() == [[[1.5, 1, 1], [1.5, 2, 0]], [[3.5, 1, 1], [3.5, 2, 0]]]
    assert abs(int(data.load(1)[0, 4, 4]) - 150) < 4
    assert data.subset([1]).parts.shape == (1, 2, 3)
    assert CUB(root.parent, "test").ids == ["2", "4"]


def test_joined_by_id_not_by_line_order(root):
    before = CUB(root, "train", parts=True)
    for number, name in enumerate(FILES):
        lines = FILES[name].splitlines()
        random.Random(number).shuffle(lines)
        (root / name).write_text("\n".join(lines) + "\n")
    after = CUB(root, "train", parts=True)
    assert after.fingerprint() == before.fingerprint()
    assert torch.equal(after.boxes, before.boxes)
    assert torch.equal(after.parts, before.parts)
    assert after.paths == before.paths


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.txt", "2 001", "1 001", "line 2: image id 1 is a duplicate of line 1"),
        ("images.txt", "2 001.Auk/b.jpg", "2", "line 2: cannot read the fields of image 2"),
        ("images.txt", "b.jpg", "x.jpg", "line 2: image id 2: no file .*x.jpg"),
        ("image_class_labels.txt", "2 1\n", "", r"image id 2 is missing \(1 of 4 are\)"),
        ("image_class_labels.txt", "2 1", "3 1", "line 3: image id 3 is a duplicate of line 2"),
        ("image_class_labels.txt", "2 1", "9 1", "line 2: image id 9 is unknown"),
        ("image_class_labels.txt", "2 1", "2 7", "line 2: class id 7 is unknown: not in classes.txt"),
        ("image_class_labels.txt", "2 1", "2 one", "line 2: cannot read .* 'one'"),
        ("image_class_labels.txt", "2 1", "2 1 1", "line 2: cannot read .* '1 1'"),
        ("image_class_labels.txt", "2 1", "two 1", "line 2: cannot read image id from 'two'"),
        ("train_test_split.txt", "2 0", "2 2", r"line 2: .*expected 1 \(train\) or 0 \(test\)"),
        ("train_test_split.txt", "4 0\n", "", "image id 4 is missing"),
        ("bounding_boxes.txt", "0 0 5 5", "0 0 5", "line 2: .*expected 4 finite numbers: x y width height"),
        ("bounding_boxes.txt", "0 0 5 5", "0 0 5 nan", "line 2: .*expected 4 finite numbers"),
        ("bounding_boxes.txt", "0 0 5 5", "0 0 5 0", "line 2: .*expected a width and a height above 0"),
        ("classes.txt", "2 002", "1 002", "line 2: class id 1 is a duplicate"),
        ("parts/part_locs.txt", "2 1 2.5 1.0 1\n", "", "part 1 of image 2 is missing"),
        ("parts/part_locs.txt", "2 1 2.5", "2 2 2.5", "line 4: part 2 of image 2 is a duplicate of line 3"),
        ("parts/part_locs.txt", "2 1 2.5", "2 5 2.5", "line 3: image id 2 or part id 5 is unknown"),
        ("parts/part_locs.txt", "2 1 2.5 1.0 1", "2 1 2.5 1.0", "line 3: expected .* <x> <y> <visible>"),
        ("parts/part_locs.txt", "2 1 2.5 1.0 1", "2 1 inf 1.0 1", "line 3: expected finite x and y"),
        ("parts/part_locs.txt", "2 1 2.5 1.0 1", "2 1 2.5 1.0 7", "line 3: expected .* visible 0 or 1"),
        ("parts/part_locs.txt", "2 1 2.5 1.0 1", "2", "line 3: expected '<image> <part>"),
    ],
)
def test_faults_are_named_with_file_and_line(root, name, old, new, message):
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=message) as caught:
        CUB(root, "test", parts=True)
    assert str(root / name) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FILES if name != "images.txt"])
def test_missing_empty_and_binary_files(root, name):
    for content, message in ((None, "No such file"), (b"", "missing|no lines"), (b"\xff\xfe\0\x01", "not a text file")):
        (root / name).unlink(missing_ok=True)
        if content is not None:
            (root / name).write_bytes(content)
        with pytest.raises(DatasetError, match=message) as caught:
            CUB(root, "test", parts=True)
        assert name.rsplit("/")[-1] in str(caught.value)


def test_wrong_root(tmp_path):
    with pytest.raises(DatasetError, match=r"found no images\.txt there"):
        CUB(tmp_path, "train")
    with pytest.raises(DatasetError, match="found no such folder"):
        CUB(tmp_path / "missing", "train")
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        CUB(tmp_path, "val")


@pytest.mark.filterwarnings("default")
def test_one_warning_with_both_counts(root):
    with pytest.warns(UserWarning, match="CUB at") as caught:
        CUB(root, "train")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "2 classes and 2 train images" in text
    assert "200 and 5,994" in text


def real(name):
    folder = os.environ.get("FGVC_EXT_TEST_DATA")
    if not folder:
        pytest.skip("set FGVC_EXT_TEST_DATA to the folder that holds cub50/ and cub200_metadata/")
    return Path(folder) / name


@pytest.mark.parametrize(("split", "count", "per_class"), [("train", 5994, (29, 30)), ("test", 5794, (11, 30))])
def test_official_metadata(split, count, per_class):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the official counts give no warning
        data = CUB(real("cub200_metadata"), split, parts=True, check_files=False)
    counts = data.labels.bincount(minlength=200)
    assert len(data) == count
    assert len(data.classes) == 200
    assert (int(counts.min()), int(counts.max())) == per_class
    assert data.classes[0] == "001.Black_footed_Albatross"
    assert data.part_names[1] == "beak"
    assert all(
        path.parent.name == data.classes[label] for path, label in zip(data.paths, data.labels.tolist(), strict=True)
    )
    assert data.parts.shape == (count, 15, 3)
    assert (data.boxes[:, 2:] > data.boxes[:, :2]).all()
    if split == "test":
        assert data.ids[0] == "1"
        assert data.boxes[0].tolist() == [60, 27, 385, 331]


def test_missing_images_are_an_error_unless_switched_off():
    with pytest.raises(
        DatasetError, match=r"images.txt, line 2: image id 2: no file .*5994 of 5994 images are missing"
    ):
        CUB(real("cub200_metadata"), "train")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("split", "count"), [("train", 1500), ("test", 1389)])
def test_real_images(split, count):
    root = real("cub50")
    with pytest.warns(UserWarning, match=f"50 classes and {count:,} {split} images; the official data set has 200"):
        data = CUB(root, split)
    assert len(data) == count
    assert len(data.classes) == 50
    for index in range(0, count, 97):
        image = data.load(index)
        assert min(image.shape[1:]) == 256
        assert data.boxes[index, 2] <= image.shape[2] + 1
        assert data.boxes[index, 3] <= image.shape[1] + 1


def test_check_knows_the_sizes_of_classes_and_the_parts(root):
    problems = {problem.kind: problem for problem in check(CUB(root, "train"))}
    assert {"class counts", "parts"} <= set(problems)
    assert "2 classes have not 29 to 30 images" in problems["class counts"].message
    assert "001.Auk (1)" in problems["class counts"].message
    assert not problems["class counts"].serious  # two classes are a part of the data set
    assert "2 parts, expected 15" in problems["parts"].message

    file = root / "parts" / "part_locs.txt"
    file.write_text("1 1 nonsense\n")
    (problem,) = [problem for problem in check(CUB(root, "train")) if problem.kind == "parts"]
    assert problem.serious
    assert "part_locs.txt, line 1" in problem.message
    file.unlink()
    (problem,) = [problem for problem in check(CUB(root, "train")) if problem.kind == "parts"]
    assert not problem.serious
    assert "part_locs.txt: No such file" in problem.message


def test_another_split_of_the_whole_data_set_is_an_error(root):
    (root / "classes.txt").write_text("".join(f"{i} {i:03d}.Bird\n" for i in range(1, 201)))
    (problem,) = [problem for problem in check(CUB(root, "test")) if problem.kind == "class counts"]
    assert problem.serious
    assert "200 classes have not 11 to 30 images" in problem.message
