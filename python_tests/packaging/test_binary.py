"""What stands in the built libraries: what they link, what they show, and nothing that a linker could mix."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgvc_ext import _library

from .conftest import PACKAGE, Interpreters, compiled

ROOT = PACKAGE.parent
OBJECTS = sorted(ROOT.glob(f"build/{sys.implementation.cache_tag}/CMakeFiles/kernel_*.dir/**/*.o"))
OPERATOR_LIBRARIES = sorted(_library.FOLDER.glob("*.so"))
LIBRARIES = [*OPERATOR_LIBRARIES, *sorted(PACKAGE.glob("_C*.so"))]
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
# What only a linker's choice among several definitions tells apart: weak (W, V) and unique (u).
MERGEABLE = ("W", "V", "u")

pytestmark = [
    compiled,
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs nm and readelf"),
]


def defined_symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Type letter and name of every symbol that the file defines."""
    output = subprocess.run(["nm", "--defined-only", *options, str(path)], capture_output=True, text=True, check=True)
    lines = (line.split(maxsplit=2) for line in output.stdout.splitlines())
    return [(fields[-2], fields[-1]) for fields in lines if len(fields) == 3]


def needed(path: Path) -> set[str]:
    """The shared libraries that the file links, without their versions: "libtorch_cpu", "libc"."""
    output = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", output)}


def runpath(path: Path) -> list[str]:
    output = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", output)


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_only_what_is_meant_to_be_seen_is_exported(path: Path) -> None:
    exported = {name for _, name in defined_symbols(path, "-D")}
    if path.name.startswith("_C"):
        assert exported == {"PyInit__C"}
    elif path.name == "libfgvc_ext_cpu.so":
        wanted = {"instruction_set", "supported_instruction_set", "use_instruction_set"}
        assert exported == {f"fgvc_ext_{name}" for name in wanted}
    else:
        assert {name for name in exported if not name.startswith("fgvc_ext_")} == set()


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_what_is_linked(path: Path) -> None:
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    if path.name.startswith("_C"):  # knows torch through the CPU library alone
        assert needed(path) - system == {"libfgvc_ext_cpu"}
        assert runpath(path) == ["$ORIGIN/lib"]
        return
    torch_libraries = {"libtorch_cpu", "libc10"} | ({"libtorch_cuda"} if "cuda" in path.name else set())
    assert needed(path) - system <= torch_libraries  # no libpython, no CUDA runtime
    assert runpath(path) == []  # torch's folder is whichever torch was imported


def test_no_kernel_can_be_taken_from_another_instruction_set() -> None:
    """A weak function of the AVX-512 object, chosen by the linker for all, would crash an older processor."""
    if not OBJECTS:
        pytest.skip("the objects of the build are not here")
    definitions: dict[str, str] = {}
    assert {path.relative_to(ROOT).parts[3].split("_")[1] for path in OBJECTS} <= set(INSTRUCTION_SETS)
    for path in OBJECTS:
        isa = path.relative_to(ROOT).parts[3].split("_")[1]  # kernel_<instruction set>_<operator>.dir
        symbols = defined_symbols(path)
        assert any(f"{len(isa)}{isa}" in name for _, name in symbols), f"{path} has nothing in namespace {isa}"
        assert [name for letter, name in symbols if letter in MERGEABLE] == []
        for name in {name for letter, name in symbols if letter.isupper()}:
            assert definitions.setdefault(name, isa) == isa, f"{name} is defined for {definitions[name]} and {isa}"


def test_the_libraries_hold_no_mergeable_symbol_of_an_instruction_set() -> None:
    mangled = [f"{len(isa)}{isa}" for isa in INSTRUCTION_SETS]
    for path in LIBRARIES:
        symbols = defined_symbols(path)
        found = [name for letter, name in symbols if letter in MERGEABLE and any(isa in name for isa in mangled)]
        assert found == [], path


def test_a_weak_symbol_would_be_found(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = "namespace fgvc_ext::avx512 { template <class T> T twice(T x) { return x + x; } template int twice(int); }"
    path = tmp_path / "weak.o"
    subprocess.run(["g++", "-std=c++20", "-c", "-xc++", "-", "-o", str(path)], input=source, text=True, check=True)
    assert [letter for letter, name in defined_symbols(path) if "6avx512" in name] == ["W"]


def undefined_symbols(path: Path) -> set[str]:
    """What the file takes from others, without the versions that it asks for."""
    output = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in output.stdout.splitlines()}


def torch_functions(path: Path) -> list[ctypes.CDLL]:
    """The libraries of torch that this one may take C functions from."""
    folder = Path(torch.__file__).parent / "lib"
    names = ["libtorch_cpu.so", *(["libtorch_cuda.so"] if "cuda" in path.name else [])]
    if not all((folder / name).exists() for name in names):
        pytest.skip("this torch has no CUDA")
    return [ctypes.CDLL(str(folder / name)) for name in names]


@pytest.mark.parametrize("path", OPERATOR_LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_undefined_symbols_are_torchs_stable_ones(path: Path) -> None:
    """Of torch the libraries use C functions alone: what keeps one build running under the next torch."""
    names = undefined_symbols(path)
    mangled = re.compile(r"_Z\w*?(2at|3c10|5torch)\d")
    foreign = sorted(name for name in names if mangled.match(name))
    assert not foreign, ", ".join(foreign)  # whole: pytest would shorten a list
    of_torch = {name for name in names if name.startswith(("aoti_torch_", "torch_"))}
    assert of_torch
    handles = torch_functions(path)
    assert [name for name in of_torch if not any(hasattr(handle, name) for handle in handles)] == []


@pytest.mark.parametrize("path", OPERATOR_LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_nothing_is_taken_from_a_cuda_runtime(path: Path) -> None:
    """It is linked statically, since torch's own may be another minor version, and loads what it needs of the driver.
    Only the CUDA library may ask torch for streams and devices.
    """
    names = undefined_symbols(path)
    foreign = sorted(name for name in names if re.match(r"_*cu(da)?[A-Z]", name))
    assert not foreign, ", ".join(foreign)
    if "cuda" not in path.name:
        of_cuda = {name for name in names if re.search(r"cuda|device_guard", name)}
        assert of_cuda <= {"aoti_torch_device_type_cuda"}  # a number, in a table of torch's headers


def test_symbols_of_torch_and_cuda_would_be_found(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = """
    namespace at { struct Tensor { int dim() const; }; }
    namespace c10::cuda { void set_device(int); }
    extern "C" int cudaMalloc(void**, unsigned long);
    int use(at::Tensor& x) { c10::cuda::set_device(0); return x.dim() + cudaMalloc(nullptr, 1); }
    """
    path = tmp_path / "libfgvc_ext_faulty.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-xc++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    with pytest.raises(AssertionError, match="2at6Tensor3dim"):
        test_undefined_symbols_are_torchs_stable_ones(path)
    with pytest.raises(AssertionError, match="cudaMalloc"):
        test_nothing_is_taken_from_a_cuda_runtime(path)


def test_the_cuda_library_registers_its_kernels_without_a_gpu(interpreters: Interpreters) -> None:
    """Linked whole and loaded with every symbol bound, under a torch of the same CUDA major version."""
    path = _library.FOLDER / "libfgvc_ext_cuda.so"
    built = _library.build_facts()["cuda"]
    if not built or not path.exists():
        pytest.skip("built without CUDA")
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != built.split(".")[0]:
        pytest.skip(f"built for CUDA {built}, torch has CUDA {torch.version.cuda}")
    code = """
import torch, fgvc_ext
from fgvc_ext import _library
assert fgvc_ext.info()["cuda library"] == "loaded", fgvc_ext.info()["cuda library"]
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("fgvc_ext::"):
        print(name, *(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA")))
"""
    lines = interpreters.run(code, ROOT).lines
    assert len(lines) >= 7
    assert [line for line in lines if not line.endswith(" True True")] == []
