"""Which of kernel and reference runs: where a library lacks an operator, and where FGVC_EXT_BACKEND asks for one."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fgvc_ext import _library

from .conftest import LIBRARY, PACKAGE, CopyPackage, Interpreters, compiled


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
