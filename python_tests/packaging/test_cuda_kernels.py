"""The machine code of the CUDA library, as far as it tells without a GPU whether kernels are fast."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture(scope="module")
def kernels(script: ModuleType) -> list[Any]:
    if not script.LIBRARY.exists():
        pytest.skip("needs the CUDA library")
    path = script.find_tools()
    assert path, "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, as `make test` does"
    return script.read_kernels(script.LIBRARY, path)


def test_no_kernel_keeps_registers_in_memory(kernels: list[Any]) -> None:
    assert kernels
    assert {kernel.name: kernel.stack for kernel in kernels if kernel.stack > 8} == {}


def test_each_path_is_one_kernel_and_gives_a_count(script: ModuleType, kernels: list[Any]) -> None:
    for path in script.PATHS:
        _, count = script.per_map(path, kernels)
        assert 10 < count < 1000, path.what
    with pytest.raises(ValueError, match="nothing: 0 kernels are called no_such_kernel"):
        script.per_map(script.Path14("nothing", "no_such_kernel", 1, ()), kernels)


def test_the_tools_are_found_beside_each_other(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuobjdump without the nvdisasm that it calls is of no use."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    folder = tmp_path / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    for tool, found in (("cuobjdump", False), ("nvdisasm", True)):
        (folder / tool).touch(mode=0o755)
        assert bool(script.find_tools()) == found


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
    assert script.instructions(kernel, (1, script.ALONE)) == pytest.approx(10 - 2)
    assert script.instructions(kernel, (1,)) is None
    with pytest.raises(ValueError, match="a path: 2 loops, but trips for 1"):
        script.per_map(script.Path14("a path", "example", 1, (1,)), [kernel])
