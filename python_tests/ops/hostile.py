"""Calls raw operators with arguments that nobody should give: ``python -m python_tests.ops.hostile FIRST COUNT OP…``.

A process of its own, which test_hostile.py starts, because such a call may end it. A call follows from its number
alone, so a fatal one can be repeated: with a COUNT of 1 it is described before it is made. Meanwhile its operator
and number stand in the file that FGVC_EXT_HOSTILE_CALL names.

An argument starts as a valid call's: those that the specs' samples make, forward and backward, saved tensors included.
Then some of them are changed, each in a way that its type in the operator's schema allows.
"""

import contextlib
import faulthandler
import os
import random
import resource
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import spec
from .comparison import run
from .test_graphs import Recorder

MEMORY = 2 * 2**30  # bytes beyond those of the process when it starts: absurd allocations must fail, not fill memory
SECONDS = 60  # for one call
SMALL = (0, 1, -1, 2, 3, 7, 16, 255, 256, 2**15, 2**16)
LARGE = (2**31 - 1, 2**31, -(2**31), 2**32, 2**33 + 1, 2**40, -(2**40), 2**62, 2**63 - 1, -(2**63))
INTEGERS = (*SMALL, *LARGE)
FLOATS = (0.0, -0.0, 1.0, -3.5, float("nan"), float("inf"), float("-inf"), 1e39, -1e39, 1e308, 5e-324)
INTEGRAL = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
NUMERIC = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, *INTEGRAL)
HUGE = (2**31, 2**40, 2**62)


def operators() -> list[str]:
    """Every raw operator of the package, from the dispatcher."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fgvc_ext::") for name in names if name.startswith("fgvc_ext::"))


@cache
def valid_calls(name: str) -> list[list[Any]]:
    """The arguments of the calls of this operator that the specs' samples make."""
    with Recorder() as recorder:
        for one in spec.SPECS:
            if name.startswith(one.name):
                for layout in ("contiguous", "channels_last"):
                    if layout in one.layouts:
                        for dtype in (torch.float32, torch.bfloat16):
                            for sample in [*one.samples(dtype, "cpu", layout), *one.empty()]:
                                run(one.function, sample)
    return [arguments for function, arguments in recorder.calls if str(function).split(".")[1] == name]


# --- changes ----------------------------------------------------------------------------------------------------------


def values(rng: random.Random, size: list[int], dtype: torch.dtype) -> Tensor:
    """Anything that the dtype can hold."""
    bits = torch.randint(0, 256, (*size, dtype.itemsize), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    if dtype == torch.bool:
        return bits[..., 0] % 2 == 1
    kind = rng.choice(["bits", "small", "extreme"])
    if kind == "bits" or not size:
        return bits.to(torch.uint8).view(dtype).reshape(size)
    if kind == "small":
        return (bits[..., 0] % 16 - 2).to(dtype)
    return torch.where(bits[..., 0] % 2 == 1, 2**62, -(2**62)).to(dtype)


def any_size(rng: random.Random) -> list[int]:
    return [rng.choice([0, 1, 1, 2, 3, 5, 17]) for _ in range(rng.randrange(6))]


def random_tensor(rng: random.Random, tensor: Tensor) -> Tensor:
    return values(rng, any_size(rng), rng.choice(NUMERIC))


def other_values(rng: random.Random, tensor: Tensor) -> Tensor:
    return values(rng, list(tensor.shape), tensor.dtype)


def other_dtype(rng: random.Random, tensor: Tensor) -> Tensor:
    return values(rng, list(tensor.shape), rng.choice(NUMERIC))


def other_size(rng: random.Random, tensor: Tensor) -> Tensor:
    """One dimension is longer or shorter, or there is one more or one less."""
    size = list(tensor.shape)
    if size and rng.random() < 0.6:
        dim = rng.randrange(len(size))
        size[dim] = max(0, size[dim] + rng.choice([-2, -1, 1, 2, 15]))
    elif size and rng.random() < 0.5:
        del size[rng.randrange(len(size))]
    else:
        size.insert(rng.randrange(len(size) + 1), rng.choice([0, 1, 2]))
    return values(rng, size, tensor.dtype)


def expanded(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same shape without memory of its own along one dimension, or along all."""
    if not tensor.dim() or not tensor.numel():
        return tensor
    dims = list(range(tensor.dim())) if rng.random() < 0.3 else [rng.randrange(tensor.dim())]
    narrow = tensor
    for dim in dims:
        narrow = narrow.narrow(dim, 0, 1)
    return narrow.expand(tensor.shape)


def huge(rng: random.Random, tensor: Tensor) -> Tensor:
    """Sizes that no memory holds, in the first and the last two dimensions: those decide over what is allocated or
    refused. A dimension that is only added up would make a call that is right and takes hours."""
    size = [rng.choice([0, 1, 2]) for _ in tensor.shape] or [1]
    for dim in {0, *range(2, len(size))}:
        if rng.random() < 0.6:
            size[dim] = rng.choice(HUGE)
    if len(size) > 1 and 0 in size:  # nothing is computed
        size[1] = rng.choice(HUGE)
    with contextlib.suppress(RuntimeError):
        return torch.ones((), dtype=tensor.dtype).expand(size)
    return tensor


def other_strides(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same shape over other memory: transposed, with gaps, from the middle, with elements that overlap."""
    dim = tensor.dim()
    memory = values(rng, [4 * max(1, tensor.numel()) + 64], tensor.dtype)
    kind = rng.choice(["permuted", "gaps", "overlapping", "shifted", "transposed view"])
    if kind == "transposed view" and dim > 1:
        return tensor.transpose(rng.randrange(dim), rng.randrange(dim))
    if kind == "permuted":
        order = rng.sample(range(dim), dim)
        dense = memory[: tensor.numel()].reshape([tensor.shape[axis] for axis in order])
        return dense.permute([order.index(axis) for axis in range(dim)])
    if kind == "gaps":
        return memory[: 2 * tensor.numel() : 2].reshape(tensor.shape)
    if kind == "shifted":
        return memory[1 : 1 + tensor.numel()].view(tensor.shape)
    strides = [rng.choice([0, 1, 1, 2]) for _ in range(dim)]
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True) if size)
    return memory.as_strided(tensor.shape, strides) if reach < len(memory) else tensor


def elsewhere(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def requiring_grad(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


TENSORS: tuple[Callable[[random.Random, Tensor], Tensor], ...] = (
    other_values, other_values, other_dtype, other_size, other_size, random_tensor, expanded, other_strides,
    other_strides, huge, elsewhere, requiring_grad,
)  # fmt: skip


def changed_list(rng: random.Random, numbers: list[int]) -> list[int]:
    """Sizes or strides: an entry out of range, a wrong number of entries, another order, anything at all."""
    kind = rng.choice(["entry", "entry", "entries", "shorter", "longer", "order", "anything"])
    changed = list(numbers)
    if kind in ("entry", "entries") and changed:
        for _ in range(1 if kind == "entry" else 2):
            changed[rng.randrange(len(changed))] = rng.choice(INTEGERS)
    elif kind == "shorter":
        changed = changed[: rng.randrange(len(changed) + 1)]
    elif kind == "longer":
        changed.insert(rng.randrange(len(changed) + 1), rng.choice(INTEGERS))
    elif kind == "order":
        rng.shuffle(changed)
    else:
        changed = [rng.choice(INTEGERS) for _ in range(rng.randrange(7))]
    return changed


def changed(rng: random.Random, kind: str, value: Any) -> Any:
    """Another value of the schema's type ``kind``, e.g. "Tensor", "Optional[Tensor]", "List[int]"."""
    if kind.startswith("Optional["):
        if rng.random() < 0.3:
            return None
        return changed(rng, kind[len("Optional[") : -1], value)
    if kind == "Tensor":
        return rng.choice(TENSORS)(rng, value if value is not None else torch.ones(3))
    if kind == "List[Tensor]":
        tensors = [changed(rng, "Tensor", one) if rng.random() < 0.5 else one for one in value]
        return rng.choice([tensors, tensors[:1], [], tensors * 2])
    if kind in ("List[int]", "List[SymInt]"):
        return changed_list(rng, value)
    if isinstance(value, torch.dtype):  # which schemas call an int
        return rng.choice(NUMERIC)
    if kind in ("int", "SymInt"):
        return rng.choice([rng.choice(INTEGERS), value + rng.choice([-1, 1, 2])])
    if kind == "float":
        return rng.choice(FLOATS)
    if kind == "bool":
        return not value
    raise NotImplementedError(f"arguments of type {kind}: say here what is hostile to them")


def arguments(name: str, number: int) -> list[Any]:
    """Those of one call, a function of its number: sometimes valid, mostly with one to three of them changed."""
    rng = random.Random(f"{name} {number}")
    schema = getattr(torch.ops.fgvc_ext, name).default._schema
    given = list(rng.choice(valid_calls(name)))
    given += [argument.default_value for argument in schema.arguments[len(given) :]]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
        place = rng.randrange(len(given))
        given[place] = changed(rng, str(schema.arguments[place].type), given[place])
    return given


def call(name: str, number: int) -> bool:
    """Whether it returned; any exception of Python's is right as well."""
    try:
        results = getattr(torch.ops.fgvc_ext, name).default(*arguments(name, number))
        listed = [results] if isinstance(results, Tensor) else results
        through = [result.sum() for result in listed if result.requires_grad]
        if through:
            with contextlib.suppress(RuntimeError):  # for one, the gradient of a backward operator
                torch.autograd.backward(through)
    except NotImplementedError as error:
        if "say here what is hostile" in str(error):
            raise
        return False
    except Exception:
        return False
    return True


def describe(argument: Any) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(describe, argument))}]"
    if not isinstance(argument, Tensor):
        return repr(argument)
    place = "" if argument.device.type == "cpu" else f", {argument.device}"
    return f"<{argument.dtype}, size {list(argument.shape)}, strides {list(argument.stride())}{place}>"


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main(first: int, count: int, names: list[str]) -> None:
    for name in names:
        valid_calls(name)
    if "FGVC_EXT_HOSTILE_UNLIMITED" not in os.environ:  # AddressSanitizer has a limit of its own
        limit_memory()
    warnings.simplefilter("ignore")
    progress = os.open(os.environ.get("FGVC_EXT_HOSTILE_CALL", os.devnull), os.O_WRONLY | os.O_CREAT)
    for name in names:
        returned = 0
        for number in range(first, first + count):
            os.pwrite(progress, f"{name} {number}\n".ljust(80).encode(), 0)
            if count == 1:
                print(f"{name}({', '.join(map(describe, arguments(name, number)))})", flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            returned += call(name, number)
        print(f"{name}: {count} calls, {returned} returned", flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    faulthandler.enable()
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or operators())
