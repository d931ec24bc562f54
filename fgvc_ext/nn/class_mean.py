from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops._checks import check_int
from ..ops.class_mean_loss import ClassMeanLosses, check_arguments, check_parameters
from ..reference.accumulation import accumulation_dtype
from ..reference.class_mean_loss import official_class_mean_loss, unit_rows
from ..reference.embedding_losses import centre_loss, deep_fisher_faces_loss

VARIANTS = ("paper", "official", "centre", "dff")


class ClassMeanLoss(nn.Module):
    """Pulls embeddings to the mean of their class and the means of different classes apart (ELoPE, eq. 5–12).

    See :func:`fgvc_ext.ops.class_mean_loss`. The means, ``class_means`` [num_classes,embedding_dim], are a float32
    buffer that starts as random unit vectors and stands in the state dict; it stays float32 in a module of half
    precision, where small steps would be rounded away. A forward in training mode writes the new means of the batch's
    classes into it, unless a loss or a mean is not finite. In evaluation mode nothing changes.

    With several processes (``torch.distributed``), a forward in training mode gathers the embeddings and labels of all
    ranks, and every rank computes the loss of the global batch, as the paper defines it. The mean over ranks of the
    losses, and of the gradients, as DistributedDataParallel takes it, is therefore that of one process with the whole
    batch; nothing needs to be multiplied by the number of ranks. The means stay equal on all ranks. Every rank must
    call forward and backward, also one without samples, and embeddings must require a gradient on all ranks or on none.

    ``variant="official"`` is the authors' public code, which differs from the paper in the length of the means, in
    the gradient of the within-class loss and in the pairs of the between-class loss; docs/class_mean_loss.md lists how.
    It runs in plain PyTorch and draws its pairs from torch's generator.

    ``variant="centre"`` and ``variant="dff"`` are the losses of other papers to which ELoPE compares its own, in plain
    PyTorch: centre loss and Deep Fisher Faces (``reference/embedding_losses.py``). Give them ``normalize=False``, as
    in their papers.

    ``within`` and ``between`` are the two losses of the last forward, detached; None before it.
    """

    whole_batch = True
    """It is no mean over samples: the loss of the parts of a batch is another one."""

    class_means: Tensor
    within: Tensor | None
    between: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        alpha: float = 0.5,
        margin: float = 0.75,
        gamma: float = 16.0,
        normalize: bool = True,
        variant: str = "paper",
    ) -> None:
        super().__init__()
        check_int("ClassMeanLoss", "num_classes", num_classes, least=1)
        check_int("ClassMeanLoss", "embedding_dim", embedding_dim, least=1)
        check_parameters(alpha=alpha, margin=margin, gamma=gamma, normalize=normalize)
        if variant not in VARIANTS:
            raise ValueError(f"ClassMeanLoss: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.alpha, self.margin, self.gamma, self.normalize = alpha, margin, gamma, normalize
        self.variant = variant
        self.register_buffer("class_means", unit_rows(torch.randn(num_classes, embedding_dim)))
        self.within = self.between = None

    def forward(self, embeddings: Tensor, labels: Tensor, *, batch_sizes: Sequence[int] | None = None) -> Tensor:
        """embeddings [N,E] and labels int64 [N] → [], the sum of the two losses.

        ``batch_sizes`` is how many samples every rank has, for a caller that knows. Without it the ranks ask each other
        at every step in training mode, which waits for the device. A single process does not need it.
        """
        options: dict[str, Any] = {
            "alpha": self.alpha,
            "margin": self.margin,
            "gamma": self.gamma,
            "normalize": self.normalize,
        }
        # Before anything is gathered: where all ranks have the same mistake, all say so. An error on one rank alone
        # leaves the others waiting in the gather, until that rank's process ends or their timeout does.
        check_arguments(embeddings, labels, self.class_means, **options)
        gathers = self.training and _world_size() > 1
        if gathers:
            embeddings, labels = _gather_batch(embeddings, labels, batch_sizes)
        arguments = (embeddings, labels, self.class_means)
        if self.variant in ("official", "dff"):  # which draw pairs
            function = official_class_mean_loss if self.variant == "official" else deep_fisher_faces_loss
            losses = function(*arguments, seed=_common_seed(labels.device) if gathers else None, **options)
        else:
            losses = (centre_loss if self.variant == "centre" else ops.class_mean_loss)(*arguments, **options)
        if self.training:
            self._keep(losses, labels)
        self.within, self.between = losses.within.detach(), losses.between.detach()
        return losses.within + losses.between

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ClassMeanLoss":
        """``half()``, ``bfloat16()`` and the like move the means, if they move them, and leave their dtype."""
        means = self.class_means
        super()._apply(fn, recurse)
        if self.class_means.dtype not in (torch.float32, torch.float64):
            # What fn gave has lost digits: only its device is taken from it.
            self.class_means = means.to(self.class_means.device, torch.float32)
        return self

    @torch.no_grad()
    def _keep(self, losses: ClassMeanLosses, labels: Tensor) -> None:
        """Writes the new means into the buffer, without looking at a value: that would wait for the device."""
        finite = losses.within.isfinite() & losses.between.isfinite() & losses.batch_means.isfinite().all()
        # A wrong label makes the losses NaN, so that what is written to the row it is moved to is what stands there.
        rows = labels.clamp(0, self.num_classes - 1)
        # Equal labels have equal rows: in which order they are written makes no difference.
        self.class_means[rows] = torch.where(finite, losses.batch_means, self.class_means[rows])
        if self.variant == "official":  # the public code gives every mean the length one, not only the batch's
            self.class_means.copy_(torch.where(finite, unit_rows(self.class_means), self.class_means))

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, alpha={self.alpha}, "
            f"margin={self.margin}, gamma={self.gamma}, normalize={self.normalize}, variant={self.variant!r}"
        )


def _world_size() -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def _gather_batch(embeddings: Tensor, labels: Tensor, batch_sizes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The global batch, rank after rank. Embeddings come in the accumulation dtype, with their gradient."""
    sizes = _batch_sizes(labels, batch_sizes)
    # Half precision is widened here, so that the sum of the ranks' gradients is rounded once, at the very end. The loss
    # would widen the embeddings anyway.
    wide = embeddings.to(accumulation_dtype(embeddings.dtype))
    return _GatherRows.apply(wide, sizes), _gathered(labels, sizes)


def _batch_sizes(labels: Tensor, given: Sequence[int] | None) -> tuple[int, ...]:
    ranks, own = _world_size(), labels.shape[0]
    if given is None:
        size = torch.full((1,), own, dtype=torch.int64, device=labels.device)
        sizes = [torch.empty_like(size) for _ in range(ranks)]
        distributed.all_gather(sizes, size)
        return tuple(torch.cat(sizes).tolist())
    rank = distributed.get_rank()
    if len(given) != ranks or given[rank] != own:
        raise ValueError(
            f"ClassMeanLoss: batch_sizes must have {ranks} entries, one per rank, and {own} for rank {rank}, got "
            f"{list(given)}"
        )
    return tuple(given)


def _gathered(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``rows`` of all ranks. Collectives need equal shapes: they are padded to the longest, and cut afterwards."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    if padded.numel():
        distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    """Gathers [n_r,E] of every rank to [Σ n_r,E]. The gradient of a rank's rows is the sum over the ranks' losses.

    This is the true adjoint: backward then computes the derivative of the sum of the ranks' losses, and the mean that
    DistributedDataParallel takes makes it that of their mean. A gather whose backward only cuts out the own rows would
    give gradients that are too small by the number of ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        return _gathered(rows.detach(), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        if total.numel():
            distributed.all_reduce(total)
        rank = distributed.get_rank()
        start = sum(ctx.sizes[:rank])
        return total[start : start + ctx.sizes[rank]], None


def _common_seed(device: torch.device) -> Tensor:
    """One seed for all ranks, drawn from the generator of the first: they must draw the same pairs."""
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    distributed.broadcast(seed, src=0)
    return seed
