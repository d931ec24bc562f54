"""Loads the operator libraries once, keeps and shows the first error, and says which of kernel and reference runs."""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import platform
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._version import __version__

FOLDER = Path(__file__).parent / "lib"
_HOW_TO_BUILD = "build it with `python setup.py develop` (or `pip install --no-build-isolation .`) in the source folder"

_errors: dict[str, str] = {}  # "cpu", "cuda" or "_C" -> why it is not loaded
_cpu_kernels: set[str] = set()  # the operators of torch.ops.fgvc_ext that have a kernel on the CPU
_cuda_kernels: set[str] = set()
_kernels = {"cpu": _cpu_kernels, "cuda": _cuda_kernels}  # by device type
_module: ModuleType | None = None  # fgvc_ext._C
_backend = os.environ.get("FGVC_EXT_BACKEND", "")
_compiled_asked = _backend == "compiled"
_reference_asked = _backend == "reference"
_labels_checked = os.environ.get("FGVC_EXT_CHECK", "") == "1"
_warned: set[str] = set()  # messages


def _load() -> None:
    """Loads the CPU library, which holds the schemas, then ``_C``, which links it, then the CUDA library.

    What is missing or broken is no error here: `_errors` keeps the reason. Only a wrong setting raises.
    """
    global _module
    if _backend not in ("", "compiled", "reference"):
        raise ValueError(f"FGVC_EXT_BACKEND must be 'compiled' or 'reference', got {_backend!r}")
    try:
        _load_library("cpu")
    except OSError as error:
        _errors["cpu"] = f"{error}; {_HOW_TO_BUILD}"
        _errors["_C"] = "needs the CPU library"
        _errors["cuda"] = "needs the CPU library, which holds the schemas"
        return
    try:
        _module = _import_module()
    except (ImportError, OSError) as error:
        _errors["_C"] = f"{error}; {_HOW_TO_BUILD}"
    _check_instruction_set()
    mismatch = _cuda_mismatch()
    if mismatch:
        _errors["cuda"] = mismatch
        return
    try:
        _load_library("cuda")
    except OSError as error:
        _errors["cuda"] = f"{error}; {_HOW_TO_BUILD}"


def _load_library(device: str) -> None:
    """Loads the device's library and notes which operators it has kernels for. Raises OSError where it is unusable."""
    path = FOLDER / f"libfgvc_ext_{device}.so"
    if not path.exists():
        raise OSError(f"not built ({path.name} is missing)")
    try:
        _refuse_truncated(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = error.__cause__ or error  # torch wraps what the loader says
        raise OSError(f"{path.name} does not load under torch {torch.__version__}: {cause}") from error
    kernels = _registered_kernels(device)
    if not kernels:
        raise OSError(f"{path.name} is not of this version of fgvc_ext: it has no kernel for any operator")
    _kernels[device].update(kernels)


def _registered_kernels(device: str) -> set[str]:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fgvc_ext::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    with_kernel = {name.removeprefix("fgvc_ext::") for name in names if has_kernel(name, device.upper())}
    # A CUDA library of another build may have kernels whose schema the CPU library does not know.
    return {operator for operator in with_kernel if hasattr(torch.ops.fgvc_ext, operator)}


def _import_module() -> ModuleType:
    found = importlib.util.find_spec("._C", __package__)
    if found is not None and found.origin is not None:
        _refuse_truncated(Path(found.origin))
    return importlib.import_module("._C", __package__)


def _refuse_truncated(path: Path) -> None:
    """Raises OSError for an ELF file that ends too early: the loader would map it, and the process die of SIGBUS."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):  # else the loader itself refuses it
        (offset,) = struct.unpack_from("<Q", header, 40)  # of the table of sections, which stands at the end
        size, number = struct.unpack_from("<HH", header, 58)
        end, actual = offset + size * number, path.stat().st_size
        if actual < end:
            raise OSError(f"{path} is truncated: {actual} of {end} bytes")


def _operators() -> list[str]:
    """Every public operator, which has the name of its file."""
    return sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[a-z]*.py"))


def _check_instruction_set() -> None:
    """Refuses an unknown FGVC_EXT_ISA, which the CPU library would read as none."""
    asked = os.environ.get("FGVC_EXT_ISA", "")
    if not asked:
        return
    supported = _supported_instruction_sets()
    if asked not in supported:
        raise ValueError(
            f"FGVC_EXT_ISA must be one of {', '.join(supported)} (of this build and processor), got {asked!r}"
        )


def _name_function(name: str) -> Callable[..., bytes]:
    """One of the CPU library's own functions that return a name: it has them also where ``_C`` is missing."""
    function = getattr(ctypes.CDLL(str(FOLDER / "libfgvc_ext_cpu.so")), name)
    function.restype = ctypes.c_char_p
    return function


def _supported_instruction_sets() -> list[str]:
    """Those of this build and processor, widest first; none without the CPU library."""
    if not has_schemas():
        return []
    name_of = _name_function("fgvc_ext_supported_instruction_set")
    return [name.decode() for name in itertools.takewhile(bool, map(name_of, itertools.count()))]


def _cuda_mismatch() -> str:
    """Why the CUDA library cannot be used, or "". It links the CUDA runtime of the major version that torch brings."""
    built = build_facts().get("cuda", "")
    if _module is None:
        return f"its CUDA version is unknown without fgvc_ext._C: {_errors['_C']}"
    if not built:
        return "built without CUDA"
    if torch.version.cuda is None:
        return f"built for CUDA {built}, but torch {torch.__version__} has no CUDA"
    if torch.version.cuda.split(".")[0] != built.split(".")[0]:
        return f"built for CUDA {built}, but torch {torch.__version__} has CUDA {torch.version.cuda}"
    return ""


def has_schemas() -> bool:
    """Whether the CPU library is loaded, and with it the schemas of ``torch.ops.fgvc_ext``."""
    return "cpu" not in _errors


def has_schema(op: str) -> bool:
    """Whether ``torch.ops.fgvc_ext`` has this operator, to which fake kernel and autograd are then attached."""
    return hasattr(torch.ops.fgvc_ext, op)


def use_kernel(op: str, tensor: Tensor) -> bool:
    """Whether the compiled kernel of ``torch.ops.fgvc_ext.<op>`` takes this tensor; if not, the reference has to.

    Where nobody asked for the reference, it warns: once per device without a library, else once per operator that the
    library lacks. With FGVC_EXT_BACKEND=compiled it raises RuntimeError instead.
    """
    if _reference_asked:
        return False
    # `.device.type` builds a string, which takes longer than all other checks together.
    if op in (_cpu_kernels if tensor.is_cpu else _cuda_kernels if tensor.is_cuda else ()):
        return True
    device = tensor.device.type
    if device != "meta":  # whose tensors have no data, so that nothing runs
        # Nothing runs with fake tensors either, unless they trace what is compiled: that will not come here again.
        runs = torch.compiler.is_compiling() or not is_fake(tensor)
        _reference_stands_in(op, device, runs)
    return False


def _reference_stands_in(op: str, device: str, runs: bool) -> bool:
    """Raises where FGVC_EXT_BACKEND=compiled; warns, if anything ``runs`` on the reference, of each reason once."""
    if _compiled_asked:
        raise RuntimeError(
            f"{op}: FGVC_EXT_BACKEND=compiled, but no kernel takes {device} tensors: {_why_no_kernel(op, device)}"
        )
    if runs:
        whole_device = device in _errors or device not in _kernels
        what = f"{device} tensors run" if whole_device else f"{op} of {device} tensors runs"
        message = (
            f"fgvc_ext: {what} on the slower PyTorch reference: {_why_no_kernel(op, device)}. `fgvc_ext.info()` tells "
            "more; FGVC_EXT_BACKEND=reference asks for the reference and silences this."
        )
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, stacklevel=4)
    return True


def _why_no_kernel(op: str, device: str) -> str:
    if device not in _kernels:
        return f"only {' and '.join(_kernels)} tensors have kernels"
    reason = _errors.get(device, f"libfgvc_ext_{device}.so has no kernel for {op}")
    return reason if _HOW_TO_BUILD in reason else f"{reason}; {_HOW_TO_BUILD}"


# torch.compile calls it while it traces and takes the result for a constant: no graph break, nothing in the graph. This
# is what torch.compiler.assume_constant_result does, which would import torch._dynamo: seconds, in every program.
_reference_stands_in._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Runs the operators' PyTorch reference inside the ``with`` block, in every thread of the process."""
    global _reference_asked
    before, _reference_asked = _reference_asked, True
    try:
        yield
    finally:
        _reference_asked = before


def build_facts() -> dict[str, str]:
    """What the compiled module was built with: compiler, torch, CUDA and its architectures; empty without it."""
    return dict(_module.build_facts()) if _module is not None else {}


def instruction_set() -> str:
    """The instruction set whose kernels run on the CPU; "none" without the CPU library."""
    return _name_function("fgvc_ext_instruction_set")().decode() if has_schemas() else "none"


def check_labels() -> bool:
    """``FGVC_EXT_CHECK=1``: look at label values also on devices where looking waits."""
    return _labels_checked


def without_code(capabilities: Iterable[tuple[int, int]], architectures: str) -> list[str]:
    """Those compute capabilities, as "8.6", for which a library of these CMake architectures has no code."""
    missing = []
    for capability in capabilities:
        if not any(_has_code(capability, architecture) for architecture in architectures.split()):
            missing.append("{}.{}".format(*capability))
    return missing


def _has_code(capability: tuple[int, int], architecture: str) -> bool:
    parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if parts is None:
        return True  # "all", "native": what it stood for in that build is not known
    built = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return capability == built
    if parts[4] == "-real" or parts[3] == "f":  # machine code, which later minor versions run as well
        return capability[0] == built[0] and capability >= built
    return capability >= built  # PTX, which the driver compiles


def _devices() -> str:
    """Number of GPUs, and what the CUDA library has no code for. Looking at them starts CUDA in this process."""
    number = torch.cuda.device_count()
    if not _kernels["cuda"] or number == 0:
        return str(number)
    try:
        found = sorted({torch.cuda.get_device_capability(device) for device in range(number)})
    except RuntimeError as error:  # in a forked process, for one
        return f"{number}, of unknown compute capability: {error}"
    missing = without_code(found, build_facts()["cuda_architectures"])
    if not missing:
        return str(number)
    return (
        f"{number}, but the library has no code for compute capability {', '.join(missing)}: build it again with "
        f'TORCH_CUDA_ARCH_LIST="{";".join(missing)}"'
    )


def _backend_in_use() -> str:
    if _reference_asked:
        return "reference (asked for)"
    if _compiled_asked:
        return "compiled (asked for)"
    return "compiled" if has_schemas() else "reference"


def _state(device: str) -> str:
    """Of the device's library: "loaded", and which operators it lacks, or why it is not loaded."""
    if device in _errors:
        return _errors[device]
    missing = [operator for operator in _operators() if operator not in _kernels[device]]
    if not missing:
        return "loaded"
    return f"loaded, without {', '.join(missing)}: these {'raise' if _compiled_asked else 'run on the reference'}"


def info() -> dict[str, Any]:
    """Versions, libraries found, instruction set in use, CUDA architectures, or why something is missing."""
    facts = build_facts()
    return {
        "fgvc_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": _backend_in_use(),
        "cpu library": _state("cpu"),
        "instruction set": instruction_set(),
        "instruction sets supported": ", ".join(_supported_instruction_sets()) or "none",
        "python module": _errors.get("_C", "loaded"),
        "cuda library": _state("cuda"),
        "cuda architectures": facts.get("cuda_architectures", "none") or "none",
        "cuda devices": _devices(),
        "built with torch": facts.get("torch", "not built"),
        "compiler": facts.get("compiler", "not built"),
    }


_load()
