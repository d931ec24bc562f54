"""Turns environment and command line into arguments of CMake, which alone knows how fgvc_ext is built.

Environment:
    FGVC_EXT_BUILD=0         the Python-only package, which runs on the PyTorch reference
    FGVC_EXT_CUDA=0|1        without or with the CUDA library (default: where nvcc and a CUDA torch are found)
    TORCH_CUDA_ARCH_LIST     as for torch, e.g. "8.0;9.0+PTX" or "Ampere Hopper" (default: see cmake/CudaLibrary.cmake)
    FGVC_EXT_CMAKE_ARGS      further arguments of CMake, e.g. "-DFGVC_EXT_EMULATION=ON"
    MAX_JOBS                 parallel compilations (default: as many as there are processors)

CMake and Ninja are those beside the interpreter (pip install cmake ninja), or else those on PATH.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
if int(setuptools.__version__.split(".")[0]) < 80:
    sys.exit(f"fgvc_ext is built by setuptools >= 80, found {setuptools.__version__}: pip install --upgrade setuptools")
OLDEST_CMAKE = (3, 22)  # as in CMakeLists.txt and pyproject.toml
BUILD_WANTED = os.environ.get("FGVC_EXT_BUILD", "1") != "0"


def find_program(name: str) -> str | None:
    """Beside the interpreter first: PATH does not know a virtual environment that is not activated."""
    beside = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return shutil.which(name, path=os.pathsep.join(beside)) or shutil.which(name)


def find_cmake() -> str:
    command = find_program("cmake")
    if command is None:
        sys.exit("fgvc_ext is built by CMake, which was not found: pip install cmake ninja")
    answer = subprocess.run([command, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    version = re.search(r"cmake version (\d+)\.(\d+)\S*", answer.stdout)
    oldest = ".".join(map(str, OLDEST_CMAKE))
    if answer.returncode or version is None:
        sys.exit(f"fgvc_ext: {command} does not run: {answer.stdout.strip()}: pip install 'cmake>={oldest}' ninja")
    if (int(version[1]), int(version[2])) < OLDEST_CMAKE:
        sys.exit(f"fgvc_ext needs CMake >= {oldest}, {command} is {version[0]}: pip install 'cmake>={oldest}' ninja")
    return command


def cuda_wanted() -> bool:
    """FGVC_EXT_CUDA, or else: torch has CUDA, and an nvcc of the same major version is found."""
    import torch

    nvcc = nvcc_path()
    asked = os.environ.get("FGVC_EXT_CUDA", "")
    if asked == "0" or (asked == "" and (torch.version.cuda is None or nvcc is None)):
        return False
    if torch.version.cuda is None:
        sys.exit(f"FGVC_EXT_CUDA=1, but torch {torch.__version__} has no CUDA: install a CUDA build of torch first")
    if nvcc is None:
        sys.exit("FGVC_EXT_CUDA=1, but nvcc was found neither in CUDA_HOME nor on PATH")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major = version.split("release ")[1].split(".")[0]
    if major == torch.version.cuda.split(".")[0]:
        return True
    message = f"nvcc is of CUDA {major}, torch of CUDA {torch.version.cuda}: the major versions must be equal"
    if asked == "1":
        sys.exit(message)
    print(f"fgvc_ext: building without the CUDA library: {message}", file=sys.stderr)
    return False


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


# The names that torch gives to architectures (torch.utils.cpp_extension), from the oldest that CUDA 12 compiles for.
NAMED_ARCHITECTURES = {
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Rubin": "10.7+PTX",
}


def cmake_architectures(torch_list: str) -> str:
    """ "8.0;9.0+PTX" as torch writes it → "80-real;90" as CMake does (without a suffix: machine code and PTX)."""
    if torch_list.strip() == "native":
        torch_list = visible_architectures()
    with_ptx: dict[str, bool] = {}  # a number that is given twice has PTX where either asks for it
    for name in torch_list.replace(" ", ";").split(";"):
        for architecture in filter(None, NAMED_ARCHITECTURES.get(name, name).split(";")):
            parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
            if parts is None:
                sys.exit(
                    f"TORCH_CUDA_ARCH_LIST: {name!r} is no architecture; expected numbers such as 8.0, 9.0a, 9.0+PTX "
                    f"or names ({', '.join(NAMED_ARCHITECTURES)}), with spaces or semicolons between them"
                )
            number = parts[1] + parts[2]
            with_ptx[number] = with_ptx.get(number, False) or parts[3] is not None
    return ";".join(number if ptx else f"{number}-real" for number, ptx in with_ptx.items())


def visible_architectures() -> str:
    """Those of the GPUs of this machine, the newest with PTX: what "native" means to torch."""
    import torch

    found = sorted({torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())})
    if not found:
        sys.exit("TORCH_CUDA_ARCH_LIST=native, but torch finds no GPU: name the architectures, e.g. 8.0;9.0+PTX")
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX"


def run(*command: str) -> None:
    if subprocess.run(command).returncode:
        sys.exit(f"fgvc_ext: the build stopped at: {shlex.join(command)}")


class CMakeBuild(build_ext):
    """Configures and builds with CMake, and installs the libraries into the package."""

    def run(self) -> None:
        if not BUILD_WANTED:
            return
        try:
            import pybind11  # noqa: F401
            import torch  # noqa: F401
        except ImportError as error:
            sys.exit(
                f"fgvc_ext is built against the torch that is installed, but: {error}. "
                "An isolated build does not see it. "
                "Install torch and pybind11 first, then run: pip install --no-build-isolation ."
            )
        in_place = self.inplace or self.editable_mode
        package = ROOT if in_place else Path(self.build_lib).resolve()
        build = ROOT / "build" / sys.implementation.cache_tag  # kept: only what changed is compiled again
        cuda = cuda_wanted()
        architectures = cmake_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if cuda else ""
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DFGVC_EXT_CUDA={'ON' if cuda else 'OFF'}",
            "-DFGVC_EXT_EMULATION=OFF",  # every option at every build: CMake's cache would keep the last build's
            "-DFGVC_EXT_SANITIZE=",
            "-DFGVC_EXT_OPTIMIZE=-O3",
            f"-DFGVC_EXT_CUDA_ARCHITECTURES={architectures}",
            *shlex.split(os.environ.get("FGVC_EXT_CMAKE_ARGS", "")),
        ]
        if cuda:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc_path()}")
        ninja = find_program("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_cmake()
        run(cmake, "-S", str(ROOT), "-B", str(build), *generator, *arguments)
        run(cmake, "--build", str(build), "--parallel", jobs)
        run(cmake, "--install", str(build), "--prefix", str(package))
        installed = {Path(line) for line in (build / "install_manifest.txt").read_text().splitlines()}
        for stale in {*(package / "fgvc_ext" / "lib").glob("*.so")} - installed:  # of a build that made more
            stale.unlink()
        if in_place:
            shutil.copy(build / "compile_commands.json", ROOT / "compile_commands.json")

    def get_outputs(self) -> list[str]:
        library = Path(self.build_lib) / "fgvc_ext"
        return [str(path) for path in [*library.glob("_C*.so"), *(library / "lib").glob("*.so")]]


class PythonBuild(build_py):
    """Puts the training drivers into the package as well, where `fgvc-ext train` finds them without the source tree."""

    def run(self) -> None:
        super().run()
        for source, target in self._drivers():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._drivers())]

    def _drivers(self) -> list[tuple[Path, Path]]:
        if self.editable_mode:  # then the source tree is there
            return []
        folder = Path(self.build_lib) / "fgvc_ext" / "train"
        return [(file, folder / file.name) for file in sorted((ROOT / "train").glob("*.py"))]


class Develop(Command):
    """``python setup.py develop``. Setuptools' own became an isolated pip install, in which torch is missing."""

    description = "install in development mode, with the libraries built in place"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":  # so it is for pip as well; the tests import this file
    setup(
        # One entry stands for everything that CMake installs; its name only makes the wheel a platform wheel.
        ext_modules=[Extension("fgvc_ext._C", sources=[])] if BUILD_WANTED else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild, "develop": Develop},
    )
