"""The CUDA sources, compiled for the CPU by `csrc/emulation`, against the reference.

The shared table of samples runs through the public functions with the emulated CUDA kernels in place of the CPU
kernels, forward and backward, under several schedules of threads and blocks: the results must be right, and the same
bits under each. After it stands what the table has no room for: exact ranks, large maps, unaligned memory, what CUDA
does with a wrong label.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fgvc_ext import _library, ops, reference

from .comparison import assert_follows, assert_same_bits, run
from .samples import DTYPES, OPERATORS, Operator, Sample, random

LIBRARY = _library.FOLDER / "libfgvc_ext_emulated.so"
SCHEDULES = ("forward", "reverse", "random:1", "random:2")
# Dtypes decide how many elements an access moves, layouts how it finds them: not every pair of the two is a case.
CASES = [
    *(("contiguous", dtype) for dtype in DTYPES),
    ("channels_last", torch.bfloat16),
    ("sliced", torch.float32),
    ("transposed", torch.float16),
    ("expanded", torch.float64),
]

pytestmark = [
    pytest.mark.skipif(not _library.has_schemas(), reason="the package has no compiled libraries"),
    pytest.mark.skipif(
        not LIBRARY.exists(), reason="to emulate CUDA, build with FGVC_EXT_CMAKE_ARGS=-DFGVC_EXT_EMULATION=ON"
    ),
]


class Emulation(TorchDispatchMode):
    """While entered, fgvc_ext's operators run the emulated CUDA kernels; autograd and checks stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fgvc_ext":
            name = str(function).split(".")[1]
            self.calls.append(name)
            function = getattr(torch.ops.fgvc_ext_emulated, name).default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def each_schedule(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    """Calls a function with the emulated kernels, once under each schedule."""
    torch.ops.load_library(str(LIBRARY))

    def call(function: Callable[[], Any]) -> list[Any]:
        results = []
        for schedule in SCHEDULES:
            monkeypatch.setenv("FGVC_EXT_EMULATION_SCHEDULE", schedule)
            with Emulation() as emulation:
                results.append(function())
            assert emulation.calls
        return results

    return call


EachSchedule = Callable[[Callable[[], Any]], list[Any]]
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def check(operator: Operator, sample: Sample, each_schedule: EachSchedule) -> None:
    results = each_schedule(lambda: run(operator.function, sample))
    for schedule, result in zip(SCHEDULES, results, strict=True):
        assert_same_bits(result, results[0], f"{sample.name}, schedule {schedule}")
    with Emulation():
        assert_follows(operator.function, operator.reference, sample)


def with_first(sample: Sample, first: Tensor) -> Sample:
    """The sample with another first tensor."""
    tensors = {**sample.tensors, next(iter(sample.tensors)): first}
    return Sample(sample.name, tensors, sample.differentiable, sample.options)


@each_operator
@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_equals_the_reference(operator: Operator, layout: str, dtype: torch.dtype, each_schedule: EachSchedule) -> None:
    if layout == "channels_last" and not operator.image_like:
        pytest.skip("not a 4-D input")
    for sample in operator.samples(dtype, "cpu", layout):
        check(operator, sample, each_schedule)


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_is_not_aligned(operator: Operator, dtype: torch.dtype, each_schedule: EachSchedule) -> None:
    for sample in operator.samples(dtype, "cpu"):
        first = next(iter(sample.tensors.values()))
        memory = torch.full((first.numel() + 1,), float("nan"), dtype=dtype)
        check(operator, with_first(sample, memory[1:].view(first.shape).copy_(first)), each_schedule)


@each_operator
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities(operator: Operator, value: float, each_schedule: EachSchedule) -> None:
    for sample in operator.samples(torch.float32, "cpu"):
        dirty = next(iter(sample.tensors.values())).clone()
        dirty.view(-1)[:: max(1, dirty.numel() // 5)] = value
        check(operator, with_first(sample, dirty), each_schedule)


@each_operator
def test_empty(operator: Operator) -> None:
    torch.ops.load_library(str(LIBRARY))
    for sample in operator.empty():
        with Emulation():
            assert_follows(operator.function, operator.reference, sample)


# --- what one operator promises beyond its reference ------------------------------------------------------------------


def ties_and_what_is_not_finite(layout: str, dtype: torch.dtype) -> Tensor:
    maps = (random(2, 9, 8, 9, dtype=dtype, device="cpu") * 2).round()
    maps[0, 0] = 0
    maps[0, 1] = torch.tensor([0.0, -0.0] * 36, dtype=dtype).view(8, 9)
    maps[0, 2, 3, 4] = float("nan")
    maps[0, 3] = float("nan")
    maps[0, 4] = float("-inf")
    maps[0, 5, 2:4] = float("inf")
    maps[0, 6] = -torch.arange(72, dtype=dtype).view(8, 9)
    maps[0, 7] = torch.arange(72, dtype=dtype).view(8, 9)
    return maps.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 8, 16, 72])
def test_k_max_pooling_ranks_like_a_stable_sort(
    k: int, dtype: torch.dtype, layout: str, each_schedule: EachSchedule
) -> None:
    features = ties_and_what_is_not_finite(layout, dtype)
    expected = features.flatten(2).sort(dim=2, descending=True, stable=True).indices[:, :, :k]
    for _, indices, _ in each_schedule(lambda: torch.ops.fgvc_ext.global_k_max_pool(features, k, None, False)):
        assert torch.equal(indices.long(), expected)


def test_k_max_pooling_of_a_map_beyond_int16_indices(each_schedule: EachSchedule) -> None:
    features = random(1, 2, 181, 182, dtype=torch.float32, device="cpu")
    check(OPERATORS[0], Sample("large", {"features": features}, ("features",), {"k": 4}), each_schedule)
    with Emulation():
        assert torch.ops.fgvc_ext.global_k_max_pool(features, 4, None, False, True)[1].dtype == torch.int32
        with pytest.raises(RuntimeError, match="need wide indices"):
            torch.ops.fgvc_ext.global_k_max_pool(features, 4, None, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_maps_than_one_chunk_of_the_weight_gradient(dtype: torch.dtype, each_schedule: EachSchedule) -> None:
    """Above 4096 maps the gradient of the weights is added up in two stages."""
    tensors = {
        "features": random(3, 1400, 1, 2, dtype=dtype, device="cpu"),
        "weight": random(2, dtype=torch.float32, device="cpu", seed=1),
    }
    check(OPERATORS[0], Sample("many maps", tensors, ("features", "weight"), {"k": 2}), each_schedule)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_suppression_mask_is_the_reference_s_bit_for_bit(
    dtype: torch.dtype, layout: str, each_schedule: EachSchedule
) -> None:
    maps = ties_and_what_is_not_finite(layout, dtype)
    for seed in (torch.tensor(-(2**62) + 12345), torch.tensor([3, 2**63 - 1])):
        expected = reference.suppression_mask(maps, seed=seed)
        for mask in each_schedule(lambda seed=seed: ops.suppression_mask(maps, seed=seed)):
            assert torch.equal(mask, expected)


def test_more_patches_than_shared_memory_holds(each_schedule: EachSchedule) -> None:
    maps = random(1, 3, 160, 160, dtype=torch.float32, device="cpu")
    expected = reference.suppression_mask(maps, patch_size=1, seed=torch.tensor(5))
    for mask in each_schedule(lambda: ops.suppression_mask(maps, patch_size=1, seed=5)):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("label", [10, -1, 2**40])
def test_a_label_out_of_range_gives_nan(label: int, each_schedule: EachSchedule) -> None:
    scores = random(3, 10, dtype=torch.float32, device="cpu")
    target = torch.tensor([1, label, 2])

    def losses_and_grad() -> tuple[Tensor, Tensor]:
        leaf = scores.clone().requires_grad_()
        losses = ops.gradient_boosting_cross_entropy(leaf, target, k=3, reduction="none")
        losses.sum().backward()
        return losses.detach(), leaf.grad

    for losses, grad in each_schedule(losses_and_grad):
        assert losses.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(dim=1).tolist() == [False, True, False]
        assert not grad[::2].isnan().any()


def test_an_error_in_a_launch_reaches_python(each_schedule: EachSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.ones(1, 1, 2, 2)
    torch.ops.load_library(str(LIBRARY))
    with monkeypatch.context() as context:
        context.setenv("FGVC_EXT_EMULATION_SCHEDULE", "sideways")
        with Emulation(), pytest.raises(Exception, match="expected forward, reverse or random:SEED, got sideways"):
            ops.global_k_max_pool(features, 1)
    for result in each_schedule(lambda: ops.global_k_max_pool(features, 1)):  # and the next call works
        assert result.item() == 1
