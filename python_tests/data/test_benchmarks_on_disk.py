"""Stanford Cars, FGVC-Aircraft, Stanford Dogs and GTOS-mobile: small sets in the official layouts, and their faults."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgvc_ext.cli import DATASETS
from fgvc_ext.data import BrokenImageError, DatasetError, check, load_dataset
from fgvc_ext.data.official import Counts, Official
from fgvc_ext.data.pipeline import DataConfig, load_datasets

savemat = pytest.importorskip("scipy.io").savemat

pytestmark = pytest.mark.filterwarnings("ignore:.*the official data set has")


def image(file: Path, colour: int, size: tuple[int, int] = (40, 60)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(file)


def structs(rows: list[dict]) -> np.ndarray:
    """A 1×N structure array, as MATLAB writes it."""
    fields = list(rows[0])
    found = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        found[0, column] = tuple(row[field] for field in fields)
    return found


def cell(values: list[str]) -> np.ndarray:
    found = np.empty((len(values), 1), dtype=object)
    found[:, 0] = values
    return found


CAR_NAMES = ["AM General Hummer", "Ram C/V Cargo Van", "Zeta"]
CAR_ROWS = {
    "train": [("00001.jpg", 3, (1, 2, 10, 20)), ("00002.jpg", 1, (5, 5, 40, 60))],
    "test": [("00001.jpg", 2, (3, 4, 30, 40))],
}


def car(name: str, place: str, number: int, box: tuple[int, ...], **more: int) -> dict:
    """The fields in the order of the devkit's README, which is not that of the files: they are read by name."""
    x1, y1, x2, y2 = box
    return {"bbox_x1": x1, "bbox_x2": x2, "bbox_y1": y1, "bbox_y2": y2, "class": number, name: place, **more}


@pytest.fixture
def cars(tmp_path):
    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cell(CAR_NAMES).T})
    for split, rows in CAR_ROWS.items():
        for place, number, _ in rows:
            image(root / f"cars_{split}" / place, 50 * number)
        file = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(root / "devkit" / file, {"annotations": structs([car("fname", *row) for row in rows])})
    return root


@pytest.fixture
def cars_in_one_list(tmp_path):
    root = tmp_path / "cars"
    rows = []
    for split in ("test", "train"):
        for _, number, box in CAR_ROWS[split]:
            place = f"car_ims/{len(rows) + 1:06d}.jpg"
            image(root / place, 50 * number)
            rows.append(car("relative_im_path", place, number, box, test=int(split == "test")))
    savemat(root / "cars_annos.mat", {"annotations": structs(rows), "class_names": cell(CAR_NAMES).T})
    return root


@pytest.mark.parametrize("layout", ["cars", "cars_in_one_list"])
def test_cars_in_both_layouts(layout, request, tmp_path):
    root = request.getfixturevalue(layout)
    train = load_dataset("cars", root, "train")
    assert (train.name, train.classes) == ("cars", CAR_NAMES)
    assert train.labels.tolist() == [2, 0]
    assert train.boxes.tolist() == [[0, 1, 10, 20], [4, 4, 40, 60]]
    assert abs(int(train.load(0)[0, 5, 5]) - 150) < 4
    test = load_dataset("cars", tmp_path, "test")  # the folder that holds it
    assert test.labels.tolist() == [1]
    assert test.boxes.tolist() == [[2, 3, 30, 40]]
    names = {"cars": ["cars_train/00001.jpg", "cars_train/00002.jpg"]}
    assert train.ids == names.get(layout, ["car_ims/000002.jpg", "car_ims/000003.jpg"])


def test_the_labels_of_cars_test_images_may_lie_beside_the_devkit(cars):
    file = "cars_test_annos_withlabels.mat"
    before = load_dataset("cars", cars, "test")
    (cars / "devkit" / file).rename(cars / file)
    assert load_dataset("cars", cars, "test").fingerprint() == before.fingerprint()
    (cars / file).unlink()
    with pytest.raises(DatasetError, match=r"withlabels\.mat: no such file, nor .*cars_test_annos\.mat has no classes"):
        load_dataset("cars", cars, "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([car("fname", "00001.jpg", 4, (1, 1, 5, 5))], r"entry 1: expected a class from 1 to 3, got 4"),
        ([car("fname", "00001.jpg", 0, (1, 1, 5, 5))], r"entry 1: expected a class from 1 to 3, got 0"),
        ([car("fname", "00001.jpg", 1, (6, 1, 5, 5))], r"entry 1: expected xmin ymin xmax ymax of a box with an area"),
        ([car("fname", "9.jpg", 1, (1, 1, 5, 5))], r"no file .*9\.jpg \(1 of 1 images are missing\)"),
        ([{"bbox_x1": 1, "fname": "00001.jpg"}], r"expected the fields bbox_x1, .*; bbox_y1 is missing, found bbox_x1"),
    ],
)
def test_faulty_lists_of_cars_are_named(rows, message, cars):
    savemat(cars / "devkit" / "cars_train_annos.mat", {"annotations": structs(rows)})
    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset("cars", cars, "train")
    assert "cars_train_annos.mat" in str(caught.value)


def test_files_that_are_no_matlab_files_are_named(cars):
    (cars / "devkit" / "cars_meta.mat").write_bytes(b"nonsense" * 40)
    with pytest.raises(DatasetError, match=r"cars_meta\.mat: cannot be read as a MATLAB file"):
        load_dataset("cars", cars, "train")
    savemat(cars / "devkit" / "cars_meta.mat", {"other": 1})
    with pytest.raises(
        DatasetError, match=r"cars_meta\.mat: expected the variables class_names, class_names is missing"
    ):
        load_dataset("cars", cars, "train")


def test_a_missing_scipy_is_said(cars, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match=r"MATLAB's files need scipy, which is not installed: pip install scipy"):
        load_dataset("cars", cars, "train")


@pytest.fixture
def aircraft(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nF/A-18\nDH 82\n")
    (data / "families.txt").write_text("Boeing 707\nF/A-18\n")
    (data / "images_variant_trainval.txt").write_text("0056978 F/A-18\n1025794 DH 82\n")
    (data / "images_variant_test.txt").write_text("0481847 707-320\n")
    (data / "images_family_trainval.txt").write_text("0056978 F/A-18\n1025794 Boeing 707\n")
    (data / "images_box.txt").write_text("1025794 3 4 30 40\n0481847 1 1 40 40\n0056978 1 2 3 4\n")
    for name in ("0056978", "1025794", "0481847"):
        picture = Image.new("RGB", (40, 60), (200, 0, 0))
        picture.paste((0, 0, 255), (0, 40, 40, 60))  # the banner
        (data / "images").mkdir(exist_ok=True)
        picture.save(data / "images" / f"{name}.jpg", quality=95, subsampling=0)
    return data


def test_aircraft(aircraft):
    train = load_dataset("aircraft", aircraft.parent.parent, "train")
    assert train.classes == ["707-320", "F/A-18", "DH 82"]
    assert train.ids == ["0056978", "1025794"]
    assert train.labels.tolist() == [1, 2]
    assert train.boxes.tolist() == [[0, 1, 3, 4], [2, 3, 30, 40]]
    assert load_dataset("aircraft", aircraft.parent, "test").ids == load_dataset("aircraft", aircraft, "test").ids
    families = load_dataset("aircraft", aircraft, "train", level="family")
    assert families.classes == ["Boeing 707", "F/A-18"]
    assert families.labels.tolist() == [1, 0]
    (aircraft / "images_box.txt").unlink()
    assert load_dataset("aircraft", aircraft, "train").boxes is None
    with pytest.raises(ValueError, match="level: expected one of variant, family, manufacturer, got 'species'"):
        load_dataset("aircraft", aircraft, "train", level="species")


def test_the_banner_of_aircraft_is_never_seen(aircraft):
    train = load_dataset("aircraft", aircraft, "train")
    for found in (train.load(0), train.load_at_least(0, 4)[0], train[0][0]):
        assert found.shape == (3, 40, 40)
        assert int(found[2].max()) < 20
    assert train.load_at_least(0, 4)[1] == (40, 40)
    image(aircraft / "images" / "0056978.jpg", 1, (40, 20))
    with pytest.raises(BrokenImageError, match=r"0056978\.jpg .*expected more than the 20 lines of the banner, got 20"):
        train.load(0)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "images_variant_trainval.txt",
            "0056978 Concorde\n",
            "line 1: variant Concorde is unknown: not in variants.txt",
        ),
        ("images_variant_trainval.txt", "0056978\n", "line 1: cannot read the fields of image 0056978"),
        ("images_variant_trainval.txt", "7 DH 82\n", r"no file .*7\.jpg"),
        ("images_box.txt", "0056978 1 2 3 4\n", r"image id 1025794 is missing \(1 of 2 are\)"),
        ("images_box.txt", "0056978 1 2 0 4\n", "line 1: .*expected xmin ymin xmax ymax of a box with an area"),
        ("variants.txt", None, "found no variants.txt there"),
    ],
)
def test_faulty_lists_of_aircraft_are_named(file, text, message, aircraft):
    (aircraft / file).unlink() if text is None else (aircraft / file).write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_dataset("aircraft", aircraft, "train")


DOG_LISTS = {
    "train": (["n02-Pug/n02_7.jpg", "n01-Chihuahua/n01_1.jpg"], [2, 1]),
    "test": (["n02-Pug/n02_9.jpg"], [2]),
}
DOG = "<object><name>dog</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.fixture
def dogs(tmp_path):
    for split, (places, labels) in DOG_LISTS.items():
        lists = {"file_list": cell(places), "labels": np.array(labels, dtype=np.uint8)[:, None]}
        savemat(tmp_path / f"{split}_list.mat", lists)
        for place in places:
            image(tmp_path / "Images" / place, 90)
            file = tmp_path / "Annotation" / place.removesuffix(".jpg")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"<annotation>{DOG.format(2, 3, 10, 12)}{DOG.format(5, 1, 20, 9)}</annotation>")
    return tmp_path


def test_dogs(dogs):
    train = load_dataset("dogs", dogs, "train")
    assert train.classes == ["n01-Chihuahua", "n02-Pug"]  # in the order of the official labels
    assert train.labels.tolist() == [1, 0]
    assert train.ids == DOG_LISTS["train"][0]
    assert train.boxes is None
    test = load_dataset("dogs", dogs, "test", with_boxes=True)
    assert test.classes == train.classes
    assert test.labels.tolist() == [1]
    assert test.boxes.tolist() == [[1, 0, 20, 12]]


def test_faulty_lists_of_dogs_are_named(dogs):
    file = dogs / "Annotation" / "n02-Pug" / "n02_9"
    for text, message in (("<annotation/>", "expected at least one bndbox"), ("<a>", "no element found|mismatched")):
        file.write_text(text)
        with pytest.raises(DatasetError, match=rf"n02_9: ({message})"):
            load_dataset("dogs", dogs, "test", with_boxes=True)
    for labels, message in (
        ([2], "2 files, but 1 labels"),
        ([121, 1], "class from 1 to 120, got 121"),
        ([1, 1], "here"),
    ):
        savemat(dogs / "train_list.mat", {"file_list": cell(DOG_LISTS["train"][0]), "labels": np.array(labels)})
        with pytest.raises(DatasetError, match=message):
            load_dataset("dogs", dogs, "train")


@pytest.fixture
def gtos(tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(("asphalt", "Painting")):
            image(tmp_path / "gtos-mobile" / split / name / "a.jpg", 40 * number + 100 * (split == "test"))
    return tmp_path


@pytest.mark.filterwarnings("default")
def test_gtos_is_a_folder_of_known_numbers(gtos):
    text = "GTOS-mobile at .*: 2 classes and 2 train images; the official data set has 31 and 31,315"
    with pytest.warns(UserWarning, match=text):
        train = load_dataset("gtos", gtos, "train")
    assert (train.name, train.classes) == ("gtos", ["Painting", "asphalt"])
    with pytest.warns(UserWarning, match="2 test images; .* 6,066"):
        assert len(load_dataset("gtos", gtos / "gtos-mobile", "test")) == 2
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        load_dataset("gtos", gtos, "val")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "numbers"),
    [("cars", "196 and 8,144"), ("aircraft", "100 and 6,667"), ("dogs", "120 and 12,000")],
)
def test_other_numbers_than_the_official_ones_are_warned_of(name, numbers, request):
    with pytest.warns(UserWarning, match=f"the official data set has {numbers}"):
        load_dataset(name, request.getfixturevalue(name), "train")


@pytest.mark.parametrize(
    ("name", "per_class"), [("cars", "24 to 68"), ("aircraft", "66 to 67"), ("dogs", "100 to 100")]
)
def test_check_knows_the_sizes_of_classes(name, per_class, request):
    data = load_dataset(name, request.getfixturevalue(name), "train")
    (problem,) = [problem for problem in check(data.subset([0])) if problem.kind == "class counts"]
    assert f"{len(data.classes)} classes have not {per_class} images" in problem.message
    assert not problem.serious


def test_the_limits_of_official_classes_are_inclusive():
    official = Official("Small", 2, {"train": 3}, per_class={"train": (1, 2)})
    assert Counts(official, "train", {"a": 1, "b": 2}).difference() == ""
    assert "1 classes have not 1 to 2 images as the official split has: b (3)" in (
        Counts(official, "train", {"a": 1, "b": 3}).difference()
    )


def test_another_split_of_the_whole_data_set_is_an_error(gtos):
    for split in ("train", "test"):
        for number in range(29):
            image(gtos / "gtos-mobile" / split / f"class{number:02d}" / "a.jpg", number)
    problems = [problem for problem in check(load_dataset("gtos", gtos, "test")) if problem.kind == "class counts"]
    assert [str(problem) for problem in problems] == [
        "error: class counts: test: 31 images, the official split has 6,066"
    ]


@pytest.mark.parametrize("name", ["cars", "aircraft", "dogs", "gtos"])
def test_a_run_loads_them_by_name(name, request):
    root = request.getfixturevalue(name)
    found = load_datasets(DataConfig(name=name, root=root), seed=0)
    assert found.facts()["name"] == name
    assert found.train.labels.dtype == torch.int64
    assert len(found.train) == 2


def test_the_command_line_knows_every_data_set():
    with pytest.raises(ValueError, match="expected one of") as caught:
        load_dataset("nothing")
    assert sorted(DATASETS) == str(caught.value).partition("expected one of ")[2].partition(", got")[0].split(", ")
