"""Losses of other papers that ELoPE's Table 5 puts in the class-mean loss's place, in plain PyTorch alone.

They take and return what :func:`class_mean_loss` does. Both papers do not normalise the embeddings.
"""

from torch import Tensor

from .class_mean_loss import ClassMeanLosses, _batch, _distinct_classes, _drawn, _returned, _updated, hinges


def centre_loss(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    *,
    alpha: float = 0.5,
    margin: float = 0.75,
    gamma: float = 16.0,
    normalize: bool = False,
) -> ClassMeanLosses:
    """Centre loss (Wen et al., ECCV 2016): (1/2N) Σ_n ‖f_n − μ_{c_n}‖² with the centres from before the step.

    The centres are constants for the gradient, and then move as in eq. 6–8. ``margin`` and ``gamma`` are not used.
    """
    batch = _batch(embeddings, labels, class_means, normalize)
    within = (batch.embeddings - batch.old_means).square().sum() / (2 * max(1, labels.shape[0]))
    means = _updated(batch, alpha).detach()[batch.first]
    return ClassMeanLosses(within, within.new_zeros(()), _returned(means, batch, class_means))


def deep_fisher_faces_loss(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    *,
    alpha: float = 0.5,
    margin: float = 0.75,
    gamma: float = 16.0,
    normalize: bool = False,
    pairs: int = 256,
    seed: Tensor | None = None,
) -> ClassMeanLosses:
    """Deep Fisher Faces (Hanselmann, Yan and Ney, BMVC 2017), as ELoPE's section 4.2 tells it from its own loss.

    ``within`` is that of ELoPE (eq. 9). ``between`` is (γ/4|P|) Σ_{(j,c)∈P} max(m − ‖μ_j − μ_c‖², 0), whose maximum is
    not squared, over a sample P of at most ``pairs`` of the batch's pairs of classes, drawn with ``seed`` (int64 [];
    None draws one from torch's generator where there are more).
    """
    batch = _batch(embeddings, labels, class_means, normalize)
    means = _updated(batch, alpha)[batch.first]
    within = (batch.embeddings - means).square().sum() / (2 * max(1, labels.shape[0]))
    drawn = _drawn(_distinct_classes(batch), pairs, seed)
    between = gamma / 4 * hinges(means, drawn, margin).sum() / drawn.sum().clamp(min=1)
    return ClassMeanLosses(within, between, _returned(means.detach(), batch, class_means))
