"""What dual attention fusion says of part images, beyond the contract that every operator keeps."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fgvc_ext import _library, nn, ops
from fgvc_ext.reference.compose_parts import blur, gaussian, normals

from .conftest import needs_libraries


def images(samples: int = 2, height: int = 32, width: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def boxes_of(*boxes: list[float], samples: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([boxes] * samples, dtype=dtype)


BOXES = boxes_of([2, 3, 14, 15], [10, 12, 22, 30], [0.5, 20, 6, 40])


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool [N,M,H,W], pixel by pixel."""
    masks = torch.zeros(*boxes.shape[:2], height, width, dtype=torch.bool)
    for sample, part, y, x in np.ndindex(*masks.shape):
        x1, y1, x2, y2 = boxes[sample, part].tolist()
        masks[sample, part, y, x] = x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2
    return masks


# --- which pixel shows what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_own_box_has_the_image_s_bits(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = images(dtype=dtype).contiguous(memory_format=layout)
    parts = ops.compose_parts(x, BOXES.to(dtype), seed=1)
    own = inside(BOXES, 32, 24)[:, :, None].expand_as(parts)
    assert own.any()
    assert torch.equal(parts[own], x[:, None].expand_as(parts)[own])
    assert (parts != x[:, None])[~own].double().mean() > 0.9


def test_own_box_then_noise_then_blur() -> None:
    """The three kinds of pixels are all there are, and each has its value."""
    x = images()
    own = inside(BOXES, 32, 24)
    other = own.any(1, keepdim=True) & ~own
    parts = ops.compose_parts(x, BOXES, blur_sigma=6, noise_std=0.5, seed=7)
    noise = 0.5 * normals(torch.tensor(7), 2, 32, 24, torch.float32)
    blurred = blur(x, 6.0)
    kinds = torch.stack([own, other, ~own.any(1, keepdim=True).expand_as(own)])
    assert (kinds.sum(0) == 1).all()
    assert all(kind.any() for kind in kinds)
    values = torch.stack([x, x + noise, blurred])[:, :, None].expand(3, *parts.shape)
    expected = (values * kinds[:, :, :, None]).sum(0)
    torch.testing.assert_close(parts, expected, rtol=0, atol=5e-6)


def test_the_noise_can_take_the_pixel_s_place() -> None:
    x = images()
    own = inside(BOXES, 32, 24)
    other = (own.any(1, keepdim=True) & ~own)[:, :, None].expand(2, 3, 3, 32, 24)
    parts = ops.compose_parts(x, BOXES, noise_std=2, noise_mode="replace", seed=7)
    noise = 2 * normals(torch.tensor(7), 2, 32, 24, torch.float32)[:, None].expand_as(parts)
    torch.testing.assert_close(parts[other], noise[other], rtol=0, atol=1e-5)


def test_one_part_has_no_noise() -> None:
    one = ops.compose_parts(images(), BOXES[:, :1], noise_std=100, seed=1)
    assert torch.equal(one, ops.compose_parts(images(), BOXES[:, :1], noise_std=0, seed=2))


def test_parts_of_an_image_share_their_noise() -> None:
    """Where two parts both show a third one's box, they are equal."""
    parts = ops.compose_parts(images(), BOXES, seed=1)
    third = inside(BOXES, 32, 24)
    third = (third[:, 2] & ~third[:, 0] & ~third[:, 1])[:, None].expand(2, 3, 32, 24)
    assert third.any()
    assert torch.equal(parts[:, 0][third], parts[:, 1][third])


def test_edges() -> None:
    """x1 ≤ x + 0.5 < x2: a middle on the left edge is inside, one on the right edge is not."""
    x = torch.ones(1, 3, 4, 6)
    x[..., 0] = 5  # so that the blur is nowhere one
    for box, columns in (
        ([1.5, 0, 3.5, 4], [1, 2]),
        ([1.4, 0, 3.6, 4], [1, 2, 3]),
        ([1.6, 0, 2.4, 4], []),
        ([-9, 0, 1.5, 4], [0]),
        ([4.5, 0, 99, 4], [4, 5]),
        ([3, 0, 2, 4], []),
        ([2, 0, 2, 4], []),
        ([math.nan, 0, 4, 4], []),
        ([-math.inf, -math.inf, math.inf, math.inf], range(6)),
    ):
        part = ops.compose_parts(x, boxes_of(box, samples=1))[0, 0, 0]
        kept = (part == x[0, 0]).all(0)
        assert kept.nonzero().flatten().tolist() == list(columns), box


def test_overlapping_boxes_are_each_their_own() -> None:
    x = images(1)
    boxes = boxes_of([0, 0, 24, 32], [4, 4, 12, 12], samples=1)
    parts = ops.compose_parts(x, boxes, seed=3)
    assert torch.equal(parts[0, 0], x[0])
    assert torch.equal(parts[0, 1, :, 4:12, 4:12], x[0, :, 4:12, 4:12])


# --- the noise --------------------------------------------------------------------------------------------------------


def noise_by_hand(words: list[int]) -> list[float]:
    """Of a pixel's four words: uniform numbers in float32, the rest in double."""
    u = [min(float((np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)), 1 - 2.0**-24) for word in words]
    radius = [math.sqrt(-2 * math.log(u[0])), math.sqrt(-2 * math.log(u[2]))]
    angle = [2 * math.pi * u[1], 2 * math.pi * u[3]]
    return [radius[0] * math.cos(angle[0]), radius[0] * math.sin(angle[0]), radius[1] * math.cos(angle[1])]


def shown_noise(seed: int | Tensor, samples: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The noise itself: a second part, empty, shows the first one's box, the whole image."""
    x = torch.zeros(samples, 3, height, width, dtype=dtype)
    boxes = boxes_of([0, 0, width, height], [0, 0, 0, 0], samples=samples, dtype=dtype)
    return ops.compose_parts(x, boxes, seed=seed)[:, 1]


@needs_libraries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0, -(2**62) + 12345])
def test_noise_is_box_muller_of_the_pixel_s_words(dtype: torch.dtype, seed: int, instruction_set: str) -> None:
    noise = shown_noise(seed, 2, 5, 37, dtype).double()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    for sample in range(2):
        every = _library._module.philox_words(seed % 2**64, 0, sample, 2, 5 * 37).tolist()
        for pixel, words in enumerate(every):
            found = noise[sample, :, pixel // 37, pixel % 37].tolist()
            assert found == pytest.approx(noise_by_hand(words), rel=0, abs=tolerance)


@needs_libraries
def test_noise_has_the_same_bits_on_every_instruction_set() -> None:
    before = _library.instruction_set()
    try:
        every = []
        for name in _library._module.supported_instruction_sets():
            _library._module.use_instruction_set(name)
            every.append(shown_noise(5, 2, 40, 50, torch.float32))
    finally:
        _library._module.use_instruction_set(before)
    assert all(torch.equal(noise, every[0]) for noise in every)


def test_noise_is_normal() -> None:
    noise = shown_noise(11, 2, 200, 200, torch.float32)
    channels = noise.transpose(0, 1).flatten(1).double()
    assert channels.mean(1).abs().max() < 0.02
    assert (channels.var(1) - 1).abs().max() < 0.03
    assert (channels.pow(4).mean(1) - 3).abs().max() < 0.15
    assert (torch.corrcoef(channels) - torch.eye(3)).abs().max() < 0.02
    assert (noise[0] * noise[1]).mean().abs() < 0.02
    assert channels.isfinite().all()
    for limit in (1, 2):
        share = (channels.abs() < limit).double().mean(1)
        assert (share - math.erf(limit / math.sqrt(2))).abs().max() < 0.01


def test_a_seed_per_sample_keys_it_wherever_it_stands() -> None:
    x, seeds = images(3), torch.tensor([5, -9, 2**63 - 1])
    boxes = BOXES[:1].expand(3, 3, 4)
    parts = ops.compose_parts(x, boxes, seed=seeds)
    for sample in range(3):
        alone = ops.compose_parts(x[sample : sample + 1], boxes[:1], seed=seeds[sample : sample + 1])
        assert torch.equal(parts[sample : sample + 1], alone)
    assert torch.equal(ops.compose_parts(x, boxes, seed=5)[0], parts[0])  # sample 0 of the call
    assert not torch.equal(ops.compose_parts(x, boxes, seed=-9)[1], parts[1])


def test_without_a_seed_torch_s_generator_decides() -> None:
    torch.manual_seed(3)
    first = ops.compose_parts(images(), BOXES)
    assert not torch.equal(first, ops.compose_parts(images(), BOXES))
    torch.manual_seed(3)
    assert torch.equal(first, ops.compose_parts(images(), BOXES))


# --- the blur ---------------------------------------------------------------------------------------------------------


def blurred(x: Tensor, sigma: float) -> Tensor:
    """What is seen outside a box without pixels."""
    return ops.compose_parts(x, torch.zeros(len(x), 1, 4), blur_sigma=sigma)[:, 0]


def test_a_constant_image_stays_one() -> None:
    x = torch.full((1, 3, 37, 29), 1.7)
    for sigma in (0.3, 5, 20, 500):
        torch.testing.assert_close(blurred(x, sigma), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width", "sigma"), [(64, 96, 8.0), (61, 50, 12.0), (40, 40, 1.0)])
def test_the_blur_is_a_pool_a_gaussian_and_a_bilinear_resize(height: int, width: int, sigma: float) -> None:
    x = images(2, height, width)
    small = functional.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)
    radius = math.ceil(3 * sigma / 4)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-((offsets / (sigma / 4)) ** 2) / 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(small, [radius] * 4, mode="reflect")
    small = functional.conv2d(functional.conv2d(padded, weights, groups=3), weights.mT, groups=3)
    expected = functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(blurred(x, sigma), expected, rtol=0, atol=2e-6)


def test_the_blur_is_close_to_the_gaussian_that_it_stands_for() -> None:
    """Of a small square in the middle of the image, sum and variance: what the pyramid adds are a few square pixels."""
    x, sigma = torch.zeros(1, 3, 200, 200), 20.0
    x[..., 96:104, 96:104] = 1
    row = blurred(x, sigma)[0, 0].double().sum(0)
    places = torch.arange(200) - 99.5
    assert row.sum().item() == pytest.approx(64, rel=1e-3)
    variance = (row * places**2).sum() / row.sum()
    square = (8**2 - 1) / 12
    assert variance.item() == pytest.approx(0.973 * sigma**2 + square, rel=0.02)  # 0.973: cut at three sigma


def test_the_weights_of_the_gaussian() -> None:
    weights = gaussian(5.0)
    assert len(weights) == 31
    assert sum(weights) == pytest.approx(1)
    assert weights[15] / weights[20] == pytest.approx(math.exp(0.5))
    assert weights == weights[::-1]


def test_without_a_sigma_nothing_is_blurred() -> None:
    assert torch.equal(blurred(images(), 0), images())


def test_the_blur_reflects_as_often_as_it_takes() -> None:
    """A radius of many times the image: what is left is nearly the mean, with the ends counted half."""
    x = torch.zeros(1, 3, 4, 16)
    x[..., 4:8] = 4  # the second of four means
    value = blurred(x, 400)
    torch.testing.assert_close(value, torch.full_like(value, 4 / 3), rtol=2e-3, atol=0)


def test_a_nan_stays_in_its_pixel_where_it_is_not_blurred() -> None:
    x = images()
    x[0, 1, 5, 5] = math.nan  # in the first box
    parts = ops.compose_parts(x, BOXES, blur_sigma=0, seed=1)
    assert parts[0, 0].isnan().nonzero().tolist() == [[1, 5, 5]]
    assert parts[0, 1].isnan().nonzero().tolist() == [[1, 5, 5]]
    assert not parts[1].isnan().any()
    assert ops.compose_parts(x, BOXES, blur_sigma=6, seed=1)[0, :, 1].isnan().sum() > 100


# --- smaller parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, (16, 12), (8, 24), (32, 3), 1, 8, (32, 24)])
def test_smaller_parts_are_means(size: Any) -> None:
    x = images(2, 32, 24) if isinstance(size, tuple) else images(2, 32, 32)
    height, width = size if isinstance(size, tuple) else (size, size)
    parts = ops.compose_parts(x, BOXES, seed=1, part_size=size)
    whole = ops.compose_parts(x, BOXES, seed=1).flatten(1, 2)
    expected = functional.avg_pool2d(whole, (x.shape[2] // height, x.shape[3] // width)).unflatten(1, (3, 3))
    torch.testing.assert_close(parts, expected, rtol=0, atol=2e-6)


# --- the rest of the contract -----------------------------------------------------------------------------------------


def test_there_is_no_gradient() -> None:
    x, boxes = images().requires_grad_(), BOXES.clone().requires_grad_()
    compiled = torch.compile(ops.compose_parts, backend="aot_eager", fullgraph=True)
    for function in (ops.compose_parts, compiled, nn.PartComposition()):
        assert not function(x, boxes).requires_grad


def test_the_module_hands_everything_on() -> None:
    module = nn.PartComposition(blur_sigma=6, noise_std=0.3, noise_mode="replace", part_size=(16, 12))
    expected = ops.compose_parts(
        images(), BOXES, blur_sigma=6, noise_std=0.3, noise_mode="replace", part_size=(16, 12), seed=4
    )
    assert torch.equal(module(images(), BOXES, seed=4), expected)
    assert torch.equal(module.eval()(images(), BOXES, 4), expected)
    assert repr(module) == ("PartComposition(blur_sigma=6, noise_std=0.3, noise_mode='replace', part_size=(16, 12))")
    assert torch.equal(nn.PartComposition()(images(), BOXES, 4), ops.compose_parts(images(), BOXES, seed=4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(2, 4, 8, 8)}, ValueError, r"images must have 3 channels, .* got \[2, 4, 8, 8\]"),
        ({"images": torch.zeros(2, 3, 0, 8)}, ValueError, r"images must have 3 channels, and H and W of at least 1"),
        ({"boxes": torch.zeros(3, 1, 4)}, ValueError, r"boxes must have shape \[2, M, 4\], got \[3, 1, 4\]"),
        ({"boxes": torch.zeros(2, 1, 5)}, ValueError, r"boxes must have shape \[2, M, 4\], got \[2, 1, 5\]"),
        ({"boxes": torch.zeros(2, 1, 4).double()}, TypeError, r"boxes must have the dtype of images"),
        ({"blur_sigma": -1}, ValueError, r"blur_sigma must be in \[0, 4096\], got -1"),
        ({"blur_sigma": 5000}, ValueError, r"blur_sigma must be in \[0, 4096\], got 5000"),
        ({"noise_std": -1}, ValueError, "noise_std must be at least 0 and finite in float32, got -1"),
        ({"noise_mode": "both"}, ValueError, "noise_mode must be 'add' or 'replace', got 'both'"),
        ({"part_size": 5}, ValueError, "part_size must divide the sides of images, 32 x 24, got 5 x 5"),
        ({"part_size": (0, 4)}, ValueError, "the height in part_size must be at least 1, got 0"),
        ({"part_size": "8"}, TypeError, r"part_size must be an int or \(height, width\), got '8'"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[\] or \[2\], got \[3\]"),
        (
            {"seed": torch.zeros((), dtype=torch.int64, device="meta")},
            ValueError,
            "seed must be on the device of images",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^compose_parts: {message}"):
        ops.compose_parts(**{"images": images(), "boxes": BOXES, **arguments})
