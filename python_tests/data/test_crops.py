"""Crops in uint8: torchvision's own pixels and random choices, for a part of the work."""

import math
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import _geometry

from fgvc_ext.data import BrokenImageError, ImageFolder, SyntheticBirds, crops
from fgvc_ext.data.dataset import decode_at_least, decode_image
from fgvc_ext.data.loading import Samples, collate, to_device
from fgvc_ext.data.transforms import Preprocessing

NATIVE = _geometry._do_native_uint8_resize_on_cpu(v2.InterpolationMode.BILINEAR)
SIZES = [(375, 500), (500, 333), (332, 500), (480, 640), (900, 1200), (701, 503), (64, 48), (128, 128), (40, 300)]
PREPARE = Preprocessing(resize=128, crop=112, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
CPU = torch.device("cpu")


def picture(height, width, seed=0):
    """Noise, in the order in memory of a decoded file."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)


class OneImage:
    labels = (0,)

    def __init__(self, image):
        self.image = image

    def load(self, index):
        return self.image

    def load_at_least(self, index, least_side):
        return self.image, tuple(self.image.shape[-2:])


def prepared(prepare, transform, image, seed=0):
    """The image as it reaches a network: through `Samples`, `collate` and `to_device`."""
    samples = Samples(OneImage(image), transform, normalise=prepare.normalise)
    batch = collate([samples[0, seed]])
    assert batch["image"].dtype == torch.uint8
    return to_device(batch, CPU, normalise=samples.normalise)["image"][0]


def torchvisions(prepare, *steps):
    """The pipeline as torchvision spells it, of a whole image in plain order."""
    resize = v2.Resize(prepare.resize, v2.InterpolationMode(prepare.interpolation), antialias=True)
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(prepare.mean), list(prepare.std))]
    pipeline = v2.Compose([resize, *steps, *normalise])
    return lambda image: pipeline(image.contiguous())


class Five(torch.nn.Module):
    def forward(self, image):
        *corners, centre = v2.functional.five_crop(image, [112, 112])
        return torch.stack([centre, *corners])


@pytest.mark.skipif(not NATIVE, reason="torch resizes uint8 in float32 here: the parts differ in the last bit")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"jitter": 0.3}, {"flip": 1.0}, {"flip": 0.0}])
def test_training_crops_and_their_random_numbers_are_torchvisions(size, options):
    image, flip, jitter = picture(*size), options.get("flip", 0.5), options.get("jitter", 0.0)
    steps = [v2.RandomCrop(112)]
    steps += [v2.RandomHorizontalFlip(flip)] if flip else []
    steps += [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    reference = torchvisions(PREPARE, *steps)
    for seed in range(6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = reference(image)
        for stored in (image, image.contiguous()):
            assert torch.equal(prepared(PREPARE, PREPARE.train_crop(**options), stored, seed), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("native", [True, False])
def test_evaluation_has_the_bits_of_torchvision(interpolation, native, monkeypatch):
    """Also where torch cannot resize uint8 and computes in float32."""
    if not native:
        monkeypatch.setattr(_geometry, "_do_native_uint8_resize_on_cpu", lambda mode: False)
    prepare = Preprocessing(resize=128, crop=112, std=(0.2, 0.25, 0.5), interpolation=interpolation)
    for number, size in enumerate(SIZES):
        image = picture(*size, seed=number)
        expected = torchvisions(prepare, v2.CenterCrop(112))(image)
        assert torch.equal(prepared(prepare, prepare.eval_crop(), image), expected)
        assert torch.equal(prepare.transform()(image), expected)
        assert torch.equal(prepared(prepare, prepare.five_crops(), image), torchvisions(prepare, Five())(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("native", [True, False])
def test_a_part_resized_is_the_part_of_the_whole(interpolation, native, monkeypatch):
    if not native:
        monkeypatch.setattr(_geometry, "_do_native_uint8_resize_on_cpu", lambda mode: False)
    elif not NATIVE:
        pytest.skip("torch resizes uint8 in float32 here")
    draw, whole = random.Random(0), crops.EvalCrop(128, 112, interpolation).whole
    for number in range(60):
        image = picture(*draw.choice([*SIZES, (draw.randint(20, 400), draw.randint(20, 400))]), seed=number)
        height, width = crops.resized(*image.shape[-2:], 128)
        side = draw.randint(1, 128)
        top, left = draw.choice([0, height - side]), draw.randint(0, width - side)
        found = crops.resized_part(image, (height, width), top, left, side, interpolation).int()
        difference = (found - whole(image)[:, top : top + side, left : left + side].int()).abs()
        assert difference.max() <= (0 if native else 1)
        assert difference.float().mean() < 0.02


def test_only_what_the_crop_needs_is_resized(monkeypatch):
    resize, seen = crops._resize, []
    monkeypatch.setattr(crops, "_resize", lambda image, *rest: (seen.append(image.shape), resize(image, *rest))[1])
    crops.resized_part(picture(375, 500), (600, 800), 100, 200, 448)
    assert seen == [(3, 285, 290)], "448 pixels of 600 / 375 need 280 pixels and a margin"
    crops.resized_part(picture(375, 499), (600, 798), 0, 0, 448)
    assert seen[1] == (3, 285, 499), "no part of 499 pixels has the weights of the whole"


def test_the_channels_of_a_pixel_lie_beside_each_other():
    """Whatever the order before: torch resizes that several times as fast."""
    for image in (picture(60, 80), picture(60, 80).contiguous()):
        assert crops.resized_part(image, (90, 120), 3, 4, 50).stride(0) == 1
        assert crops.EvalCrop(90, 50)(image).stride(0) == 1


def test_sizes_are_rounded_as_torchvision_rounds_them():
    for height in range(1, 60):
        for width in range(1, 60):
            for shorter in (7, 31):
                expected = _geometry._compute_resized_output_size((height, width), [shorter])
                assert crops.resized(height, width, shorter) == tuple(expected)


# --- what happens on the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 9, 7), (2, 3, 9, 7), (2, 5, 3, 9, 7), (3, 1, 1), (0, 3, 4, 4)])
def test_normalising_has_the_bits_of_torchvision_in_any_order_in_memory(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(PREPARE.mean, PREPARE.std)])
    beside = images.movedim(-3, -1).contiguous().movedim(-1, -3)
    for given in (images, beside):
        found = PREPARE.normalise(given)
        assert torch.equal(found, steps(images))
        assert min(shape) < 2 or found.stride() == given.stride()


def test_a_batch_on_the_device_is_as_the_network_wants_it():
    float_images = torch.rand(2, 3, 4, 4)
    label = torch.tensor([1, 2])
    for channels_last in (False, True):
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def moved(images, channels_last=channels_last):
            batch = {"image": images, "label": label}
            return to_device(batch, CPU, normalise=PREPARE.normalise, channels_last=channels_last)

        assert torch.equal(moved(float_images.clone())["image"], float_images), "a transform of one's own has done it"
        assert torch.equal(moved(float_images)["label"], label)
        for stored in (float_images, float_images.to(memory_format=torch.channels_last)):
            images = (stored * 255).to(torch.uint8)
            found = moved(images)["image"]
            assert found.is_contiguous(memory_format=layout)
            assert torch.equal(found, PREPARE.normalise(images))
        assert moved((torch.rand(2, 5, 3, 4, 4) * 255).to(torch.uint8))["image"].is_contiguous()
    assert to_device({"image": images}, CPU)["image"].dtype == torch.uint8, "nothing says how"


def test_crops_are_stacked_in_their_order_in_memory():
    beside, plain = [picture(5, 4, seed=seed) for seed in range(3)], []
    plain = [image.contiguous() for image in beside]
    assert torch.equal(crops.stacked(beside), torch.stack(plain))
    assert crops.stacked(beside).is_contiguous(memory_format=torch.channels_last)
    assert crops.stacked(plain).is_contiguous()
    assert torch.equal(crops.stacked([beside[0], plain[1]]), torch.stack(plain[:2]))


@pytest.mark.parametrize("values", [{"mean": (0.5,)}, {"std": (0.2, 0.0, 0.2)}, {"std": (0.1, 0.2)}])
def test_means_and_deviations_are_checked(values):
    with pytest.raises(ValueError, match=r"expected 3 means and 3 deviations above 0, got mean \(.* and std \("):
        Preprocessing(**values)


# --- reduced decoding of large photos ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Birds of 480 x 400 pixels as JPEGs."""
    birds = SyntheticBirds("train", classes=2, train_per_class=4, image_size=480, cache=False)
    for index in range(8):
        file = tmp_path / "train" / str(index // 4) / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(birds.load(index)[:, 40:440].permute(1, 2, 0).numpy()).save(file, quality=92)
    return tmp_path


@pytest.mark.parametrize(
    ("size", "least_side", "factor"),
    [((480, 400), 100, 4), ((480, 400), 101, 2), ((480, 400), 50, 8), ((480, 400), 201, 1), ((480, 401), 50, 1),
     ((482, 400), 50, 2), ((480, 404), 50, 4), ((480, 400), None, 1)],
)  # fmt: skip
def test_a_large_jpeg_is_decoded_reduced_where_nothing_is_stretched(tmp_path, size, least_side, factor):
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "a.jpg")
    pixels, whole = decode_at_least(tmp_path / "a.jpg", least_side)
    assert whole == (size[1], size[0])
    assert pixels.shape == (3, size[1] // factor, size[0] // factor)
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert decode_at_least(tmp_path / "a.png", least_side)[0].shape == (3, size[1], size[0])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_reduced_images_are_turned_and_converted(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # upright once turned by 90 degrees
    image = Image.new("RGB", (480, 400), "white")
    image.paste((0, 0, 0), (0, 0, 240, 400))
    image.convert(mode).save(tmp_path / "a.jpg", exif=exif)
    pixels, whole = decode_at_least(tmp_path / "a.jpg", 100)
    assert whole == (480, 400)
    assert pixels.shape == (3, 120, 100)
    assert (pixels[:, 2, 50] < 20).all()
    assert (pixels[:, -3, 50] > 235).all()


def test_a_truncated_jpeg_is_found_when_reduced(folder):
    file = folder / "train" / "0" / "0.jpg"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(BrokenImageError, match="index 0"):
        ImageFolder(folder, "train").load_at_least(0, 100)


def difference(dataset, prepare):
    """The mean difference, in grey levels, of training crops of reduced images from those of whole ones."""
    crop, found = prepare.train_crop(), []
    for index in range(len(dataset)):
        reduced, size = dataset.load_at_least(index, crop.least_side)
        assert tuple(reduced.shape[-2:]) != size, "reduced"
        both = []
        for image in (reduced, dataset.load(index)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                both.append(crop(image, size).float())
        found.append((both[0] - both[1]).abs().mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("resize", [40, 70])
def test_training_crops_of_reduced_images_differ_by_less_than_a_grey_level(folder, resize):
    assert difference(ImageFolder(folder, "train"), Preprocessing(resize=resize, crop=resize - 8)) < 1


@pytest.mark.filterwarnings("ignore:CUB at")
def test_sharp_photos_differ_by_less_than_a_grey_level(tmp_path):
    """Photos of 256 pixels a side hold more detail a pixel than larger ones."""
    if not os.environ.get("FGVC_EXT_TEST_DATA"):
        pytest.skip("set FGVC_EXT_TEST_DATA to the folder that holds cub50/")
    files = sorted(Path(os.environ["FGVC_EXT_TEST_DATA"], "cub50").rglob("*.jpg"))[::70]
    for number, file in enumerate(files):
        pixels = decode_image(file)
        height, width = (length // 8 * 8 for length in pixels.shape[-2:])
        if min(height, width) < 256:
            continue
        target = tmp_path / "train" / "bird" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:, :height, :width].permute(1, 2, 0).numpy()).save(target, quality=95)
    for resize in (40, 20):
        assert difference(ImageFolder(tmp_path, "train"), Preprocessing(resize=resize, crop=resize - 4)) < 1


def test_samples_load_reduced_images_for_training_alone(folder):
    data, prepare = ImageFolder(folder, "train"), Preprocessing(resize=40, crop=32)
    reduced, whole = prepare.train_crop(), data.load(0)
    found = Samples(data, reduced)[0, 5]["image"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = reduced(data.load_at_least(0, math.ceil(2.5 * 40))[0], tuple(whole.shape[-2:]))
    assert torch.equal(found, expected)
    assert torch.equal(Samples(data, prepare.eval_crop())[0, 5]["image"], prepare.eval_crop()(whole))


def test_a_data_set_that_changes_its_images_is_not_passed_by(folder):
    class Halves(ImageFolder):
        def load(self, index):
            return super().load(index)[:, :, :240]

    image, size = Halves(folder, "train").load_at_least(0, 50)
    assert tuple(image.shape[-2:]) == size == (400, 240)
