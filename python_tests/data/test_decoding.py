"""Every image mode and every way a file can be broken, with real files."""

import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fgvc_ext.data import BrokenImageError, decode_image, verify_image

RED = (220, 30, 40)


def halves(size=(24, 16)):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste((20, 40, 210), (size[0] // 2, 0, *size))
    return image


def assert_halves(pixels, tolerance):
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    expected = torch.from_numpy(np.array(halves())).permute(2, 0, 1)
    assert pixels.shape == expected.shape
    assert (pixels[..., [2, -3]].int() - expected[..., [2, -3]].int()).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [("a.png", "RGB", 0), ("a.jpg", "RGB", 60), ("a.jpg", "CMYK", 60), ("a.png", "P", 12), ("a.png", "RGBA", 0),
     ("a.tif", "CMYK", 0), ("a.gif", "P", 12), ("a.bmp", "RGB", 0), ("a.webp", "RGB", 60)],
)  # fmt: skip
def test_colour_modes(tmp_path, name, mode, tolerance):
    (halves().quantize(8) if mode == "P" else halves().convert(mode)).save(tmp_path / name)
    assert_halves(decode_image(tmp_path / name), tolerance)


def test_content_counts_not_the_file_ending(tmp_path):
    halves().convert("RGBA").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert_halves(decode_image(tmp_path / "a.jpg"), 0)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_greyscale_becomes_three_equal_channels(tmp_path, mode):
    halves().convert("L").convert(mode).save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png")
    assert pixels.shape == (3, 16, 24)
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[1] == pixels[2]).all()
    assert len(pixels.unique()) == 2


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_greyscale_keeps_its_tones(tmp_path, name):
    values = np.array([[0, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert decode_image(tmp_path / name)[0].tolist() == [[0, 128, 255]]


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    image.save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").permute(1, 2, 0).tolist() == [[[255, 255, 255], list(RED)]]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, name, orientation):
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = halves().transpose(undo[orientation]) if orientation in undo else halves()
    stored.save(tmp_path / name, exif=exif)
    assert_halves(decode_image(tmp_path / name), 60 if name == "a.jpg" else 0)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").flatten().tolist() == list(RED)


@pytest.mark.parametrize("size", [(20_000, 40), (40, 20_000)])
def test_20000_pixels_a_side(tmp_path, size):
    halves(size).save(tmp_path / "a.jpg")
    assert decode_image(tmp_path / "a.jpg").shape == (3, size[1], size[0])


@pytest.mark.slow
def test_more_pixels_than_pillow_allows(tmp_path):
    Image.new("1", (20_000, 10_000), 1).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png")[:, -1, -1].tolist() == [255, 255, 255]


def test_pixel_limit_is_checked_before_decoding(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")))
    with pytest.raises(BrokenImageError, match="60000 x 60000 pixels are more than the limit of 500000000"):
        decode_image(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS is not None, "the limit of Pillow is everybody's and must stay"


def noisy_file(path):
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
def test_truncated(tmp_path, name, keep):
    data = noisy_file(tmp_path / name)
    (tmp_path / name).write_bytes(data[: max(4, int(len(data) * keep))])
    with pytest.raises(BrokenImageError) as caught:
        decode_image(tmp_path / name, index=7)
    error = caught.value
    assert error.path == tmp_path / name
    assert error.index == 7
    assert error.cause
    assert str(tmp_path / name) in str(error)
    assert "index 7" in str(error)
    assert error.cause in str(error)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"", "empty"), (b"<html>404</html>", "not an image"), (b"\0" * 5000, "not an image"), (None, "No such file")],
)
def test_not_an_image(tmp_path, content, cause):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BrokenImageError, match=cause):
        decode_image(tmp_path / "a.jpg")


def test_float_images_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BrokenImageError, match="no defined range"):
        decode_image(tmp_path / "a.tif")


def test_flipped_byte_in_png_is_found(tmp_path):
    data = bytearray(noisy_file(tmp_path / "a.png"))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BrokenImageError):
        decode_image(tmp_path / "a.png")


def test_error_survives_a_worker_process(tmp_path):
    with pytest.raises(BrokenImageError) as caught:
        decode_image(tmp_path / "a.jpg", index=3)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.path, copy.index, copy.cause) == (
        str(caught.value), caught.value.path, 3, caught.value.cause)  # fmt: skip
    assert isinstance(BrokenImageError(str(copy)), BrokenImageError), "DataLoader rebuilds errors from the message"


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_program_that_allows_truncated_images_changes_nothing(tmp_path, name, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = noisy_file(tmp_path / name)
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    for read in (decode_image, verify_image):
        with pytest.raises(BrokenImageError):
            read(tmp_path / name)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "the setting is everybody's and must stay"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97, 1])
def test_verifying_finds_what_decoding_finds(tmp_path, name, keep):
    data = noisy_file(tmp_path / name)
    (tmp_path / name).write_bytes(data[: max(4, int(len(data) * keep))])
    if keep == 1:
        verify_image(tmp_path / name)
        verify_image(tmp_path / name, header_only=True)
    else:
        with pytest.raises(BrokenImageError, match="index 7"):
            verify_image(tmp_path / name, index=7)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 40), (40, 5), (8, 8)])
def test_jpegs_of_a_few_pixels_can_be_verified(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "a.jpg")
    verify_image(tmp_path / "a.jpg")
    assert decode_image(tmp_path / "a.jpg").shape == (3, size[1], size[0])
