"""`fgvc-ext train`: the drivers of `train/`, from an installed package too."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def train_command(arguments: Sequence[str]) -> int:
    """`fgvc-ext train <paper> <preset> …`: run a driver with the arguments after its name; returns its exit code."""
    drivers = {file.stem: file for file in sorted(drivers_folder().glob("*.py"))}
    paper = arguments[0] if arguments else None
    if paper in drivers:
        code: int = load_driver(drivers[paper]).DRIVER.main(arguments[1:], ["fgvc-ext", "train", paper])
        return code
    usage = "usage: fgvc-ext train PAPER PRESET [changes]; fgvc-ext train PAPER --help shows presets and changes"
    lines = [f"  {name:<24}{_first_line(file)}" for name, file in drivers.items()]
    wanted = paper in ("-h", "--help")
    problem = [] if wanted else [f"fgvc-ext train: expected one of {', '.join(drivers)}, got {paper or 'nothing'}"]
    print("\n".join([usage, *lines, *problem]), file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2


def drivers_folder() -> Path:
    """Where the drivers are: `train/` of a source tree, whose files a wheel holds as `fgvc_ext/train/`."""
    package = Path(__file__).parents[1]
    installed = package / "train"
    return installed if installed.is_dir() else package.parent / "train"


def load_driver(file: Path) -> ModuleType:
    """The module of a driver's file."""
    name = f"fgvc_ext_train_{file.stem}"
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
