"""Importing the package where something is missing, broken or foreign: it never fails, and says once what is wrong."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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


def without(operator: str, library: Path) -> None:
    """As if built before the operator was: the name under which it is registered becomes another of equal length."""
    code = library.read_bytes()
    assert code.count(operator.encode()) > 1
    library.write_bytes(code.replace(operator.encode(), operator[:-1].encode() + b"0"))


# Every operator twice, against the reference; then the warnings, which operators run compiled, and what info() says.
EVERY_OPERATOR = """
import warnings
import torch, fgvc_ext
from fgvc_ext import _library, ops
maps = torch.randn(2, 3, 4, 5, requires_grad=True)
calls = {
    "diversify": lambda: ops.diversify(maps, seed=1),
    "suppression_mask": lambda: ops.suppression_mask(maps, seed=1),
    "global_k_max_pool": lambda: ops.global_k_max_pool(maps),
    "gradient_boosting_cross_entropy":
        lambda: ops.gradient_boosting_cross_entropy(maps[..., 0, 0], torch.tensor([0, 1]), k=1),
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, call in [*calls.items(), *calls.items()]:
        with fgvc_ext.use_reference():
            expected = call()
        torch.testing.assert_close(call(), expected)
        if expected.requires_grad:
            call().sum().backward()
    print(*[name for name in calls if _library.use_kernel(name, maps)])
print(len(caught), *[str(warning.message) for warning in caught])
print(fgvc_ext.info()["cpu library"])
"""


@compiled
@pytest.mark.parametrize(
    ("operator", "others", "library"),
    [
        (
            "global_k_max_pool", "diversify suppression_mask gradient_boosting_cross_entropy",
            "loaded, without global_k_max_pool: these run on the reference",
        ),
        ("suppression_mask", "diversify global_k_max_pool gradient_boosting_cross_entropy", "loaded"),
    ],
)  # fmt: skip
def test_a_library_that_lacks_an_operator_serves_the_others(
    interpreters: Interpreters, copy_package: CopyPackage, operator: str, others: str, library: str
) -> None:
    folder = copy_package(libraries=True)
    without(operator, folder / "fgvc_ext" / "lib" / LIBRARY)
    compiled_ones, warning, found = interpreters.run(EVERY_OPERATOR, folder).lines
    assert compiled_ones == others
    assert warning.startswith(f"1 fgvc_ext: {operator} of cpu tensors runs on the slower PyTorch reference: {LIBRARY} ")
    assert f"has no kernel for {operator}; build it with `python setup.py develop`" in warning
    assert "FGVC_EXT_BACKEND=reference" in warning
    assert found == library


@compiled
def test_an_operator_that_no_library_has_yet_runs_on_its_reference(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    """A new file in ops/, whose kernel is still to be written: its own calls and everybody else's work."""
    folder = copy_package(libraries=True)
    (folder / "fgvc_ext" / "ops" / "twice.py").write_text("""
from .._library import has_schema, use_kernel

def twice(x):
    return x * 2 if not use_kernel("twice", x) else None

assert not has_schema("twice") and has_schema("diversify")
""")
    code = """
from fgvc_ext.ops.twice import twice
assert twice(torch.ones(1)).item() == 2
"""
    compiled_ones, warnings, library, warning, *_ = interpreters.run(EVERY_OPERATOR + code, folder).lines
    assert len(compiled_ones.split()) == 4
    assert warnings.strip() == "0"
    assert library == "loaded, without twice: these run on the reference"
    assert "twice of cpu tensors runs on the slower PyTorch reference" in warning


def test_a_kernel_that_one_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, operators in (("cpu", {"diversify", "global_k_max_pool"}), ("cuda", {"diversify"})):
        monkeypatch.setitem(_library._kernels, device, operators)
        monkeypatch.setattr(_library, f"_{device}_kernels", operators)
    monkeypatch.setattr(_library, "_operators", lambda: ["diversify", "global_k_max_pool"])
    for name, value in (("_errors", {}), ("_warned", set()), ("_reference_asked", False), ("_compiled_asked", False)):
        monkeypatch.setattr(_library, name, value)
    on_cpu = SimpleNamespace(is_cpu=True, is_cuda=False, device=torch.device("cpu"))
    on_cuda = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"))
    assert _library.use_kernel("diversify", on_cpu)
    assert _library.use_kernel("diversify", on_cuda)
    assert _library.use_kernel("global_k_max_pool", on_cpu)
    with pytest.warns(UserWarning, match="global_k_max_pool of cuda tensors runs on the slower .*libfgvc_ext_cuda.so"):
        assert not _library.use_kernel("global_k_max_pool", on_cuda)
    assert _library._state("cpu") == "loaded"
    assert _library._state("cuda") == "loaded, without global_k_max_pool: these run on the reference"


@compiled
def test_a_kernel_without_a_schema_is_none(interpreters: Interpreters, copy_package: CopyPackage) -> None:
    """Of a CUDA library that is newer than the CPU library: calling it would fail."""
    code = """
import torch, fgvc_ext
from fgvc_ext import _library
newer = torch.library.Library("fgvc_ext", "IMPL")
newer.impl("diversify", lambda *arguments: None, "CUDA")
newer.impl("of_tomorrow", lambda *arguments: None, "CUDA")
print(sorted({"diversify", "of_tomorrow"} & _library._registered_kernels("cuda")))
"""
    assert interpreters.run(code, copy_package(libraries=True)).lines == ["['diversify']"]


# Every operator where compiled kernels are asked for, eager and while torch.compile traces; then what info() says.
ASKED_FOR = """
import torch, fgvc_ext
from fgvc_ext import ops
features = torch.arange(24.).reshape(1, 2, 3, 4)
traced = torch.compile(lambda x: ops.diversify(x), backend="eager", fullgraph=True)
for call in (ops.global_k_max_pool, ops.diversify, ops.suppression_mask, traced):
    try:
        call(features)
        print("ran")
    except RuntimeError as error:
        print(str(error).splitlines()[0])
with fgvc_ext.use_reference():  # asked for as well, and nearer
    assert ops.global_k_max_pool(features, 4).tolist() == [[9.5, 21.5]]
assert ops.global_k_max_pool(features.to("meta"), 4).shape == (1, 2)  # nothing runs
print(fgvc_ext.info()["backend"])
print(fgvc_ext.info()["cpu library"])
"""


def test_compiled_kernels_that_are_asked_for_and_missing_are_an_error(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    *calls, backend, _ = interpreters.run(ASKED_FOR, copy_package(libraries=False), FGVC_EXT_BACKEND="compiled").lines
    operators = ("global_k_max_pool", "diversify", "suppression_mask", "diversify")
    for call, operator in zip(calls, operators, strict=True):
        assert f"{operator}: FGVC_EXT_BACKEND=compiled, but no kernel takes cpu tensors: not built ({LIBRARY}" in call
        assert "build it with `python setup.py develop`" in call
    assert backend == "compiled (asked for)"


@compiled
def test_compiled_kernels_that_are_asked_for_run(interpreters: Interpreters, copy_package: CopyPackage) -> None:
    folder = copy_package(libraries=True)
    assert interpreters.run(ASKED_FOR, folder, FGVC_EXT_BACKEND="compiled").lines == [
        *["ran"] * 4, "compiled (asked for)", "loaded",
    ]  # fmt: skip


@compiled
def test_one_missing_kernel_is_an_error_where_compiled_ones_are_asked_for(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    folder = copy_package(libraries=True)
    without("global_k_max_pool", folder / "fgvc_ext" / "lib" / LIBRARY)
    *calls, _, library = interpreters.run(ASKED_FOR, folder, FGVC_EXT_BACKEND="compiled").lines
    assert calls[1:] == ["ran"] * 3
    assert calls[0].startswith(
        "global_k_max_pool: FGVC_EXT_BACKEND=compiled, but no kernel takes cpu tensors: "
        f"{LIBRARY} has no kernel for global_k_max_pool; build it with `python setup.py develop`"
    )
    assert library == "loaded, without global_k_max_pool: these raise"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda", "built without CUDA; build it with `python setup.py develop`"),
        ("xpu", "only cpu and cuda tensors have kernels"),
    ],
)
def test_the_error_names_the_device(device: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = SimpleNamespace(is_cpu=False, is_cuda=device == "cuda", device=torch.device(device))
    monkeypatch.setattr(_library, "_compiled_asked", True)
    monkeypatch.setattr(_library, "_cuda_kernels", set())
    monkeypatch.setattr(_library, "_errors", {"cuda": "built without CUDA"})
    message = f"diversify: FGVC_EXT_BACKEND=compiled, but no kernel takes {device} tensors: {reason}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        _library.use_kernel("diversify", tensor)


def test_an_unknown_backend_is_refused(interpreters: Interpreters) -> None:
    result = interpreters.run("import fgvc_ext", PACKAGE.parent, FGVC_EXT_BACKEND="nonsense")
    assert result.status == 1
    assert "ValueError: FGVC_EXT_BACKEND must be 'compiled' or 'reference', got 'nonsense'" in result.output


@compiled
def test_an_unknown_instruction_set_is_refused(interpreters: Interpreters) -> None:
    assert _library._module is not None
    supported = ", ".join(_library._module.supported_instruction_sets())
    for name in ("avx1024", "AVX2"):
        result = interpreters.run("import fgvc_ext", PACKAGE.parent, FGVC_EXT_ISA=name)
        assert result.status == 1
        assert f"ValueError: FGVC_EXT_ISA must be one of {supported} (of this build and pro" in result.output
        assert f"got {name!r}" in result.output
    assert interpreters.run("import fgvc_ext", PACKAGE.parent, FGVC_EXT_ISA="").status == 0


@compiled
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_the_instruction_set_can_be_named(interpreters: Interpreters, copy_package: CopyPackage, name: str) -> None:
    assert _library._module is not None
    if name not in _library._module.supported_instruction_sets():
        pytest.skip(f"this processor or this build has no {name}")
    result = interpreters.run(USE + "print(info['instruction set'])", copy_package(libraries=True), FGVC_EXT_ISA=name)
    assert result.lines == ["0", "", "compiled", "loaded", name]


@compiled
def test_the_instruction_set_is_honoured_and_checked_without_the_python_module(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    folder = copy_package(libraries=True)
    next(folder.glob("fgvc_ext/_C*.so")).unlink()
    code = f"""
import ctypes
import fgvc_ext
assert fgvc_ext.info()["cpu library"] == "loaded" and fgvc_ext.info()["python module"] != "loaded"
asked = ctypes.CDLL("{folder}/fgvc_ext/lib/{LIBRARY}").fgvc_ext_instruction_set
asked.restype = ctypes.c_char_p
print(asked().decode())
"""
    supported = _library._module.supported_instruction_sets()
    for name in supported:
        assert interpreters.run(code, folder, FGVC_EXT_ISA=name).lines == [name]
    result = interpreters.run(code, folder, FGVC_EXT_ISA="nonsense")
    assert result.status == 1
    assert f"ValueError: FGVC_EXT_ISA must be one of {', '.join(supported)} (of this build and pro" in result.output


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


@pytest.mark.parametrize(
    ("architectures", "capabilities", "without"),
    [
        ("75-real 80-real 86-real 89-real 90", [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0)], []),
        ("75-real 80-real 86-real 89-real 90", [(6, 1), (7, 0), (10, 0), (12, 1)], ["6.1", "7.0"]),  # 90 has PTX
        ("80-real", [(7, 5), (8, 0), (8, 6), (9, 0)], ["7.5", "9.0"]),  # machine code: the major version's
        ("86-real", [(8, 0), (8, 6), (8, 9)], ["8.0"]),
        ("80-virtual", [(7, 5), (8, 0), (12, 0)], ["7.5"]),
        ("90a", [(9, 0), (10, 0)], ["10.0"]),  # neither its machine code nor its PTX runs elsewhere
        ("100f-real", [(10, 0), (10, 3), (12, 0)], ["12.0"]),
        ("120-real", [(12, 0), (12, 1), (1, 2)], ["1.2"]),
        ("all-major", [(5, 2), (13, 0)], []),  # the build's list is not known
        ("", [(8, 0)], ["8.0"]),
        ("80-real", [], []),
    ],
)
def test_gpus_that_the_library_has_no_code_for(
    architectures: str, capabilities: list[tuple[int, int]], without: list[str]
) -> None:
    assert _library.without_code(capabilities, architectures) == without


@pytest.mark.parametrize(
    ("loaded", "capabilities", "words"),
    [
        (False, [(6, 1)], "1"),
        (True, [], "0"),
        (True, [(9, 0), (8, 0)], "2"),
        (
            True, [(8, 0), (6, 1), (6, 1)], "3, but the library has no code for compute capability 6.1: "
            'build it again with TORCH_CUDA_ARCH_LIST="6.1"',
        ),
    ],
)  # fmt: skip
def test_info_names_gpus_that_the_library_has_no_code_for(
    loaded: bool, capabilities: list[tuple[int, int]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_library._kernels, "cuda", loaded)
    monkeypatch.setattr(_library, "build_facts", lambda: {"cuda_architectures": "80-real 90"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert _library._devices() == words
