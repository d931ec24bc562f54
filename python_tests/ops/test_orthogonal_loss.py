"""What the knowledge-transfer paper says of the orthogonal loss, beyond the contract that every operator keeps."""

import math

import pytest
import torch
from torch import Tensor

import fgvc_ext
from fgvc_ext import nn, ops


def normalised(maps: Tensor) -> Tensor:
    """eq. 2 as it is written, for maps that are not constant."""
    mean, std = maps.mean((-2, -1), keepdim=True), maps.std((-2, -1), keepdim=True, correction=0)
    return (maps - mean) / std


def test_an_example_by_hand() -> None:
    student = torch.tensor([[[0.0, 1.0, 2.0]]])  # z = √1.5·(−1, 0, 1), S = √1.5·(0, 0, 1)
    teachers = torch.tensor([[[[0.0, 0.0, 3.0]]], [[[2.0, 1.0, 0.0]]]])  # |z| at the last position: √2 and √1.5
    loss = ops.orthogonal_loss(student, teachers)
    assert loss.item() == pytest.approx(math.sqrt(1.5) * (math.sqrt(2) + math.sqrt(1.5)) / 2 / 3)


def test_it_is_the_mean_over_the_teachers() -> None:
    student, teachers = torch.randn(3, 5, 6), torch.randn(4, 3, 5, 6)
    single = torch.stack([ops.orthogonal_loss(student, teacher[None]) for teacher in teachers])
    torch.testing.assert_close(ops.orthogonal_loss(student, teachers), single.mean())


def test_a_teacher_that_looks_away_costs_nothing() -> None:
    student = torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0]]])
    teacher = torch.tensor([[[[0.0, 1.0, -1.0, 1.0, -1.0]]]])  # 0 where the student looks
    assert ops.orthogonal_loss(student, teacher) == 0
    assert ops.orthogonal_loss(student, student[None]) > 0


def test_scale_and_offset_make_no_difference() -> None:
    student, teachers = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(3, 2, 5, 6, dtype=torch.float64)
    expected = ops.orthogonal_loss(student, teachers)
    torch.testing.assert_close(ops.orthogonal_loss(7 * student - 3, 0.1 * teachers + 5), expected)
    torch.testing.assert_close(ops.orthogonal_loss(student, -teachers), expected)  # |z|


def test_the_gradient_is_that_of_the_formula() -> None:
    student = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    teachers = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    ops.orthogonal_loss(student, teachers).backward(torch.tensor(1.7, dtype=torch.float64))
    maps, spatial = student.detach(), (-2, -1)
    z = normalised(maps)
    h = 1.7 * normalised(teachers.detach()).abs().mean(0) / z.numel() * (z > 0)
    std = maps.std(spatial, keepdim=True, correction=0)
    expected = (h - h.mean(spatial, keepdim=True) - z * (h * z).mean(spatial, keepdim=True)) / std
    torch.testing.assert_close(student.grad, expected, rtol=1e-11, atol=1e-15)
    assert teachers.grad is None
    assert torch.autograd.gradcheck(lambda maps: ops.orthogonal_loss(maps, teachers.detach()), (student,))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30])
def test_a_constant_map_has_neither_value_nor_gradient(value: float) -> None:
    student, teachers = torch.randn(2, 3, 5), torch.randn(2, 2, 3, 5)
    student[0] = value
    student.requires_grad_()
    loss = ops.orthogonal_loss(student, teachers)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ops.orthogonal_loss(student[1:], teachers[:, 1:]).detach() / 2)
    assert (student.grad[0] == 0).all()
    assert student.grad.isfinite().all()

    teachers[0] = value
    half = ops.orthogonal_loss(student, teachers)
    torch.testing.assert_close(half, ops.orthogonal_loss(student, teachers[1:]) / 2)


def test_no_nan_arises_on_the_way_of_a_constant_maps_gradient() -> None:
    """Torch's anomaly detection, which looks at every step of the reference, finds none."""
    student, teachers = torch.randn(2, 3, 5), torch.randn(2, 2, 3, 5)
    student[0] = 0.1
    student.requires_grad_()
    with fgvc_ext.use_reference(), torch.autograd.set_detect_anomaly(True):
        ops.orthogonal_loss(student, teachers).backward()
    assert (student.grad[0] == 0).all()


def test_a_single_position_is_a_constant_map() -> None:
    student = torch.randn(3, 1, 1, requires_grad=True)
    loss = ops.orthogonal_loss(student, torch.randn(2, 3, 1, 1))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 1e30])
def test_small_and_large_maps_are_normalised_like_others(scale: float) -> None:
    student, teachers = torch.randn(2, 5, 5), torch.randn(3, 2, 5, 5)
    scaled = (student * scale).requires_grad_()
    loss = ops.orthogonal_loss(scaled, teachers * scale)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ops.orthogonal_loss(student, teachers), rtol=1e-4, atol=1e-6)
    assert scaled.grad.isfinite().all()


def test_a_nearly_constant_map_is_not_a_constant_one() -> None:
    student = torch.ones(1, 4, 4)
    student[0, 1, 2] += torch.finfo(torch.float32).eps
    student.requires_grad_()
    loss = ops.orthogonal_loss(student, torch.randn(1, 1, 4, 4))
    loss.backward()
    assert loss > 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_a_float32_loss(dtype: torch.dtype) -> None:
    student = (300 + 10 * torch.randn(2, 14, 14)).to(dtype).requires_grad_()
    for teachers in (torch.randn(2, 2, 14, 14), (300 * torch.randn(2, 2, 14, 14)).to(dtype)):
        loss = ops.orthogonal_loss(student, teachers)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        assert loss.isfinite()
        assert grad.isfinite().all()
        exact = ops.orthogonal_loss(student.detach().double(), teachers.double())
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_nan_in_any_map_gives_a_nan_loss() -> None:
    student, teachers = torch.randn(2, 3, 3), torch.randn(2, 2, 3, 3)
    student[0, 0, 0] = float("nan")
    assert ops.orthogonal_loss(student, teachers).isnan()
    student, teachers = torch.randn(2, 3, 3), torch.randn(2, 2, 3, 3)
    teachers[1, 1, 2, 2] = float("nan")
    assert ops.orthogonal_loss(student, teachers).isnan()


def test_no_samples() -> None:
    student = torch.zeros(0, 3, 4, requires_grad=True)
    loss = ops.orthogonal_loss(student, torch.zeros(2, 0, 3, 4))
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("student", "teachers", "error", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(0, 2, 3, 4),
            ValueError,
            r"teacher_maps must hold the maps of at least one teacher, got \[0, 2, 3, 4\]: the first model has no "
            "teacher and trains with cross-entropy alone",
        ),
        (
            torch.zeros(2, 3, 4),
            torch.zeros(1, 2, 4, 3),
            ValueError,
            r"teacher_maps must have shape \[T, 2, 3, 4\], .* got \[1, 2, 4, 3\]",
        ),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), ValueError, r"teacher_maps must have shape \[T,N,H,W\], got"),
        (
            torch.zeros(2, 3),
            torch.zeros(1, 2, 3, 4),
            ValueError,
            r"student_map must have shape \[N,H,W\], got \[2, 3\]",
        ),
        (torch.zeros(2, 0, 4), torch.zeros(1, 2, 0, 4), ValueError, "student_map must have H and W of at least 1"),
        (
            torch.zeros(2, 3, 4),
            torch.zeros(1, 2, 3, 4, dtype=torch.float64),
            TypeError,
            "teacher_maps must have the dtype of student_map .* got torch.float64",
        ),
        (
            torch.zeros(2, 3, 4),
            torch.zeros(1, 2, 3, 4, device="meta"),
            ValueError,
            "teacher_maps must be on the device of student_map .* got meta",
        ),
        (torch.zeros(2, 3, 4), None, TypeError, "teacher_maps must be a tensor .* got NoneType"),
    ],
)
def test_bad_arguments(student: Tensor, teachers: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^orthogonal_loss: {message}"):
        ops.orthogonal_loss(student, teachers)


def test_the_module_is_the_function() -> None:
    student, teachers = torch.randn(2, 3, 4), torch.randn(3, 2, 3, 4)
    assert torch.equal(nn.OrthogonalLoss()(student, teachers), ops.orthogonal_loss(student, teachers))


def test_teachers_of_another_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher_maps"):
        ops.orthogonal_loss(torch.rand(2, 3, 4), torch.rand(5, 3, 3, 4))
