"""The direction of knowledge within the package: arrows go one way, and no circle of imports exists."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fgvc_ext

PACKAGE = Path(fgvc_ext.__file__).parent
MAY_KNOW = {  # besides itself and the files at the top of the package
    "reference": set(),
    "ops": {"reference"},
    "nn": {"ops", "reference"},
    "data": set(),
    "models": {"nn", "ops", "reference", "data"},
    "explain": {"models", "nn", "ops", "reference", "data"},
    "training": {"explain", "models", "nn", "ops", "reference", "data"},
    "cli": {"training", "explain", "models", "nn", "ops", "reference", "data"},
}


def _imports(file: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, also within functions: "models.backbone"."""
    here = file.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        path = (node.module or "").split(".") if node.module else []
        if node.level:
            path = [*here[: len(here) - node.level], *path]
        elif path[0] == "fgvc_ext":
            path = path[1:]
        else:
            continue
        for name in node.names:
            inner = PACKAGE.joinpath(*path, name.name)
            if inner.with_suffix(".py").exists():
                found.add(".".join([*path, name.name]))
            elif inner.is_dir():
                found.add(".".join([*path, name.name, "__init__"]))
            elif PACKAGE.joinpath(*path).is_dir():
                found.add(".".join([*path, "__init__"]))
            else:
                found.add(".".join(path))
    return found


FILES = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] in MAY_KNOW]


def test_knowledge_goes_one_way():
    for file in FILES:
        folder = file.relative_to(PACKAGE).parts[0]
        known = {name.partition(".")[0] for name in _imports(file)} & set(MAY_KNOW)
        assert known <= {folder} | MAY_KNOW[folder], f"{file} imports {known}"


def test_no_module_comes_back_to_itself():
    names = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in FILES}
    graph = {name: {found for found in _imports(file) if found in names} for name, file in names.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_files_stay_short():
    long = {str(f): len(f.read_text().splitlines()) for f in FILES}
    assert {name: length for name, length in long.items() if length > 400} == {}
