"""What every operator promises of its results, tried on every spec. test_gradients.py and test_graphs.py go on."""

import re

import pytest
import torch
from torch import Tensor

import fgvc_ext

from .comparison import Outcome, assert_follows, assert_same_bits, map_first, map_tensors, named_tensors, run
from .conftest import each_spec, needs_gpu, needs_libraries
from .generators import DTYPES, IMAGE_LAYOUTS, wide
from .spec import Sample, Spec

pytestmark = needs_libraries
each_layout = pytest.mark.parametrize("layout", IMAGE_LAYOUTS)


def on(sample: Sample, device: str) -> Sample:
    return map_tensors(sample, lambda tensor: tensor.to(device))


def samples(spec: Spec, dtype: torch.dtype = torch.float32, device: str = "cpu", layout: str = "") -> list[Sample]:
    layout = layout or "contiguous"
    if layout not in spec.layouts:
        pytest.skip("not a layout of this operator's input")
    return spec.samples(dtype, device, layout)


@each_spec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(spec: Spec, dtype: torch.dtype, instruction_set: str) -> None:
    for sample in samples(spec, dtype):
        assert_follows(spec.function, spec.reference, sample)


@pytest.mark.cuda
@needs_gpu
@each_spec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_layout
def test_equals_the_reference_on_cuda(spec: Spec, dtype: torch.dtype, layout: str) -> None:
    for sample in samples(spec, dtype, "cuda", layout):
        assert_follows(spec.function, spec.reference, sample)


@each_spec
def test_large_inputs_equal_the_reference(spec: Spec, device: str) -> None:
    for sample in spec.large():
        assert_follows(spec.function, spec.reference, on(sample, device))


@each_spec
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layouts(spec: Spec, layout: str, dtype: torch.dtype, instruction_set: str) -> None:
    for sample in samples(spec, dtype, "cpu", layout):
        assert_follows(spec.function, spec.reference, sample)


@each_spec
@each_layout
def test_results_like_the_input_keep_its_dense_layout(spec: Spec, layout: str, device: str) -> None:
    """Those of its size; also gradients."""
    for sample in samples(spec, torch.float32, device, layout)[:2]:
        tensors = dict(named_tensors(sample.tensors))
        image = next(iter(tensors.values()))
        if image.dim() != 4:
            pytest.skip("not a 4-D input")
        outcome = run(spec.function, sample)
        for name, result in outcome.results.items():
            if result.shape == image.shape:
                assert result.stride() == torch.empty_like(image).stride(), name
        for name, grad in outcome.gradients.items():
            if grad is not None and grad.dim() == 4:
                assert grad.stride() == torch.empty_like(tensors[name]).stride(), name


@each_spec
def test_results_and_gradients_have_the_dtypes_of_the_contract(spec: Spec, device: str) -> None:
    """Gradients come in each input's dtype; floating results in the first tensor's dtype or in that of sums."""
    for dtype in DTYPES:
        for sample in samples(spec, dtype, device):
            outcome = run(spec.function, sample)
            for name, tensor in named_tensors(sample.tensors):
                grad = outcome.gradients.get(name)
                assert grad is None or (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape), name
            for name, result in outcome.results.items():
                assert not result.is_floating_point() or result.dtype in (dtype, wide(dtype)), name


@each_spec
def test_autocast_changes_nothing(spec: Spec, device: str) -> None:
    """The operators take autocast's mixture of dtypes as it is, and accumulate in float32 whatever it says."""
    for sample in samples(spec, torch.bfloat16, device):
        plain = run(spec.function, sample)
        with torch.autocast(device, torch.bfloat16):
            assert_same_bits(run(spec.function, sample), plain, sample.name)


@each_spec
def test_same_bits_every_time_and_for_every_thread_count(spec: Spec, instruction_set: str, threads: None) -> None:
    for sample in [*samples(spec), *spec.large()]:
        torch.set_num_threads(1)
        one = run(spec.function, sample)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same_bits(run(spec.function, sample), one, f"{sample.name}, {count} threads")


@pytest.mark.cuda
@needs_gpu
@each_spec
def test_same_bits_every_time_on_cuda(spec: Spec) -> None:
    for sample in [*samples(spec, device="cuda"), *(on(sample, "cuda") for sample in spec.large())]:
        one = run(spec.function, sample)
        for _ in range(3):
            assert_same_bits(run(spec.function, sample), one, sample.name)


@each_spec
def test_empty(spec: Spec, device: str) -> None:
    for sample in spec.empty():
        empty = on(sample, device)
        assert_follows(spec.function, spec.reference, empty)
        for name, grad in run(spec.function, empty).gradients.items():
            assert not grad.any(), f"gradient of {name}"


@each_spec
def test_arguments_are_not_written_to(spec: Spec, device: str) -> None:
    for sample in samples(spec, torch.float32, device):
        before = {name: (tensor.clone(), tensor._version) for name, tensor in named_tensors(sample.tensors)}
        run(spec.function, sample)
        for name, tensor in named_tensors(sample.tensors):
            assert torch.equal(tensor, before[name][0]), name
            assert tensor._version == before[name][1], name


@each_spec
def test_use_reference_runs_the_reference(spec: Spec, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reference(*arguments: object, **options: object) -> None:
        raise ArithmeticError("the reference was called")

    monkeypatch.setattr(f"fgvc_ext.reference.{spec.name}", reference)
    sample = samples(spec, torch.float32, device)[0]
    with fgvc_ext.use_reference(), pytest.raises(ArithmeticError, match="was called"):
        spec.function(**sample.tensors, **sample.options)
    spec.function(**sample.tensors, **sample.options)


# --- what is not finite -----------------------------------------------------------------------------------------------


def poisoned(sample: Sample, value: float) -> Sample:
    """The sample with ``value`` at a few places of its first tensor."""

    def dirty(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[:: max(1, changed.numel() // 5)] = value
        return changed

    return map_first(sample, dirty)


def assert_follows_with_nan_and_infinities(spec: Spec, device: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        for sample in samples(spec, torch.float32, device):
            assert_follows(spec.function, spec.reference, poisoned(sample, value))


@each_spec
def test_nan_and_infinities_are_neither_lost_nor_fatal(spec: Spec, instruction_set: str) -> None:
    assert_follows_with_nan_and_infinities(spec, "cpu")


@pytest.mark.cuda
@needs_gpu
@each_spec
def test_nan_and_infinities_are_neither_lost_nor_fatal_on_cuda(spec: Spec) -> None:
    assert_follows_with_nan_and_infinities(spec, "cuda")


# --- errors -----------------------------------------------------------------------------------------------------------


def with_first(sample: Sample, value: object) -> dict[str, object]:
    """Keyword arguments of a call with another first argument."""
    return {**sample.tensors, **sample.options, sample.first: value}


def typical(spec: Spec) -> Sample:
    sample = samples(spec)[0]
    if isinstance(sample.tensors[sample.first], list):
        pytest.skip("the first argument is a list: the spec's faults say what is wrong with one")
    return sample


@each_spec
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_other_dtypes_are_refused_by_name(spec: Spec, dtype: torch.dtype) -> None:
    sample = typical(spec)
    got = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"{spec.name}: {sample.first} must be of dtype float32, .* got {got}"):
        spec.function(**with_first(sample, sample.tensors[sample.first].to(dtype)))


@each_spec
def test_other_shapes_and_types_are_refused_by_name(spec: Spec) -> None:
    sample = typical(spec)
    with pytest.raises(ValueError, match=rf"{spec.name}: {sample.first} must have shape {re.escape(spec.shape)}, got"):
        spec.function(**with_first(sample, sample.tensors[sample.first][0]))
    with pytest.raises(TypeError, match=f"{spec.name}: {sample.first} must be a tensor .* got list"):
        spec.function(**with_first(sample, [[1.0]]))


@each_spec
def test_sparse_tensors_are_refused_by_name(spec: Spec) -> None:
    sample = typical(spec)
    for name, tensor in sample.tensors.items():
        if isinstance(tensor, Tensor) and tensor.dim():
            with pytest.raises(TypeError, match=f"^{spec.name}: {name} .*strided"):
                spec.function(**{**sample.tensors, **sample.options, name: tensor.to_sparse()})


def test_an_outcome_names_what_it_holds() -> None:
    """The dictionary that comparisons go through: nothing of a result is left out."""
    outcome = Outcome({"loss": torch.ones(())}, {"x": None}, ("loss",))
    assert list(outcome.named()) == ["loss", "gradient of x"]
