"""Orthogonal loss ("Knowledge Transfer Based Fine-grained Visual Classification", eq. 2–6)."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import use_kernel
from ..reference.accumulation import accumulation_dtype
from ._checks import check_beside, check_positions, check_tensor
from ._operator import Operator, backward_operator, constant, fake_loss_gradient

OP = "orthogonal_loss"


def orthogonal_loss(student_map: Tensor, teacher_maps: Tensor) -> Tensor:
    """How far a student looks where its teachers look: the mean product of their normalised attention maps.

    With z(M) = (M − mean) / std over the H·W positions of a map (eq. 2), S = max(z(student), 0) (eq. 3) and
    A_t = |z(teacher t)| (eq. 4): ``loss = (1/T) Σ_t mean over N, H and W of A_t · S`` (eq. 5, 6). "Knowledge Transfer
    Based Fine-grained Visual Classification". The standard deviation is the population's, which is our choice, and
    so is the mean over the positions, because the paper leaves both open.

    Args:
        student_map: [N,H,W], float32, float64, bfloat16 or float16, any strides. The raw map, not a normalised one, as
            :func:`spatial_attention_map` returns it.
        teacher_maps: [T,N,H,W], dtype of ``student_map`` or float32, any strides. The raw maps of T ≥ 1 teachers for
            the same images. They are constants, even where they require a gradient.

    Returns:
        [] in float32 (float64 for float64).

    Gradient:
        to ``student_map``. With h = grad · (1/T) Σ_t A_t / (N·H·W) where z > 0, and 0 elsewhere, it is
        ``(h − mean(h) − z · mean(h · z)) / std``, the means being those of the sample's map. Where z = 0 the derivative
        of max(z, 0) is 0. Saved for backward: that gradient for grad = 1, [N,H,W] in the dtype of the loss. No second
        backward.

    A constant map, one whose largest and smallest values are equal, has z = 0 and receives no gradient; so does every
    map of a single position. No other value is added to the standard deviation. A NaN in any map gives a NaN loss.
    N = 0 gives a loss of 0. The same bits on every run and for every thread count.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or T = 0: the first model has no teacher
            and trains with cross-entropy alone.
    """
    check_tensor(OP, "student_map", student_map, "[N,H,W]")
    check_tensor(OP, "teacher_maps", teacher_maps, "[T,N,H,W]")
    check_beside(OP, "teacher_maps", teacher_maps, "student_map", student_map)
    samples, height, width = student_map.shape
    if height == 0 or width == 0:
        raise ValueError(f"{OP}: student_map must have H and W of at least 1, got {list(student_map.shape)}")
    if teacher_maps.shape[1:] != student_map.shape:
        raise ValueError(
            f"{OP}: teacher_maps must have shape [T, {samples}, {height}, {width}], maps of the size of student_map "
            f"for every teacher, got {list(teacher_maps.shape)}"
        )
    if teacher_maps.shape[0] == 0:
        raise ValueError(
            f"{OP}: teacher_maps must hold the maps of at least one teacher, got {list(teacher_maps.shape)}: the first "
            "model has no teacher and trains with cross-entropy alone"
        )
    check_positions(OP, "student_map", student_map)
    if not use_kernel(OP, student_map):
        return reference.orthogonal_loss(student_map, teacher_maps)
    return _orthogonal_loss(student_map, constant(teacher_maps))[0]


def _fake(student_map: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student_map.dtype)
    return student_map.new_empty((), dtype=dtype), student_map.new_empty((1, *student_map.shape), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    _, gradients = output
    # The gradients stay differentiable, so that who differentiates them is refused: they depend on the student's map.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradients)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    (gradients,) = ctx.saved_tensors
    return None if grad is None else _orthogonal_loss_backward(grad, gradients, ctx.dtype), None


def _fake_backward(grad: Tensor, gradients: Tensor, dtype: torch.dtype) -> Tensor:
    return fake_loss_gradient(gradients, dtype)


_orthogonal_loss = Operator(OP, _fake, _setup_context, _backward)
_orthogonal_loss_backward = backward_operator(OP, _fake_backward)
