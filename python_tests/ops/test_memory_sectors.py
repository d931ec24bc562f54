"""How much of the memory that warps touch they asked for, counted under emulation: no GPU is needed.

A GPU moves global memory in sectors of 32 bytes. The emulation counts, for each access of a warp, the sectors that it
touches and the fewest that could hold its bytes (`csrc/emulation/accesses.h`). It sees what goes through `Global` of
`csrc/cuda/memory.cuh`; a test here finds what does not.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fgvc_ext import _library, ops

from .comparison import map_first, results
from .generators import arrange, random
from .spec import SPECS, Spec
from .test_emulation import LIBRARY, Emulation

ROOT = Path(__file__).parents[2]
LEAST = 0.9
SIDES = (14, 28)
IMAGE_SIDES = {14: 32, 28: 64}  # of operators on images, which are larger than feature maps

needs_emulation = pytest.mark.skipif(
    not _library.has_schemas() or not LIBRARY.exists(),
    reason="to emulate CUDA, build with FGVC_EXT_CMAKE_ARGS=-DFGVC_EXT_EMULATION=ON",
)


class Launch(NamedTuple):
    loads: int
    least_loads: int
    stores: int
    least_stores: int
    worst: str

    @property
    def efficiency(self) -> float:
        return (self.least_loads + self.least_stores) / (self.loads + self.stores)


@pytest.fixture
def counted() -> Iterator[Callable[[Callable[[], Any]], list[Launch]]]:
    """Calls a function and tells what each launch of an emulated kernel did."""
    torch.ops.load_library(str(LIBRARY))
    library = ctypes.CDLL(str(LIBRARY))
    library.fgvc_ext_emulation_sectors.restype = ctypes.c_char_p

    def call(function: Callable[[], Any]) -> list[Launch]:
        library.fgvc_ext_emulation_count_sectors(1)
        with Emulation():
            function()
        lines = library.fgvc_ext_emulation_sectors().decode().splitlines()
        return [Launch(*map(int, line.split()[:4]), " ".join(line.split()[4:])) for line in lines]

    yield call
    library.fgvc_ext_emulation_count_sectors(0)


Counted = Callable[[Callable[[], Any]], list[Launch]]


def assert_efficient(launches: list[Launch]) -> None:
    assert launches
    for launch in launches:
        assert launch.efficiency >= LEAST, launch
        total = launch.loads + launch.stores
        for touched, least in ((launch.loads, launch.least_loads), (launch.stores, launch.least_stores)):
            assert 4 * touched < total or least >= LEAST * touched, launch  # what is a small part may lie badly


# Every operator on maps, by its spec; and beside what `of_size` makes, calls that take other kernels.
IMAGE_LIKE = [spec for spec in SPECS if spec.image_like]
FURTHER = {"global_k_max_pool": [{"k": 16, "weight": torch.ones(16, requires_grad=True)}]}
CALLS = [(spec, further) for spec in IMAGE_LIKE for further in ({}, *FURTHER.get(spec.name, ()))]


def image_call(spec: Spec, side: int, dtype: torch.dtype, layout: str, further: dict[str, Any]) -> Callable[[], None]:
    """Forward, and backward where there is one, on [2,64,side,side]."""
    if spec.channels is not None:
        side = IMAGE_SIDES[side]
    sample = spec.of_size((2, 64, side, side), "cpu")
    differentiable = sample.first in spec.differentiable
    sample = map_first(sample, lambda one: arrange(one.to(dtype), layout).requires_grad_(differentiable))
    arguments = {**sample.tensors, **sample.options, **further}

    def call() -> None:
        for output in results(spec.function(**arguments)).values():
            if output.requires_grad:
                output.backward(torch.ones_like(output))

    return call


@needs_emulation
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spec", "further"), CALLS, ids=[spec.name + " further" * bool(further) for spec, further in CALLS]
)
def test_kernels_ask_for_what_they_touch(
    spec: Spec, further: dict[str, Any], dtype: torch.dtype, layout: str, side: int, counted: Counted
) -> None:
    assert_efficient(counted(image_call(spec, side, dtype, layout, further)))


def test_no_operator_on_maps_is_left_out() -> None:
    assert {"global_k_max_pool", "diversify", "suppression_mask", "spatial_attention_map"} <= {
        spec.name for spec, _ in CALLS
    }
    assert set(FURTHER) <= {spec.name for spec in IMAGE_LIKE}


@needs_emulation
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boxes_begin_at_sectors(dtype: torch.dtype, side: int, counted: Counted) -> None:
    """Maps of 14×14 do not: each second one (bfloat16: three of four) begins within a sector."""
    maps = random(16, side, side, dtype=dtype, device="cpu")
    assert_efficient(counted(lambda: ops.heatmap_to_boxes(maps, threshold=0.3, image_size=448)))


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_orthogonal_loss(dtype: torch.dtype, counted: Counted) -> None:
    """Its sums run in an order that does not depend on where a map begins: sectors are whole at 28×28."""
    student = random(4, 28, 28, dtype=dtype, device="cpu").requires_grad_()
    teachers = random(3, 4, 28, 28, dtype=dtype, device="cpu", seed=1)
    assert_efficient(counted(lambda: ops.orthogonal_loss(student, teachers).backward()))


@needs_emulation
@pytest.mark.parametrize(("stride", "efficiency"), [(1, 1.0), (2, 0.5), (8, 1 / 8), (16, 1 / 8)])
def test_the_count_knows_a_kernel_that_wastes(stride: int, efficiency: float, counted: Counted) -> None:
    """`copy_strided` of csrc/emulation/sectors.cpp copies floats that lie `stride` apart."""
    source, target = torch.arange(256.0 * stride + 8), torch.zeros(256 * stride + 8)
    first = (-source.data_ptr() % 32) // 4, (-target.data_ptr() % 32) // 4
    pointers = [ctypes.c_void_p(t[at:].data_ptr()) for t, at in zip((source, target), first, strict=True)]
    copy = ctypes.CDLL(str(LIBRARY)).fgvc_ext_emulation_copy_strided
    (launch,) = counted(lambda: copy(*pointers, ctypes.c_uint(256), ctypes.c_uint(stride)))
    assert torch.equal(target[first[1] :][: 256 * stride : stride], source[first[0] :][: 256 * stride : stride])
    assert launch.efficiency == pytest.approx(efficiency)
    if efficiency < 1:
        assert "sectors.cpp" in launch.worst
        with pytest.raises(AssertionError):
            assert_efficient([launch])


@needs_emulation
def test_nothing_is_counted_unless_asked(counted: Counted) -> None:
    counted(lambda: None)
    library = ctypes.CDLL(str(LIBRARY))
    library.fgvc_ext_emulation_count_sectors(0)
    with Emulation():
        ops.global_k_max_pool(torch.ones(1, 1, 2, 2), 1)
    library.fgvc_ext_emulation_sectors.restype = ctypes.c_char_p
    assert library.fgvc_ext_emulation_sectors() == b""


# --- accesses that would not be counted -------------------------------------------------------------------------------

# Outside memory.cuh a star is a multiplication, with a space on both sides: no pointer has a name there, and nothing is
# dereferenced. What the argument structs point to is not indexed either.
POINTER_STAR = re.compile(r"\w\*|\*\w|\*>|\*&|->")


def code_of(source: str) -> str:
    return re.sub(r"//.*|/\*.*?\*/|\"[^\"\n]*\"", "", source)


def pointer_fields() -> set[str]:
    member = re.compile(r"^\s*(?:const )?\w+ ?(\*\w[\w*, ]*|\* \w[\w*, ]*);", re.M)
    headers = (ROOT / "csrc" / "common").glob("*.h")
    declarations = [member.findall(code_of(header.read_text())) for header in headers]
    return {name for group in declarations for names in group for name in re.findall(r"\w+", names)}


def uncounted_accesses(source: str, fields: set[str]) -> list[str]:
    indexed = re.compile(rf"\.(?:{'|'.join(sorted(fields))})\s*\[") if fields else re.compile(r"(?!)")
    lines = [re.sub(r"__launch_bounds__\(.*?\)", "", line) for line in code_of(source).splitlines()]
    return [line.strip() for line in lines if POINTER_STAR.search(line) or indexed.search(line)]


@pytest.mark.skipif(not (ROOT / "csrc" / "cuda").is_dir(), reason="the sources are not here")
def test_global_memory_is_accessed_in_memory_cuh_alone() -> None:
    fields = pointer_fields()
    assert {"features", "indices", "bits", "seed", "target", "log_sum"} <= fields
    files = sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    hosts = {"memory.cuh", "launch.cuh", "elements.cuh"}  # the one place; and code that runs on the host
    assert hosts < {file.name for file in files}
    for file in files:
        if file.name not in hosts:
            assert not uncounted_accesses(file.read_text(), fields), file.name


@pytest.mark.parametrize(
    "line",
    [
        "const T* grad = op.grad;",
        "value = *address;",
        "op.bits[map] = 0;",
        "static_cast<T*>(op.output)[map] = total;",
        "total += map->row;",
    ],
)
def test_an_access_that_is_not_counted_is_found(line: str) -> None:
    assert uncounted_accesses(line, {"bits"})
    assert not uncounted_accesses("const int64_t at = map * k + rank;  // grad*weight", {"bits"})
