"""What fits this machine: the processor's instruction set, torch's CUDA, the architectures of its GPUs."""

import pytest
import torch

from fgvc_ext import _library

from .conftest import LIBRARY, PACKAGE, USE, CopyPackage, Interpreters, compiled


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
info = fgvc_ext.info()
assert info["cpu library"] == "loaded" and info["python module"] != "loaded"
asked = ctypes.CDLL("{folder}/fgvc_ext/lib/{LIBRARY}").fgvc_ext_instruction_set
asked.restype = ctypes.c_char_p
print(asked().decode())
print(info["instruction set"])
print(info["instruction sets supported"])
"""
    supported = _library._module.supported_instruction_sets()
    for name in supported:
        assert interpreters.run(code, folder, FGVC_EXT_ISA=name).lines == [name, name, ", ".join(supported)]
    result = interpreters.run(code, folder, FGVC_EXT_ISA="nonsense")
    assert result.status == 1
    assert f"ValueError: FGVC_EXT_ISA must be one of {', '.join(supported)} (of this build and pro" in result.output


def test_without_the_cpu_library_no_instruction_set_is_in_use(
    interpreters: Interpreters, copy_package: CopyPackage
) -> None:
    code = "import fgvc_ext; print(*[fgvc_ext.info()[f'instruction {w}'] for w in ('set', 'sets supported')])"
    assert interpreters.run(code, copy_package(libraries=False)).lines == ["none none"]


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
    ("of_torch", "mismatch"),
    [
        ("13.0", ""),
        ("13.2", ""),  # a minor version makes no difference
        ("12.9", f"built for CUDA 13.0, but torch {torch.__version__} has CUDA 12.9"),
        (None, f"built for CUDA 13.0, but torch {torch.__version__} has no CUDA"),
    ],
)
def test_the_major_version_of_cuda_decides(
    of_torch: str | None, mismatch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "_module", object())
    monkeypatch.setattr(_library, "build_facts", lambda: {"cuda": "13.0"})
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    assert _library._cuda_mismatch() == mismatch


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
