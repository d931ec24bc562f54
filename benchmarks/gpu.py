"""What `make gpu` runs on a machine with a GPU: the two ceilings, the tests, compute-sanitizer, benchmarks, a training.

    python benchmarks/gpu.py ceilings | test | sanitize | bench | train

Each part ends within its limit, writes what it finds as it finds it into ``benchmarks/results/<gpu>-<date>/``, and
exits with a status other than 0 where something failed, a target was missed or time was up. Needs torch with CUDA,
pytest and hypothesis; nothing is installed.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck")
DRIVERS = sorted((ROOT / "train").glob("*.py"))
# Seconds of each command. `make gpu-test` runs ceilings, test and the sanitizers: each target ends within 8 minutes.
LIMITS = {"ceilings": 60, "test": 180, "sanitize": 210 // len(SANITIZERS), "bench": 450}
LIMITS["train"] = 450 // max(1, len(DRIVERS))
# Kernels on small inputs: a sanitizer makes them a hundred times slower.
MEASURE_CEILINGS = "measure-ceilings"  # a command of its own, that can be stopped
SANITIZED_TESTS = ["python_tests/ops/test_cuda.py", "-k", "small"]


def results_folder() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = Path(__file__).parent / "results" / f"{name}-{datetime.date.today()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(command: list[str], log: Path, limit: float, **environment: str) -> int:
    """Runs a command, its output on the terminal and in ``log`` at once. At its limit it is killed, with what it has
    started, whether or not it writes anything: 124."""
    print("$", " ".join(command), flush=True)
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    stopped = threading.Event()
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # and so a process group of its own
        )

        def stop() -> None:
            stopped.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # this process was interrupted
                stop()
        if stopped.is_set():
            file.write(f"stopped after {limit:.0f} s\n")
            return 124
    return status


def milliseconds(call: object, repeats: int = 30) -> float:
    """Median time of a call on the device."""
    assert callable(call)
    for _ in range(5):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in events)
    return times[len(times) // 2]


def ceilings() -> int:
    command = [sys.executable, str(Path(__file__).resolve()), MEASURE_CEILINGS]
    return run(command, results_folder() / "ceilings.log", LIMITS["ceilings"])


def measure_ceilings() -> int:
    """The device's copy bandwidth and its rate of bfloat16 matrix products: no kernel can be faster."""
    source = torch.randn(2**28, device="cuda")  # 1 GiB, beyond every cache
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    side = 8192
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: left @ right)
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(2 * source.numel() * 4 / copy / 1e6, 1),  # bytes read and bytes written
        "bf16_tflop_per_s": round(2 * side**3 / product / 1e9, 1),
    }
    print(json.dumps(facts, indent=1))
    (results_folder() / "ceilings.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def test_command() -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--maxfail=20", "python_tests/ops"]


def test() -> int:
    """Every operator on CUDA through the contract, streams, graphs and waits."""
    return run(test_command(), results_folder() / "tests.log", LIMITS["test"])


def sanitize_command(tool: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return [*command, sys.executable, "-m", "pytest", "-m", "cuda", "-q", *SANITIZED_TESTS]


def sanitize() -> int:
    """The same kernels on small inputs under each of compute-sanitizer's tools."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    status = 0
    for tool in SANITIZERS:
        log = results_folder() / f"{tool}.log"
        # PyTorch's allocator hides accesses beyond a tensor's end from memcheck.
        status |= run(sanitize_command(tool), log, LIMITS["sanitize"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return status


def bench_command(folder: Path) -> list[str]:
    options = ["--device", "cuda", "--strict", "--out", str(folder / "operators.csv")]
    return [sys.executable, "benchmarks/run.py", *options]


def bench() -> int:
    """Against eager PyTorch and torch.compile, in float32 and bfloat16; targets missed make the status 1."""
    folder = results_folder()
    return run(bench_command(folder), folder / "bench.log", LIMITS["bench"])


def train_command(driver: Path, out: Path) -> list[str]:
    return [sys.executable, str(driver), "demo", "--out", str(out)]


def train() -> int:
    """A short real training on the device: the demo of each driver."""
    folder, status = results_folder(), 0
    for driver in DRIVERS:
        out = ROOT / "runs" / f"gpu-{driver.stem}"
        shutil.rmtree(out, ignore_errors=True)
        status |= run(train_command(driver, out), folder / f"train-{driver.stem}.log", LIMITS["train"])
        for name in ("run.json", "metrics.csv"):
            if (out / name).exists():
                shutil.copy(out / name, folder / f"{driver.stem}-{name}")
    return status


PARTS = {part.__name__: part for part in (ceilings, test, sanitize, bench, train)}
EVERY = {**PARTS, MEASURE_CEILINGS: measure_ceilings}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=EVERY, metavar="part", help=", ".join(PARTS))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU: `make test` tests the CUDA kernels under emulation instead")
    sys.exit(max(min(1, abs(EVERY[name]())) for name in asked.parts))
