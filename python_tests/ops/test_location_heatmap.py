"""What dual attention fusion says of the location heat map, beyond the contract that every operator keeps."""

import math

import pytest
import torch
from torch import Tensor

from fgvc_ext import _library, nn, ops
from fgvc_ext.reference.location_heatmap import nearest

nan, inf = math.nan, math.inf


def one_channel(*rows: list[float]) -> Tensor:
    """[1,1,h,w]."""
    return torch.tensor([[list(rows)]], dtype=torch.float32)


def test_an_example_by_hand() -> None:
    """Three levels of 2×2: sums of channels above their mean, resized and averaged."""
    first = torch.stack([torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])[None]
    assert first.sum(1).tolist() == [[[2, 2], [3, 1]]]  # mean 2: only the 3 exceeds it
    second = one_channel([0, 0], [4, 4])
    third = one_channel([9, 0], [9, 9])
    heatmap = ops.location_heatmap([first, second, third], 4)
    third_part = torch.tensor(1.0) / 3
    expected = torch.tensor([[third_part, 0], [1, 2 * third_part]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert heatmap.shape == (1, 1, 4, 4)
    torch.testing.assert_close(heatmap[0, 0], expected, rtol=0, atol=1e-7)
    assert heatmap[0, 0, 2, 0] == 1  # exactly: three of three


def test_what_equals_the_mean_is_background() -> None:
    assert ops.location_heatmap([one_channel([1, 2, 3])], (1, 3)).tolist() == [[[[0, 0, 1]]]]
    assert ops.location_heatmap([one_channel([-1, 0, 1])], (1, 3)).tolist() == [[[[0, 0, 1]]]]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 0.1, 1e30])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_constant_map_is_all_ones(value: float, layout: torch.memory_format) -> None:
    """Also where the mean of its sums is not their value by a rounding."""
    for channels, height, width in ((1, 1, 1), (3, 7, 7), (17, 14, 14), (100, 9, 31), (517, 5, 5)):
        level = torch.full((2, channels, height, width), value).contiguous(memory_format=layout)
        assert (ops.location_heatmap([level], (20, 30)) == 1).all()


def test_the_values_of_three_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 8, side, side, generator=generator) for side in (16, 8, 4)]
    values = ops.location_heatmap(levels, 64).unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert values[0] == 0
    assert values[-1] == 1


def test_each_sample_has_thresholds_of_its_own() -> None:
    levels = [torch.randn(3, 6, 8, 8), torch.randn(3, 9, 4, 4)]
    levels[0][1] *= 1000
    together = ops.location_heatmap(levels, 16)
    for sample in range(3):
        alone = ops.location_heatmap([level[sample : sample + 1] for level in levels], 16)
        assert torch.equal(together[sample : sample + 1], alone)


def test_sums_are_computed_in_float32() -> None:
    """A sum of 2048 channels of 100 is too large for float16; here one position of four has a little more."""
    level = torch.full((1, 2048, 2, 2), 100.0, dtype=torch.float16)
    level[0, 0, 1, 1] = 101
    heatmap = ops.location_heatmap([level], 2)
    assert heatmap.dtype == torch.float16
    assert heatmap.tolist() == [[[[0, 0], [0, 1]]]]


@pytest.mark.parametrize(("size", "image_size"), [(7, 31), (5, 47), (3, 2), (9, 9), (1, 6), (61, 134)])
def test_levels_that_do_not_divide_the_image_are_read_under_the_middle(size: int, image_size: int) -> None:
    expected = [math.floor((i + 0.5) * size / image_size) for i in range(image_size)]
    assert nearest(image_size, size, torch.device("cpu")).tolist() == expected
    for place in range(size):
        row = torch.zeros(1, 1, 1, size)
        row[..., place] = 1
        if size > 1:
            found = ops.location_heatmap([row], (1, image_size)).flatten()
            assert found.tolist() == [float(at == place) for at in expected]
            column = ops.location_heatmap([row.mT], (image_size, 1)).flatten()
            assert torch.equal(found, column)


def test_a_nan_makes_the_map_of_its_sample_nan() -> None:
    levels = [torch.randn(3, 5, 4, 4), torch.randn(3, 5, 2, 2)]
    levels[1][1, 2, 0, 1] = nan
    heatmap = ops.location_heatmap(levels, 8)
    assert heatmap[1].isnan().all()
    assert not heatmap[[0, 2]].isnan().any()
    levels[1][1, 2, 0, 1] = inf
    levels[1][1, 2, 1, 1] = -inf
    assert ops.location_heatmap(levels, 8)[1].isnan().all()


def test_infinities_of_one_sign_are_numbers() -> None:
    assert ops.location_heatmap([one_channel([1, inf, 3])], (1, 3)).tolist() == [[[[1, 1, 1]]]]  # nothing is above
    assert ops.location_heatmap([one_channel([1, -inf, 3])], (1, 3)).tolist() == [[[[1, 0, 1]]]]


def test_checks_turn_nan_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    level = torch.randn(4, 2, 3, 3)
    level[2, 1, 1, 1] = nan
    monkeypatch.setattr(_library, "_labels_checked", True)
    with pytest.raises(ValueError, match=r"^location_heatmap: features must be finite, got NaN .* in sample 2$"):
        ops.location_heatmap([level], 6)
    assert ops.location_heatmap([level[:2]], 6).shape == (2, 1, 6, 6)
    compiled = torch.compile(ops.location_heatmap, backend="aot_eager", fullgraph=True)
    assert compiled([level], 6)[2].isnan().all()


def test_there_is_no_gradient() -> None:
    level = torch.randn(2, 5, 4, 4, requires_grad=True)
    compiled = torch.compile(ops.location_heatmap, backend="aot_eager", fullgraph=True)
    for function in (ops.location_heatmap, compiled, nn.LocationHeatmap()):
        assert not function([level, level], 8).requires_grad


def test_a_tuple_serves_as_a_list() -> None:
    levels = [torch.randn(2, 5, 4, 4), torch.randn(2, 3, 2, 2)]
    expected = ops.location_heatmap(levels, [8, 12])
    assert expected.shape == (2, 1, 8, 12)
    assert torch.equal(nn.LocationHeatmap()(tuple(levels), (8, 12)), expected)


LEVEL = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("features", "image_size", "error", "message"),
    [
        (LEVEL, 8, TypeError, r"features must be a list of tensors \[N,C,h,w\], got Tensor"),
        ([], 8, ValueError, "features must hold 1 to 8 levels, got 0"),
        ([LEVEL] * 9, 8, ValueError, "features must hold 1 to 8 levels, got 9"),
        ([LEVEL, None], 8, TypeError, r"features\[1\] must be a tensor \[N,C,h,w\], got NoneType"),
        ([LEVEL, LEVEL[0]], 8, ValueError, r"features\[1\] must have shape \[N,C,h,w\], got \[3, 4, 4\]"),
        ([LEVEL, LEVEL.double()], 8, TypeError, r"features\[1\] must have the dtype of features\[0\]"),
        ([LEVEL, LEVEL[:1]], 8, ValueError, r"features\[1\] must have the 2 samples of features\[0\], got \[1, 3, 4"),
        ([LEVEL[:, :0]], 8, ValueError, r"features\[0\] must have C, h and w of at least 1, got \[2, 0, 4, 4\]"),
        ([LEVEL[..., :0]], 8, ValueError, r"features\[0\] must have C, h and w of at least 1, got \[2, 3, 4, 0\]"),
        ([LEVEL], 0, ValueError, "the height in image_size must be at least 1, got 0"),
        ([LEVEL], (4, 0.5), TypeError, "the width in image_size must be an int, got float"),
        ([LEVEL], 2**16, ValueError, "image_size must be at most 2147483647 pixels in all, got 65536 x 65536"),
    ],
)
def test_bad_arguments(features: object, image_size: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^location_heatmap: {message}"):
        ops.location_heatmap(features, image_size)
