"""What the knowledge-transfer paper says of spatial attention maps, beyond the contract that every operator keeps."""

import pytest
import torch

from fgvc_ext import nn, ops


def test_an_example_by_hand() -> None:
    features = torch.tensor([[[[1.0, 3.0]], [[-2.0, 0.0]]]], requires_grad=True)  # g = (2, −1)
    attention = ops.spatial_attention_map(features)
    assert attention.tolist() == [[[(2 * 1 + -1 * -2) / 2, (2 * 3 + -1 * 0) / 2]]]
    attention.backward(torch.tensor([[[1.0, 0.0]]]))
    # (1/C)·(g_c·dM(p) + (1/HW)·Σ_q dM(q)·F_c(q))
    assert features.grad.tolist() == [[[[(2 + 0.5) / 2, 0.5 / 2]], [[(-1 - 1) / 2, -1 / 2]]]]


def test_the_gradient_is_that_of_the_formula() -> None:
    features = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, 6, dtype=torch.float64)
    ops.spatial_attention_map(features).backward(grad)
    values, dm = features.detach(), grad[:, None]
    expected = (values.mean((2, 3), keepdim=True) * dm + (dm * values).mean((2, 3), keepdim=True)) / 5
    torch.testing.assert_close(features.grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(ops.spatial_attention_map, (features,))


def test_one_channel_is_its_own_weight() -> None:
    features = torch.randn(2, 1, 3, 3)
    expected = features[:, 0] * features.mean((2, 3))[:, :, None]
    torch.testing.assert_close(ops.spatial_attention_map(features), expected)


def test_a_single_position_is_the_mean_square() -> None:
    features = torch.randn(2, 7, 1, 1)
    torch.testing.assert_close(ops.spatial_attention_map(features)[:, 0, 0], features.square().mean((1, 2, 3)))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_the_layout_makes_no_difference(layout: str) -> None:
    features = torch.randn(2, 5, 4, 6)
    other = {
        "channels_last": lambda: features.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: features.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda: features.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": lambda: features[:1].expand(2, -1, -1, -1),
    }[layout]()
    attention = ops.spatial_attention_map(other)
    assert attention.is_contiguous()
    torch.testing.assert_close(attention, ops.spatial_attention_map(other.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_stores(dtype: torch.dtype) -> None:
    features = torch.randn(2, 600, 14, 14).relu().to(dtype).requires_grad_()
    attention = ops.spatial_attention_map(features)
    attention.sum().backward()
    assert attention.dtype == features.grad.dtype == dtype
    exact = ops.spatial_attention_map(features.detach().double())
    torch.testing.assert_close(attention.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_large_values_overflow_in_float16_only() -> None:
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True), (torch.float32, True)):
        attention = ops.spatial_attention_map(torch.full((1, 2, 3, 3), 300, dtype=dtype))
        assert bool(attention.isfinite().all()) is finite


def test_a_nan_stays_in_its_sample() -> None:
    features = torch.randn(2, 3, 4, 4)
    features[0, 1, 2, 3] = float("nan")
    assert ops.spatial_attention_map(features).isnan().flatten(1).all(1).tolist() == [True, False]
    assert not ops.spatial_attention_map(features)[1].isnan().any()


def test_no_samples() -> None:
    features = torch.zeros(0, 3, 4, 5, requires_grad=True)
    attention = ops.spatial_attention_map(features)
    attention.sum().backward()
    assert attention.shape == (0, 4, 5)
    assert features.grad.shape == (0, 3, 4, 5)


def test_vmap_and_grad() -> None:
    features = torch.randn(3, 2, 4, 5, 6)
    mapped = torch.func.vmap(ops.spatial_attention_map)(features)
    torch.testing.assert_close(mapped, torch.stack([ops.spatial_attention_map(one) for one in features]))
    grad = torch.func.grad(lambda values: ops.spatial_attention_map(values).square().sum())(features[0])
    leaf = features[0].clone().requires_grad_()
    ops.spatial_attention_map(leaf).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(2, 3, 4), ValueError, r"features must have shape \[N,C,H,W\], got \[2, 3, 4\]"),
        (torch.zeros(2, 0, 4, 4), ValueError, r"features must have C, H and W of at least 1, got \[2, 0, 4, 4\]"),
        (torch.zeros(2, 3, 0, 4), ValueError, r"features must have C, H and W of at least 1, got \[2, 3, 0, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), TypeError, "features must be of dtype float32, .* got int64"),
        ([1.0], TypeError, r"features must be a tensor \[N,C,H,W\], got list"),
    ],
)
def test_bad_arguments(features: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^spatial_attention_map: {message}"):
        ops.spatial_attention_map(features)


def test_the_module_is_the_function() -> None:
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(nn.SpatialAttentionMap()(features), ops.spatial_attention_map(features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interleaved_channels_that_fill_their_vectors_or_not(dtype: torch.dtype, instruction_set: str) -> None:
    """One to nine vectors of 4, 8 or 16 channels, and one channel more or less."""
    for channels in sorted(
        {lanes * vectors + more for lanes in (4, 8, 16) for vectors in range(1, 10) for more in (-1, 0, 1)}
    ):
        features = torch.randn(1, channels, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last)
        leaf, exact = features.clone().requires_grad_(), features.double().requires_grad_()
        for one in (leaf, exact):
            ops.spatial_attention_map(one).sum().backward()
        eps = torch.finfo(dtype).eps
        attention, expected = ops.spatial_attention_map(features).double(), ops.spatial_attention_map(exact).detach()
        torch.testing.assert_close(attention, expected, rtol=eps, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=eps, atol=1e-6)


def test_under_fake_tensors_a_gradient_has_the_layout_of_the_features() -> None:
    with torch._subclasses.FakeTensorMode():
        features = torch.empty(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
        (grad,) = torch.autograd.grad(ops.spatial_attention_map(features).sum(), features)
    assert grad.stride() == features.stride()
