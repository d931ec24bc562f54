"""The comparison of models on a data set whose answers are known, and the crop's geometry against torchvision's."""

import csv
import threading
from collections import Counter

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from fgvc_ext.data import BrokenImageError
from fgvc_ext.explain import ModelView, comparison
from fgvc_ext.explain.comparison import MEASURES, explain_models
from fgvc_ext.explain.crop import CentreCrop
from fgvc_ext.explain.document import read_json
from fgvc_ext.explain.embeddings import embedding_figure
from fgvc_ext.explain.figures import PairExample, cam_comparison, pairs_figure
from fgvc_ext.explain.report import write_run_report
from fgvc_ext.explain.scene import Scene

SIZES = [(50, 80), (80, 50), (64, 64), (33, 47), (47, 33)]


class Squares:
    """Grey images of 48 × 64 with one bright square each: class 0 left, class 1 right; class 2 has none left over."""

    classes = ("left", "right", "none")
    part_names = ("corner", "edge")

    def __init__(self, count: int = 8) -> None:
        self.labels = torch.arange(count) % 2
        self.boxes = torch.tensor([[8.0, 16.0, 24.0, 32.0], [40.0, 16.0, 56.0, 32.0]])[self.labels]
        centre = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        self.parts = torch.stack([torch.cat([centre, torch.ones(count, 1)], 1), torch.zeros(count, 3)], 1)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, row: int) -> torch.Tensor:
        image = torch.full((3, 48, 64), 20, dtype=torch.uint8)
        x1, y1, x2, y2 = self.boxes[row].int().tolist()
        image[:, y1:y2, x1:x2] = 220
        return image

    def separating_part(self, a: int, b: int) -> str:
        return "corner"


def prepare(image: torch.Tensor) -> torch.Tensor:
    return image[:, :, 8:56].float() / 255


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Maps [n,3,6,6]: class 0 speaks for light in the left half, class 1 in the right, class 2 never."""
    light = torch.nn.functional.avg_pool2d(images[:, 0] - 0.1, 8).clamp(min=0)
    left, right = light.clone(), light.clone()
    left[..., 3:] = 0
    right[..., :3] = 0
    return torch.stack([left, right, torch.zeros_like(left)], 1)


def seen(maps_of, **rest) -> ModelView:
    """A model whose scores are the means of its classes' maps."""

    def look(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = maps_of(images)
        return maps.mean((2, 3)), maps[torch.arange(len(maps)), labels]

    return ModelView(look, **rest)


def swapped(images: torch.Tensor) -> torch.Tensor:
    """A model that takes left for right."""
    return brightness(images)[:, [1, 0, 2]]


def test_known_models_give_known_measures_confusions_and_figures(tmp_path):
    seeds = []

    def masks(images, seed):
        seeds.append(seed)
        return brightness(images) > 0

    models = {
        "right": seen(brightness, features=lambda images: brightness(images).mean((2, 3))),
        "swapped": seen(lambda images: brightness(images)[:, [1, 0, 2]] + 0.0, masks=masks),
    }
    data = Squares()
    explain_models(tmp_path, data, models, prepare=prepare, frame=CentreCrop(48, 48), seed=100, rows=2, batch_size=3)
    with (tmp_path / "measures.csv").open(newline="") as file:
        right, swapped, even = csv.DictReader(file)
    assert right["share in box"] == "1.000 ± 0.000"
    assert right["area used"] == "0.111 ± 0.000"  # 4 of 36 cells, evenly
    assert right["parts touched"] == "1.000 ± 0.000"
    assert swapped["share in box"] == "–"  # no evidence for the true class at all
    assert even["share in box"] == "0.111 ± 0.000"
    assert (tmp_path / "confusions.csv").read_text().splitlines()[1] == "left,right,4,4,8,1.000000"
    assert list(read_json(tmp_path / "figures" / "captions.json")) == [
        "activation_maps.png", "confused_pairs.png", "confusion.png", "features.png"
    ]  # fmt: skip
    assert torch.equal(seeds[0], torch.tensor([102, 106]))
    page = write_run_report(tmp_path).read_text()
    assert page.count("<img") == 4
    assert "even attention" in page


def test_a_confused_class_without_test_images(tmp_path):
    """As a limit on the test images makes them: the class "none" has none, and all are taken for it."""

    def none(images: torch.Tensor) -> torch.Tensor:
        return brightness(images)[:, [2, 2, 0]] + brightness(images)[:, [2, 2, 1]]

    data = Squares(6)
    explain_models(tmp_path, data, {"ours": seen(none)}, prepare=prepare, frame=CentreCrop(48, 48))
    lines = (tmp_path / "confusions.csv").read_text().splitlines()
    assert lines[1:] == ["left,none,3,0,3,1.000000", "right,none,3,0,3,1.000000"]
    assert (tmp_path / "figures/confused_pairs.png").exists()


def test_every_image_is_decoded_once_but_for_the_examples_and_in_threads(tmp_path, capsys):
    data, decoded, threads = Squares(20), Counter(), set()

    class Watched(Squares):
        def load(self, row: int) -> torch.Tensor:
            decoded[row] += 1
            threads.add(threading.current_thread())
            return data.load(row)

    swapped = seen(lambda images: brightness(images)[:, [1, 0, 2]], masks=lambda images, seed: brightness(images) > 0)
    models = {"first": swapped, "second": swapped}
    explain_models(tmp_path, Watched(20), models, prepare=prepare, frame=CentreCrop(48, 48), rows=4, batch_size=3)
    assert sorted(decoded) == list(range(20))
    assert sum(decoded.values()) == 20 + 2, "one example of each class of the one confused pair"
    assert len(threads - {threading.current_thread()}) > 0
    assert capsys.readouterr().out == "report: 20 test images, seen by first, second\n"


def test_features_are_those_of_the_confused_classes_alone(tmp_path, monkeypatch):
    """Every third image is of the class "none" and called so; the two others are taken for each other."""
    drawn, asked = [], []
    monkeypatch.setattr(comparison, "embedding_figure", lambda *args: drawn.append(args) or embedding_figure(*args))

    class Thirds(Squares):
        def __init__(self) -> None:
            super().__init__(9)
            self.labels = torch.arange(9) % 3
            self.boxes[2::3] = torch.tensor([24.0, 0.0, 40.0, 8.0])

    def maps(images: torch.Tensor) -> torch.Tensor:
        top = images[:, 0, :8].mean((1, 2)) > 0.1
        return swapped(images) * ~top[:, None, None, None] + torch.eye(3)[2, :, None, None] * top[:, None, None, None]

    def features(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return brightness(images).mean((2, 3))

    data = Thirds()
    models = {"first": seen(maps), "second": seen(maps, features=features)}
    explain_models(tmp_path, data, models, prepare=prepare, frame=CentreCrop(48, 48), group=2, batch_size=4)
    ((found, labels, classes),) = drawn
    assert list(found) == ["second"], "the other has no features"
    assert asked == [4, 2]
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert classes == data.classes
    images = torch.stack([prepare(data.load(row)) for row in (0, 1, 3, 4, 6, 7)])
    assert torch.equal(found["second"], brightness(images).mean((2, 3)))


def test_a_broken_image_is_an_error(tmp_path):
    class Broken(Squares):
        def load(self, row: int) -> torch.Tensor:
            raise BrokenImageError(f"cannot decode image {row}")

    with pytest.raises(BrokenImageError, match="image 0"):
        explain_models(tmp_path, Broken(), {"a": seen(brightness)}, prepare=prepare, frame=CentreCrop(48, 48))


def test_boxes_and_parts_are_placed_once_whatever_is_drawn(tmp_path, monkeypatch):
    """Of 48 × 64 pixels the crop begins 8 from the left: a part that was moved twice would lie 8 more to the left."""
    drawn: list[PairExample] = []
    monkeypatch.setattr(comparison, "pairs_figure", lambda examples: drawn.extend(examples) or pairs_figure(examples))
    boxes: list[torch.Tensor] = []

    def compare(*args, **options):
        boxes.append(options["boxes"].clone())
        return cam_comparison(*args, **options)

    monkeypatch.setattr(comparison, "cam_comparison", compare)
    data = Squares()
    before = data.parts.clone()
    masked = seen(swapped, masks=lambda images, seed: brightness(images) > 0)
    explain_models(tmp_path, data, {"ours": masked}, prepare=prepare, frame=CentreCrop(48, 48), rows=8)
    assert torch.equal(data.parts, before)
    assert torch.equal(boxes[0], data.boxes - torch.tensor([8.0, 0.0, 8.0, 0.0]))
    (example,) = drawn
    assert (example.point_a, example.point_b) == ((8.0, 24.0), (40.0, 24.0))
    assert (example.part, example.enlarged) == ("corner", "corner")
    assert example.image_a[0, 24, 8] == 220, "the part is on the bright square"
    assert example.image_b[0, 24, 40] == 220


def test_an_example_shows_the_part_if_any_image_does(tmp_path, monkeypatch):
    drawn: list[PairExample] = []
    monkeypatch.setattr(comparison, "pairs_figure", lambda examples: drawn.extend(examples) or pairs_figure(examples))
    data = Squares()
    data.parts[:, 0, 2] = 0
    data.parts[4, 0, 2] = 1
    explain_models(tmp_path, data, {"ours": seen(swapped)}, prepare=prepare, frame=CentreCrop(48, 48))
    (example,) = drawn
    assert (example.point_a, example.point_b) == ((8.0, 24.0), None)


def test_a_part_outside_the_crop_is_not_visible():
    data = Squares(2)
    data.parts[0, 0] = torch.tensor([7.9, 24.0, 1.0])
    data.parts[1, 0] = torch.tensor([56.0, 24.0, 1.0])
    data.parts[:, 1] = torch.tensor([[8.0, 0.0, 1.0], [55.9, 47.9, 0.0]])
    scene = Scene(data, CentreCrop(48, 48), prepare)
    assert [list(rows) for rows, _ in scene.batches(1)] == [[0], [1]]
    assert scene.parts[:, :, 2].tolist() == [[0, 1], [0, 0]]
    torch.testing.assert_close(scene.parts[0, 1], torch.tensor([0.0, 0.0, 1.0]))


def test_batches_are_all_rows_in_their_order():
    data = Squares(7)
    scene = Scene(data, CentreCrop(48, 48), prepare)
    found = list(scene.batches(3, keep=(2, 5)))
    assert [list(rows) for rows, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(
        torch.cat([images for _, images in found]), torch.stack([prepare(data.load(n)) for n in range(7)])
    )
    assert torch.equal(scene.prepared([5, 2]), torch.stack([prepare(data.load(n)) for n in (5, 2)]))
    assert torch.equal(scene.shown(5), CentreCrop(48, 48).image(data.load(5)))
    assert torch.equal(scene.shown(6), CentreCrop(48, 48).image(data.load(6)))


def test_a_perfect_model_and_a_plain_data_set(tmp_path):
    data = Squares(4)
    data.boxes = None
    plain = {"labels": data.labels, "classes": data.classes, "boxes": None}
    bare = type("Bare", (), {**plain, "__len__": lambda self: 4, "load": lambda self, row: Squares(4).load(row)})()
    explain_models(tmp_path, bare, {"ours": seen(brightness)}, prepare=prepare, frame=CentreCrop(48, 48))
    assert (tmp_path / "measures.csv").read_text().splitlines()[0] == "model,area used"
    assert (tmp_path / "confusions.csv").read_text().count("\n") == 1
    assert [file.name for file in (tmp_path / "figures").glob("*.png")] == ["activation_maps.png"]


def test_no_images_is_an_error(tmp_path):
    view = {"a": seen(brightness)}
    with pytest.raises(ValueError, match="got 1 and 0"):
        explain_models(tmp_path, Squares(0), view, prepare=prepare, frame=CentreCrop(48, 48))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("resize", "crop"), [(48, 48), (40, 31), (101, 64)])
def test_crop_is_the_one_of_evaluation(height, width, resize, crop):
    generator = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[3.0, 5.0, 21.0, 30.0], [0.0, 0.0, width, height]])
    wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    transform = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop)])
    expected_image, expected_boxes = transform(image, wrapped)
    frame = CentreCrop(resize, crop)
    difference = (frame.image(image).int() - expected_image.int()).abs()
    assert difference.max() <= 2  # torchvision rounds between the two passes
    torch.testing.assert_close(frame.boxes(boxes, height, width), torch.Tensor(expected_boxes))
    corner = frame.points(boxes[0, :2], height, width)
    assert corner.dtype == torch.float32
    torch.testing.assert_close(corner.clamp(0, crop), expected_boxes[0, :2].as_subclass(torch.Tensor))


def test_the_zero_level_of_a_models_maps_does_not_count(tmp_path):
    models = {
        "here": seen(brightness),
        "above": seen(lambda images: brightness(images) + 5),
        "below": seen(lambda images: brightness(images) - 5),
        "various": seen(lambda images: brightness(images) + torch.arange(len(images))[:, None, None, None]),
    }
    explain_models(tmp_path, Squares(), models, prepare=prepare, frame=CentreCrop(48, 48), rows=1)
    with (tmp_path / "measures.csv").open(newline="") as file:
        here, above, below, various, _ = ({**row, "model": ""} for row in csv.DictReader(file))
    assert here == above == below == various
    assert "own minimum" in MEASURES
    assert "own minimum" in (tmp_path / "figures" / "captions.json").read_text()
