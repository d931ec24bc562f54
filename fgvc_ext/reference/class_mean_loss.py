"""Class-mean embedding loss (Hanselmann and Ney, "ELoPE", eq. 5–12), and the variant of the authors' public code."""

from typing import NamedTuple

import torch
from torch import Tensor

from .accumulation import accumulation_dtype
from .labels import look_at_labels_on_cpu, wrong_labels
from .philox import draws

OFFICIAL_PAIRS = 256  # the public code draws at most so many pairs
OFFICIAL_PAIRS_OPERATOR_ID = 3  # word of the Philox counter; 1 and 2 are those of diversify and compose_parts


class ClassMeanLosses(NamedTuple):
    """What :func:`class_mean_loss` returns."""

    within: Tensor
    between: Tensor
    batch_means: Tensor


class _Batch(NamedTuple):
    """What both variants start from, in the accumulation dtype."""

    embeddings: Tensor  # f [N,E]; the rows of wrong labels are NaN
    valid: Tensor  # bool [N]: the label is in range
    first: Tensor  # int64 [N]: the first sample of the same class; a wrong label has a class of its own
    counts: Tensor  # n_c of the sample's class [N,1]
    sums: Tensor  # Σ_{n∈c} f_n of the sample's class [N,E]
    old_means: Tensor  # μ^{t−1} of the sample's class [N,E]


def class_mean_loss(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    *,
    alpha: float = 0.5,
    margin: float = 0.75,
    gamma: float = 16.0,
    normalize: bool = True,
) -> ClassMeanLosses:
    batch = _batch(embeddings, labels, class_means, normalize)
    # One row computes the mean of a class for all its samples, so that their rows are equal to the last bit.
    means = _updated(batch, alpha)[batch.first]

    samples = labels.shape[0]
    within = (batch.embeddings - means).square().sum() / (2 * max(1, samples))  # eq. 9

    pairs = _distinct_classes(batch)  # P
    total = _squared_hinges(means, pairs, margin).sum()
    between = gamma / 4 * total / pairs.sum().clamp(min=1)  # eq. 10
    return ClassMeanLosses(within, between, _returned(means.detach(), batch, class_means))


def official_class_mean_loss(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    *,
    alpha: float = 0.5,
    margin: float = 0.75,
    gamma: float = 16.0,
    normalize: bool = True,
    seed: Tensor | None = None,
) -> ClassMeanLosses:
    """The authors' public code, which differs from the paper in four points.

    - Every mean has its length set to one after the update. Gradients pass as if it had not been.
    - The gradient of the within-class loss leaves out the other samples of the class: r_i·(1 − α/(1+n_c))/N.
    - The between-class loss takes pairs of samples, not of classes: those of different labels whose means are closer
      than the margin, of which it draws at most S = min(256, N(N−1)).
    - Its sum is divided by S, however many pairs there are. Its gradient to f is that of eq. 11 and 12.

    ``seed`` is an int64 tensor []; None draws one from torch's generator of the device where pairs must be drawn.
    The rows of ``batch_means`` have length one; the other rows of ``class_means`` are the caller's to normalise.
    """
    batch = _batch(embeddings, labels, class_means, normalize)
    samples = labels.shape[0]
    share = alpha / (1 + batch.counts)
    means = unit_rows(_updated(batch, alpha).detach())[batch.first]

    residuals = batch.embeddings.detach() - means
    followed = residuals + (1 - share) * (batch.embeddings - batch.embeddings.detach())  # adds zero, and the gradient
    within = followed.square().sum() / (2 * max(1, samples))

    order = torch.arange(samples, device=labels.device)
    different = batch.valid[:, None] & batch.valid & (labels[:, None] != labels) & (order[:, None] < order)
    close = (means[:, None] - means).square().sum(dim=2) < margin
    number = min(OFFICIAL_PAIRS, samples * (samples - 1))
    drawn = _drawn(different & close, number, seed)
    moved = share * batch.sums
    moving = means + (moved - moved.detach())[batch.first]  # dμ_c/df_n = α/(1+n_c), as the paper has it
    total = _squared_hinges(moving, drawn, margin).sum()
    between = gamma / 4 * total / max(1, number)
    return ClassMeanLosses(within, between, _returned(means, batch, class_means))


def unit_rows(values: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays zero and has no gradient."""
    scaled = values * _scale_to_one(values.detach().abs().amax(dim=1, keepdim=True))
    squares = scaled.square().sum(dim=1, keepdim=True)
    zero = squares == 0
    # Not only the result but also the root: its derivative at zero is infinite, and infinity times zero is NaN.
    return torch.where(zero, 0.0, scaled / torch.where(zero, 1.0, squares).sqrt())


def _scale_to_one(magnitudes: Tensor) -> Tensor:
    """Powers of two that bring float32 or float64 magnitudes near one, from the bits of their exponents.

    They change no digit, and keep the squares of very large and very small numbers finite and apart from zero.
    """
    words, mantissa, most = (torch.int64, 52, 2046) if magnitudes.dtype == torch.float64 else (torch.int32, 23, 254)
    exponents = most - (magnitudes.view(words) >> mantissa)
    return (exponents.clamp(min=1) << mantissa).view(magnitudes.dtype)


def _batch(embeddings: Tensor, labels: Tensor, class_means: Tensor, normalize: bool) -> _Batch:
    classes = class_means.shape[0]
    look_at_labels_on_cpu("class_mean_loss", "labels", labels, classes)
    dtype = accumulation_dtype(embeddings.dtype)
    valid = ~wrong_labels(labels, classes)
    # Added, not put in place: so the NaN of a wrong label reaches the gradient of its own row as well.
    values = embeddings.to(dtype) + torch.where(valid, 0.0, float("nan"))[:, None].to(dtype)
    if normalize:
        values = unit_rows(values)
    # Only the batch's classes are looked at: a batch knows its classes from its labels.
    same = (labels[:, None] == labels) & valid
    samples = labels.shape[0]
    order = torch.arange(samples, device=labels.device)
    own = torch.where(valid, samples, order)  # a wrong label equals no label, not even itself
    first = torch.where(same, order, own[:, None]).amin(dim=1) if samples else order
    # A sum over what is masked, not a product with a matrix of ones: autocast would compute that in half precision,
    # and a NaN times zero would reach all classes.
    sums = torch.where(same[:, :, None], values, 0.0).sum(dim=1)
    old_means = class_means.detach()[torch.where(valid, labels, 0)].to(dtype)
    return _Batch(values, valid, first, same.sum(dim=1, keepdim=True).to(dtype), sums, old_means)


def _updated(batch: _Batch, alpha: float) -> Tensor:
    """The mean of every sample's class after the step of eq. 6–8: [N,E]."""
    step = (batch.counts * batch.old_means - batch.sums) / (1 + batch.counts)
    return batch.old_means - alpha * step


def _distinct_classes(batch: _Batch) -> Tensor:
    """Every pair of classes once, as the pair of their first samples: bool [N,N]."""
    order = torch.arange(len(batch.first), device=batch.first.device)
    leads = batch.valid & (batch.first == order)
    return leads[:, None] & leads & (order[:, None] < order)


def _returned(means: Tensor, batch: _Batch, class_means: Tensor) -> Tensor:
    """``batch_means``: NaN where the label is wrong."""
    return torch.where(batch.valid[:, None], means, float("nan")).to(class_means.dtype)


def _squared_hinges(means: Tensor, pairs: Tensor, margin: float) -> Tensor:
    """The squares of `hinges`: [N,N]."""
    return hinges(means, pairs, margin).square()


def hinges(means: Tensor, pairs: Tensor, margin: float) -> Tensor:
    """max(m − ‖μ_j − μ_c‖², 0) of the chosen pairs of rows, bool [N,N], and zero for the others: [N,N].

    A pair that is not closer than the margin is left out before its distance is squared: no infinity of it reaches a
    gradient. A NaN is not left out.
    """
    difference = means[:, None] - means
    distant = difference.detach().square().sum(dim=2) >= margin
    active = pairs & ~distant
    squared = torch.where(active[:, :, None], difference, 0.0).square().sum(dim=2)
    return torch.where(active, margin - squared, 0.0)


def _drawn(eligible: Tensor, number: int, seed: Tensor | None) -> Tensor:
    """At most ``number`` of the eligible pairs at random, bool [N,N], without waiting for how many there are."""
    samples = eligible.shape[0]
    if samples * (samples - 1) // 2 <= number:
        return eligible
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=eligible.device)
    entries = samples * samples
    words = draws(seed, 1, 1, entries, OFFICIAL_PAIRS_OPERATOR_ID)[0, 0]
    # The pair's number breaks ties, so that the same pairs are drawn on every device.
    numbers = torch.arange(entries, device=eligible.device)
    keys = torch.where(eligible.flatten(), words, 2**32) * entries + numbers
    chosen = keys.topk(number, largest=False, sorted=False).indices
    return eligible & torch.zeros_like(eligible).flatten().index_fill(0, chosen, True).view_as(eligible)
