"""What setup.py and CMake decide before they compile: the CUDA library or not, for which GPUs, the emulation or not."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fgvc_ext import _library

from .conftest import PACKAGE, PROGRAMS

ROOT = PACKAGE.parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py as a module; imported, it builds nothing."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 80:
        pytest.skip("setup.py asks for setuptools >= 80")
    specification = importlib.util.spec_from_file_location("fgvc_ext_setup", ROOT / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("torch_list", "cmake_list"),
    [
        ("", ""),
        ("8.0", "80-real"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("8.0 8.6", "80-real;86-real"),
        (" 8.0;; 8.6 ", "80-real;86-real"),
        ("9.0a", "90a-real"),
        ("9.0a+PTX", "90a"),
        ("12.0 12.1+PTX", "120-real;121"),
        ("Turing", "75"),
        ("Ampere", "80-real;86"),
        ("Ampere+Tegra", "87-real"),
        ("Ada Hopper", "89;90"),
        ("Blackwell", "100-real;103-real;120-real;121"),
        ("Ampere;8.0+PTX 8.6", "80;86"),  # each once, with PTX where one of them asks for it
    ],
)
def test_architectures_as_torch_writes_them(setup: ModuleType, torch_list: str, cmake_list: str) -> None:
    assert setup.cmake_architectures(torch_list) == cmake_list


def test_the_names_mean_what_they_mean_to_torch(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = pytest.importorskip("torch.utils.cpp_extension")._get_cuda_arch_flags
    for name in setup.NAMED_ARCHITECTURES:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
        try:
            wanted = {flag.split(",code=")[1] for flag in flags()}
        except ValueError:
            continue  # this torch does not know it
        codes = set()
        for architecture in setup.cmake_architectures(name).split(";"):
            number = architecture.removesuffix("-real")
            codes |= {f"sm_{number}"} | (set() if "-real" in architecture else {f"compute_{number}"})
        assert codes == wanted, name


@pytest.mark.parametrize("name", ["Amper", "ampere", "80", "8.0,8.6", "sm_80", "8.0+ptx", "8", "Turing+PTX"])
def test_an_unknown_architecture_is_refused_by_name(setup: ModuleType, name: str) -> None:
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: '{re.escape(name)}' is no architecture; expected"):
        setup.cmake_architectures(f"9.0 {name}")


def test_native_means_the_gpus_that_are_here(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(9, 0), (8, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: found[number])
    assert setup.cmake_architectures("native") == "80-real;90"
    found.clear()
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        setup.cmake_architectures("native")


@pytest.fixture
def toolchain(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str | None, str], None]:
    """Gives torch and nvcc a CUDA version, or none, and FGVC_EXT_CUDA a value."""

    def arrange(of_torch: str | None, of_nvcc: str | None, asked: str) -> None:
        monkeypatch.setenv("FGVC_EXT_CUDA", asked)
        monkeypatch.setattr(torch.version, "cuda", of_torch)
        monkeypatch.setattr(setup, "nvcc_path", lambda: of_nvcc and "nvcc")
        answer = SimpleNamespace(stdout=f"Cuda compilation tools, release {of_nvcc}, V{of_nvcc}.88")
        monkeypatch.setattr(setup.subprocess, "run", lambda *arguments, **options: answer)

    return arrange


@pytest.mark.parametrize(
    ("of_torch", "of_nvcc", "asked", "wanted"),
    [
        ("13.2", "13.0", "", True),
        ("13.2", "13.0", "1", True),
        ("13.2", "13.0", "0", False),
        ("13.2", None, "", False),
        (None, "13.0", "", False),
        (None, None, "0", False),
        ("13.2", "12.8", "", False),  # with a line that says why
        ("13.2", None, "1", "nvcc was found neither in CUDA_HOME nor on PATH"),
        (None, "13.0", "1", "has no CUDA: install a CUDA build of torch"),
        ("13.2", "12.8", "1", "nvcc is of CUDA 12, torch of CUDA 13.2: the major versions must be equal"),
    ],
)
def test_whether_the_cuda_library_is_built(
    setup: ModuleType,
    toolchain: Callable[[str | None, str | None, str], None],
    of_torch: str | None,
    of_nvcc: str | None,
    asked: str,
    wanted: bool | str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toolchain(of_torch, of_nvcc, asked)
    if isinstance(wanted, str):
        with pytest.raises(SystemExit, match=wanted):
            setup.cuda_wanted()
        return
    assert setup.cuda_wanted() is wanted
    mismatch = "building without the CUDA library: nvcc is of CUDA 12" in capsys.readouterr().err
    assert mismatch == (of_nvcc == "12.8")


def test_nvcc_is_looked_for_in_cuda_home_first(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in ("asked", "on_path"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path" / "bin"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "asked"))
    assert setup.nvcc_path() == str(tmp_path / "asked" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup.nvcc_path() == str(tmp_path / "on_path" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", "")
    assert setup.nvcc_path() is None


def fake_program(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment that is not activated, and a PATH that knows an older CMake, which fails, and no other."""
    scripts = tmp_path / "environment" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setattr(setup.sys, "executable", str(scripts / "python"))
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    system = fake_program(tmp_path / "system" / "cmake", "echo 'cmake version 3.16.3'; exit 1")
    monkeypatch.setenv("PATH", os.pathsep.join([str(system.parent), "/usr/bin", "/bin"]))
    return scripts


@pytest.mark.parametrize("place", ["environment/bin", "scripts"])
def test_cmake_is_looked_for_beside_the_interpreter_first(
    setup: ModuleType, environment: Path, tmp_path: Path, place: str
) -> None:
    beside = fake_program(tmp_path / place / "cmake", "echo 'cmake version 3.22.0-rc1'")
    assert setup.find_cmake() == str(beside)


def test_cmake_is_found_on_path_where_none_is_beside_the_interpreter(
    setup: ModuleType, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        SystemExit, match=r"system/cmake does not run: cmake version 3\.16\.3: pip install 'cmake>=3\.22'"
    ):
        setup.find_cmake()
    on_path = fake_program(tmp_path / "system" / "cmake", "echo 'cmake version 4.1.0'")
    assert setup.find_cmake() == str(on_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="CMake, which was not found: pip install cmake ninja"):
        setup.find_cmake()


def test_an_older_cmake_is_named_with_its_version(setup: ModuleType, environment: Path) -> None:
    beside = fake_program(environment / "cmake", "echo 'cmake version 3.9.6'")
    with pytest.raises(SystemExit, match=f"needs CMake >= 3.22, {beside} is cmake version 3.9.6: pip install 'cmake"):
        setup.find_cmake()


def test_the_oldest_cmake_is_that_of_the_build(setup: ModuleType) -> None:
    oldest = ".".join(map(str, setup.OLDEST_CMAKE))
    assert f"cmake_minimum_required(VERSION {oldest})" in (ROOT / "CMakeLists.txt").read_text()
    assert f'"cmake>={oldest}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("jobs", "parallel"), [("3", "3"), ("", str(os.cpu_count()))])
def test_the_build_uses_the_programs_beside_the_interpreter_and_as_many_jobs_as_asked(
    setup: ModuleType, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str, parallel: str
) -> None:
    answer = f"""
test "$1" = --version && echo 'cmake version 3.31.6' && exit
echo "$@" >> {tmp_path}/calls
touch {tmp_path}/build/$TAG/install_manifest.txt {tmp_path}/build/$TAG/compile_commands.json"""
    fake_program(environment / "cmake", answer)
    ninja = fake_program(environment / "ninja", "")
    for name, value in (("MAX_JOBS", jobs), ("FGVC_EXT_CUDA", "0"), ("TAG", sys.implementation.cache_tag)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    command = setup.CMakeBuild(setup.setuptools.Distribution())
    command.initialize_options()
    command.inplace, command.debug = True, False
    command.run()
    configure, build, install = (tmp_path / "calls").read_text().splitlines()
    assert f"-G Ninja -DCMAKE_MAKE_PROGRAM={ninja} -DPython_EXECUTABLE={environment}/python " in configure
    assert build == f"--build {tmp_path}/build/{sys.implementation.cache_tag} --parallel {parallel}"
    assert install.startswith("--install ")


@pytest.mark.parametrize("header", [None, "", "#include <of_a_package_that_is_missing.h>"])
def test_the_emulation_is_left_out_where_no_headers_of_cuda_are_found(tmp_path: Path, header: str | None) -> None:
    """A project around csrc/emulation that finds headers in `tmp_path` alone, whatever this machine has."""
    cmake = shutil.which("cmake", path=PROGRAMS)
    if cmake is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    place = tmp_path / "site-packages" / "nvidia" / "cu13" / "include"
    if header is not None:
        place.mkdir(parents=True)
        (place / "cuda_bf16.h").write_text(header)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").touch()
    (tmp_path / "CMakeLists.txt").write_text(f"""
cmake_minimum_required(VERSION 3.22)
project(around LANGUAGES CXX)
set(torch_include {tmp_path}/site-packages/torch/include)
set(cuda_sources "")
add_library(torch_stable INTERFACE)
add_subdirectory({ROOT}/csrc/emulation emulation)
if(TARGET fgvc_ext_emulated)
  get_target_property(folders fgvc_ext_emulated INCLUDE_DIRECTORIES)
  message(STATUS "compiled with ${{folders}}")
endif()
""")
    only_here = [f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"]
    command = [cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"), *only_here]
    environment = {name: value for name, value in os.environ.items() if name != "CPLUS_INCLUDE_PATH"}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    built = header == ""
    assert (f"compiled with {ROOT}/csrc/emulation;{place}" in result.stdout) == built, result.stdout
    assert ("CMake Warning" in result.stdout) != built
    assert ("no headers of CUDA that compile were found" in " ".join(result.stdout.split())) != built


def test_the_processor_is_asked_for_every_instruction_that_the_kernels_are_compiled_with() -> None:
    """A table whose flags are not all checked ends in an illegal instruction on some processors."""
    lines = [line for line in (ROOT / "CMakeLists.txt").read_text().splitlines() if "avx" in line and " -m" in line]
    compiled_with = set(re.findall(r" -m(?!prefer)(\w+)", " ".join(lines)))
    assert {"avx2", "avx512vl", "bmi", "lzcnt"} <= compiled_with
    source = (ROOT / "csrc" / "cpu" / "instruction_set.cpp").read_text()
    assert set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', source)) == compiled_with


def test_every_operator_has_the_files_that_the_page_on_adding_one_names() -> None:
    (listed,) = re.findall(r"set\(operators\s+([\w\s]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed.split()) == _library._operators()
    named = set(re.findall(r"`([\w/<>]+/[\w<>]+\.\w+)`", (ROOT / "docs" / "adding_an_op.md").read_text()))
    assert {"fgvc_ext/ops/<op>.py", "csrc/cuda/<op>.cuh", "csrc/emulation/sanitizers/<op>.cpp"} <= named
    for operator in listed.split():
        files = [name.replace("<op>", operator) for name in sorted(named) if "<topic>" not in name]
        assert [name for name in files if not (ROOT / name).is_file()] == []
