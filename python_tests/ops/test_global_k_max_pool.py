"""What ELoPE says of global k-max pooling, beyond the contract that every operator keeps."""

import contextlib

import pytest
import torch

import fgvc_ext
from fgvc_ext import nn, ops


def test_an_example_by_hand() -> None:
    features = torch.tensor([[[[1.0, 7.0, 3.0], [5.0, -2.0, 5.0]]]])
    assert ops.global_k_max_pool(features, 1).item() == 7
    assert ops.global_k_max_pool(features, 3).item() == pytest.approx((7 + 5 + 5) / 3)
    weight = torch.tensor([2.0, 1.0, 0.5])
    assert ops.global_k_max_pool(features, 3, weight).item() == pytest.approx((2 * 7 + 5 + 0.5 * 5) / 3)


def test_gradients_by_hand() -> None:
    features = torch.tensor([[[[1.0, 7.0, 3.0], [5.0, -2.0, 5.0]]]], requires_grad=True)
    weight = torch.tensor([2.0, 1.0], requires_grad=True)
    ops.global_k_max_pool(features, 2, weight).backward(torch.tensor([[4.0]]))
    # Of the two fives the first in row-major order is taken.
    assert features.grad.tolist() == [[[[0, 4, 0], [2, 0, 0]]]]
    assert weight.grad.tolist() == [14, 10]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    """The sum of the k largest is not rounded before it is divided by k."""
    features = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    with fgvc_ext.use_reference() if backend == "reference" else contextlib.nullcontext():
        for k in (3, 5, 20):
            exact = ops.global_k_max_pool(features.float(), k)
            assert torch.equal(ops.global_k_max_pool(features, k), exact.to(dtype))


def test_k_of_one_is_max_pooling_and_k_of_all_is_the_mean() -> None:
    features = torch.randn(3, 5, 6, 7)
    assert torch.equal(ops.global_k_max_pool(features, 1), features.amax((2, 3)))
    torch.testing.assert_close(ops.global_k_max_pool(features, 42), features.mean((2, 3)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 2), (14, 14), (3, 100), (181, 182)])
def test_ties_go_to_the_lowest_index(size: tuple[int, int], memory_format: torch.memory_format) -> None:
    maps = torch.zeros(2, 19, *size).contiguous(memory_format=memory_format).requires_grad_()
    ops.global_k_max_pool(maps, 3).sum().backward()
    taken = maps.grad.contiguous().flatten(2).nonzero()[:, 2].view(2, 19, 3)
    assert (taken == torch.tensor([0, 1, 2])).all()


@pytest.mark.parametrize("k", [1, 3, 4, 8, 16, 20])
@pytest.mark.parametrize("size", [(14, 14), (7, 7), (5, 13), (40, 70)])
def test_among_equals_the_ranks_follow_the_index(size: tuple[int, int], k: int, instruction_set: str) -> None:
    features = (torch.randn(2, 19, *size, generator=torch.Generator().manual_seed(k)) * 4).round() / 2
    _, indices, values = torch.ops.fgvc_ext.global_k_max_pool(features, k, None, True)
    expected = features.flatten(2).sort(dim=2, descending=True, stable=True)
    assert torch.equal(indices.long(), expected.indices[..., :k])
    assert torch.equal(values, expected.values[..., :k])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("size", [(3, 3), (8, 9)])
def test_nan_and_infinities_have_ranks(
    size: tuple[int, int], k: int, dtype: torch.dtype, memory_format: torch.memory_format, instruction_set: str
) -> None:
    """As in a stable sort: NaN first; −inf is a value, also where fewer than k are larger."""
    features = torch.randn(2, 19, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[0, 1, 1, 2] = features[1, 18, 2] = float("nan")
    features[0, 2] = float("-inf")
    features[0, 3, 1:] = float("-inf")
    features[0, 4, 2, 1] = features[1, 17, 1] = float("inf")
    arranged = features.contiguous(memory_format=memory_format)
    _, indices, values = torch.ops.fgvc_ext.global_k_max_pool(arranged, k, None, True)
    expected = features.flatten(2).sort(dim=2, descending=True, stable=True)
    assert torch.equal(indices.long(), expected.indices[..., :k])
    assert torch.equal(values.nan_to_num(7), expected.values[..., :k].to(values.dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("outside", [4, -1, 2**15 - 1])
def test_an_index_outside_its_map_is_passed_over(outside: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Only somebody who calls the raw operator has one; the neighbouring map must not get its gradient."""
    indices = torch.tensor([[[outside], [3]]], dtype=dtype)
    arguments = (None, None, [1, 2, 2, 2], [8, 4, 2, 1], True, False)
    grad = torch.ops.fgvc_ext.global_k_max_pool_backward(torch.tensor([[5.0, 7.0]]), indices, *arguments)[0]
    assert grad.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 7]


def test_threads_change_no_bit_of_a_weight_gradient_in_float64(threads: None) -> None:
    """In float32 a last rounding would hide another order of the sums."""
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(40, 300, 2, 2, dtype=torch.float64)
    grads = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        grads += torch.autograd.grad(ops.global_k_max_pool(features, 3, weight).sin().sum(), weight)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_minus_zero_ties_with_zero() -> None:
    features = torch.tensor([[[[-0.0, 0.0, -1.0]]]], requires_grad=True)
    ops.global_k_max_pool(features, 1).sum().backward()
    assert features.grad.flatten().tolist() == [1, 0, 0]


def test_nan_stays_in_its_own_map_and_gradients_stay_in_bounds() -> None:
    features = torch.randn(1, 3, 4, 4)
    features[0, 1, 2, 3] = float("nan")
    features.requires_grad_()
    pooled = ops.global_k_max_pool(features, 4)
    assert pooled.isnan().tolist() == [[False, True, False]]
    pooled.nansum().backward()
    assert (features.grad[0, 0] != 0).sum() == 4


def test_the_index_dtype_follows_the_map() -> None:
    if not torch.ops.fgvc_ext.__dict__ and not hasattr(torch.ops.fgvc_ext, "global_k_max_pool"):
        pytest.skip("the package has no compiled libraries")
    for width, dtype in ((32768, torch.int16), (32769, torch.int32)):
        features = torch.zeros(1, 1, 1, width)
        features[..., -1] = 1
        indices = torch.ops.fgvc_ext.global_k_max_pool(features, 1, None, False, width > 32768)[1]
        assert indices.dtype == dtype
        assert indices.item() == width - 1


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be at least 1, got 0"),
        (13, ValueError, r"k must be at most H\*W = 3\*4 = 12, got 13"),
        (2.0, TypeError, "k must be an int, got float"),
        (True, TypeError, "k must be an int, got bool"),
    ],
)
def test_bad_k(k: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"global_k_max_pool: {message}"):
        ops.global_k_max_pool(torch.zeros(1, 1, 3, 4), k)


def test_a_map_of_too_many_positions_is_refused() -> None:
    features = torch.zeros(1).expand(1, 1, 2**16, 2**16)  # one number in memory
    message = r"features must have at most 2147483647 positions per map, got H\*W = 65536\*65536 = 4294967296"
    with pytest.raises(ValueError, match=f"global_k_max_pool: {message}"):
        ops.global_k_max_pool(features)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3), ValueError, r"weight must have shape \[4\], .* got \[3\]"),
        (torch.ones(4, 1), ValueError, r"weight must have shape \[k\], got \[4, 1\]"),
        (torch.ones(4, dtype=torch.float64), TypeError, "weight must have the dtype of features .* got torch.float64"),
        (torch.ones(4, device="meta"), ValueError, "weight must be on the device of features .* got meta"),
    ],
)
def test_bad_weight(weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"global_k_max_pool: {message}"):
        ops.global_k_max_pool(torch.zeros(1, 1, 3, 4), 4, weight)


def test_the_module_starts_as_the_plain_mean_and_learns_its_weights() -> None:
    features = torch.randn(2, 3, 5, 5)
    pool = nn.GlobalKMaxPool2d(4, weighted=True)
    assert torch.equal(pool(features), nn.GlobalKMaxPool2d(4)(features))
    pool(features).sum().backward()
    assert pool.weight.grad.shape == (4,)
    assert (pool.weight.grad.diff() <= 0).all()  # larger values, larger gradient
    assert "k=4, weighted=True" in repr(pool)


def test_the_last_position_of_a_map_that_is_one_too_large_for_16_bits() -> None:
    features = torch.zeros(1, 1, 1, 2**15 + 1)
    features[..., -1] = 1
    features.requires_grad_()
    ops.global_k_max_pool(features, 1).sum().backward()
    assert features.grad.flatten().nonzero().tolist() == [[2**15]]
