"""What ELoPE says of the class-mean loss, beyond the contract that every operator keeps."""

import contextlib
import sys

import pytest
import torch
from torch import Tensor

import fgvc_ext
from fgvc_ext import _library, ops, reference
from fgvc_ext.ops import ClassMeanLosses

MODULE = sys.modules["fgvc_ext.ops.class_mean_loss"]  # ops.class_mean_loss is the function


def inputs(samples: int, classes: int, size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """float64 embeddings of length about one half, labels of the first classes, and unit means."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, size, generator=generator, dtype=torch.float64) / (2 * size**0.5)
    labels = torch.randint(0, max(1, classes - 1), (samples,), generator=generator)
    means = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    return embeddings, labels, means / means.norm(dim=1, keepdim=True)


def written_out(
    embeddings: Tensor, labels: Tensor, class_means: Tensor, alpha: float, margin: float, gamma: float, normalize: bool
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Eq. 6–10 with loops over classes, samples and pairs."""
    features = [row / row.norm() if normalize else row for row in embeddings]
    means = {}
    for label in sorted(set(labels.tolist())):
        mine = [feature for feature, other in zip(features, labels.tolist(), strict=True) if other == label]
        step = sum(class_means[label] - feature for feature in mine) / (1 + len(mine))
        means[label] = class_means[label] - alpha * step
    distances = [
        (feature - means[label]).square().sum() for feature, label in zip(features, labels.tolist(), strict=True)
    ]
    pairs = [(j, c) for j in means for c in means if j < c]
    hinges = [(margin - (means[j] - means[c]).square().sum()).clamp(min=0) ** 2 for j, c in pairs]
    between = gamma / (4 * len(pairs)) * sum(hinges) if pairs else torch.zeros((), dtype=torch.float64)
    return sum(distances) / (2 * len(features)), between, means


def test_an_example_by_hand() -> None:
    embeddings = torch.tensor([[2.0, 0.0], [1.0, 2.0], [0.0, 2.0]], requires_grad=True)
    class_means = torch.tensor([[1.0, 0.0], [float("nan"), 7.0], [0.0, 0.0]])
    losses = ops.class_mean_loss(embeddings, torch.tensor([2, 0, 2]), class_means, normalize=False)
    assert isinstance(losses, ClassMeanLosses)
    # class 2: (0,0) + 0.5·(2,2)/3; class 0: (1,0) + 0.5·(0,2)/2
    expected = torch.tensor([[1 / 3, 1 / 3], [1, 0.5], [1 / 3, 1 / 3]])
    torch.testing.assert_close(losses.batch_means, expected)
    assert not losses.batch_means.requires_grad
    assert losses.within.item() == pytest.approx((26 / 9 + 1.5**2 + 26 / 9) / 6)
    assert losses.between.item() == pytest.approx(16 / 4 * (0.75 - 17 / 36) ** 2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("alpha", "margin", "gamma"), [(0.5, 0.75, 16.0), (0.0, 3.0, 1.0), (1.0, 2.0, 0.5), (0.5, 0, 0)]
)
@pytest.mark.parametrize(("samples", "classes"), [(9, 4), (2, 9), (1, 1), (20, 12)])
def test_it_is_what_the_equations_say(
    samples: int, classes: int, alpha: float, margin: float, gamma: float, normalize: bool
) -> None:
    embeddings, labels, class_means = inputs(samples, classes)
    embeddings.requires_grad_()
    options = {"alpha": alpha, "margin": margin, "gamma": gamma, "normalize": normalize}
    losses = ops.class_mean_loss(embeddings, labels, class_means, **options)
    within, between, means = written_out(embeddings, labels, class_means, **options)
    exactly = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(losses.within, within, **exactly)
    torch.testing.assert_close(losses.between, between, **exactly)
    torch.testing.assert_close(losses.batch_means, torch.stack([means[label] for label in labels.tolist()]), **exactly)
    for actual, expected in ((losses.within, within), (losses.between, between)):
        (grad,) = torch.autograd.grad(actual, embeddings, retain_graph=True)
        wanted = torch.zeros_like(grad)
        if expected.requires_grad:
            (wanted,) = torch.autograd.grad(expected, embeddings, retain_graph=True)
        torch.testing.assert_close(grad, wanted, **exactly)


def test_the_gradients_are_those_of_the_formulas() -> None:
    embeddings, labels, class_means = inputs(8, 4)
    embeddings.requires_grad_()
    losses = ops.class_mean_loss(embeddings, labels, class_means, margin=2.0, normalize=False)
    residual = embeddings.detach() - losses.batch_means
    same = (labels[:, None] == labels).double()
    share = 0.5 / (1 + same.sum(1, keepdim=True))
    (within,) = torch.autograd.grad(losses.within, embeddings, retain_graph=True)
    torch.testing.assert_close(within, (residual - share * (same @ residual)) / 8, rtol=1e-12, atol=1e-15)

    means = {label: losses.batch_means[labels == label][0] for label in labels.tolist()}
    expected = torch.zeros_like(residual)
    pairs = len(means) * (len(means) - 1) / 2
    for row, label in enumerate(labels.tolist()):
        for other, mean in means.items():
            difference = means[label] - mean
            if other != label:
                expected[row] -= 16 / pairs * share[row] * (2.0 - difference.square().sum()).clamp(min=0) * difference
    (between,) = torch.autograd.grad(losses.between, embeddings)
    torch.testing.assert_close(between, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_finite_differences(normalize: bool) -> None:
    embeddings, labels, class_means = inputs(7, 4)

    def losses(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return ops.class_mean_loss(embeddings, labels, class_means, margin=3.0, normalize=normalize)[:2]

    assert torch.autograd.gradcheck(losses, (embeddings.requires_grad_(),))


def test_equal_labels_have_equal_means_to_the_last_bit_and_nothing_is_changed() -> None:
    embeddings, labels, class_means = (x.float() if x.is_floating_point() else x for x in inputs(37, 5, 33))
    before = embeddings.clone(), labels.clone(), class_means.clone()
    means = ops.class_mean_loss(embeddings, labels, class_means).batch_means
    for label in range(4):
        rows = means[labels == label]
        assert torch.equal(rows, rows[:1].expand_as(rows))
    assert all(torch.equal(x, y) for x, y in zip((embeddings, labels, class_means), before, strict=True))


def test_one_class_has_no_between_loss_and_no_gradient_of_it() -> None:
    embeddings, _, class_means = inputs(6, 1)
    embeddings.requires_grad_()
    losses = ops.class_mean_loss(embeddings, torch.zeros(6, dtype=torch.int64), class_means)
    (grad,) = torch.autograd.grad(losses.between, embeddings, retain_graph=True)
    assert losses.between == 0
    assert (grad == 0).all()
    losses.within.backward()
    assert embeddings.grad.isfinite().all()


def test_a_zero_embedding_is_zero_and_has_no_gradient() -> None:
    embeddings, labels, class_means = inputs(6, 4)
    embeddings[2] = 0
    embeddings.requires_grad_()
    losses = ops.class_mean_loss(embeddings, labels, class_means, margin=3.0)
    sum(losses[:2]).backward()
    assert (embeddings.grad[2] == 0).all()
    assert embeddings.grad.isfinite().all()
    assert (embeddings.grad[:2] != 0).any()
    unit = embeddings.detach() / embeddings.detach().norm(dim=1, keepdim=True).clamp(min=1e-30)
    expected = ops.class_mean_loss(unit, labels, class_means, margin=3.0, normalize=False)
    torch.testing.assert_close(losses.within, expected.within)
    torch.testing.assert_close(losses.batch_means, expected.batch_means)


def test_identical_samples_and_equal_means_are_harmless() -> None:
    class_means = torch.eye(3, 4)[[0, 0, 1]]
    embeddings = torch.ones(4, 4, requires_grad=True)
    losses = ops.class_mean_loss(embeddings, torch.tensor([0, 1, 0, 1]), class_means)
    assert losses.between.item() == pytest.approx(16 / 4 * 0.75**2)
    (grad,) = torch.autograd.grad(losses.between, embeddings, retain_graph=True)
    assert (grad == 0).all()  # there is no direction in which equal means repel each other
    losses.within.backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e20, 1e19, 1e37, 1e-20, 1e-22, 1e-25, 1e-38])
def test_the_length_of_very_long_and_very_short_embeddings(scale: float, dtype: torch.dtype, backend: str) -> None:
    """Their squares are infinite or zero in float32; the loss does not depend on their length."""
    embeddings = (torch.tensor([[3.0, 4.0], [4.0, -3.0], [5.0, 0.1]], dtype=torch.float64) * scale).to(dtype)
    labels, class_means = torch.tensor([0, 1, 1]), torch.tensor([[0.5, 0.5], [0.5, 0.25]])

    def losses_and_gradients(embeddings: Tensor, means: Tensor) -> tuple[ClassMeanLosses, list[Tensor]]:
        leaf = embeddings.clone().requires_grad_()
        losses = ops.class_mean_loss(leaf, labels, means)
        return losses, [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses[:2]]

    with fgvc_ext.use_reference() if backend == "reference" else contextlib.nullcontext():
        losses, gradients = losses_and_gradients(embeddings, class_means)
    exact, exact_gradients = losses_and_gradients(embeddings.double(), class_means.double())
    for actual, expected in zip(losses, exact, strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)
    for actual, expected in zip(gradients, exact_gradients, strict=True):
        assert expected.any()
        # Relative to the largest: what the normalisation takes away may cancel.
        atol = 4 * torch.finfo(dtype).eps * expected.abs().max().item() + 1e-45
        torch.testing.assert_close(actual.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=atol)


def test_by_hand_two_rows_whose_squares_are_out_of_range() -> None:
    for scale in (1e19, 1e20, 1e-25, 1e-22):
        embeddings = (torch.tensor([[3.0, 4.0], [4.0, -3.0]]) * scale).requires_grad_()
        f = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
        losses = ops.class_mean_loss(embeddings, torch.tensor([0, 1]), f.flip(0))
        # Each mean is orthogonal to its sample: ‖f − (3/4 μ + 1/4 f)‖² = 9/16 · 2.
        assert losses.within.item() == pytest.approx(0.5625)
        torch.testing.assert_close(losses.batch_means, 0.25 * f + 0.75 * f.flip(0))
        losses.within.backward()
        torch.testing.assert_close(embeddings.grad * scale, -0.05625 * f.flip(0))


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_an_infinity_is_nan_where_it_stands_and_the_rest_of_its_row_is_zero(backend: str) -> None:
    embeddings = torch.tensor([[float("-inf"), 3.0, 1e-30], [1.0, float("nan"), 2.0]])
    with fgvc_ext.use_reference() if backend == "reference" else contextlib.nullcontext():
        losses = ops.class_mean_loss(embeddings, torch.tensor([0, 1]), torch.ones(2, 3))
    assert losses.within.isnan()
    assert losses.batch_means.isnan().tolist() == [[True, False, False], [True, True, True]]
    assert losses.batch_means[0, 1:].tolist() == [0.75, 0.75]  # the mean has moved towards zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, normalize: bool) -> None:
    embeddings, labels, class_means = inputs(9, 4, 600)
    embeddings = (300 * embeddings.sign()).to(dtype).requires_grad_()  # the squares' sum is infinite in float16
    for means in (class_means.float(), class_means.to(dtype)):
        losses = ops.class_mean_loss(embeddings, labels, means, normalize=normalize)
        (grad,) = torch.autograd.grad(losses.within + losses.between, embeddings)
        assert losses.within.dtype == losses.between.dtype == torch.float32
        assert losses.batch_means.dtype == means.dtype
        assert grad.dtype == dtype
        assert grad.isfinite().all()
        exact = ops.class_mean_loss(embeddings.detach().double(), labels, means.double(), normalize=normalize)
        assert losses.within.item() == pytest.approx(exact.within.item(), rel=1e-5)


def test_autocast_makes_no_difference() -> None:
    embeddings, labels, class_means = (x.float() if x.is_floating_point() else x for x in inputs(9, 4, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.class_mean_loss(embeddings, labels, class_means)
    outside = ops.class_mean_loss(embeddings, labels, class_means)
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def test_no_samples() -> None:
    embeddings = torch.zeros(0, 4, requires_grad=True)
    losses = ops.class_mean_loss(embeddings, torch.zeros(0, dtype=torch.int64), torch.ones(3, 4))
    (losses.within + losses.between).backward()
    assert losses.within == losses.between == 0
    assert losses.batch_means.shape == embeddings.grad.shape == (0, 4)


def test_only_the_batchs_classes_are_looked_at() -> None:
    """Ten thousand classes, of which the others' means are NaN."""
    embeddings, labels, class_means = inputs(12, 5, 16)
    many = torch.full((10_000, 16), float("nan"), dtype=torch.float64)
    many[7_000:7_005] = class_means
    few = ops.class_mean_loss(embeddings, labels, class_means)
    all_ = ops.class_mean_loss(embeddings, labels + 7_000, many)
    assert all(torch.equal(one, other) for one, other in zip(few, all_, strict=True))


def test_a_nan_gives_nan_losses_and_stays_in_the_means_of_its_class() -> None:
    embeddings, labels, class_means = inputs(9, 4)
    embeddings[3, 1] = float("nan")
    losses = ops.class_mean_loss(embeddings, labels, class_means)
    assert losses.within.isnan()
    assert torch.equal(losses.batch_means.isnan().all(1), labels == labels[3])
    assert not losses.batch_means[labels != labels[3]].isnan().any()


def test_infinitely_distant_means_do_not_repel_each_other() -> None:
    embeddings = torch.tensor([[1e30, 0.0], [0.0, 1.0]], requires_grad=True)
    losses = ops.class_mean_loss(embeddings, torch.tensor([0, 1]), torch.zeros(2, 2), normalize=False)
    losses.between.backward()
    assert losses.between == 0
    assert (embeddings.grad == 0).all()


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("label", [4, -1, -100, 2**40])
def test_a_bad_label_is_an_index_error_that_names_the_first(label: int, backend: str) -> None:
    embeddings, _, class_means = inputs(4, 4)
    with (
        fgvc_ext.use_reference() if backend == "reference" else contextlib.nullcontext(),
        pytest.raises(
            IndexError,
            match=rf"^class_mean_loss: labels\[2\] = {label} is not in \[0, 4\), the range of 4 classes$",
        ),
    ):
        ops.class_mean_loss(embeddings, torch.tensor([0, 3, label, 99]), class_means)


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
def test_a_bad_label_elsewhere_spoils_its_own_rows_only(wrong: int) -> None:
    """Where looking would wait; compiled, the reference does not look either."""
    embeddings, labels, class_means = inputs(7, 4)
    bad = labels.clone()
    bad[2] = wrong
    function = torch.compile(reference.class_mean_loss, backend="aot_eager", fullgraph=True)
    leaf = embeddings.clone().requires_grad_()
    losses = function(leaf, bad, class_means, margin=3.0)
    (losses.within + losses.between).backward()
    assert losses.within.isnan()
    others = torch.arange(7) != 2
    assert torch.equal(losses.batch_means.isnan().all(1), ~others)
    assert torch.equal(leaf.grad.isnan().all(1), ~others)
    assert leaf.grad[others].isfinite().all()

    rest = embeddings[others].requires_grad_()
    expected = ops.class_mean_loss(rest, labels[others], class_means, margin=3.0)
    torch.testing.assert_close(losses.between, expected.between)
    torch.testing.assert_close(losses.batch_means[others], expected.batch_means)
    # The mean over the samples still counts the one that is spoilt.
    (expected.within * 6 / 7 + expected.between).backward()
    torch.testing.assert_close(leaf.grad[others], rest.grad)


@pytest.mark.parametrize("asked", [True, False])
def test_labels_on_another_device_are_looked_at_where_that_is_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which nothing can look at: only the call is recorded."""
    calls = []
    monkeypatch.setattr(_library, "_labels_checked", asked)
    monkeypatch.setattr(MODULE, "look_at_labels", lambda *arguments: calls.append(arguments))
    embeddings, class_means = torch.empty(3, 20, device="meta"), torch.empty(7, 20, device="meta")
    labels = torch.empty(3, dtype=torch.int64, device="meta")
    with fgvc_ext.use_reference():
        ops.class_mean_loss(embeddings, labels, class_means)
    assert calls == ([(MODULE.OP, "labels", labels, 7)] if asked else [])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bad_label_on_cuda_is_an_error_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_labels_checked", True)
    embeddings, labels, class_means = (tensor.cuda() for tensor in inputs(7, 4))
    labels[2] = 4
    with pytest.raises(IndexError, match=r"^class_mean_loss: labels\[2\] = 4 is not in \[0, 4\)"):
        ops.class_mean_loss(embeddings, labels, class_means)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bad_label_on_cuda_spoils_its_own_rows_only() -> None:
    embeddings, labels, class_means = (tensor.cuda() for tensor in inputs(7, 4))
    labels[2] = 4
    leaf = embeddings.requires_grad_()
    losses = ops.class_mean_loss(leaf, labels, class_means)
    (losses.within + losses.between).backward()
    spoilt = [row == 2 for row in range(7)]
    assert losses.within.isnan()
    assert losses.batch_means.isnan().all(1).tolist() == leaf.grad.isnan().all(1).tolist() == spoilt


E, L, M = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2, 3, 4), L, M), {}, ValueError, r"embeddings must have shape \[N,E\], got \[2, 3, 4\]"),
        (
            (torch.zeros(2, 0), L, torch.zeros(5, 0)),
            {},
            ValueError,
            r"embeddings must have E of at least 1, got \[2, 0\]",
        ),
        ((E, L[:1], M), {}, ValueError, r"labels must have shape \[2\], one class a row of embeddings, got \[1\]"),
        ((E, L.int(), M), {}, TypeError, "labels must be of dtype int64, got int32"),
        ((E, L.to("meta"), M), {}, ValueError, r"labels must be on the device of embeddings \(cpu\), got meta"),
        ((E, L, torch.zeros(5, 4)), {}, ValueError, r"class_means must have shape \[C, 3\], .* got \[5, 4\]"),
        ((E, L, torch.zeros(0, 3)), {}, ValueError, r"class_means must have at least one class, got \[0, 3\]"),
        ((E, L, M.double()), {}, TypeError, "class_means must have the dtype of embeddings .* got torch.float64"),
        ((E.double(), L, M), {}, TypeError, "class_means must have the dtype of embeddings .* got torch.float32"),
        ((E, L, M), {"alpha": -0.5}, ValueError, "alpha must be finite and at least 0, got -0.5"),
        ((E, L, M), {"margin": float("inf")}, ValueError, "margin must be finite and at least 0, got inf"),
        ((E, L, M), {"gamma": "16"}, TypeError, "gamma must be a number, got str"),
        ((E, L, M), {"normalize": 1}, TypeError, "normalize must be a bool, got int"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Tensor, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^class_mean_loss: {message}"):
        ops.class_mean_loss(*arguments, **options)


def test_a_nan_in_one_loss_stays_out_of_the_gradient_of_the_other() -> None:
    """`within` alone is differentiated: what `between` would give, zero times a NaN, is no part of its gradient."""
    embeddings = torch.randn(4, 6)
    embeddings[0, 0] = float("nan")
    leaf = embeddings.requires_grad_()
    losses = ops.class_mean_loss(leaf, torch.tensor([0, 0, 1, 2]), torch.randn(3, 6))
    losses.within.backward()
    assert leaf.grad[:2].isnan().any()
    assert leaf.grad[2:].isfinite().all()


def test_a_class_of_many_samples_is_added_up_accurately() -> None:
    embeddings = torch.rand(300_000, 1)
    labels, means = torch.zeros(300_000, dtype=torch.int64), torch.zeros(1, 1)
    found = ops.class_mean_loss(embeddings, labels, means, normalize=False)
    exact = ops.class_mean_loss(embeddings.double(), labels, means.double(), normalize=False)
    assert found.within.item() == pytest.approx(exact.within.item(), rel=1e-6)
    assert found.batch_means[0].item() == pytest.approx(exact.batch_means[0].item(), rel=1e-6)
