"""The format of a mutant: one small change of a source file that the tests must notice.

``lists/<area>.py`` holds those of an area. To add one, copy an entry: nothing else needs an edit. ``run.py`` applies
them, test_mutants.py demands that they fit the sources.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPS = "python_tests/ops"
EMULATION = (f"{OPS}/test_emulation.py", f"{OPS}/test_memory_sectors.py")
# Operators whose tests have other names than they: their -k expression.
ALSO_NAMED = {"diversify": "diversify or suppression_mask", "class_mean_loss": "class_mean"}


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands in ``file`` exactly once, becomes ``new``.

    ``tests`` are the arguments of pytest that should notice; without them the name of the file decides. ``survives``
    says why nothing can notice. It does not count as caught.
    """

    id: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    survives: str = ""
    file: str = ""
    area: str = ""

    @property
    def selection(self) -> tuple[str, ...]:
        return self.tests or selection_of(self.file)

    def applied(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.id}: stands {text.count(self.old)} times in {self.file}, must be once: {self.old!r}"
            )
        return text.replace(self.old, self.new)

    @property
    def key(self) -> str:
        """Of all that decides the result: another key is another mutant, whose result is not known."""
        parts = [self.file, self.old, self.new, *self.selection, (ROOT / self.file).read_text()]
        return digest([*parts, *(path.read_text() for path in files_of(self.selection))])


def of(file: str, *mutants: Mutant, tests: tuple[str, ...] = ()) -> list[Mutant]:
    """The mutants of a file; ``tests`` for those that name none."""
    return [replace(mutant, file=file, tests=mutant.tests or tests) for mutant in mutants]


def operators() -> list[str]:
    return sorted(path.stem for path in (ROOT / "fgvc_ext" / "ops").glob("[a-z]*.py"))


def selection_of(file: str) -> tuple[str, ...]:
    """Of an operator's file: all tests of the fast tier that bear its name, its own file first. Else: all of ops."""
    stem = Path(file).stem
    emulated = file.startswith("csrc/cuda/")
    names = [name for name in operators() if stem.startswith(name)]
    if emulated:
        paths = EMULATION
    else:
        own = f"{OPS}/test_{names[0]}.py" if names else ""
        paths = (*([own] if (ROOT / own).is_file() else []), OPS, *(f"--ignore={path}" for path in EMULATION))
    return (*paths, "-m", "not slow", *(["-k", ALSO_NAMED.get(names[0], names[0])] if names else []))


def files_of(selection: tuple[str, ...], root: Path | None = None) -> Iterator[Path]:
    """What pytest reads for these arguments, but for the files of operators that they do not name."""
    named = [name for name in operators() if name in " ".join(selection)]
    others = [name for name in operators() if named and name not in named]
    for argument in selection:
        path = (root or ROOT) / argument.split("::")[0]
        for found in sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file():
            if not any(name in found.stem for name in others):
                yield found


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def mutants() -> list[Mutant]:
    found = []
    for path in sorted((Path(__file__).parent / "lists").glob("[a-z]*.py")):
        module = import_module(f"{__package__}.lists.{path.stem}")
        found += [replace(mutant, area=path.stem) for mutant in module.MUTANTS]
    return found
