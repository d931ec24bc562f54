"""What the operators keep between forward and backward: the bytes that their docstrings promise, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fgvc_ext import _library, ops

pytestmark = pytest.mark.skipif(not _library.has_schemas(), reason="the package has no compiled libraries")

N, C = 3, 5


def saved_by(function: Callable[[], Tensor]) -> list[Tensor]:
    """Every tensor that autograd packs for backward during the call."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert function().requires_grad, "the call built no graph"
    return saved


def new_bytes(saved: list[Tensor], *inputs: Tensor) -> int:
    """Bytes of the storages behind ``saved``, each once, without those that the inputs own anyway."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def holds(saved: list[Tensor], tensor: Tensor) -> bool:
    return any(one.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for one in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_k_max_pooling_saves_k_int16_a_map(k: int, dtype: torch.dtype) -> None:
    features = torch.randn(N, C, 7, 6, dtype=dtype, requires_grad=True)
    saved = saved_by(lambda: ops.global_k_max_pool(features, k))
    assert not holds(saved, features)
    assert new_bytes(saved, features) == N * C * k * 2


@pytest.mark.parametrize(("side", "index_bytes"), [((128, 256), 2), ((128, 257), 4)], ids=["32768", "32896"])
def test_k_max_pooling_widens_indices_only_for_large_maps(side: tuple[int, int], index_bytes: int) -> None:
    features = torch.randn(1, 2, *side, requires_grad=True)
    assert new_bytes(saved_by(lambda: ops.global_k_max_pool(features, 4)), features) == 2 * 4 * index_bytes


@pytest.mark.parametrize("weight_needs_grad", [False, True])
def test_k_max_pooling_saves_values_only_for_the_weight(weight_needs_grad: bool) -> None:
    k = 4
    features = torch.randn(N, C, 7, 6, requires_grad=True)
    weight = torch.randn(k, requires_grad=weight_needs_grad)
    saved = saved_by(lambda: ops.global_k_max_pool(features, k, weight))
    assert not holds(saved, features)
    expected = N * C * k * (2 + (4 if weight_needs_grad else 0))  # int16 indices, float32 values
    assert new_bytes(saved, features, weight) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", [(1, 1), (7, 7), (14, 14), (5, 9)], ids=str)
def test_diversify_saves_one_bit_an_element(side: tuple[int, int], dtype: torch.dtype) -> None:
    maps = torch.randn(N, C, *side, dtype=dtype, requires_grad=True)
    saved = saved_by(lambda: ops.diversify(maps, seed=0))
    assert not holds(saved, maps)
    assert new_bytes(saved) == N * C * -(-side[0] * side[1] // 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)])
def test_gradient_boosting_cross_entropy_saves_four_numbers_a_sample(
    dtype: torch.dtype, number: int, reduction: str
) -> None:
    scores, target = torch.randn(N, 40, dtype=dtype, requires_grad=True), torch.arange(N)
    saved = saved_by(lambda: ops.gradient_boosting_cross_entropy(scores, target, k=5, reduction=reduction))
    assert holds(saved, scores), "scores must be saved as they are, not as a copy"
    assert holds(saved, target)
    assert new_bytes(saved, scores, target) == 4 * N * number


def test_nothing_is_saved_where_no_gradient_is_asked_for() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda tensor: tensor):
        ops.global_k_max_pool(torch.randn(N, C, 7, 6), 4)
        ops.diversify(torch.randn(N, C, 7, 6), seed=0)
        ops.gradient_boosting_cross_entropy(torch.randn(N, 40), torch.arange(N))
    assert not saved
