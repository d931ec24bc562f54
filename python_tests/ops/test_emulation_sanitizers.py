"""The CUDA kernels on the CPU under AddressSanitizer and ThreadSanitizer, and planted faults that must be reported.

`csrc/emulation/faults.cpp` is the test of the tools: a sound kernel passes everywhere, and each of its faulty twins is
found by the emulation, by a sanitizer or by results that depend on the schedule. `csrc/emulation/sanitizer_main.cpp`
then runs the kernels of every operator.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "csrc" / "emulation"
BUILDS = {
    "plain": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
SCHEDULES = ("forward", "reverse", "random:1", "random:2", "random:3")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers need g++"),
    pytest.mark.skipif(not EMULATION.is_dir(), reason="the sources are not here"),
]


@functools.cache
def toolkit_include() -> list[Path]:
    """The folders of CUDA's headers, of a toolkit or of what torch's wheels bring, as csrc/emulation/CMakeLists.txt."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    candidates = [[Path(home) / "include"] for home in [*homes, "/usr/local/cuda"] if home]
    packages = Path(torch.__file__).parents[1]
    candidates.append([*sorted(packages.glob("nvidia/*/include")), packages / "triton/backends/nvidia/include"])
    for folders in candidates:
        command = ["g++", "-fsyntax-only", "-xc++", "-", *(f"-I{folder}" for folder in folders)]
        if subprocess.run(command, input="#include <cuda_bf16.h>", text=True, capture_output=True).returncode == 0:
            return folders
    return []


def compile_executable(build: str, executable: Path, *sources: Path) -> Path:
    toolkit = toolkit_include()
    if not toolkit:
        pytest.skip("the emulation needs CUDA's headers, of a toolkit (CUDA_HOME, nvcc on PATH) or of a CUDA torch")
    torch_headers = Path(torch.__file__).parent / "include"  # read, not linked
    command = ["g++", "-std=c++20", "-g", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", *BUILDS[build]]
    command += [
        "-DFGVC_EXT_EMULATE_CUDA",
        "-DFGVC_KERNELS_ONLY",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-I",
        str(EMULATION),
    ]
    command += [option for folder in [*toolkit, torch_headers] for option in ("-isystem", str(folder))]
    command += [*map(str, sources), "-o", str(executable)]
    subprocess.run(command, check=True)
    return executable


def run(executable: Path, *arguments: str, schedule: str = "forward") -> tuple[int, str]:
    """Exit status, and what was written to both outputs."""
    environment = {**os.environ, "FGVC_EXT_EMULATION_SCHEDULE": schedule, "ASAN_OPTIONS": "", "TSAN_OPTIONS": ""}
    command = [str(executable), *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "unexpected memory mapping" in result.stdout:  # ThreadSanitizer cannot live with much address randomization
        command = ["setarch", "-R", *command]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faults")
    return {build: compile_executable(build, folder / build, EMULATION / "faults.cpp") for build in BUILDS}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sound_kernel_passes(faults: dict[str, Path], build: str, schedule: str) -> None:
    assert run(faults[build], "sound", schedule=schedule) == (0, "4035 4044 4053 \n")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("foreign_mask", "thread (7,0,0) waits at __shfl_down_sync(0xffffff7f)"),
        ("own_lane_left_out", "__syncwarp(0x0000fffe) in"),
        ("different_masks", "waits at __shfl_down_sync(0xfffffffe)"),
        ("different_collectives", "thread (3,0,0) waits at __shfl_xor_sync(0xffffffff)"),
        ("missing_lanes", "no thread can go on: thread (0,0,0) waits at __shfl_down_sync(0xffffffff)"),
        ("divergent_barrier", "no thread can go on: thread (0,0,0) waits at __syncthreads"),
        ("early_exit", "thread (64,0,0) has left the kernel"),
        ("empty_grid", "no GPU takes a grid of (0,1,1) blocks"),
    ],
)
def test_the_emulation_reports_what_a_gpu_would_answer_with_a_hang(
    faults: dict[str, Path], build: str, fault: str, message: str
) -> None:
    status, output = run(faults[build], fault)
    assert status == 1
    assert message in output
    assert output.startswith("CUDA emulation: ")  # and no sanitizer adds reports of its own
    assert output.count("\n") == 1


@pytest.mark.parametrize("fault", ["missing_barrier", "unwritten_shared"])
def test_results_that_depend_on_the_schedule(faults: dict[str, Path], fault: str) -> None:
    outputs = {run(faults["plain"], fault, schedule=schedule)[1] for schedule in SCHEDULES}
    assert len(outputs) > 1


@pytest.mark.parametrize("fault", ["missing_barrier", "shuffle_in_place_of_barrier"])
def test_thread_sanitizer_reports_races(faults: dict[str, Path], fault: str) -> None:
    for schedule in SCHEDULES:
        status, output = run(faults["thread"], fault, schedule=schedule)
        assert status != 0
        assert "ThreadSanitizer: data race" in output


@pytest.mark.parametrize("fault", ["shared", "dynamic", "global", "local"])
def test_address_sanitizer_reports_what_is_out_of_bounds(faults: dict[str, Path], fault: str) -> None:
    status, output = run(faults["address"], f"{fault}_out_of_bounds")
    assert status != 0
    assert "AddressSanitizer" in output or "out of bounds" in output
    assert "faults.cpp" in output


def test_undefined_behaviour_sanitizer_reports_unaligned_loads(faults: dict[str, Path]) -> None:
    status, output = run(faults["address"], "misaligned")
    assert status != 0
    assert "runtime error" in output
    assert "misaligned address" in output


@pytest.mark.parametrize("build", ["address", "thread"])
def test_the_kernels_of_every_operator(tmp_path: Path, build: str) -> None:
    operators = sorted((EMULATION / "sanitizers").glob("*.cpp"))
    assert {file.stem for file in operators} == {file.stem for file in (ROOT / "csrc" / "cuda").glob("*.cu")}
    executable = compile_executable(build, tmp_path / build, EMULATION / "sanitizer_main.cpp", *operators)
    outputs = set()
    for schedule in SCHEDULES:
        status, output = run(executable, schedule=schedule)
        assert status == 0, output
        assert [line.split()[0] for line in output.splitlines()] == sorted(file.stem for file in operators)
        outputs.add(output)
    assert len(outputs) == 1, outputs  # the same digests under every schedule
