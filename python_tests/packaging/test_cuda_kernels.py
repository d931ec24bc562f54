"""The machine code of the CUDA library, as far as it tells without a GPU whether kernels are fast."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("the benchmarks are not here")
    specification = importlib.util.spec_from_file_location("kernels", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["kernels"] = module  # dataclasses look there
    specification.loader.exec_module(module)
    return module


def test_no_kernel_keeps_registers_in_memory(script: ModuleType) -> None:
    cuobjdump = script.find_cuobjdump()
    if not script.LIBRARY.exists() or not cuobjdump:
        pytest.skip("needs the CUDA library and cuobjdump (pip install nvidia-cuda-cuobjdump)")
    kernels = script.read_kernels(script.LIBRARY, cuobjdump)
    assert kernels
    assert {kernel.name: kernel.stack for kernel in kernels if kernel.stack > 8} == {}


def test_instructions_are_counted_by_trips(script: ModuleType) -> None:
    """A loop of three instructions, a rare one that a branch skips, an exit, and what lies behind it."""
    code = [
        "MOV",
        "FADD",
        "ISETP",
        "@P0 BRA 0x10",
        "@P1 BRA 0x90",
        "MOV",
        "IADD",
        "@P0 BRA 0x60",
        "MOV",
        "EXIT",
        "BRA 0xa0",
    ]
    kernel = script.Kernel("example", 1, 0, 0, tuple((16 * number, text) for number, text in enumerate(code)))
    assert kernel.loops() == [(0x10, 0x30), (0x60, 0x70)]
    assert script.instructions(kernel, (1, 1)) == 10
    assert script.instructions(kernel, (5, 1)) == 10 + 4 * 3
    assert script.instructions(kernel, (1, 0)) == 10 - 4
    assert script.instructions(kernel, (1,)) is None
