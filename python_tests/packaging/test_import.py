"""Importing the package where something is missing, broken or foreign: it never fails, and says once what is wrong."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fgvc_ext import _library

from .conftest import PACKAGE, Interpreters, compiled

CopyPackage = Callable[..., Path]
EXTRAS = ("torchvision", "tyro", "matplotlib", "PIL", "safetensors", "tqdm", "timm")
LIBRARY = "libfgvc_ext_cpu.so"

# Two operators, each twice; then what was warned of, and what info() says.
USE = """
import warnings
import torch, fgvc_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        features = torch.arange(24.).reshape(1, 2, 3, 4).requires_grad_()
        scores = fgvc_ext.ops.global_k_max_pool(features, 4)
        assert scores.tolist() == [[9.5, 21.5]], scores
        fgvc_ext.ops.gradient_boosting_cross_entropy(scores, torch.tensor([1])).backward()
        assert features.grad.isfinite().all()
print(len(caught))
print(str(caught[0].message) if caught else "")
info = fgvc_ext.info()
print(info["backend"])
print(info["cpu library"])
"""


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
        (another_library, "is not of this version of fgvc_ext: it has no kernel for diversify"),
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


def test_an_unknown_backend_is_refused(interpreters: Interpreters) -> None:
    result = interpreters.run("import fgvc_ext", PACKAGE.parent, FGVC_EXT_BACKEND="nonsense")
    assert result.status == 1
    assert "ValueError: FGVC_EXT_BACKEND must be 'compiled' or 'reference', got 'nonsense'" in result.output


@compiled
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_the_instruction_set_can_be_named(interpreters: Interpreters, copy_package: CopyPackage, name: str) -> None:
    assert _library._module is not None
    if name not in _library._module.supported_instruction_sets():
        pytest.skip(f"this processor or this build has no {name}")
    result = interpreters.run(USE + "print(info['instruction set'])", copy_package(libraries=True), FGVC_EXT_ISA=name)
    assert result.lines == ["0", "", "compiled", "loaded", name]


def test_processes_that_import_at_once(interpreters: Interpreters) -> None:
    results = interpreters.run_copies(4, USE, PACKAGE.parent)
    assert len(results) == 4
    assert all(result.lines == results[0].lines for result in results)


@compiled
def test_a_cuda_library_is_left_alone_where_torch_has_another_cuda(interpreters: Interpreters) -> None:
    code = "import torch; torch.version.cuda = {!r}\nimport fgvc_ext; print(fgvc_ext.info()['cuda library'])"
    built = _library.build_facts()["cuda"]
    if not built:
        assert interpreters.run(code.format("13.2"), PACKAGE.parent).lines == ["built without CUDA"]
        return
    (other,) = interpreters.run(code.format("99.1"), PACKAGE.parent).lines
    assert other == f"built for CUDA {built}, but torch {torch.__version__} has CUDA 99.1"
    (none,) = interpreters.run(code.format(None), PACKAGE.parent).lines
    assert none == f"built for CUDA {built}, but torch {torch.__version__} has no CUDA"
