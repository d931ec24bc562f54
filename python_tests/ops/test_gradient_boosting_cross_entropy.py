"""What the paper says of gradient-boosting cross-entropy, beyond the contract that every operator keeps."""

import contextlib
import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import fgvc_ext
from fgvc_ext import _library, nn, ops

MODULE = importlib.import_module("fgvc_ext.ops.gradient_boosting_cross_entropy")  # its name in `ops` is the function's


def test_an_example_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0, 3.0, 0.5]], requires_grad=True)
    loss = ops.gradient_boosting_cross_entropy(scores, torch.tensor([0]), k=1)
    total = math.exp(2) + math.exp(3)
    assert loss.item() == pytest.approx(-2 + math.log(total))
    loss.backward()
    expected = [math.exp(2) / total - 1, 0, math.exp(3) / total, 0]
    assert scores.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_all_ties_at_the_threshold_count() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0, -5.0]])
    loss = ops.gradient_boosting_cross_entropy(scores, torch.tensor([0]), k=2)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.e))


@pytest.mark.parametrize("k", [36, 37, 5000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_with_all_negatives_it_is_cross_entropy(k: int, reduction: str) -> None:
    scores, target = torch.randn(5, 37), torch.tensor([3, -100, 0, 36, 7])
    ours = ops.gradient_boosting_cross_entropy(scores, target, k=k, reduction=reduction)
    torch.testing.assert_close(ours, F.cross_entropy(scores, target, reduction=reduction))


def test_with_one_negative_less_it_is_not() -> None:
    scores, target = torch.randn(5, 37), torch.tensor([3, 1, 0, 36, 7])
    ours = ops.gradient_boosting_cross_entropy(scores, target, k=35)
    assert ours < F.cross_entropy(scores, target)


def test_the_gradient_is_boosted_for_confusing_negatives_only() -> None:
    """Eq. 16: at the k most confusing classes the gradient is larger than cross-entropy's, elsewhere it is zero."""
    scores, target = torch.randn(8, 50, dtype=torch.float64), torch.arange(8)
    grads = {}
    for name, k in (("ours", 5), ("plain", 50)):
        leaf = scores.clone().requires_grad_()
        ops.gradient_boosting_cross_entropy(leaf, target, k=k).backward()
        grads[name] = leaf.grad
    negatives = ~F.one_hot(target, 50).bool()
    kept = (grads["ours"] != 0) & negatives
    assert kept.sum(1).tolist() == [5] * 8
    assert (grads["ours"][kept] > grads["plain"][kept]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ignored_rows_are_not_looked_at(value: float) -> None:
    scores = torch.randn(3, 20)
    scores[1] = value
    scores.requires_grad_()
    loss = ops.gradient_boosting_cross_entropy(scores, torch.tensor([1, -100, 2]))
    loss.backward()
    assert loss.isfinite()
    assert (scores.grad[1] == 0).all()


def test_all_ignored_is_what_cross_entropy_gives() -> None:
    scores, target = torch.randn(3, 20), torch.full((3,), -100)
    assert ops.gradient_boosting_cross_entropy(scores, target).isnan()
    assert ops.gradient_boosting_cross_entropy(scores, target, reduction="sum") == 0
    assert ops.gradient_boosting_cross_entropy(scores, target, reduction="none").tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("label", [20, -1, -101, 2**40])
def test_a_bad_label_is_an_index_error_that_names_the_first(label: int, backend: str) -> None:
    target = torch.tensor([0, -100, label, 99])
    with (
        fgvc_ext.use_reference() if backend == "reference" else contextlib.nullcontext(),
        pytest.raises(IndexError, match=rf"target\[2\] = {label} is not in \[0, 20\), the range of 20 classes"),
    ):
        ops.gradient_boosting_cross_entropy(torch.randn(4, 20), target)


def test_a_wrong_label_on_a_device_gives_nan_in_its_own_row() -> None:
    """Where looking would wait: the CUDA kernel under emulation does the same, see test_emulation.py."""
    from fgvc_ext.reference import gradient_boosting_cross_entropy as plain

    scores = torch.randn(3, 20, requires_grad=True)
    function = torch.compile(plain, backend="aot_eager", fullgraph=True)  # compiled, the reference does not look either
    losses = function(scores, torch.tensor([0, 20, 3]), reduction="none")
    losses.nansum().backward()
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("label", [20, -1, 2**40])
def test_a_wrong_label_on_cuda_gives_nan_in_its_own_row(label: int) -> None:
    scores = torch.randn(3, 20, device="cuda", requires_grad=True)
    losses = ops.gradient_boosting_cross_entropy(scores, torch.tensor([0, label, 3], device="cuda"), reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert scores.grad.isnan().all(dim=1).tolist() == [False, True, False]
    assert scores.grad[::2].isfinite().all()


def test_looking_at_labels_names_the_first_wrong_one() -> None:
    look_at_labels = MODULE.look_at_labels
    with pytest.raises(
        IndexError, match=r"^op: target\[2\] = 20 is not in \[0, 20\), the range of 20 classes, nor ignore_index = -100"
    ):
        look_at_labels("op", "target", torch.tensor([0, -100, 20, -1]), 20, -100)
    with pytest.raises(IndexError, match=r"^op: labels\[1\] = -1 is not in \[0, 20\), the range of 20 classes$"):
        look_at_labels("op", "labels", torch.tensor([0, -1, 20]), 20)
    look_at_labels("op", "target", torch.tensor([0, 7, 19]), 20, -100)
    look_at_labels("op", "target", torch.tensor([0, 99, 19]), 20, 99)


@pytest.mark.parametrize("asked", [True, False])
def test_labels_on_another_device_are_looked_at_where_that_is_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which nothing can look at: only the call is recorded."""
    calls = []
    monkeypatch.setattr(_library, "_labels_checked", asked)
    monkeypatch.setattr(MODULE, "look_at_labels", lambda *arguments: calls.append(arguments))
    scores, target = torch.empty(3, 20, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with fgvc_ext.use_reference():
        ops.gradient_boosting_cross_entropy(scores, target, ignore_index=7)
    assert calls == ([(MODULE.OP, "target", target, 20, 7)] if asked else [])


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False")])
def test_the_environment_asks_for_it(value: str, expected: str) -> None:
    code = "from fgvc_ext import _library; print(_library.check_labels())"
    environment = {**os.environ, "FGVC_EXT_CHECK": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_wrong_label_on_cuda_is_an_error_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_labels_checked", True)
    scores, target = torch.randn(3, 20, device="cuda"), torch.tensor([0, 20, 3], device="cuda")
    with pytest.raises(IndexError, match=r"target\[1\] = 20 is not in \[0, 20\)"):
        ops.gradient_boosting_cross_entropy(scores, target)


def test_half_precision_gives_float32_losses() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        scores = torch.randn(4, 30).to(dtype).requires_grad_()
        loss = ops.gradient_boosting_cross_entropy(scores, torch.arange(4))
        loss.backward()
        assert loss.dtype == torch.float32
        assert scores.grad.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
            {},
            ValueError,
            r"target must have shape \[2\], .* got \[3\]",
        ),
        ((torch.zeros(2, 3), torch.zeros(2)), {}, TypeError, "target must be of dtype int64, got float32"),
        (
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
            {},
            TypeError,
            "target must be of dtype int64, got int32",
        ),
        ((torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)), {}, ValueError, "scores must have at least one class"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), {"k": 0}, ValueError, "k must be at least 1, got 0"),
        (
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
            {"reduction": "average"},
            ValueError,
            "reduction must be one of none, mean, sum, got 'average'",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64, device="meta")),
            {},
            ValueError,
            "target must be on the device of scores",
        ),
    ],
)
def test_bad_arguments(
    arguments: tuple[torch.Tensor, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"gradient_boosting_cross_entropy: {message}"):
        ops.gradient_boosting_cross_entropy(*arguments, **options)


@pytest.mark.skipif(not _library.has_schemas(), reason="the package has no compiled libraries")
def test_a_million_rows_reduce_accurately() -> None:
    scores = torch.zeros(1_000_000, 2)
    loss = ops.gradient_boosting_cross_entropy(scores, torch.zeros(1_000_000, dtype=torch.int64))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_module_is_the_function() -> None:
    scores, target = torch.randn(4, 30), torch.arange(4)
    module = nn.GradientBoostingCrossEntropyLoss(k=3, reduction="sum")
    assert torch.equal(
        module(scores, target), ops.gradient_boosting_cross_entropy(scores, target, k=3, reduction="sum")
    )
    assert "k=3, reduction='sum'" in repr(module)
