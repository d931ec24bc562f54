"""What is said of group bilinear pooling, beyond every operator's contract."""

import math

import pytest
import torch
from torch import Tensor

from fgvc_ext import nn, ops, reference
from fgvc_ext.nn.group_bilinear import position_code

# (channels, groups): C = p², C = p²/2 as in the paper's sites, and the spec's smaller ones.
SITES = ((256, 16), (512, 16), (128, 8))


def by_einsum(features: Tensor, groups: int, scale: float = 1 / 32) -> Tensor:
    """[N,p,p,H,W], before the resize."""
    grouped = features.unflatten(1, (groups, features.shape[1] // groups))
    return (torch.einsum("bgihw,bgkhw->bikhw", grouped, grouped) * scale).tanh()


def test_an_example_by_hand() -> None:
    features = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(1, 4, 1, 1)  # rows (1, 2) and (3, −1): Y = ((10, −1), (−1, 5))
    out = ops.group_bilinear(features, 2, scale=0.1).flatten()
    assert out.tolist() == pytest.approx([math.tanh(1.0), math.tanh(-0.1), math.tanh(-0.1), math.tanh(0.5)], rel=1e-6)


def test_the_gradient_of_the_example() -> None:
    features = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64).view(1, 4, 1, 1).requires_grad_()
    ops.group_bilinear(features, 2, scale=0.1)[0, 1].sum().backward()  # T_01
    slope = 0.1 * (1 - math.tanh(-0.1) ** 2)  # S = ((0, slope), (slope, 0)): rows change places
    assert features.grad.flatten().tolist() == pytest.approx([2 * slope, slope, -slope, 3 * slope], rel=1e-12)


@pytest.mark.parametrize(("channels", "groups"), SITES)
def test_the_paper_s_sites(channels: int, groups: int, instruction_set: str) -> None:
    """Without a resize, or of 2:1: o_j = (1 − t_j) T[2j] + t_j T[2j + 1] with t_j = j / (C − 1)."""
    features = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    responses = by_einsum(features, groups).flatten(1, 2)
    if responses.shape[1] == 2 * channels:
        t = (torch.arange(channels, dtype=torch.float64) / (channels - 1))[:, None, None]
        responses = (1 - t) * responses[:, 0::2] + t * responses[:, 1::2]
    torch.testing.assert_close(ops.group_bilinear(features, groups), responses, rtol=1e-12, atol=1e-14)
    narrow = ops.group_bilinear(features.float(), groups)
    torch.testing.assert_close(narrow.double(), responses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("channels", "groups"), SITES)
def test_gradcheck_at_the_paper_s_sites(channels: int, groups: int) -> None:
    features = (torch.randn(1, channels, 1, 1, dtype=torch.float64)).requires_grad_()
    code = position_code(channels, groups).double()
    assert torch.autograd.gradcheck(lambda x: ops.group_bilinear(x, groups, position=code), (features,))


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 15, 16, 17, 40])
def test_the_resize_is_that_of_torch(channels: int) -> None:
    features = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    responses = by_einsum(features, 2).flatten(1, 2)  # 16 values
    as_lines = responses.permute(0, 2, 3, 1).reshape(-1, 1, 16)
    expected = torch.nn.functional.interpolate(as_lines, size=channels, mode="linear", align_corners=True)
    out = ops.group_bilinear(features, 2, out_channels=channels)
    torch.testing.assert_close(out, expected.view(2, 3, 2, channels).permute(0, 3, 1, 2), rtol=1e-12, atol=1e-14)


def test_permuted_groups_give_the_same() -> None:
    """Without a code: which is what the code is for."""
    features = torch.randn(2, 32, 4, 3, dtype=torch.float64)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    permuted = features.unflatten(1, (8, 4))[:, order].flatten(1, 2)
    torch.testing.assert_close(ops.group_bilinear(permuted, 8), ops.group_bilinear(features, 8))
    code = position_code(32, 8).double()
    one, other = (ops.group_bilinear(x, 8, position=code) for x in (features, permuted))
    assert (one - other).abs().max() > 1e-3


def test_the_code_is_added_before_the_product() -> None:
    features, code = torch.randn(2, 12, 3, 4), torch.randn(12)
    coded = ops.group_bilinear(features, 3, position=code)
    torch.testing.assert_close(coded, ops.group_bilinear(features + code[:, None, None], 3))


def test_the_result_is_symmetric() -> None:
    out = ops.group_bilinear(torch.randn(2, 36, 3, 5), 6).unflatten(1, (6, 6))
    assert torch.equal(out, out.transpose(1, 2))


def test_tanh_to_a_few_units_in_the_last_place(instruction_set: str) -> None:
    """Groups of one channel with one group: T = tanh(x²), and tanh(−x²) for a negative scale."""
    x = torch.cat([torch.linspace(0, 4, 20001), torch.logspace(-18, 1, 5001)])
    for scale in (1.0, -1.0):
        out = ops.group_bilinear(x.view(1, 1, 1, -1), 1, scale=scale).flatten()
        exact = (scale * (x * x).double()).tanh()
        assert ((out - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-45).all()
    assert out[-1] == -1


def test_other_numbers_of_channels_follow_the_layout() -> None:
    features = torch.randn(2, 8, 3, 5)
    last = torch.channels_last
    assert ops.group_bilinear(features, 2, out_channels=6).is_contiguous()
    for function in (ops.group_bilinear, reference.group_bilinear):
        out = function(features.contiguous(memory_format=last), 2, out_channels=6)
        assert out.is_contiguous(memory_format=last)
    torch.testing.assert_close(out, ops.group_bilinear(features, 2, out_channels=6))


def test_a_nan_stays_at_its_position_and_with_its_channel() -> None:
    features = torch.randn(2, 8, 3, 4)
    features[1, 5, 2, 1] = float("nan")  # channel 1 of its group of 4
    wrong = ops.group_bilinear(features, 2, out_channels=16).isnan()
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1] = expected[:, 1] = True
    assert torch.equal(wrong[1, :, 2, 1].view(4, 4), expected)
    assert wrong.sum() == expected.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_stores(dtype: torch.dtype) -> None:
    features = (torch.randn(2, 512, 4, 4) * 3).to(dtype)
    exact = ops.group_bilinear(features.double(), 16)
    out = ops.group_bilinear(features, 16)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_large_batch_of_positions_needs_no_more_memory_than_its_result() -> None:
    """Nothing but the features is kept for backward, and no product is ever in memory."""
    features = torch.randn(1, 64, 20, 20, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.group_bilinear(features, 4)
    assert [tensor.data_ptr() for tensor in saved] == [features.data_ptr()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": 5}, ValueError, "groups must divide the 12 channels of features, got 5"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"groups": 2.0}, TypeError, "groups must be an int, got float"),
        ({"groups": 3, "out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"groups": 3, "out_channels": 2**31}, ValueError, "out_channels must be at most 2147483647, got 2147483648"),
        ({"groups": 3, "scale": math.inf}, ValueError, "scale must be finite in float32, got inf"),
        ({"groups": 3, "position": torch.zeros(4)}, ValueError, r"position must have shape \[12\], .* got \[4\]"),
        ({"groups": 3, "position": torch.zeros(13)}, ValueError, r"position must have shape \[12\], .* got \[13\]"),
        ({"groups": 3, "position": torch.zeros(12, dtype=torch.float64)}, TypeError, "position must have the dtype"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^group_bilinear: {message}"):
        ops.group_bilinear(torch.zeros(2, 12, 3, 4), **options)


def test_groups_of_too_many_channels() -> None:
    with pytest.raises(ValueError, match="groups must leave at most 1024 channels in a group, got 1 for 1025"):
        ops.group_bilinear(torch.zeros(1, 1025, 1, 1), 1)
    assert ops.group_bilinear(torch.ones(1, 1024, 1, 1), 1, out_channels=3).shape == (1, 3, 1, 1)


# --- the module -------------------------------------------------------------------------------------------------------


def test_the_block_starts_as_the_identity() -> None:
    block, features = nn.GroupBilinear2d(128, 8), torch.randn(2, 128, 5, 4)
    assert torch.equal(block(features), features)
    assert not block.norm.weight.any()
    block(features).sum().backward()
    assert block.norm.weight.grad.any()  # from there it can learn


def test_the_block_adds_the_normalised_response() -> None:
    block, features = nn.GroupBilinear2d(128, 8, scale=0.1).eval(), torch.randn(2, 128, 5, 4)
    torch.nn.init.ones_(block.norm.weight)
    response = ops.group_bilinear(features, 8, position=position_code(128, 8), scale=0.1)
    torch.testing.assert_close(block.bilinear(features), response)
    torch.testing.assert_close(block(features), features + response / math.sqrt(1 + block.norm.eps))


def test_the_position_code() -> None:
    """sin(t) for even k, cos(t) for odd k, with t = g / 1.5^(2k/p)."""
    code = position_code(24, 4).view(4, 6)
    for group in range(4):
        for channel in range(6):
            t = group / 1.5 ** (2 * channel / 6)
            expected = math.cos(t) if channel % 2 else math.sin(t)
            assert code[group, channel].item() == pytest.approx(expected, abs=1e-7)


def test_the_code_of_the_public_implementation() -> None:
    """At the last site its 32 groups share two codes; elsewhere it is the formula's."""
    code = nn.GroupBilinear2d(2048, 32, position="upstream").position.view(32, 64)
    assert len(code.unique(dim=0)) == 2
    assert torch.equal(code.view(16, 128), position_code(128, 8).expand(16, 128))
    assert len(nn.GroupBilinear2d(2048, 32).position.view(32, 64).unique(dim=0)) == 32
    assert torch.equal(nn.GroupBilinear2d(256, 16, position="upstream").position, position_code(256, 16))
    assert nn.GroupBilinear2d(256, 16, position=None).position is None


def test_the_code_is_no_state() -> None:
    block = nn.GroupBilinear2d(16, 4)
    assert all(name.startswith("norm.") for name in block.state_dict())
    block.load_state_dict(nn.GroupBilinear2d(16, 4, position=None).state_dict())
    half = nn.GroupBilinear2d(16, 4).half()
    assert half.position.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 5), "groups must divide the 12 channels, got 5"),
        ((12, 0), "groups must be at least 1, got 0"),
        ((12, 3, "learned"), "position must be one of formula, upstream, None, got 'learned'"),
    ],
)
def test_bad_arguments_of_the_block(arguments: tuple[object, ...], message: str) -> None:
    channels, groups, *position = arguments
    with pytest.raises(ValueError, match=f"^GroupBilinear2d: {message}"):
        nn.GroupBilinear2d(channels, groups, **({"position": position[0]} if position else {}))


def test_the_block_says_what_it_is() -> None:
    assert "channels=16, groups=4, position='formula', scale=0.5" in repr(nn.GroupBilinear2d(16, 4, scale=0.5))
