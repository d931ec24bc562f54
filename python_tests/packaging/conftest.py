import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import fgvc_ext
from fgvc_ext import _library

from . import toy_table

PACKAGE = Path(fgvc_ext.__file__).parent
# Where setup.py looks for cmake and ninja, too: beside the interpreter first.
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
LIBRARY = "libfgvc_ext_cpu.so"
CopyPackage = Callable[..., Path]
compiled = pytest.mark.skipif(_library._module is None, reason="the package has no compiled libraries")

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


@dataclass(frozen=True)
class Result:
    status: int  # of the process, or minus the signal that ended it
    output: str

    @property
    def lines(self) -> list[str]:
        """What the code printed; it must have ended well."""
        assert self.status == 0, self.output
        return self.output.splitlines()


class Interpreters:
    """Fresh interpreters that have torch but not yet fgvc_ext, which they find in the folder `path`."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fresh_interpreters.py"))]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run_copies(self, copies: int, code: str, path: Path, **environment: str) -> list[Result]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {"code": code, "path": str(path), "environment": environment, "copies": copies}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return [Result(**result) for result in json.loads(self.server.stdout.readline())]

    def run(self, code: str, path: Path, **environment: str) -> Result:
        return self.run_copies(1, code, path, **environment)[0]

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="session")
def interpreters() -> Iterator[Interpreters]:
    started = Interpreters()
    yield started
    started.close()


@pytest.fixture
def copy_package(tmp_path: Path) -> CopyPackage:
    """Copies the package, with the CPU library and `_C` or without any, and returns the folder that holds the copy."""

    def copy(*, libraries: bool) -> Path:
        shutil.copytree(PACKAGE, tmp_path / "fgvc_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        if libraries:
            (tmp_path / "fgvc_ext" / "lib").mkdir(exist_ok=True)
            shutil.copy(_library.FOLDER / LIBRARY, tmp_path / "fgvc_ext" / "lib")
            for module in PACKAGE.glob("_C*.so"):
                shutil.copy(module, tmp_path / "fgvc_ext")
        return tmp_path

    return copy


BENCHMARKS = PACKAGE.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/, where modules find each other as a script's do; they are forgotten again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def tables(scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The table runner, with a toy driver and its table in the test's folder."""
    found = scripts("tables")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/toy.py").write_text(toy_table.DRIVER)
    (tmp_path / "toy.toml").write_text(toy_table.TABLE)
    (tmp_path / "page.md").write_text("# Results\n\nA text.\n")
    monkeypatch.setattr(found, "ROOT", tmp_path)
    monkeypatch.setattr(found, "machine", lambda device: {"device": device, "torch": "1.2", "date": "2020-01-02T03"})
    monkeypatch.setenv("TOY_ROOT", "/toy")
    return found
