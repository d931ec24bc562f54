"""Importing the package where something is missing, broken or foreign: it never fails, and says once what is wrong."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import LIBRARY, PACKAGE, USE, CopyPackage, Interpreters, compiled

EXTRAS = ("torchvision", "tyro", "matplotlib", "PIL", "safetensors", "tqdm", "timm")


def test_import_needs_torch_and_numpy_alone(interpreters: Interpreters) -> None:
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({EXTRAS}))
import fgvc_ext, fgvc_ext.ops, fgvc_ext.nn, fgvc_ext.cli
for name in {EXTRAS}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:  # the block is real
        print(name)
"""
    assert interpreters.run(code, PACKAGE.parent).lines == list(EXTRAS)


def test_without_libraries_the_reference_runs_with_one_warning(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    count, warning, backend, library = interpreters.run(USE, copy_package(libraries=False)).lines
    assert (count, backend) == ("1", "reference")
    assert "python setup.py develop" in warning  # how to get the fast path
    assert "pip install --no-build-isolation ." in warning
    assert "FGVC_EXT_BACKEND=reference" in warning  # and how to be left alone
    assert f"{LIBRARY} is missing" in library


def test_a_program_that_only_compiles_is_warned_as_well(interpreters: Interpreters, copy_package: CopyPackage) -> None:
    """While tracing, without a graph break, and with what comes after as it would be without the warning."""
    code = """
import warnings
import torch, fgvc_ext
pool = torch.compile(lambda features: fgvc_ext.ops.global_k_max_pool(features, 4), backend="eager", fullgraph=True)
loss = torch.compile(fgvc_ext.ops.gradient_boosting_cross_entropy, backend="eager", fullgraph=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(pool(torch.arange(24.).reshape(1, 2, 3, 4)).tolist())
    print(pool(torch.arange(60.).reshape(1, 2, 5, 6)).tolist())
    loss(torch.zeros(1, 5), torch.tensor([1]))
print(*[str(warning.message) for warning in caught if "fgvc_ext" in str(warning.message)])
"""
    lines = interpreters.run(code, copy_package(libraries=False)).lines
    assert lines[:-1] == ["[[9.5, 21.5]]", "[[9.5, 21.5]]", "[[27.5, 57.5]]"]
    assert lines[-1].count("fgvc_ext: cpu tensors run on the slower PyTorch reference") == 1
    assert "python setup.py develop" in lines[-1]


def test_the_import_does_not_bring_torchs_compiler(interpreters: Interpreters, copy_package: CopyPackage) -> None:
    code = "import fgvc_ext, sys; print('torch._dynamo' in sys.modules)"
    assert interpreters.run(code, copy_package(libraries=False)).lines == ["False"]


def test_the_warning_comes_once_a_device_and_not_for_tensors_without_data(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    code = """
import warnings
import torch, fgvc_ext
from torch._subclasses.fake_tensor import FakeTensorMode

class Elsewhere:  # as much of a tensor as `use_kernel` looks at
    is_cpu, is_cuda = False, True
    device = torch.device("cuda")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(fgvc_ext.ops.global_k_max_pool(torch.empty(1, 2, 3, 4, device="meta"), 4).shape)
    with FakeTensorMode():
        print(fgvc_ext.ops.global_k_max_pool(torch.empty(1, 2, 3, 4), 4).shape)
    print(len(caught))
    for tensor in (torch.empty(1), torch.empty(1), Elsewhere(), Elsewhere()):
        for op in ("global_k_max_pool", "diversify"):
            fgvc_ext._library.use_kernel(op, tensor)
print(*[str(warning.message).split()[1] for warning in caught])
"""
    size = "torch.Size([1, 2])"
    assert interpreters.run(code, copy_package(libraries=False)).lines == [size, size, "0", "cpu cuda"]


@pytest.mark.parametrize("libraries", [False, pytest.param(True, marks=compiled)])
def test_the_reference_that_was_asked_for_warns_of_nothing(
    interpreters: Interpreters, copy_package: CopyPackage, libraries: bool
) -> None:
    result = interpreters.run(USE, copy_package(libraries=libraries), FGVC_EXT_BACKEND="reference")
    assert result.lines[:3] == ["0", "", "reference (asked for)"]


@compiled
def test_with_libraries_the_kernels_run_without_a_warning(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    assert interpreters.run(USE, copy_package(libraries=True)).lines == ["0", "", "compiled", "loaded"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)


def another_library(path: Path) -> None:
    module = next(PACKAGE.glob("_C*.so"))  # an ELF file that loads, once the CPU library is there
    shutil.copy(next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.so"), module), path)


def of_a_newer_torch(path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("making a library needs gcc")
    source = "void torch_of_the_future(void); void call(void) { torch_of_the_future(); }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(path)], input=source, text=True, check=True)


@compiled
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (truncated, "is truncated: "),
        (only_a_header, "is truncated: 100 of "),
        (empty, "file too short"),
        (text, "invalid ELF header"),
        (another_library, "is not of this version of fgvc_ext: it has no kernel for any operator"),
        (of_a_newer_torch, "undefined symbol: torch_of_the_future"),
    ],
)
def test_a_broken_library_is_named_once(
    interpreters: Interpreters, copy_package: CopyPackage, fault: Callable[[Path], None], cause: str
) -> None:
    folder = copy_package(libraries=True)
    fault(folder / "fgvc_ext" / "lib" / LIBRARY)
    count, warning, backend, library = interpreters.run(USE, folder).lines
    assert (count, backend) == ("1", "reference")
    for message in (warning, library):
        assert LIBRARY in message
        assert cause in message
        assert "python setup.py develop" in message


@compiled
@pytest.mark.parametrize("fault", [truncated, empty, text, Path.unlink])
def test_a_broken_python_module_leaves_the_kernels_in_use(
    interpreters: Interpreters, copy_package: CopyPackage, fault: Callable[[Path], None]
) -> None:
    folder = copy_package(libraries=True)
    fault(next(folder.glob("fgvc_ext/_C*.so")))
    result = interpreters.run(USE + "print(info['python module'])", folder)
    assert result.lines[:4] == ["0", "", "compiled", "loaded"]
    assert "_C" in result.lines[4]
    assert "python setup.py develop" in result.lines[4]


def test_processes_that_import_at_once(interpreters: Interpreters) -> None:
    results = interpreters.run_copies(4, USE, PACKAGE.parent)
    assert len(results) == 4
    assert all(result.lines == results[0].lines for result in results)
