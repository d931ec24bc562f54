"""Images cut to boxes, and the file that the boxes are kept in."""

import pytest
import torch
from torchvision.ops import box_iou

from fgvc_ext.data import DatasetError, ImageDataset
from fgvc_ext.data.boxed import Boxed, boxed, boxes_as_csv, boxes_of, intersection_over_union
from fgvc_ext.data.pipeline import Datasets


class Ramps(ImageDataset):
    """Red is the column of a pixel, green its row; image i is 20 + i pixels high and 30 wide."""

    def __init__(self, count=4, split="train", boxes=None, ids=None):
        labels = torch.arange(count) % 2
        super().__init__("ramps", split, ["a", "b"], labels, ids or [f"{split}/{i}" for i in range(count)], boxes)

    def load(self, index):
        height = 20 + int(self.ids[index].rpartition("/")[2])
        image = torch.zeros(3, height, 30, dtype=torch.uint8)
        image[0], image[1] = torch.arange(30), torch.arange(height)[:, None]
        return image

    def content_key(self):
        return "1"


def _corners(image):
    return [image[0, 0, 0].item(), image[1, 0, 0].item(), image[0, -1, -1].item() + 1, image[1, -1, -1].item() + 1]


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((3.0, 4.0, 10.0, 12.0), [3, 4, 10, 12]),
        ((3.2, 4.9, 9.1, 11.5), [3, 4, 10, 12]),  # every pixel that the box touches
        ((-5.0, -1.0, 400.0, 400.0), [0, 0, 30, 20]),
        ((7.0, 8.0, 7.0, 8.0), [7, 8, 8, 9]),  # a pixel at least
        ((90.0, 90.0, 95.0, 95.0), [29, 19, 30, 20]),
    ],
)
def test_a_part_is_what_its_box_touches(box, pixels):
    data = Boxed(Ramps(1), torch.tensor([box]))
    assert _corners(data.load(0)) == pixels


def test_parts_keep_labels_and_ids_and_can_be_chosen_from():
    boxes = torch.tensor([[float(i), 0, i + 4, 5] for i in range(4)])
    data = Boxed(Ramps(4), boxes)
    assert (data.labels.tolist(), data.ids, data.boxes) == ([0, 1, 0, 1], Ramps(4).ids, None)
    part = data.subset([3, 1])
    assert [_corners(part.load(i))[0] for i in range(2)] == [3, 1]
    assert part.ids == ["train/3", "train/1"]
    other = Boxed(Ramps(4), boxes + 1)
    assert len({data.fingerprint(), other.fingerprint(), Ramps(4).fingerprint()}) == 3


def test_a_large_image_is_not_reduced_before_it_is_cut():
    image, size = Boxed(Ramps(1), torch.tensor([[2.0, 2, 8, 9]])).load_at_least(0, 1)
    assert (tuple(image.shape), size) == ((3, 7, 6), (7, 6))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(3, 4), r"cut: expected \[4,4\], got \[3, 4\]"),
        (torch.full((4, 4), torch.nan), "finite boxes.*train/0"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        Boxed(Ramps(4), boxes)


def test_boxes_come_back_from_their_file_bit_for_bit(tmp_path):
    ids = ['a, "b"/0', "ü\udcff/1", "line\nbreak/2", "carriage\rreturn/3"]
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * 1000
    file = tmp_path / "boxes.csv"
    file.write_bytes(boxes_as_csv({"train": (ids, values), "test": (ids[:1], values[1:2])}))
    assert torch.equal(boxes_of(file, Ramps(4, ids=ids)), values)
    assert torch.equal(boxes_of(file, Ramps(4, ids=ids).subset([2, 0])), values[[2, 0]])
    assert torch.equal(boxes_of(file, Ramps(1, ids=ids[:1]), "test"), values[1:2])
    with pytest.raises(DatasetError, match=r"boxes\.csv: no box of .* \(test\), nor of 2 other"):
        boxes_of(file, Ramps(4, ids=ids), "test")


@pytest.mark.parametrize("content", ["", "id,box\n", "split,id,x1,y1,x2,y2\ntrain,a,1,2,x,4\n"])
def test_another_file_is_named_with_its_line(content, tmp_path):
    (tmp_path / "boxes.csv").write_text(content)
    with pytest.raises(DatasetError, match=r"boxes\.csv, line \d: expected"):
        boxes_of(tmp_path / "boxes.csv", Ramps(1))


def test_all_splits_are_cut_by_a_file_or_by_their_true_boxes(tmp_path):
    true = torch.tensor([[1.0, 2, 5, 6]] * 4)
    datasets = Datasets(Ramps(4, boxes=true), Ramps(2, "test", boxes=true[:2]), Ramps(1, "val", boxes=true[:1]))
    parts = boxed(datasets, None)
    assert [_corners(part.load(0)) for part in parts.splits().values()] == [[1, 2, 5, 6]] * 3
    found = {split: (data.ids, true[: len(data)] + i) for i, (split, data) in enumerate(datasets.splits().items())}
    (tmp_path / "boxes.csv").write_bytes(boxes_as_csv(found))
    parts = boxed(datasets, tmp_path / "boxes.csv")
    assert [_corners(part.load(0))[0] for part in (parts.train, parts.test, parts.val)] == [1, 2, 3]
    # A folder without "test" is evaluated on its "val": the file names the run's splits, not the data sets'.
    parts = boxed(Datasets(datasets.train, Ramps(2, "val", ids=datasets.test.ids)), tmp_path / "boxes.csv")
    assert _corners(parts.test.load(0))[0] == 2
    with pytest.raises(DatasetError, match="ramps test: the images have no true boxes"):
        boxed(Datasets(Ramps(4, boxes=true), Ramps(2, "test")), None)


def test_intersection_over_union_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    first, size = 10 * torch.rand(2, 50, 2, generator=generator), 5 * torch.rand(2, 50, 2, generator=generator)
    boxes, others = torch.cat([first, first + size], -1)
    torch.testing.assert_close(intersection_over_union(boxes, others), box_iou(boxes, others).diagonal())
    nothing = torch.tensor([[1.0, 1, 1, 1]])
    assert intersection_over_union(nothing, nothing).tolist() == [0.0]
