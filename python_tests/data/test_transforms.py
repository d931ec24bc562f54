import json

import pytest
import torch

from fgvc_ext.data import eval_transform, five_crop_transform, train_transform
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.explain.crop import CentreCrop


def ramp(height=40, width=60):
    """Red grows to the right, green downwards."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0], image[1] = torch.arange(width) * 4, torch.arange(height)[:, None] * 6
    return image


NEUTRAL = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_eval_is_the_normalised_centre():
    image = ramp()
    out = eval_transform(40, 20, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))(image)
    expected = (image[:, 10:30, 20:40] / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor(
        [0.2, 0.25, 0.5]
    )[:, None, None]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (37, 11), (64, 64), (20, 300)])
def test_any_size_in_one_size_out(height, width):
    image = ramp(height, width)
    assert train_transform(32, 24)(image).shape == (3, 24, 24)
    assert eval_transform(32, 24)(image).shape == (3, 24, 24)
    assert five_crop_transform(32, 32)(image).shape == (5, 3, 32, 32)


def test_five_crops_are_centre_and_corners():
    crops = five_crop_transform(40, 16, **NEUTRAL)(ramp()) * 255
    top_left = [(crop[0, 0, 0] / 4, crop[1, 0, 0] / 6) for crop in crops]
    assert [(round(x.item()), round(y.item())) for x, y in top_left] == [(22, 12), (0, 0), (44, 0), (0, 24), (44, 24)]


def test_train_depends_on_torchs_seed_alone():
    transform = train_transform(40, 16, jitter=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = transform(ramp())
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        again = transform(ramp())
        assert not torch.equal(again, transform(ramp()))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


def test_flip_probability():
    image = ramp(16, 16)
    assert torch.equal(
        train_transform(16, 16, flip=1.0, **NEUTRAL)(image),
        train_transform(16, 16, flip=0.0, **NEUTRAL)(image).flip(-1),
    )


@pytest.mark.parametrize("make", [train_transform, eval_transform, five_crop_transform])
@pytest.mark.parametrize(("resize", "crop"), [(16, 17), (16, 0)])
def test_crop_beyond_the_image(make, resize, crop):
    with pytest.raises(ValueError, match=f"crop {crop} and resize {resize}"):
        make(resize, crop)


def test_preprocessing_comes_back_from_json_and_is_the_evaluations_transform():
    prepare = Preprocessing(resize=40, crop=32, std=(0.5, 0.5, 0.5), interpolation="bicubic")
    assert Preprocessing.from_json(json.loads(json.dumps(prepare.options()))) == prepare
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    expected = eval_transform(40, 32, std=(0.5, 0.5, 0.5), interpolation="bicubic")(image)
    assert torch.equal(prepare.transform()(image), expected)
    assert not torch.equal(eval_transform(40, 32, std=(0.5, 0.5, 0.5))(image), expected), "bilinear is another"
    with pytest.raises(ValueError, match="interpolation: expected bilinear or bicubic, got 'nearest'"):
        eval_transform(40, 32, interpolation="nearest")


def test_boxes_of_the_crop_lie_in_the_image():
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [10.0, 4.0, 12.0, 8.0]])
    frame = CentreCrop(40, 32)
    in_image = Preprocessing(resize=40, crop=32).in_image(boxes, 80, 120)
    assert in_image[0].tolist() == [28.0, 8.0, 92.0, 72.0]
    torch.testing.assert_close(frame.boxes(in_image, 80, 120), boxes)
