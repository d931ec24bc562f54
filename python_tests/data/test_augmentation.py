"""What DataConfig adds to a random crop: squeezing, the centre, rotation, lighting."""

import pytest
import torch
from test_crops import NATIVE, picture
from torchvision.transforms import v2

from fgvc_ext.data import SyntheticBirds
from fgvc_ext.data.crops import LIGHTING_AXES, LIGHTING_STD
from fgvc_ext.data.pipeline import DataConfig, Datasets, preprocessing, training_samples
from fgvc_ext.data.transforms import Preprocessing
from fgvc_ext.explain.crop import CentreCrop

PREPARE = Preprocessing(resize=64, crop=48)
SQUEEZE = Preprocessing(resize=64, crop=48, keep_ratio=False)
PLAIN = {"flip": 0.0}


def _drawn(transform, image, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)


@pytest.mark.skipif(not NATIVE, reason="torch resizes uint8 in float32 here: the parts differ in the last bit")
@pytest.mark.parametrize("size", [(90, 130), (131, 70), (64, 64), (40, 50)])
def test_without_the_ratio_both_sides_are_resized(size):
    image, resize = picture(*size), v2.Resize([64, 64], antialias=True)
    assert torch.equal(SQUEEZE.eval_crop()(image), v2.functional.center_crop(resize(image), [48, 48]))
    expected = v2.Compose([resize, v2.RandomCrop(48)])
    assert torch.equal(_drawn(SQUEEZE.train_crop(**PLAIN), image), _drawn(expected, image))
    assert SQUEEZE.five_crops()(image).shape == (5, 3, 48, 48)


def test_the_centre_in_training_is_that_of_evaluation():
    image = picture(90, 131)
    for prepare in (PREPARE, SQUEEZE):
        centre = prepare.train_crop(flip=0.0, random_crop=False)
        assert torch.equal(_drawn(centre, image), _drawn(centre, image, 1))
        assert (
            centre(image).int() - prepare.eval_crop()(image).int()
        ).abs().max() <= 1  # a part, or the whole, resized
    assert not torch.equal(_drawn(PREPARE.train_crop(**PLAIN), image), _drawn(PREPARE.train_crop(**PLAIN), image, 1))


@pytest.mark.skipif(not NATIVE, reason="torch resizes uint8 in float32 here: the parts differ in the last bit")
def test_rotation_is_torchvisions_between_crop_and_flip():
    image, prepare = picture(90, 130), PREPARE.train_crop(flip=0.5, jitter=0.3, rotation=20.0)
    turn = v2.RandomRotation(20.0, v2.InterpolationMode.BILINEAR)
    steps = [
        v2.Resize(64, antialias=True),
        v2.RandomCrop(48),
        turn,
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.3, 0.3, 0.3),
    ]
    for seed in range(4):
        assert torch.equal(_drawn(prepare, image, seed), _drawn(v2.Compose(steps), image, seed))


def test_lighting_moves_all_pixels_by_one_colour_along_the_principal_components():
    image = torch.full((3, 64, 64), 120, dtype=torch.uint8)
    lit = PREPARE.train_crop(flip=0.0, random_crop=False, lighting=0.1)
    for seed in range(5):
        found = _drawn(lit, image, seed).int()
        assert (found == found[:, :1, :1]).all()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            factors = 0.1 * torch.randn(3)
        expected = 120 + 255 * sum(LIGHTING_AXES[:, i] * factors[i] * LIGHTING_STD[i] for i in range(3))
        assert (found[:, 0, 0] - expected).abs().max() <= 0.5 + 1e-4
    torch.testing.assert_close(LIGHTING_AXES.T @ LIGHTING_AXES, torch.eye(3), atol=1e-3, rtol=0)
    bright = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert min(int(_drawn(lit, bright, seed).min()) for seed in range(5)) > 200, "it is cut off, and does not wrap"


@pytest.mark.parametrize(
    "wrong", [{"rotation": 200.0}, {"rotation": -1.0}, {"lighting": -0.1}, {"lighting": float("nan")}]
)
def test_augmentation_out_of_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a rotation from 0 to 180 degrees and a lighting of at least 0"):
        PREPARE.train_crop(**wrong)


def test_the_configuration_reaches_the_crop():
    data = SyntheticBirds("train", classes=2, train_per_class=1, test_per_class=1, image_size=32)
    config = DataConfig(
        resize=40, crop=32, flip=0.25, jitter=0.1, rotation=7.0, lighting=0.2, random_crop=False, keep_ratio=False
    )
    prepare = preprocessing(config, {})
    crop = training_samples(Datasets(data, data), config, prepare).transform
    assert (crop.keep_ratio, crop.random_crop, crop.lighting) == (False, False, 0.2)
    assert (crop.rotate.degrees, crop.flip.p, crop.jitter.brightness) == ([-7.0, 7.0], 0.25, (0.9, 1.1))
    plain = training_samples(Datasets(data, data), DataConfig(), preprocessing(DataConfig(), {})).transform
    assert (plain.rotate, plain.jitter, plain.lighting, plain.random_crop, plain.keep_ratio) == (
        None,
        None,
        0,
        True,
        True,
    )


def test_boxes_of_a_squeezed_crop_lie_in_the_image():
    boxes = torch.tensor([[0.0, 0.0, 48.0, 48.0], [10.0, 4.0, 12.0, 8.0]])
    in_image = SQUEEZE.in_image(boxes, 64, 128)
    assert in_image[0].tolist() == [16.0, 8.0, 112.0, 56.0]
    torch.testing.assert_close(CentreCrop(64, 48, keep_ratio=False).boxes(in_image, 64, 128), boxes)
