"""The CPU library under AddressSanitizer and UBSan: every operator's samples, both directions, all instruction sets."""

import os
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
from python_tests.ops.samples import DTYPES, LAYOUTS, OPERATORS

torch.set_num_threads(2)
ran = 0
for name in _library._module.supported_instruction_sets():
    _library._module.use_instruction_set(name)
    for operator in OPERATORS:
        for dtype in DTYPES:
            for layout in LAYOUTS if operator.image_like else ("contiguous", "transposed", "sliced"):
                large = operator.large() if dtype == torch.float32 and layout == "contiguous" else []
                for sample in [*operator.samples(dtype, "cpu", layout), *operator.empty(), *large]:
                    print(name, operator.name, dtype, layout, sample.name, flush=True)
                    for tensor in sample.differentiable:
                        sample.tensors[tensor].requires_grad_()
                    result = operator.function(**sample.tensors, **sample.options)
                    if sample.differentiable:
                        result.backward(torch.ones_like(result))
                    ran += 1
print("ran", ran)
"""

# The backward of k-max pooling trusts its own forward's indices: one of them now points right behind the maps.
PLANTED = """
import torch, fgvc_ext
features = torch.ops.fgvc_ext.global_k_max_pool_backward(
    torch.ones(1, 1), torch.tensor([[[6]]], dtype=torch.int16), torch.zeros(1, 1, 0), None,
    [1, 1, 2, 3], [6, 6, 3, 1], True, False)
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
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it likes
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]),
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-c", f"import fgvc_ext\nassert fgvc_ext.__file__.startswith({str(package)!r})\n{code}"]
    return subprocess.run(
        command, cwd=package, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_every_sample_of_every_operator_is_clean(package: Path) -> None:
    result = run(EVERY_SAMPLE, package)
    report = result.stdout[result.stdout.find("==ERROR") :] if "==ERROR" in result.stdout else result.stdout[-6000:]
    assert result.returncode == 0, report
    assert "runtime error" not in result.stdout, report
    assert int(result.stdout.split()[-1]) > 500


def test_a_planted_access_out_of_bounds_is_found(package: Path) -> None:
    result = run(PLANTED, package)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stdout
    assert "csrc/cpu/global_k_max_pool.h" in result.stdout
    assert "not found" not in result.stdout
