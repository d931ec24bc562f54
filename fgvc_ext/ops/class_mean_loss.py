"""Class-mean embedding loss (Hanselmann and Ney, "ELoPE", eq. 5–12)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import check_labels, use_kernel
from ..reference.accumulation import accumulation_dtype
from ..reference.class_mean_loss import ClassMeanLosses
from ..reference.labels import look_at_labels
from ._checks import LARGEST_FLOAT32, check_beside, check_labels_shape, check_real, check_tensor
from ._operator import Operator, backward_operator, constant, fake_loss_gradient

OP = "class_mean_loss"


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
    """Moves the means of the batch's classes, and measures how close embeddings are to them and they to each other.

    With f_n the embedding of sample n, divided by its length unless ``normalize`` is False, n_c the number of samples
    of class c in the batch and μ the given means, the means of the batch's classes become
    ``μ_c' = μ_c − alpha · Σ_{n∈c} (μ_c − f_n) / (1 + n_c)`` (eq. 6–8). The losses are

    - ``within = (1/(2N)) Σ_n ‖f_n − μ'_{c_n}‖²`` (eq. 9), and
    - ``between = (gamma/(4·|P|)) Σ_{(j,c)∈P} max(margin − ‖μ'_j − μ'_c‖², 0)²`` (eq. 10), P being all unordered pairs
      of different classes in the batch.

    ELoPE (Hanselmann and Ney, 2020), where the loss of an embedding is their sum (eq. 5). This is a pure function:
    ``class_means`` is not changed, and :class:`fgvc_ext.nn.ClassMeanLoss` is the module that keeps the means.

    Args:
        embeddings: [N,E], float32, float64, bfloat16 or float16, any strides.
        labels: [N], int64 in [0, C).
        class_means: [C,E], dtype of ``embeddings`` or float32, any strides. Only the rows of the batch's classes are
            read. A constant, even where it requires a gradient.
        alpha: the rate at which means move, at least 0 and, like the next two, finite in float32. The paper uses 0.5.
        margin: the squared distance beyond which two means do not repel each other, at least 0. The paper uses 0.75.
        gamma: the weight of ``between``, at least 0. The paper uses 16.
        normalize: divide embeddings by their Euclidean length first, as the paper does.

    Returns:
        A named tuple ``(within, between, batch_means)``. The losses are [] in float32 (float64 for float64).
        ``batch_means`` is [N,E] in the dtype of ``class_means``: row n is the new mean of sample n's class, the same
        bits for equal labels, without a gradient.

    Gradient:
        to ``embeddings``, of both losses, exact through the new means (section 4 of the paper asks for it). With
        r_n = f_n − μ'_{c_n} and s_c = alpha/(1 + n_c), the derivative of ``within`` with respect to f_i is
        ``(1/N) · (r_i − s_c · Σ_{n∈c} r_n)``, and that of ``between`` is
        ``−(gamma/|P|) · s_c · Σ_j max(margin − ‖μ'_c − μ'_j‖², 0) · (μ'_c − μ'_j)``, j being the other classes of the
        batch and c the class of i (eq. 11, 12). Saved for backward: both gradients, [2,N,E] in the
        dtype of the losses. No second backward.

    An embedding of length 0 has f = 0 and receives no gradient. With fewer than two classes in the batch, ``between``
    is 0 and has no gradient. A pair of means that is not closer than the margin has none either; two equal means repel
    each other in no direction. A NaN in a row gives a NaN ``within``, and NaN in the means of its class. N = 0 gives
    losses of 0 and empty means. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
        IndexError: on the CPU, a label outside [0, C). On CUDA ``within`` and the sample's rows of the gradient and of
            ``batch_means`` are NaN, and the other samples are treated as if it were in no class; FGVC_EXT_CHECK=1 turns
            that into the error.
    """
    check_arguments(embeddings, labels, class_means, alpha=alpha, margin=margin, gamma=gamma, normalize=normalize)
    # Python's integers may be too large for the operators, floats of the same value are not.
    alpha, margin, gamma = float(alpha), float(margin), float(gamma)
    if not use_kernel(OP, embeddings):
        return reference.class_mean_loss(
            embeddings, labels, class_means, alpha=alpha, margin=margin, gamma=gamma, normalize=normalize
        )
    class_means = constant(class_means)
    return ClassMeanLosses(*_class_mean_loss(embeddings, labels, class_means, alpha, margin, gamma, normalize)[:3])


def check_arguments(
    embeddings: Any, labels: Any, class_means: Any, *, alpha: Any, margin: Any, gamma: Any, normalize: Any
) -> None:
    check_tensor(OP, "embeddings", embeddings, "[N,E]")
    check_labels_shape(OP, "labels", labels, "embeddings", embeddings)
    check_tensor(OP, "class_means", class_means, "[C,E]")
    check_beside(OP, "class_means", class_means, "embeddings", embeddings)
    size = embeddings.shape[1]
    if size == 0:
        raise ValueError(f"{OP}: embeddings must have E of at least 1, got {list(embeddings.shape)}")
    if class_means.shape[1] != size:
        raise ValueError(
            f"{OP}: class_means must have shape [C, {size}], means of the size of embeddings, got "
            f"{list(class_means.shape)}"
        )
    if class_means.shape[0] == 0:
        raise ValueError(f"{OP}: class_means must have at least one class, got {list(class_means.shape)}")
    check_parameters(alpha=alpha, margin=margin, gamma=gamma, normalize=normalize)
    if check_labels() and not labels.is_cpu and not torch.compiler.is_compiling():
        look_at_labels(OP, "labels", labels, class_means.shape[0])


def check_parameters(*, alpha: Any, margin: Any, gamma: Any, normalize: Any) -> None:
    for name, value in (("alpha", alpha), ("margin", margin), ("gamma", gamma)):
        check_real(OP, name, value, lambda number: 0 <= number <= LARGEST_FLOAT32, "finite and at least 0")
    if not isinstance(normalize, bool):
        raise TypeError(f"{OP}: normalize must be a bool, got {type(normalize).__name__}")


def _fake(
    embeddings: Tensor,
    labels: Tensor,
    class_means: Tensor,
    alpha: float,
    margin: float,
    gamma: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(embeddings.dtype)
    within, between = (embeddings.new_empty((), dtype=dtype) for _ in range(2))
    gradients = embeddings.new_empty((2, *embeddings.shape), dtype=dtype)
    return within, between, class_means.new_empty(embeddings.shape), gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, batch_means, gradients = output
    ctx.mark_non_differentiable(batch_means)
    # The gradients stay differentiable, so that who differentiates them is refused: they depend on the embeddings.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradients)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, within: Tensor | None, between: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    nothing = within is None and between is None
    embeddings = None if nothing else _class_mean_loss_backward(within, between, gradients, ctx.dtype)
    return embeddings, None, None, None, None, None, None


def _fake_backward(within: Tensor | None, between: Tensor | None, gradients: Tensor, dtype: torch.dtype) -> Tensor:
    return fake_loss_gradient(gradients, dtype)


_class_mean_loss = Operator(OP, _fake, _setup_context, _backward)
_class_mean_loss_backward = backward_operator(OP, _fake_backward)
