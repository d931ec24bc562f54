"""Orthogonal loss ("Knowledge Transfer Based Fine-grained Visual Classification", eq. 2–5)."""

import torch
from torch import Tensor

from .accumulation import accumulation_dtype


def normalised_map(maps: Tensor) -> Tensor:
    """eq. 2 over the last two dimensions, with the population's standard deviation.

    A constant map gives zeros, and no gradient reaches it.
    """
    spatial = (-2, -1)
    constant = maps.amax(spatial, keepdim=True) == maps.amin(spatial, keepdim=True)
    # Zero in a constant map also where its mean is another number or, of infinities, none.
    centred = torch.where(constant, 0.0, maps - maps.mean(spatial, keepdim=True))
    centred = centred - centred.mean(spatial, keepdim=True)  # what rounding left, in a map that is far from zero
    # z does not depend on the map's scale. Dividing by it first keeps the squares of small and large maps finite.
    scale = centred.detach().abs().amax(spatial, keepdim=True)
    centred = centred / torch.where(constant, 1.0, scale)
    variance = centred.square().mean(spatial, keepdim=True)
    # Not only the result but also the root: its derivative at zero is infinite, and infinity times zero is NaN.
    return torch.where(constant, 0.0, centred / torch.where(constant, 1.0, variance).sqrt())


def orthogonal_loss(student_map: Tensor, teacher_maps: Tensor) -> Tensor:
    dtype = accumulation_dtype(student_map.dtype)
    student = normalised_map(student_map.to(dtype)).relu()  # eq. 3
    teachers = normalised_map(teacher_maps.detach().to(dtype)).abs()  # eq. 4
    # eq. 5 for each teacher, and the mean over the teachers (eq. 6).
    return (teachers.mean(dim=0) * student).sum() / max(1, student.numel())
