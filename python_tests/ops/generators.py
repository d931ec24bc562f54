"""What specs make their samples of: values, layouts of memory, random choices, and faults that many operators share."""

import random as python_random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MATRIX_LAYOUTS = ("contiguous", "sliced", "transposed", "expanded", "fewer rows", "shifted")
IMAGE_LAYOUTS = (
    *MATRIX_LAYOUTS, "channels_last", "fewer channels", "channels_last, fewer channels", "channels_last, shifted",
)  # fmt: skip
nan, inf = float("nan"), float("inf")
T = TypeVar("T")


def random(*size: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a second floating argument under autocast, and that of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arrange(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout of memory. What lies between them is NaN, so that a read of it is seen."""
    last = torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format
    if layout == "sliced":
        wide = _memory([2 * size for size in values.shape], values)
        return wide[tuple(slice(None, None, 2) for _ in values.shape)].copy_(values)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # all samples share one memory
        return values[:1].expand_as(values)
    if layout == "fewer rows":  # x[:, :, :7]: the next channel does not begin where this one ends
        return _cut(values, values.dim() - 2, 0, last)
    if layout.endswith("fewer channels"):  # x[:, :5]
        return _cut(values, 1, 0, last)
    if layout == "shifted":  # x[..., 1:]: no row is aligned
        return _cut(values, values.dim() - 1, 1, last)
    if layout == "channels_last, shifted":  # x[:, 1:]
        return _cut(values, 1, 1, last)
    return values.contiguous(memory_format=last)


def _cut(values: Tensor, dim: int, before: int, memory_format: torch.memory_format) -> Tensor:
    """``values`` as a part of a larger tensor: ``before`` elements stand before them along ``dim``, some behind."""
    size = list(values.shape)
    size[dim] += before + 2
    whole = _memory(size, values).contiguous(memory_format=memory_format)
    return whole.narrow(dim, before, values.shape[dim]).copy_(values)


def _memory(size: Sequence[int], like: Tensor) -> Tensor:
    fill = nan if like.is_floating_point() else 1
    return torch.full(list(size), fill, dtype=like.dtype, device=like.device)


# --- random choices ---------------------------------------------------------------------------------------------------


class Draw(Protocol):
    """Where a drawn sample's choices come from: hypothesis, which shrinks what fails, or a seed."""

    def integer(self, least: int, most: int) -> int: ...

    def number(self, least: float, most: float) -> float: ...

    def choice(self, values: Sequence[T]) -> T: ...


class SeededDraw:
    """The same choices for the same seed; for places that hypothesis cannot reach, such as a process under ASan."""

    def __init__(self, seed: int) -> None:
        self.random = python_random.Random(seed)

    def integer(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def number(self, least: float, most: float) -> float:
        return self.random.uniform(least, most)

    def choice(self, values: Sequence[T]) -> T:
        return self.random.choice(values)


def boolean(draw: Draw) -> bool:
    return draw.choice([False, True])


def often(draw: Draw) -> bool:
    """Three times of four."""
    return draw.integer(0, 3) > 0


FEW = (0, 1, 1, 2, 3, 5)  # samples
CHANNELS = (0, 1, 2, 7, 15, 16, 17, 33)  # a tile of the CPU kernels has 16
SIDES = (1, 1, 2, 3, 4, 7, 8, 9, 14, 17, 33)


def int64(draw: Draw) -> int:
    return draw.choice([0, -1, 2**63 - 1, -(2**63), draw.integer(-(2**63), 2**63 - 1)])


def drawn_layout(draw: Draw, values: Tensor) -> Tensor:
    """The values in a drawn layout: a named one, any order of the dimensions, or repeated along one of them."""
    names = IMAGE_LAYOUTS if values.dim() == 4 else MATRIX_LAYOUTS if values.dim() >= 2 else ("contiguous", "sliced")
    name = draw.choice([*names, "permuted", "repeated"])
    if name == "permuted":
        rest, order = list(range(values.dim())), []
        while rest:
            order.append(rest.pop(draw.integer(0, len(rest) - 1)))
        return values.permute(order).contiguous().permute([order.index(dim) for dim in range(values.dim())])
    if name == "repeated" and values.dim():
        return values.narrow(-1, 0, min(1, values.shape[-1])).expand_as(values)
    return arrange(values, name)


def drawn_floats(draw: Draw, size: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values, sometimes with ties, sometimes far from zero, sometimes with a few that are not finite."""
    values = scale * random(*size, dtype=torch.float64, device="cpu", seed=draw.integer(0, 999))
    kind = draw.choice(["as they are", "as they are", "rounded", "far from zero", "after a ReLU"])
    if kind == "rounded":
        values = values.round()
    elif kind == "far from zero":
        values = values + 1000 * scale
    elif kind == "after a ReLU":
        values = values.relu()
    values = values.to(dtype)
    if values.numel() and not often(draw):
        for _ in range(draw.integer(1, 3)):
            values.view(-1)[draw.integer(0, values.numel() - 1)] = draw.choice([nan, inf, -inf, -0.0])
    return drawn_layout(draw, values)


def drawn_maps(draw: Draw) -> Tensor:
    size = draw.choice(FEW), draw.choice(CHANNELS), draw.choice(SIDES), draw.choice(SIDES)
    return drawn_floats(draw, size, draw.choice(DTYPES), draw.choice([0.01, 1.0, 20.0]))


def drawn_vector(draw: Draw, values: Tensor) -> Tensor:
    """Sometimes with gaps between the elements."""
    return torch.stack([values, values], dim=1)[:, 0] if boolean(draw) else values


def largest_finite(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].double().abs()
    return float(finite.max()) if finite.numel() else 0.0


# --- faults -----------------------------------------------------------------------------------------------------------
# A fault takes (draw, sample) and gives the argument's name and a value that it must not have; the sample is a
# python_tests.ops.spec.Sample.

NO_INTS: tuple[Any, ...] = (1.5, 1.0, "a", None, True, [1], 1j)
NO_NUMBERS: tuple[Any, ...] = ("a", None, True, [0.5], 1j)
TOO_LARGE = (2**63, 2**70, -(2**63) - 1)  # for 64 bits


def wrong(name: str, *values: Any) -> Callable[[Draw, Any], tuple[str, Any]]:
    """Any of these values for the argument."""
    return lambda draw, sample: (name, draw.choice(values))


def wrong_first(draw: Draw, sample: Any) -> tuple[str, Any]:
    """For a first argument that is a floating tensor of fixed dimensions, or a list of such tensors."""
    name, first = next(iter(sample.tensors.items()))
    if not isinstance(first, list):
        return name, _wrong_floats(draw, first)
    place = draw.integer(0, len(first) - 1)
    wrong_one = [*first[:place], _wrong_floats(draw, first[place]), *first[place + 1 :]]
    return name, draw.choice([wrong_one, wrong_one, [first], first[place], None, "a", 1.0])


def _wrong_floats(draw: Draw, tensor: Tensor) -> Any:
    dense = tensor.nan_to_num()
    other_dtype = dense.to(draw.choice([torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]))
    more = tensor.new_zeros((2, *tensor.shape))
    return draw.choice([other_dtype, more, more[0, ..., 0], dense.to_sparse(), dense.tolist(), None, "a", 1.0])


def no_positions(draw: Draw, sample: Any) -> tuple[str, Any]:
    """For a first argument [N,C,H,W] that must not be without positions."""
    name, tensor = next(iter(sample.tensors.items()))
    height, width = draw.choice([(0, 3), (3, 0), (0, 0)])
    return name, tensor.new_zeros(*tensor.shape[:2], height, width)


def no_channels(draw: Draw, sample: Any) -> tuple[str, Any]:
    """For a first argument [N,C,H,W] that must not be without channels."""
    name, tensor = next(iter(sample.tensors.items()))
    return name, tensor.new_zeros(len(tensor), 0, *tensor.shape[2:])


def wrong_groups(draw: Draw, sample: Any) -> tuple[str, Any]:
    """For a number ``groups`` that must divide the channels of the first argument [N,C,H,W]."""
    channels = next(iter(sample.tensors.values())).shape[1]
    return "groups", draw.choice([channels + 1, 2 * channels + 1, 0, -1, -channels, *TOO_LARGE, *NO_INTS])


def wrong_int64s(name: str) -> Callable[[Draw, Any], tuple[str, Any]]:
    """For an int64 vector of the batch's size: labels, or a seed per sample."""

    def fault(draw: Draw, sample: Any) -> tuple[str, Any]:
        right = torch.zeros(len(next(iter(sample.tensors.values()))), dtype=torch.int64)
        longer, deeper = torch.zeros(len(right) + 1, dtype=torch.int64), right[:, None]
        values = [longer, deeper, right.int(), right.float(), right.bool(), right.to("meta"), right.to_sparse()]
        return name, draw.choice([*values, right.tolist(), "a", 1.5, 1j])

    return fault


def wrong_bools(name: str) -> Callable[[Draw, Any], tuple[str, Any]]:
    """For a bool matrix beside a first argument whose first two sizes it has."""

    def fault(draw: Draw, sample: Any) -> tuple[str, Any]:
        rows, columns = next(iter(sample.tensors.values())).shape[:2]
        right = torch.ones(rows, columns, dtype=torch.bool)
        sizes = [(rows + 1, columns), (rows, columns + 1), (rows, columns, 1), (rows * columns,)]
        values = [*(right.new_ones(size) for size in sizes), right.int(), right.float(), right.long()]
        return name, draw.choice([*values, right.to("meta"), right.to_sparse(), right.tolist(), None, True, "a", 1.0])

    return fault


def wrong_label(name: str, classes: Callable[[Any], int], ignored: str = "") -> Callable[[Draw, Any], tuple[str, Any]]:
    """An int64 vector with one label outside [0, classes(sample)) that is not the option ``ignored`` either."""

    def fault(draw: Draw, sample: Any) -> tuple[str, Any]:
        target, end = sample.tensors[name].clone(), classes(sample)
        if not len(target):
            return name, torch.zeros(1, dtype=torch.int64)
        labels = [end, end + 1, -1, -end, 2**31, 2**32, 2**63 - 1, -(2**63)]
        allowed = sample.options.get(ignored)
        target[draw.integer(0, len(target) - 1)] = draw.choice([label for label in labels if label != allowed])
        return name, target

    return fault
