"""Argument checks: every message names the operator, the argument, what was expected and what came.

They read metadata only, so that they neither wait for a device nor break a compiled graph. Those of numbers return
them, NumPy's as Python's: the operators would not take NumPy's.
"""

import numbers
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST_FLOAT32 = torch.finfo(torch.float32).max
SMALLEST_FLOAT32 = torch.finfo(torch.float32).tiny  # of the normal numbers above zero
_LARGEST = sys.float_info.max
MOST_POSITIONS = 2**31 - 1  # of a map: what the kernels count in 32 bits
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: Any, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """``shape`` is written as in the docstrings, e.g. ``"[N,C,H,W]"``; only the number of dimensions is checked."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be of dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {value.layout}")
    if value.dim() != shape.count(",") + (shape != "[]"):
        raise ValueError(f"{op}: {name} must have shape {shape}, got {list(value.shape)}")


def check_beside(op: str, name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    """A second floating tensor: on the first one's device, of its dtype or float32 (float64 only beside float64)."""
    check_device(op, name, value, first_name, first)
    fits = value.dtype == first.dtype or (value.dtype == torch.float32 and first.dtype != torch.float64)
    if not fits:
        raise TypeError(
            f"{op}: {name} must have the dtype of {first_name} ({first.dtype})"
            f"{'' if first.dtype == torch.float64 else ' or float32'}, got {value.dtype}"
        )


def check_device(op: str, name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    if value.device != first.device:
        raise ValueError(f"{op}: {name} must be on the device of {first_name} ({first.device}), got {value.device}")


def check_positions(op: str, name: str, maps: Tensor) -> int:
    """H·W of ``maps`` [...,H,W]. In a compiled graph the check is a guard: larger maps come here again."""
    height, width = maps.shape[-2:]
    positions = height * width
    if positions > MOST_POSITIONS:
        raise ValueError(
            f"{op}: {name} must have at most {MOST_POSITIONS} positions per map, got H*W = {height}*{width} = "
            f"{positions}"
        )
    return positions


def check_int(op: str, name: str, value: Any, least: int = -(2**63)) -> int:
    if not _is_int(value):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    value = _as_int(value)
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{op}: {name} must fit 64 bits, got {value}")
    return value


def _is_int(value: Any) -> bool:
    """Python's, NumPy's or a symbolic one; no tensor, whose value would have to be waited for."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)


def _as_int(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def check_real(op: str, name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # Not all: an integer may be too large for a float. And NumPy's would round what they are compared with.
    value = value if isinstance(value, (int, float)) else float(value)
    if not (-_LARGEST <= value <= _LARGEST and accepts(value)):
        raise ValueError(f"{op}: {name} must be {expected}, got {value}")
    return value


def check_finite(op: str, name: str, value: Any, beside: Tensor) -> float:
    """Finite also in what the operator computes in: float64 beside a float64 tensor, float32 beside others."""
    if beside.dtype == torch.float64:
        return check_real(op, name, value, lambda number: True, "finite")
    return check_real(op, name, value, lambda number: abs(number) <= LARGEST_FLOAT32, "finite in float32")


def check_probability(op: str, name: str, value: Any) -> float:
    return check_real(op, name, value, lambda p: 0 <= p <= 1, "a probability in [0, 1]")


def check_labels_shape(op: str, name: str, value: Any, first_name: str, first: Tensor) -> None:
    """int64 [N], one label for each row of the first tensor, on its device."""
    check_tensor(op, name, value, "[N]", (torch.int64,))
    check_device(op, name, value, first_name, first)
    rows = first.shape[0]
    if value.shape[0] != rows:
        raise ValueError(
            f"{op}: {name} must have shape [{rows}], one class a row of {first_name}, got {list(value.shape)}"
        )


def image_sides(op: str, image_size: Any, name: str = "image_size") -> tuple[int, int]:
    """(height, width) of ``image_size``, which is one number for both or the two of them."""
    if isinstance(image_size, (int, torch.SymInt, numbers.Integral)):
        image_size = (image_size, image_size)
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise TypeError(f"{op}: {name} must be an int or (height, width), got {image_size!r}")
    height = check_int(op, f"the height in {name}", image_size[0], least=1)
    width = check_int(op, f"the width in {name}", image_size[1], least=1)
    return height, width


def seed_tensor(op: str, seed: int | Tensor | None, maps: Tensor, name: str = "maps") -> Tensor:
    """The int64 tensor [] or [N] that keys Philox; ``None`` draws one from torch's generator of the maps' device.

    ``name`` is that of ``maps`` in the operator.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=maps.device)
    if isinstance(seed, Tensor):
        check_tensor(op, "seed", seed, "[N]" if seed.dim() else "[]", (torch.int64,))
        check_device(op, "seed", seed, name, maps)
        if seed.dim() == 1 and seed.shape[0] != maps.shape[0]:
            raise ValueError(f"{op}: seed must have shape [] or [{maps.shape[0]}], got {list(seed.shape)}")
        return seed
    if not _is_int(seed):
        raise TypeError(f"{op}: seed must be None, an int or an int64 tensor, got {type(seed).__name__}")
    number = _as_int(seed)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: seed must fit 64 bits, got {seed}")
    return torch.full((), number, dtype=torch.int64, device=maps.device)
