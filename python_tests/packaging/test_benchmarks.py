"""The benchmarks: their cases come from the specs, and the clock shows what a contender takes, not its neighbour."""

import csv
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from python_tests.ops.spec import SPECS, Case, Spec, Target

from .conftest import BENCHMARKS as FOLDER
from .conftest import compiled

pytestmark = [compiled, pytest.mark.skipif(not FOLDER.is_dir(), reason="the sources are not here")]
benchmarked = [spec for spec in SPECS if spec.benchmark is not None]
each_benchmark = pytest.mark.parametrize("spec", benchmarked, ids=lambda spec: spec.name)


@pytest.fixture
def modules(scripts: Callable[[str], ModuleType]) -> dict[str, ModuleType]:
    names = ("cases", "timing", "results", "gpu", "naive", "run", "data", "step")
    return {name: scripts(name) for name in names}


def small(spec: Spec, backward: bool) -> Case:
    case = min(spec.benchmark.sweep, key=lambda case: torch.Size(case.shape).numel())
    return replace(case, backward=backward, targets=())


@each_benchmark
@pytest.mark.parametrize("backward", [False, True])
def test_every_contender_can_be_called(spec: Spec, backward: bool, modules: dict[str, Any]) -> None:
    """But what is compiled first, which takes long."""
    cases = modules["cases"]
    measured = cases.Measured(spec, small(spec, backward and bool(spec.differentiable)), False)
    every = cases.contenders(measured, "cpu", [])
    assert {cases.OURS, cases.EAGER, cases.COMPILED, cases.FLOOR} <= {one.name for one in every}
    for one in every:
        if one.name not in (cases.COMPILED, cases.FLOOR):
            one.call()


@each_benchmark
def test_a_contender_with_other_results_is_refused(spec: Spec, modules: dict[str, Any]) -> None:
    cases = modules["cases"]
    sample = spec.benchmark.sample(small(spec, False), "cpu")
    cases.compare(spec, spec.benchmark, sample)

    def halved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value / 2
        halves = [one / 2 for one in value]
        return tuple(halves) if type(value) is tuple else type(value)(*halves)

    wrong = replace(spec, function=lambda **arguments: halved(spec.function(**arguments)))
    if spec.benchmark.comparable_options is None:
        with pytest.raises(AssertionError, match="not close"):
            cases.compare(wrong, spec.benchmark, sample)


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_floor_does_nothing_but_is_called_as_ours_are(requires_grad: bool, modules: dict[str, Any]) -> None:
    import floor

    first = torch.ones(3, 5, requires_grad=requires_grad)
    result = floor.do_nothing(first)
    assert result.shape == (3,)
    if requires_grad:
        result.sum().backward()
        assert first.grad.shape == (3, 5)


def test_a_neighbour_s_traces_are_not_timed(modules: dict[str, Any]) -> None:
    """A contender that is slow only after another one, as after one that emptied the caches."""
    timing = modules["timing"]
    cold = [True]

    def ours() -> None:
        time.sleep(0.02 if cold[0] else 0.001)
        cold[0] = False

    def neighbour() -> None:
        cold[0] = True

    contenders = [timing.Contender("ours", ours), timing.Contender("neighbour", neighbour)]
    times = timing.measure(contenders, "cpu", rounds=6, seconds=1)
    assert 0.001 <= times.median("ours") < 0.01


def test_fresh_memory_is_noticed(modules: dict[str, Any]) -> None:
    timing = modules["timing"]
    import mmap

    def fresh() -> None:
        with mmap.mmap(-1, 2**21) as memory:
            memory[:: mmap.PAGESIZE] = b"x" * (2**21 // mmap.PAGESIZE)

    kept = bytearray(2**21)
    contenders = [timing.Contender("fresh", fresh), timing.Contender("kept", lambda: kept.count(b"y"))]
    times = timing.measure(contenders, "cpu", rounds=6, seconds=1)
    assert times.faults["fresh"] >= 1
    assert times.faults["kept"] == 0


def test_either_of_two_targets_is_enough(modules: dict[str, Any]) -> None:
    cases, timing = modules["cases"], modules["timing"]
    times = timing.Times({"fgvc_ext": [1.0], "eager": [30.0], "read once": [0.25]}, {}, {}, {})
    target = Target("read once", at_most=2, otherwise=Target("eager", at_least=20))
    verdict = cases.verdict(target, times)
    assert verdict.passed
    assert verdict.what == "ours / read once or eager / ours"
    assert not cases.verdict(replace(target, otherwise=Target("eager", at_least=40)), times).passed
    assert not cases.verdict(replace(target, otherwise=None), times).passed


def test_backward_alone_is_timed_on_what_forward_saves(modules: dict[str, Any]) -> None:
    cases = modules["cases"]
    spec = next(spec for spec in benchmarked if spec.name == "spatial_attention_map")
    assert any(case.alone and case.targets for case in (*spec.benchmark.cpu, *spec.benchmark.cuda))
    measured = cases.Measured(spec, replace(small(spec, True), alone=True), False)
    assert measured.direction == "backward"
    calls = {one.name: one.call for one in cases.contenders(measured, "cpu", [])}
    for _ in range(2):  # the graph is kept
        (expected,) = calls[cases.EAGER]()
        torch.testing.assert_close(calls[cases.OURS](), expected)
    wrong = replace(spec.benchmark, backward=lambda sample: lambda: torch.zeros_like(expected))
    with pytest.raises(AssertionError, match="not close"):
        cases.contenders(replace(measured, spec=replace(spec, benchmark=wrong)), "cpu", [])


def test_small_shapes_are_compared_with_eager_alone(modules: dict[str, Any]) -> None:
    cases, timing = modules["cases"], modules["timing"]

    def verdicts(**times: float) -> dict[str, bool]:
        samples = {name.replace("_", "."): [time] for name, time in times.items()}
        samples[cases.OURS] = samples.pop("ours")
        return {one.what: one.passed for one in cases.never_slower(timing.Times(samples, {}, {}, {}))}

    always, small_shapes = "ours / max(eager, torch.compile)", "small shapes: ours / eager"
    short = {"eager": 4.0, "torch_compile": 9.0, "floor": 1.0}
    assert verdicts(ours=3.0, **short) == {always: True, small_shapes: True}
    assert verdicts(ours=6.0, **short) == {always: True, small_shapes: False}
    assert verdicts(ours=6.0, **{**short, "floor": 0.1}) == {always: True}


def test_results_are_written_as_they_come(modules: dict[str, Any], tmp_path: Path) -> None:
    cases, results, timing = modules["cases"], modules["results"], modules["timing"]
    measured = cases.Measured(benchmarked[0], small(benchmarked[0], False), False)
    samples = {cases.OURS: [1e-6, 2e-6], cases.EAGER: [3e-6, 4e-6]}
    result = results.Result(measured, timing.Times(samples, dict.fromkeys(samples, 1), {}, {}))
    path = tmp_path / "new" / "operators.csv"
    file = results.CsvFile(path, "cpu")
    for number in (0, 1, 2):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert [row["contender"] for row in rows] == [*samples] * number
        file.append(result)
    assert rows[0]["op"] == measured.op
    assert float(rows[1]["median_us"]) == 3.5


def test_strict_is_the_exit_status(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, cases = modules["run"], modules["cases"]
    monkeypatch.setattr(run, "chosen_instruction_sets", lambda args: [])
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(run, "contenders", lambda *arguments: [])
    monkeypatch.setattr(run, "sections", lambda *arguments: {})
    monkeypatch.setattr(run, "chosen_cases", lambda args: [cases.Measured(benchmarked[0], Case((1,)), False)] * 2)
    samples = {cases.OURS: [1.0, 1.0], cases.EAGER: [2.0, 2.0]}
    for ours, words, status in ((1.0, ["--strict"], 0), (3.0, ["--strict"], 1), (3.0, [], 0)):
        samples[cases.OURS] = [ours, ours]
        times = modules["timing"].Times(samples, dict.fromkeys(samples, 1), {}, {cases.OURS: 0})
        monkeypatch.setattr(run, "measure", lambda *arguments, times=times, **options: times)
        path = tmp_path / "operators.csv"
        assert run.main([*words, "--out", str(path)]) == status
        assert len(path.read_text().splitlines()) == 1 + 2 * 2


def test_a_page_keeps_the_sections_of_operators_that_were_not_measured(modules: dict[str, Any], tmp_path: Path) -> None:
    results, page = modules["results"], tmp_path / "page.md"
    page.write_text(f"Before.\n\n{results.BEGIN}\n\n{results.END}\n\n### After\n")
    results.replace_sections(page, {"orthogonal_loss": "old", "diversify": "one\n\n| a | ### b |"})
    results.replace_sections(page, {"orthogonal_loss": "new", "group_bilinear": "two"})
    text = page.read_text()
    own = {"diversify": "one\n\n| a | ### b |", "group_bilinear": "two", "orthogonal_loss": "new"}
    assert text == f"Before.\n\n{results.BEGIN}\n\n{results.document(own)}\n{results.END}\n\n### After\n"
    page.write_text(text.replace(results.END, ""))
    with pytest.raises(ValueError, match="each once"):
        results.replace_sections(page, {})


def test_a_gpus_sections_stand_beside_those_of_the_cpu(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, cases = modules["results"], modules["cases"]
    monkeypatch.setattr(results, "machine", lambda device: {"device": "Some GPU" if device == "cuda" else "cpu"})
    one = modules["timing"].Times({cases.OURS: [1.0, 1.0]}, {cases.OURS: 1}, {}, {cases.OURS: 0})
    measured = [results.Result(cases.Measured(benchmarked[0], Case((1,)), True), one)]
    op = measured[0].case.op
    monkeypatch.setattr(cases.Measured, "verdicts", lambda case, times: [])
    assert list(results.sections(measured, "cpu")) == [op]
    assert list(results.sections(measured, "cuda")) == [f"{op} on Some GPU"]


# --- the step of dual attention fusion --------------------------------------------------------------------------------


def test_the_naive_step_gives_the_same_loss_and_is_told_beside_ours(
    modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naive, out = modules["naive"], tmp_path / "naive.csv"
    words = ["--device", "cpu", "--precision", "fp32", "--size", "64", "--batch-size", "2", "--out", str(out)]
    words += ["--rounds", "2", "--seconds", "0", "--backbone", "resnet10_narrow"]
    assert naive.main(words) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row[""] for row in rows] == [naive.OURS, naive.REFERENCE, naive.NAIVE]
    assert [float(row["over ours"]) > 0 for row in rows] == [True] * 3
    with pytest.raises(SystemExit):
        naive.arguments(["--precision", "bf16"])
    assert "in fp32" in capsys.readouterr().err
    for factor in (2, math.nan):
        monkeypatch.setattr(naive, "naive_step", lambda task, batch, by=factor: {"loss": by * task.step(batch)["loss"]})
        with pytest.raises(SystemExit, match="the steps differ"):
            naive.main(words)


# --- the data path ----------------------------------------------------------------------------------------------------


def test_the_data_path_is_measured_beside_the_plain_one(modules: dict[str, Any], tmp_path: Path) -> None:
    data = modules["data"]
    dataset = data.write_jpegs(tmp_path / "images", 2, 96, 64)
    assert [tuple(dataset.load(row).shape) for row in range(2)] == [(3, 64, 96)] * 2
    every = data.contenders(dataset, 80, 56)
    shapes = {name: (contender([0, 1]).dtype, contender([1]).shape) for name, contender in every.items()}
    assert shapes[data.OURS] == shapes[data.EVALUATED] == (torch.uint8, (1, 3, 56, 56))
    assert shapes[data.NORMALISED] == shapes[data.PLAIN] == (torch.float32, (1, 3, 56, 56))


def test_the_data_path_is_written_with_its_ratio(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = modules["data"]
    monkeypatch.setattr(data, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(data.torch, "set_num_threads", lambda count: None)
    rates = {data.OURS: [300.0, 200.0, 200.0], data.PLAIN: [100.0, 100.0, 50.0]}
    monkeypatch.setattr(data, "contenders", lambda *rest: {name: lambda rows: time.sleep(0.001) for name in rates})
    path = tmp_path / "new" / "data.csv"
    words = ["--images", "2", "--size", "96", "64", "--resize", "80", "--crop", "56", "--rounds", "3"]
    assert data.main([*words, "--out", str(path)]) == 0
    assert f"written: {path}" in capsys.readouterr().out
    data.write_csv(path, data.arguments(words), rates)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["contender"] for row in rows] == [*rates]
    assert [float(row["ratio_to_plain"]) for row in rows] == [3.0, 1.0]
    assert [float(row["images_per_second"]) for row in rows] == [200.0, 100.0]
    assert (rows[0]["width"], rows[0]["crop"], rows[0]["rounds"], rows[0]["torch"]) == (
        "96",
        "56",
        "3",
        torch.__version__,
    )


# --- make gpu ---------------------------------------------------------------------------------------------------------


def test_the_commands_of_make_gpu_are_understood(modules: dict[str, Any], tmp_path: Path) -> None:
    gpu, run = modules["gpu"], modules["run"]
    python, script, *words = gpu.bench_command(tmp_path)
    assert python == sys.executable
    assert (gpu.ROOT / script).samefile(FOLDER / "run.py")
    args = run.arguments(words)
    assert (args.strict, args.device, args.out) == (True, "cuda", tmp_path / "operators.csv")
    assert gpu.DRIVERS
    for driver in gpu.DRIVERS:
        python, script, *words = gpu.train_command(driver, tmp_path)
        shown = subprocess.run([python, script, *words, "--help"], capture_output=True, text=True, cwd=gpu.ROOT)
        assert shown.returncode == 0, shown.stderr
    makefile = (gpu.ROOT / "Makefile").read_text()
    parts = [
        line.split("benchmarks/gpu.py ")[1].split() for line in makefile.splitlines() if "benchmarks/gpu.py " in line
    ]
    assert sorted(part for target in parts for part in target) == sorted(gpu.PARTS)
    times = {"sanitize": len(gpu.SANITIZERS), "train": len(gpu.DRIVERS)}
    for target in parts:  # what `make` runs in one target
        assert sum(gpu.LIMITS[part] * times.get(part, 1) for part in target) < 8 * 60, target
    assert int(re.search(r"timeout (\d+) .*build_ext", makefile)[1]) < 8 * 60


def test_the_tests_of_make_gpu_exist(modules: dict[str, Any]) -> None:
    """Not collected here, where there may be no GPU: what the sanitizers choose from is read."""
    gpu = modules["gpu"]
    command = gpu.sanitize_command("memcheck")
    assert command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    file, _, word = gpu.SANITIZED_TESTS
    assert command[-3:] == gpu.SANITIZED_TESTS
    assert re.search(rf"^def test_\w*{word}\w*\(", (gpu.ROOT / file).read_text(), re.M)
    collected = subprocess.run(
        [*gpu.test_command()[:-1], file, "--collect-only", "-k", word], capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert f"{file}::test_small" in collected.stdout, collected.stdout


def _runs(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] != "Z"
    except OSError:  # gone, also between opening and reading
        return False


@pytest.mark.parametrize("noisy", [False, True])
def test_a_command_is_killed_at_its_limit(
    noisy: bool, modules: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what it has started, and even if it never writes a line."""
    script = f"sleep 60 & echo $! > {tmp_path}/child; " + ("while :; do echo x; sleep 0.1; done" if noisy else "wait")
    begin = time.monotonic()
    assert modules["gpu"].run(["sh", "-c", script], tmp_path / "log", 1.0) == 124
    assert time.monotonic() - begin < 30
    assert "stopped after 1 s" in (tmp_path / "log").read_text()
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    while _runs(child):  # a killed process ends when the system next runs it
        assert time.monotonic() - begin < 30
        time.sleep(0.05)
    assert modules["gpu"].run(["sh", "-c", "echo here; exit 3"], tmp_path / "log", 30) == 3
    assert "here" in (tmp_path / "log").read_text()


def test_every_method_s_step_is_measured_beside_the_plain_one(modules: dict[str, Any], tmp_path: Path) -> None:
    step, out = modules["step"], tmp_path / "step.csv"
    words = "--backbone resnet10_narrow --size 32 --batch-size 4 --rounds 5 --seconds 1 --device cpu --precision fp32"
    assert step.main([*words.split(), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["method"] for row in rows] == [method.name for method in step.METHODS]
    for row in rows:
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        assert 0 < float(row["share"]) < 1
        assert row["ratio_wanted"] or row["share_wanted"] or row["method"] == "dual_attention"
        assert row["backbone"] == "resnet10_narrow"


def test_the_share_of_our_operators_is_that_of_the_profile(modules: dict[str, Any]) -> None:
    """A step that does nothing but call one of ours, and one that never does."""
    import fgvc_ext

    features = torch.rand(16, 256, 28, 28, requires_grad=True)
    gradient = torch.ones(16, 256)

    def forward_and_backward() -> None:
        features.grad = None
        fgvc_ext.ops.global_k_max_pool(features, k=4).backward(gradient)

    share = modules["step"].share_of_ours
    assert share(forward_and_backward, "cpu") > 0.6
    assert share(lambda: features.exp().sum().backward(), "cpu") == 0


def test_a_gpu_s_time_counts_once(modules: dict[str, Any]) -> None:
    """A profile has it for kernels, for the operators that launched them, and for stretches that have a name."""
    from types import SimpleNamespace

    from torch.autograd import DeviceType

    def event(key: str, kind: DeviceType, own: float, total: float, named: bool = False) -> SimpleNamespace:
        times = {"device_time_total": total, "self_device_time_total": own}
        return SimpleNamespace(key=key, device_type=kind, is_user_annotation=named, **times)

    events = [
        event("aten::conv2d", DeviceType.CPU, 0, 90),
        event("aten::cudnn_convolution", DeviceType.CPU, 90, 90),
        event("fgvc_ext::global_k_max_pool", DeviceType.CPU, 10, 10),
        event("Optimizer.step", DeviceType.CPU, 0, 100, named=True),
        event("a kernel of cudnn", DeviceType.CUDA, 90, 90),
        event("global_k_max_pool_kernel", DeviceType.CUDA, 10, 10),
        event("Optimizer.step", DeviceType.CUDA, 100, 100, named=True),
    ]
    assert modules["step"].share_in(events, "cuda") == 0.1


def test_an_interval_is_that_of_the_ratios_median(modules: dict[str, Any]) -> None:
    timing = modules["timing"]
    ours, theirs = [1.0 + 0.01 * (n % 7) for n in range(60)], [1.0] * 60
    low, high = timing.Times({"a": ours, "b": theirs}, {}, {}, {}).ratio_interval("a", "b")
    assert 1.01 <= low <= 1.03 <= high <= 1.05
    steady = timing.Times({"a": [3.0, 6.0, 12.0], "b": [1.0, 2.0, 4.0]}, {}, {}, {})  # drift hits both
    assert steady.ratio_interval("a", "b") == (3.0, 3.0)
