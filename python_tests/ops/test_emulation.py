"""The CUDA sources, compiled for the CPU by `csrc/emulation`, against the reference.

The shared table of samples runs through the public functions with the emulated CUDA kernels in place of the CPU
kernels, forward and backward, under several schedules of threads and blocks: the results must be right, and the same
bits under each. After it stands what the table has no room for: exact ranks, large maps, unaligned memory, what CUDA
does with a wrong label.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fgvc_ext import _library, ops, reference

from .comparison import assert_follows, assert_same_bits, map_first, run
from .generators import DTYPES, arrange, random
from .spec import SPECS, Sample, Spec
from .test_contract import poisoned

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
K_MAX_POOLING = next(spec for spec in SPECS if spec.name == "global_k_max_pool")
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def check(spec: Spec, sample: Sample, each_schedule: EachSchedule, cancelling: float = 0.0) -> None:
    results = each_schedule(lambda: run(spec.function, sample))
    for schedule, result in zip(SCHEDULES, results, strict=True):
        assert_same_bits(result, results[0], f"{sample.name}, schedule {schedule}")
    with Emulation():
        assert_follows(spec.function, spec.reference, sample, cancelling)


def with_first(sample: Sample, first: Tensor) -> Sample:
    """The sample with another first tensor. Where that is the first of a list, the others take its dtype."""
    value = sample.tensors[sample.first]
    given = [first, *(one.to(first.dtype) for one in value[1:])] if isinstance(value, list) else first
    return replace(sample, tensors={**sample.tensors, sample.first: given})


@each_spec
@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_equals_the_reference(spec: Spec, layout: str, dtype: torch.dtype, each_schedule: EachSchedule) -> None:
    if layout not in spec.layouts:
        pytest.skip("not a layout of this operator")
    for sample in spec.samples(dtype, "cpu", layout):
        check(spec, sample, each_schedule)


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_is_not_aligned(spec: Spec, dtype: torch.dtype, each_schedule: EachSchedule) -> None:
    def shifted(first: Tensor) -> Tensor:
        memory = torch.full((first.numel() + 1,), float("nan"), dtype=dtype)
        return memory[1:].view(first.shape).copy_(first)

    for sample in spec.samples(dtype, "cpu", "contiguous"):
        check(spec, map_first(sample, shifted), each_schedule)


@each_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities(spec: Spec, value: float, each_schedule: EachSchedule) -> None:
    for sample in spec.samples(torch.float32, "cpu", "contiguous"):
        check(spec, poisoned(sample, value), each_schedule)


@each_spec
def test_empty(spec: Spec) -> None:
    torch.ops.load_library(str(LIBRARY))
    for sample in spec.empty():
        with Emulation():
            assert_follows(spec.function, spec.reference, sample)


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


def ranks(features: Tensor, k: int) -> Tensor:
    return features.flatten(2).sort(dim=2, descending=True, stable=True).indices[:, :, :k]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 8, 16, 17, 32, 33, 72])
def test_k_max_pooling_ranks_like_a_stable_sort(
    k: int, dtype: torch.dtype, layout: str, each_schedule: EachSchedule
) -> None:
    features = ties_and_what_is_not_finite(layout, dtype)
    for _, indices, _ in each_schedule(lambda: torch.ops.fgvc_ext.global_k_max_pool(features, k, None, False)):
        assert torch.equal(indices.long(), ranks(features, k))


@pytest.mark.parametrize("values", ["normal", "dead", "sparse", "rising", "falling", "two values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "side"), [(4, 14), (32, 28), (4, 56), (32, 56), (1100, 56)])
def test_ranks_of_maps_with_many_ties(
    k: int, side: int, dtype: torch.dtype, values: str, each_schedule: EachSchedule
) -> None:
    """Candidates by the dozen in each warp; maps of several tiles, of several warps, of several windows of ranks."""
    features = random(1, 5, side, side, dtype=torch.float32, device="cpu")
    features = {
        "normal": features,
        "dead": features.relu() * 0,
        "sparse": (features - 2.5).relu(),
        "rising": torch.arange(features.numel()).view(features.shape) / 64,
        "falling": -torch.arange(features.numel()).view(features.shape) / 64,
        "two values": (features > 1).float(),
    }[values].to(dtype)  # fmt: skip
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = features.contiguous(memory_format=layout)
        with Emulation():
            output, indices, _ = torch.ops.fgvc_ext.global_k_max_pool(maps, k, None, False)
        assert torch.equal(indices.long(), ranks(features, k))
        expected = features.flatten(2).double().gather(2, ranks(features, k)).mean(dim=2)
        assert torch.allclose(output.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_small_words_hold_every_16_bit_float(each_schedule: EachSchedule) -> None:
    """Key and position share a word where values have 16 bits: the order of all of them, subnormal ones too."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)[torch.randperm(2**16)].view(256, 16, 4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        features = bits.view(dtype)
        for _, indices, _ in each_schedule(lambda f=features: torch.ops.fgvc_ext.global_k_max_pool(f, 16, None, False)):
            assert torch.equal(indices.long(), ranks(features, 16))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_indices_that_are_not_of_these_maps_are_skipped(
    dtype: torch.dtype, layout: torch.memory_format, each_schedule: EachSchedule
) -> None:
    stride = torch.empty(1, 3, 7, 6).to(memory_format=layout).stride()
    for k in (3, 40):
        indices = torch.arange(k).repeat(1, 3, 1).to(torch.int16)
        indices[0, 0, 0], indices[0, 1, 1], indices[0, 2, 2] = -1, 42, 32767
        grad = torch.full((1, 3), float(k), dtype=dtype)
        arguments = grad, indices, None, None, [1, 3, 7, 6], list(stride), True, False
        for features, _ in each_schedule(lambda a=arguments: torch.ops.fgvc_ext.global_k_max_pool_backward(*a)):
            expected = torch.zeros(3, 42, dtype=dtype)
            expected[:, :k] = 1
            expected[0, 0] = expected[1, 1] = expected[2, 2] = 0
            assert torch.equal(features.flatten(2)[0], expected)


PADDED = {
    "rows left out": lambda maps: maps[:, :, :7],
    "columns left out": lambda maps: maps[..., :7],
    "channels left out": lambda maps: maps[:, 1:14],
    "one map": lambda maps: maps[:1, 3:4, :7],
    "every other channel": lambda maps: maps[:, ::2],
}


@each_spec
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_maps(spec: Spec, dtype: torch.dtype, layout: torch.memory_format, each_schedule: EachSchedule) -> None:
    """Maps that begin or end where a wide access may not: what lies between them is NaN."""
    if not spec.image_like:
        pytest.skip("not a 4-D input")
    for name, part in PADDED.items():
        memory = torch.full((2, 17, 9, 8), float("nan"), dtype=dtype).contiguous(memory_format=layout)
        view = part(memory)[:, : spec.channels]
        if spec.channels not in (None, view.shape[1]):
            continue
        view.copy_(random(*view.shape, dtype=dtype, device="cpu"))
        sample = replace(spec.of_size(tuple(view.shape), "cpu"), name=name)
        sample = with_first(sample, view)
        check(spec, sample, each_schedule, spec.cancelling(sample))


@each_spec
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_that_do_not_fill_a_block(spec: Spec, layout: str, each_schedule: EachSchedule) -> None:
    if not spec.image_like:
        pytest.skip("not a 4-D input")
    for channels in (1, 7, 9, 33):
        sample = spec.of_size((2, channels, 28, 28), "cpu")
        sample = map_first(sample, lambda first: arrange(first, layout))
        check(spec, sample, each_schedule, spec.cancelling(sample))


@each_spec
def test_indices_beyond_32_bits(spec: Spec, each_schedule: EachSchedule) -> None:
    """Two samples 2**31 elements apart, of which only these few are ever touched."""
    if not spec.image_like:
        pytest.skip("not a 4-D input")
    sample = spec.of_size((2, 10, 8, 7), "cpu")
    memory = torch.empty(2**31 + 2000, dtype=torch.bfloat16)
    for stride in ((56, 7, 1), (1, 80, 10)):
        maps = memory.as_strided((2, 10, 8, 7), (2**31, *stride))[:, : spec.channels]
        maps.copy_(random(*maps.shape, dtype=torch.bfloat16, device="cpu"))
        check(spec, with_first(sample, maps), each_schedule)


def test_k_max_pooling_of_a_map_beyond_int16_indices(each_schedule: EachSchedule) -> None:
    features = random(1, 2, 181, 182, dtype=torch.float32, device="cpu")
    check(K_MAX_POOLING, Sample("large", {"features": features}, ("features",), {"k": 4}), each_schedule)
    with Emulation():
        assert torch.ops.fgvc_ext.global_k_max_pool(features, 4, None, False, True)[1].dtype == torch.int32
        with pytest.raises(RuntimeError, match="need wide indices"):
            torch.ops.fgvc_ext.global_k_max_pool(features, 4, None, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_maps_than_one_chunk_of_the_weight_gradient(dtype: torch.dtype, each_schedule: EachSchedule) -> None:
    """Above 1024 maps the gradient of the weights is added up in two stages."""
    tensors = {
        "features": random(3, 1400, 1, 2, dtype=dtype, device="cpu"),
        "weight": random(2, dtype=torch.float32, device="cpu", seed=1),
    }
    check(K_MAX_POOLING, Sample("many maps", tensors, ("features", "weight"), {"k": 2}), each_schedule)


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


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("wrong", [0, 2, 6])  # also the first sample of its class, whose block leads
@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_class_mean_label_out_of_range_spoils_its_own_rows_only(
    label: int, wrong: int, normalize: bool, each_schedule: EachSchedule
) -> None:
    embeddings = random(7, 6, dtype=torch.float32, device="cpu")
    labels, class_means = torch.tensor([0, 3, 0, 4, 3, 1, 4]), random(5, 6, dtype=torch.float32, device="cpu", seed=1)
    options = {"margin": 30.0, "normalize": normalize}
    others = torch.arange(7) != wrong

    def losses_and_gradients(rows: Tensor, labels: Tensor) -> list[Tensor]:
        leaf = embeddings[rows].clone().requires_grad_()
        losses = ops.class_mean_loss(leaf, labels, class_means, **options)
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses[:2]]
        return [*(value.detach() for value in losses), *gradients]

    with Emulation():
        absent = losses_and_gradients(others, labels[others])
    bad = labels.clone()
    bad[wrong] = label
    for within, between, *rows in each_schedule(lambda: losses_and_gradients(others | ~others, bad)):
        assert within.isnan()
        torch.testing.assert_close(between, absent[1])
        # The mean over the samples still counts the one that is spoilt: the gradient of `within` is that much smaller.
        for found, expected, factor in zip(rows, absent[2:], (1, 6 / 7, 1), strict=True):
            assert torch.equal(found.isnan().all(dim=1), ~others)
            torch.testing.assert_close(found[others], expected * factor)
            assert expected.any()


def test_a_wrong_label_in_backward_alone_gives_nan(each_schedule: EachSchedule) -> None:
    scores = random(3, 10, dtype=torch.float32, device="cpu")
    rows = torch.ops.fgvc_ext.gradient_boosting_cross_entropy(scores, torch.tensor([1, 2, 3]), 3, 1, -100)[1]
    arguments = torch.ones(()), scores, torch.tensor([1, 10, 3]), rows
    for grad in each_schedule(lambda: torch.ops.fgvc_ext.gradient_boosting_cross_entropy_backward(*arguments)):
        assert grad.isnan().all(dim=1).tolist() == [False, True, False]


def test_the_sum_of_many_losses_loses_nothing() -> None:
    """Added up in float, as many losses would be off by several roundings; in double they are not."""
    torch.ops.load_library(str(LIBRARY))
    first = torch.zeros(150_000)
    first[::3] = 7
    scores, target = torch.stack([first, first.roll(1)], dim=1), torch.zeros(len(first), dtype=torch.int64)
    with Emulation():
        total = ops.gradient_boosting_cross_entropy(scores, target, reduction="sum")
    losses = torch.nn.functional.cross_entropy(scores, target, reduction="none").double()
    assert abs(total.double() - losses.sum()) <= 2 * torch.finfo(torch.float32).eps * losses.sum()


def test_an_error_in_a_launch_reaches_python(each_schedule: EachSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.ones(1, 1, 2, 2)
    torch.ops.load_library(str(LIBRARY))
    with monkeypatch.context() as context:
        context.setenv("FGVC_EXT_EMULATION_SCHEDULE", "sideways")
        with Emulation(), pytest.raises(Exception, match="expected forward, reverse or random:SEED, got sideways"):
            ops.global_k_max_pool(features, 1)
    for result in each_schedule(lambda: ops.global_k_max_pool(features, 1)):  # and the next call works
        assert result.item() == 1
