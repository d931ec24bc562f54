"""Orthogonal loss ("Knowledge Transfer Based Fine-grained Visual Classification", eq. 2–6)."""

from torch import Tensor

from .. import reference
from ._checks import check_beside, check_tensor

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
        of max(z, 0) is 0. Saved for backward: the two inputs and a few numbers a map. No second backward.

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
    return reference.orthogonal_loss(student_map, teacher_maps)
