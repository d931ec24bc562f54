"""Loads the operator libraries once, keeps and shows the first error, and says which of kernel and reference runs."""

import contextlib
import importlib.util
import os
import platform
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._version import __version__

FOLDER = Path(__file__).parent / "lib"
_HOW_TO_BUILD = "build it with `python setup.py develop` (or `pip install --no-build-isolation .`) in the source folder"

_errors: dict[str, str] = {}
_kernels = {"cpu": False, "cuda": False}  # device type -> its kernels are registered
_module: ModuleType | None = None  # fgvc_ext._C
_reference_asked = os.environ.get("FGVC_EXT_BACKEND", "") == "reference"
_labels_checked = os.environ.get("FGVC_EXT_CHECK", "") == "1"
_warned: set[str] = set()  # device types


def _load() -> None:
    global _module
    backend = os.environ.get("FGVC_EXT_BACKEND", "")
    if backend not in ("", "compiled", "reference"):
        raise ValueError(f"FGVC_EXT_BACKEND must be 'compiled' or 'reference', got {backend!r}")
    _kernels["cpu"] = _load_library("cpu")
    if not _kernels["cpu"]:
        _errors["cuda"] = "needs the CPU library, which holds the schemas"
        return
    _module = _load_module()
    _kernels["cuda"] = _cuda_matches() and _load_library("cuda")


def _load_library(device: str) -> bool:
    path = FOLDER / f"libfgvc_ext_{device}.so"
    if not path.exists():
        _errors[device] = f"not built ({path.name} is missing); {_HOW_TO_BUILD}"
        return False
    try:
        _refuse_truncated(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = error.__cause__ or error  # torch wraps what the loader says
        _errors[device] = f"{path.name} does not load under torch {torch.__version__}: {cause}; {_HOW_TO_BUILD}"
        return False
    missing = [operator for operator in _operators() if not _has_kernel(operator, device)]
    if missing:
        what = f"has no kernel for {', '.join(missing)}"
        _errors[device] = f"{path.name} is not of this version of fgvc_ext: it {what}; {_HOW_TO_BUILD}"
    return not missing


def _load_module() -> ModuleType | None:
    try:
        found = importlib.util.find_spec("._C", __package__)
        if found is not None and found.origin is not None:
            _refuse_truncated(Path(found.origin))
        return importlib.import_module("._C", __package__)
    except (ImportError, OSError) as error:
        _errors["_C"] = f"{error}; {_HOW_TO_BUILD}"
        return None


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


def _has_kernel(operator: str, device: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fgvc_ext::{operator}", device.upper()))
    except RuntimeError:  # not even a schema
        return False


def _cuda_matches() -> bool:
    """The CUDA library links the CUDA runtime of one major version, and torch must bring the same."""
    built = build_facts().get("cuda", "")
    if _module is None:
        _errors["cuda"] = f"its CUDA version is unknown without fgvc_ext._C: {_errors['_C']}"
    elif not built:
        _errors["cuda"] = "built without CUDA"
    elif torch.version.cuda is None:
        _errors["cuda"] = f"built for CUDA {built}, but torch {torch.__version__} has no CUDA"
    elif torch.version.cuda.split(".")[0] != built.split(".")[0]:
        _errors["cuda"] = f"built for CUDA {built}, but torch {torch.__version__} has CUDA {torch.version.cuda}"
    return "cuda" not in _errors


def has_schemas() -> bool:
    """Whether ``torch.ops.fgvc_ext`` has the operators, to which fake kernels and autograd are then attached."""
    return _kernels["cpu"]


def has_schema(op: str) -> bool:
    """Whether ``torch.ops.fgvc_ext`` has this operator."""
    return _kernels["cpu"]


def use_kernel(tensor: Tensor) -> bool:
    """Whether the compiled kernel takes this tensor; warns once a device where the reference stands in unasked."""
    if _reference_asked:
        return False
    # `.device.type` builds a string, which takes longer than all other checks together.
    if _kernels["cpu"] if tensor.is_cpu else _kernels.get(tensor.device.type, False):
        return True
    # Without data nothing runs; but what is compiled is traced with fake tensors, and then runs without coming here.
    if torch.compiler.is_compiling() or not is_fake(tensor):
        _warn_once(tensor.device.type)
    return False


def _warn_once(device: str) -> bool:
    if device in _warned or device == "meta":
        return True
    _warned.add(device)
    reason = _errors.get(device, "this device has no kernels")
    warnings.warn(
        f"fgvc_ext: {device} tensors run on the slower PyTorch reference: {reason}. `fgvc_ext.info()` tells more; "
        "FGVC_EXT_BACKEND=reference asks for the reference and silences this.",
        stacklevel=4,
    )
    return True


# torch.compile calls it while it traces and takes the result for a constant: no graph break, nothing in the graph. This
# is what torch.compiler.assume_constant_result does, which would import torch._dynamo: seconds, in every program.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    return _module.instruction_set() if _module is not None else "none"


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


def info() -> dict[str, Any]:
    """Versions, libraries found, instruction set in use, CUDA architectures, or why something is missing."""
    facts = build_facts()
    return {
        "fgvc_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": "reference (asked for)" if _reference_asked else "compiled" if _kernels["cpu"] else "reference",
        "cpu library": "loaded" if _kernels["cpu"] else _errors["cpu"],
        "instruction set": instruction_set(),
        "instruction sets supported": ", ".join(_module.supported_instruction_sets()) if _module else "none",
        "python module": "loaded" if _module is not None else _errors.get("_C", "needs the CPU library"),
        "cuda library": "loaded" if _kernels["cuda"] else _errors["cuda"],
        "cuda architectures": facts.get("cuda_architectures", "none") or "none",
        "cuda devices": _devices(),
        "built with torch": facts.get("torch", "not built"),
        "compiler": facts.get("compiler", "not built"),
    }


_load()
