"""What is said of the semantic grouping loss, beyond every operator's contract."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fgvc_ext import nn, ops, reference

SITES = ((256, 16), (512, 16), (2048, 32))


def correlations(features: Tensor) -> Tensor:
    """co, and Z [N,C,H·W], in the words of the spec."""
    values = features.double().flatten(2) + 1e-3
    directions = values / (values.square().sum(2, keepdim=True) + 1e-10).sqrt()
    return torch.einsum("bip,bjp->ij", directions, directions) / len(features)


def grouping(channels: int, groups: int) -> Tensor:
    group = torch.arange(channels) // (channels // groups)
    return (group[:, None] == group).double()


def factor(channels: int) -> float:
    return 1e-3 / (channels / 512) ** 2


@pytest.mark.parametrize(("site", "expected"), zip(SITES, (15.36, 15.87, 8.06), strict=True))
def test_orthogonal_channels(site: tuple[int, int], expected: float) -> None:
    """Each responds at one place of its own: co = 1."""
    channels, groups = site
    features = (torch.eye(channels) - 1e-3).view(1, channels, channels, 1)
    assert ops.semantic_grouping_loss(features, groups).item() == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("site", "expected"), zip(SITES, (245.8, 245.8, 254.0), strict=True))
def test_equal_channels(site: tuple[int, int], expected: float) -> None:
    channels, groups = site
    features = torch.rand(2, 1, 3, 3).expand(2, channels, 3, 3)
    assert ops.semantic_grouping_loss(features, groups).item() == pytest.approx(expected, abs=5e-2)


def test_a_perfect_grouping_has_no_loss() -> None:
    groups = torch.eye(4).view(1, 4, 4, 1).repeat_interleave(8, dim=1) - 1e-3
    assert ops.semantic_grouping_loss(groups, 4).item() == pytest.approx(0, abs=1e-6 * factor(32) * 32**2)
    # In groups of half the size, 4 of the 8 channels that each is equal to are foreign.
    assert ops.semantic_grouping_loss(groups, 8).item() == pytest.approx(32 * 4 * factor(32), rel=1e-5)


def test_the_identity_of_the_spec() -> None:
    """Σ (co − gt)² = |co|² − 2/B · Σ_b Σ_g |Σ_{i in g} Z_bi|² + G p²."""
    features, groups = torch.randn(3, 24, 5, 4, dtype=torch.float64).relu(), 6
    values = features.flatten(2) + 1e-3
    directions = values / (values.square().sum(2, keepdim=True) + 1e-10).sqrt()
    within = directions.unflatten(1, (groups, 4)).sum(2).square().sum()
    expected = correlations(features).square().sum() - 2 / 3 * within + groups * 4**2
    loss = ops.semantic_grouping_loss(features, groups)
    torch.testing.assert_close(loss, factor(24) * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (64, 8), (65, 5), (200, 8)])
def test_the_formula(channels: int, groups: int, instruction_set: str) -> None:
    features = torch.randn(3, channels, 6, 5).relu()
    expected = factor(channels) * (correlations(features) - grouping(channels, groups)).square().sum()
    loss = ops.semantic_grouping_loss(features, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_formula() -> None:
    """dZ_b = (4k/B) R Z_b and dU = (dZ − Z <Z, dZ>) / |V|."""
    features, groups = torch.randn(2, 70, 4, 3, dtype=torch.float64).relu().requires_grad_(), 7
    (3 * ops.semantic_grouping_loss(features, groups)).backward()
    values = features.detach().flatten(2) + 1e-3
    length = (values.square().sum(2, keepdim=True) + 1e-10).sqrt()
    z = values / length
    residual = correlations(features.detach()) - grouping(70, groups)
    dz = 3 * 4 * factor(70) / 2 * residual @ z
    expected = (dz - z * (z * dz).sum(2, keepdim=True)) / length
    torch.testing.assert_close(features.grad.flatten(2), expected, rtol=1e-10, atol=1e-12)


def test_the_number_of_samples_is_the_real_one() -> None:
    """A batch of one sample twice has the loss of the sample."""
    features = torch.rand(1, 12, 4, 4)
    one, two = (ops.semantic_grouping_loss(x, 3) for x in (features, features.expand(2, -1, -1, -1)))
    torch.testing.assert_close(one, two)


def test_dead_channels_are_the_constant_direction() -> None:
    features = torch.rand(2, 8, 3, 3)
    features[:, 2:4] = 0
    constant = features.clone()
    constant[:, 2:4] = 0.7
    one, other = (ops.semantic_grouping_loss(x, 2) for x in (features, constant))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dead", [[5, 6, 7], list(range(18))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_dead_channels(dead: list[int], dtype: torch.dtype) -> None:
    """They are finite, and those of the reference in float64."""
    features = torch.rand(2, 18, 7, 6, dtype=dtype)
    features[:, dead] = 0
    exact = features.double().requires_grad_()
    features.requires_grad_()
    ops.semantic_grouping_loss(features, 3).backward()
    reference.semantic_grouping_loss(exact, 3).backward()
    assert exact.grad.abs().max() > 50 or len(dead) == 18  # there the directions are equal, and nothing can change
    atol = (1e-5 if dtype == torch.float32 else 1e-13) * 4 * factor(18) * 18 / (1e-3 * 42**0.5)
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=0, atol=atol)


def test_equal_maps_have_hardly_a_gradient() -> None:
    features = torch.rand(2, 1, 4, 4).repeat(1, 12, 1, 1).requires_grad_()
    ops.semantic_grouping_loss(features, 3).backward()
    assert features.grad.abs().max() < 1e-5 * 4 * factor(12) * 12


def test_it_is_not_additive_over_samples() -> None:
    features = torch.rand(2, 8, 3, 3)
    parts = [ops.semantic_grouping_loss(part, 2) for part in features.split(1)]
    assert (ops.semantic_grouping_loss(features, 2) - sum(parts) / 2).abs() > 1e-4


@pytest.mark.parametrize("function", [ops.semantic_grouping_loss, reference.semantic_grouping_loss])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_has_no_direction_gives_nan(bad: float, function: Callable[[Tensor, int], Tensor]) -> None:
    features = torch.rand(2, 6, 3, 3)
    features[1, 4, 0, 2] = bad
    features.requires_grad_()
    loss = function(features, 2)
    loss.backward()
    assert loss.isnan()
    assert features.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_stores(dtype: torch.dtype) -> None:
    features = torch.rand(2, 40, 5, 5).to(dtype).requires_grad_()
    loss = ops.semantic_grouping_loss(features, 4)
    loss.backward()
    exact = features.detach().double().requires_grad_()
    ops.semantic_grouping_loss(exact, 4).backward()
    assert loss.dtype == torch.float32
    assert features.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=eps, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (5, ValueError, "groups must divide the 12 channels of features, got 5"),
        (0, ValueError, "groups must be at least 1, got 0"),
        ("2", TypeError, "groups must be an int, got str"),
    ],
)
def test_bad_arguments(groups: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^semantic_grouping_loss: {message}"):
        ops.semantic_grouping_loss(torch.zeros(2, 12, 3, 4), groups)


def test_no_samples() -> None:
    features = torch.zeros(0, 12, 3, 3, requires_grad=True)
    loss = ops.semantic_grouping_loss(features, 3)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.shape == features.shape


def test_the_module_is_the_function() -> None:
    features = torch.rand(2, 12, 4, 5)
    assert torch.equal(nn.SemanticGroupingLoss(3)(features), ops.semantic_grouping_loss(features, 3))
    assert "groups=3" in repr(nn.SemanticGroupingLoss(3))
