"""The module that keeps class means, and the variant of the authors' public code."""

import math

import pytest
import torch
from torch import Tensor

import fgvc_ext
from fgvc_ext import nn, ops
from fgvc_ext.nn.class_mean import _GatherRows
from fgvc_ext.reference.class_mean_loss import _drawn, official_class_mean_loss
from fgvc_ext.reference.philox import draws


def batch(samples: int, classes: int, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    return torch.randn(samples, size, generator=generator), labels


def test_means_start_as_random_unit_vectors_in_the_state_dict() -> None:
    torch.manual_seed(1)
    module = nn.ClassMeanLoss(200, 16)
    means = module.state_dict()["class_means"]
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.norm(dim=1), torch.ones(200))
    assert means.mean().abs() < 0.02
    assert list(module.parameters()) == []
    torch.manual_seed(1)
    assert torch.equal(nn.ClassMeanLoss(200, 16).class_means, means)


def test_training_keeps_the_new_means_of_the_batchs_classes() -> None:
    module = nn.ClassMeanLoss(5, 6, alpha=0.7, margin=2.0, gamma=3.0)
    before = module.class_means.clone()
    embeddings, labels = batch(8, 4)
    expected = ops.class_mean_loss(embeddings, labels, before, alpha=0.7, margin=2.0, gamma=3.0)
    embeddings.requires_grad_()
    loss = module(embeddings, labels)
    loss.backward()
    assert torch.equal(loss.detach(), expected.within + expected.between)
    assert torch.equal(module.within, expected.within)
    assert torch.equal(module.between, expected.between)
    assert not module.within.requires_grad
    assert torch.equal(module.class_means[labels], expected.batch_means)
    absent = [label for label in range(5) if label not in labels.tolist()]
    assert torch.equal(module.class_means[absent], before[absent])


def test_evaluation_changes_nothing() -> None:
    module = nn.ClassMeanLoss(4, 6).eval()
    before = module.class_means.clone()
    embeddings, labels = batch(8, 4)
    assert module.within is None
    first, second = module(embeddings, labels), module(embeddings, labels)
    assert torch.equal(first, second)
    assert torch.equal(module.class_means, before)
    assert module.within is not None


def test_two_forwards_before_one_backward() -> None:
    """Nothing that backward needs is the buffer itself."""
    module = nn.ClassMeanLoss(4, 6)
    embeddings, labels = batch(8, 4)
    embeddings.requires_grad_()
    start = module.class_means.clone()
    (first, second) = module(embeddings, labels), module(2 + embeddings, labels)
    (first + second).backward()
    after_one = nn.ClassMeanLoss(4, 6)
    after_one.class_means.copy_(start)
    leaf = embeddings.detach().clone().requires_grad_()
    after_one(leaf, labels).backward()
    after_one(2 + leaf, labels).backward()
    torch.testing.assert_close(embeddings.grad, leaf.grad)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_loss_that_is_not_finite_leaves_the_means(variant: str) -> None:
    module = nn.ClassMeanLoss(4, 6, variant=variant)
    before = module.class_means.clone()
    embeddings, labels = batch(8, 4)
    embeddings[0, 0] = float("nan")
    assert module(embeddings, labels).isnan()
    assert torch.equal(module.class_means, before)


def test_a_bad_label_that_is_not_looked_at_leaves_the_means() -> None:
    module = nn.ClassMeanLoss(4, 6)
    before = module.class_means.clone()
    embeddings, labels = batch(8, 4)
    labels[3] = 4
    with fgvc_ext.use_reference():  # the kernel looks, also in a compiled graph
        assert torch.compile(module, backend="aot_eager", fullgraph=True)(embeddings, labels).isnan()
    assert torch.equal(module.class_means, before)
    with pytest.raises(IndexError, match=r"class_mean_loss: labels\[3\] = 4 is not in \[0, 4\)"):
        module(embeddings, labels)
    assert torch.equal(module.class_means, before)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_no_samples_change_nothing(variant: str) -> None:
    module = nn.ClassMeanLoss(4, 6, variant=variant)
    before = module.class_means.clone()
    embeddings = torch.zeros(0, 6, requires_grad=True)
    module(embeddings, torch.zeros(0, dtype=torch.int64)).backward()
    torch.testing.assert_close(module.class_means, before)
    assert module.within == module.between == 0


def test_means_approach_the_embeddings_and_distances_shrink() -> None:
    module = nn.ClassMeanLoss(3, 6)
    embeddings, labels = batch(12, 3)
    centres = torch.eye(3, 6)
    embeddings = centres[labels] + 0.1 * embeddings
    losses = [module(embeddings, labels).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 4
    assert (module.class_means @ centres.t()).argmax(1).tolist() == [0, 1, 2]


def test_half_precision_embeddings_beside_float32_means() -> None:
    module = nn.ClassMeanLoss(4, 6)
    embeddings, labels = batch(8, 4)
    loss = module(embeddings.bfloat16(), labels)
    assert loss.dtype == module.class_means.dtype == torch.float32


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_of_half_precision_keeps_its_means_in_float32(dtype: torch.dtype, variant: str) -> None:
    embeddings, labels = batch(8, 4)
    module, cast = (nn.ClassMeanLoss(4, 6, variant=variant) for _ in range(2))
    cast.load_state_dict(module.state_dict())
    cast = torch.nn.Sequential(cast).to(dtype)[0]
    assert cast.class_means.dtype == cast.state_dict()["class_means"].dtype == torch.float32
    assert torch.equal(cast.class_means, module.class_means)
    for _ in range(3):
        assert torch.equal(cast(embeddings.to(dtype), labels), module(embeddings.to(dtype), labels))
    assert torch.equal(cast.class_means, module.class_means)


def test_casts_that_keep_digits_and_moves_reach_the_means() -> None:
    module = nn.ClassMeanLoss(4, 6)
    before = module.class_means.clone()
    assert torch.equal(module.double().class_means, before.double())
    embeddings, labels = batch(8, 4)
    module.eval()(embeddings.double(), labels)
    assert torch.equal(module.half().class_means, before)
    assert torch.equal(module.double().float().class_means, before)
    moved = module.to("meta", torch.bfloat16)
    assert moved is module
    assert moved.class_means.is_meta
    assert moved.class_means.dtype == torch.float32


def test_its_description_and_its_errors() -> None:
    assert repr(nn.ClassMeanLoss(4, 6, margin=0.5)) == (
        "ClassMeanLoss(num_classes=4, embedding_dim=6, alpha=0.5, margin=0.5, gamma=16.0, normalize=True, "
        "variant='paper')"
    )
    with pytest.raises(
        ValueError, match="ClassMeanLoss: variant must be one of paper, official, centre, dff, got 'public'"
    ):
        nn.ClassMeanLoss(4, 6, variant="public")
    for sizes, name in (((0, 6), "num_classes"), ((4, 0), "embedding_dim"), ((-1, 6), "num_classes")):
        with pytest.raises(ValueError, match=f"^ClassMeanLoss: {name} must be at least 1, got {min(sizes)}"):
            nn.ClassMeanLoss(*sizes)
    with pytest.raises(TypeError, match=r"^ClassMeanLoss: embedding_dim must be an int, got float"):
        nn.ClassMeanLoss(4, 6.0)
    with pytest.raises(ValueError, match="class_mean_loss: alpha must be finite and at least 0, got -1"):
        nn.ClassMeanLoss(4, 6, alpha=-1)
    module = nn.ClassMeanLoss(4, 6)
    with pytest.raises(ValueError, match=r"class_means must have shape \[C, 5\], .* got \[4, 6\]"):
        module(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


def test_the_official_variant_by_hand() -> None:
    """Two samples of one class, one of another: the numbers of the public code's formulas."""
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 2.0], [5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0])
    class_means = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    losses = official_class_mean_loss(embeddings, labels, class_means, margin=4.0)
    # μ_0 = (0,1) − ½·2·((0,1) − (1,0))/3 = (1,2)/3, which becomes (1,2)/√5;
    # μ_1 = (1,0) − ½·((1,0) − (0,1))/2 = (3,1)/4, which becomes (3,1)/√10.
    first, second = [1 / math.sqrt(5), 2 / math.sqrt(5)], [3 / math.sqrt(10), 1 / math.sqrt(10)]
    expected = torch.tensor([first, second, first], dtype=torch.float64)
    torch.testing.assert_close(losses.batch_means, expected)
    squared = 2 - math.sqrt(2)  # ‖μ_0 − μ_1‖² = 2 − 2·5/√50
    # ‖f − μ‖² = 2 − 2 f·μ
    assert losses.within.item() == pytest.approx((2 * (2 - 2 / math.sqrt(5)) + 2 - 2 / math.sqrt(10)) / 6)
    # Two pairs of samples, (0,1) and (1,2), of the same two classes; N(N−1) = 6.
    assert losses.between.item() == pytest.approx(16 / 4 * 2 * (4 - squared) ** 2 / 6)

    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    lengths = torch.tensor([[3.0], [2.0], [5.0]], dtype=torch.float64)
    share = torch.tensor([[0.5 / 3], [0.5 / 2], [0.5 / 3]], dtype=torch.float64)

    def through_the_length(grad: Tensor) -> Tensor:
        return (grad - unit * (grad * unit).sum(1, keepdim=True)) / lengths

    (within,) = torch.autograd.grad(losses.within, embeddings, retain_graph=True)
    torch.testing.assert_close(within, through_the_length((unit - expected) * (1 - share) / 3))
    (between,) = torch.autograd.grad(losses.between, embeddings)
    away = (expected[0] - expected[1]) * torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(between, through_the_length(-16 * 2 * share * (4 - squared) * away / 6))


def test_the_official_variant_leaves_out_what_the_paper_has() -> None:
    embeddings, labels = batch(8, 3)
    module = nn.ClassMeanLoss(5, 6, variant="official")
    module.class_means.mul_(3)
    module(embeddings, labels)
    torch.testing.assert_close(module.class_means.norm(dim=1), torch.ones(5))  # also of absent classes
    paper = nn.ClassMeanLoss(5, 6)
    paper(embeddings, labels)
    assert (paper.class_means.norm(dim=1) - 1).abs().max() > 0.01


def test_pairs_at_or_beyond_the_margin_are_not_taken() -> None:
    embeddings, labels = torch.eye(3, dtype=torch.float64), torch.arange(3)
    for margin, between in ((2.0, 0.0), (2.5, 16 / 4 * 3 * 0.5**2 / 6)):
        losses = official_class_mean_loss(embeddings, labels, torch.eye(3, dtype=torch.float64), margin=margin)
        assert losses.between.item() == pytest.approx(between)


def test_at_most_256_pairs_are_drawn() -> None:
    samples = 40  # 780 pairs
    embeddings, labels = torch.ones(samples, 3), torch.arange(samples)
    class_means = torch.ones(samples, 3) / math.sqrt(3)
    losses = official_class_mean_loss(embeddings, labels, class_means)
    assert losses.between.item() == pytest.approx(16 / 4 * 0.75**2, rel=1e-5)  # 256 equal pairs, divided by 256

    embeddings, _ = batch(samples, samples)
    spread = torch.nn.functional.normalize(embeddings + 4, dim=1)

    def between(seed: Tensor | None) -> float:
        return official_class_mean_loss(embeddings + 4, labels, spread, seed=seed).between.item()

    assert between(torch.tensor(7)) == between(torch.tensor(7))
    draws = {between(torch.tensor(seed)) for seed in range(5)}
    assert len(draws) == 5
    torch.manual_seed(3)
    first = between(None)
    torch.manual_seed(3)
    assert between(None) == first
    state = torch.get_rng_state()
    official_class_mean_loss(embeddings[:23] + 4, labels[:23], spread[:23])
    assert torch.equal(torch.get_rng_state(), state)  # all 253 pairs of 23 samples are taken: nothing is drawn


def test_pairs_are_drawn_by_the_words_of_philox() -> None:
    """The 256 eligible pairs of the smallest words; 3 is this operator's number in the counter."""
    eligible = torch.ones(40, 40, dtype=torch.bool).triu(1)
    words = draws(torch.tensor(7), 1, 1, 40 * 40, 3)[0, 0].view(40, 40)
    last = words[eligible].sort().values[255]
    assert torch.equal(_drawn(eligible, 256, torch.tensor(7)), eligible & (words <= last))


def test_no_draw_is_spent_on_a_distant_pair() -> None:
    """Two groups of 20 classes: 380 pairs of equal means, and 400 beyond the margin."""
    embeddings = torch.eye(2).repeat(20, 1)
    losses = official_class_mean_loss(embeddings, torch.arange(40), embeddings, seed=torch.tensor(7))
    assert losses.between.item() == pytest.approx(16 / 4 * 0.75**2)  # 256 equal pairs, divided by 256


def test_the_draws_of_pairs_are_without_bias() -> None:
    """The mean over many draws is the mean over all pairs, of which 256 are drawn."""
    embeddings, labels = batch(40, 12, seed=4)
    embeddings = (embeddings / 4 + 1).double()
    class_means = torch.nn.functional.normalize(embeddings[:12], dim=1)
    draws = torch.stack(
        [official_class_mean_loss(embeddings, labels, class_means, seed=torch.tensor(s)).between for s in range(200)]
    )
    means = official_class_mean_loss(embeddings, labels, class_means).batch_means
    hinges = []
    for i in range(40):
        for j in range(i):
            distance = (means[i] - means[j]).square().sum()
            if labels[i] != labels[j] and distance < 0.75:
                hinges.append((0.75 - distance) ** 2)
    assert len(hinges) > 300
    expected = 4 * torch.stack(hinges).mean()
    assert (draws.mean() - expected).abs() < 4 * draws.std() / math.sqrt(200)
    assert draws.std() > 0


def test_one_loss_that_is_not_finite_leaves_the_means() -> None:
    """`between` is infinite while `within` is not."""
    module = nn.ClassMeanLoss(2, 2, gamma=3e38, margin=1e4, normalize=False)
    before = module.class_means.clone()
    module(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert module.within.isfinite()
    assert module.between.isinf()
    assert torch.equal(module.class_means, before)


def test_batch_sizes_are_of_every_rank_and_true_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is gathered."""
    monkeypatch.setattr("fgvc_ext.nn.class_mean._world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    module = nn.ClassMeanLoss(2, 2)
    for sizes in ([3], [3, 2], [3, 3, 3]):
        with pytest.raises(ValueError, match=r"batch_sizes must have 2 entries, .* and 3 for rank 1, got"):
            module(torch.randn(3, 2), torch.tensor([0, 1, 1]), batch_sizes=sizes)


def test_the_gather_leaves_the_gradient_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' sum is made in a copy: autograd may give the same tensor to others."""

    def all_gather(parts: list[Tensor], rows: Tensor) -> None:
        for part in parts:
            part.copy_(rows)

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.mul_(2))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    rows, grad = torch.randn(3, 2, requires_grad=True), torch.randn(6, 2)
    before = grad.clone()
    _GatherRows.apply(rows, (3, 3)).backward(grad)
    assert torch.equal(grad, before)
    assert torch.equal(rows.grad, 2 * before[3:])
