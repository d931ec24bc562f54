"""The CPU library under AddressSanitizer and UBSan: every operator's samples, both directions, all instruction sets.

Random valid calls and hostile ones of the raw operators follow: a call that reads beyond a tensor may well not end a
process without a sanitizer.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import PACKAGE, PROGRAMS

ROOT = PACKAGE.parent
CMAKE, NINJA = shutil.which("cmake", path=PROGRAMS), shutil.which("ninja", path=PROGRAMS)
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # in this order, before all else in the process

EVERY_SAMPLE = """
import torch
from fgvc_ext import _library
from python_tests.ops.comparison import run
from python_tests.ops.generators import DTYPES, SeededDraw
from python_tests.ops.spec import SPECS

torch.set_num_threads(2)
ran = 0
for name in _library._module.supported_instruction_sets():
    _library._module.use_instruction_set(name)
    for spec in SPECS:
        samples = [*spec.empty(), *spec.large(), *(spec.drawn(SeededDraw(number)) for number in range(300))]
        for dtype in DTYPES:
            for layout in spec.layouts:
                samples += spec.samples(dtype, "cpu", layout)
        for number, sample in enumerate(samples):
            print(name, spec.name, number, sample.name, flush=True)
            run(spec.function, sample)
            ran += 1
print("ran", ran)
"""

HOSTILE = """
from python_tests.ops import hostile
hostile.main(50_000, 1000, hostile.operators())
"""

# Compiled as the library is, and given memory of a tensor. Kernels themselves check what they read.
FAULTY = """
#pragma GCC visibility push(default)
extern "C" float behind(const float* values, int count) { return values[count]; }
extern "C" int more(int number) { return number + 1; }
"""
PLANTED = """
import ctypes, torch
library = ctypes.CDLL({path!r})
library.behind.restype = ctypes.c_float
library.behind.argtypes = [ctypes.c_void_p, ctypes.c_int]
values = torch.ones(6)
assert library.behind(values.data_ptr(), 5) == 1 and library.more(1) == 2
print("right calls pass", flush=True)
{call}
print("not found")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here"),
    pytest.mark.skipif(shutil.which("gcc") is None or CMAKE is None, reason="needs gcc and cmake"),
]


def runtimes() -> str:
    """What LD_PRELOAD is to be, since Python itself is not built with the sanitizers."""
    paths = []
    for name in RUNTIMES:
        found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"gcc has no {name}")
        paths.append(str(path.resolve()))
    return " ".join(paths)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package whose CPU library is built with both sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(PACKAGE, folder / "fgvc_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    assert CMAKE is not None
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"] if NINJA else []
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFGVC_EXT_SANITIZE=address,undefined"]
    for command in (
        ["-S", str(ROOT), "-B", str(folder / "build"), *generator, *options],
        ["--build", str(folder / "build"), "--parallel", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)],
        ["--install", str(folder / "build"), "--prefix", str(folder)],
    ):
        built = subprocess.run([CMAKE, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert built.returncode == 0, built.stdout
    return folder


def run(code: str, package: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtimes(),
        # Python keeps what it likes; absurd allocations fail, as without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048",
        "FGVC_EXT_HOSTILE_UNLIMITED": "1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]),
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-c", f"import fgvc_ext\nassert fgvc_ext.__file__.startswith({str(package)!r})\n{code}"]
    return subprocess.run(
        command, cwd=package, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_clean(result: subprocess.CompletedProcess[str]) -> None:
    begins = [result.stdout.find(mark) for mark in ("==ERROR", "runtime error:") if mark in result.stdout]
    report = result.stdout[max(0, min(begins) - 200) :][:6000] if begins else result.stdout[-6000:]
    assert result.returncode == 0, report
    assert "runtime error" not in result.stdout, report


def test_every_sample_of_every_operator_is_clean(package: Path) -> None:
    result = run(EVERY_SAMPLE, package)
    assert_clean(result)
    assert int(result.stdout.split()[-1]) > 1000


def test_hostile_calls_of_raw_operators_are_clean(package: Path) -> None:
    result = run(HOSTILE, package)
    assert_clean(result)
    assert result.stdout.count(": 1000 calls, ") >= 7


@pytest.fixture(scope="module")
def faulty_library(package: Path) -> Path:
    """FAULTY, compiled and linked with the options of the library's own files."""
    commands = json.loads((package / "build" / "compile_commands.json").read_text())
    command = next(shlex.split(one["command"]) for one in commands if one["file"].endswith("csrc/cpu/diversify.cpp"))
    options = [word for word in command if word.startswith("-") and word not in ("-o", "-c")]
    source, library = package / "faulty.cpp", package / "libfaulty.so"
    source.write_text(FAULTY)
    subprocess.run(
        [command[0], *options, "-shared", str(source), "-o", str(library)], check=True, cwd=package / "build"
    )
    return library


@pytest.mark.parametrize(
    ("call", "report"),
    [
        ("library.behind(values.data_ptr(), 6)", "AddressSanitizer: heap-buffer-overflow"),
        ("library.more(2**31 - 1)", "runtime error: signed integer overflow"),
    ],
    ids=["address", "undefined"],
)
def test_a_planted_fault_is_found(call: str, report: str, package: Path, faulty_library: Path) -> None:
    result = run(PLANTED.format(path=str(faulty_library), call=call), package)
    assert result.returncode != 0
    assert "right calls pass" in result.stdout
    assert report in result.stdout
    assert "faulty.cpp" in result.stdout
    assert "not found" not in result.stdout
