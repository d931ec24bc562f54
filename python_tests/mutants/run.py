"""Mutation testing: applies each mutant of ``lists/``, builds what it touches and runs the tests that should notice.

    python -m python_tests.mutants.run [--only REGEX] [--area AREA] [--jobs N] [--again]

The work is done in copies of the source tree below build/mutants, never in the tree itself. What was found stands in
results.csv beside this file, under a key of mutant, source and tests: only what has changed is run again, and a run
that was stopped goes on where it was. Exit code 1 if fewer than 95 % are caught, or something could not be run.
"""

import argparse
import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from .mutant import EMULATION, ROOT, Mutant, digest, files_of, mutants

RESULTS = Path(__file__).with_name("results.csv")
WORK = ROOT / "build" / "mutants"
WANTED = 0.95
CAUGHT = ("caught", "timed out")  # a hang does not pass unnoticed
# What mutants need a build of their own for.
BUILT = ("csrc/", "fgvc_ext/ops/", "fgvc_ext/reference/", "fgvc_ext/_library.py")
BEFORE = "before the change"  # the result of mutants whose tests already fail, or whose file does not build, without it


class Result(NamedTuple):
    id: str
    result: str  # caught, timed out, survived, did not compile
    by: str  # the test that noticed first
    seconds: int
    key: str


class Results:
    """The file of results, written after every mutant."""

    def __init__(self, path: Path, known: set[str]) -> None:
        self.path, self.lock = path, threading.Lock()
        rows = csv.reader(path.read_text().splitlines()[1:]) if path.exists() else []
        found = [Result(row[0], row[1], row[2], int(row[3]), row[4]) for row in rows]
        self.of = {result.id: result for result in found if result.id in known}

    def add(self, result: Result) -> None:
        with self.lock:
            self.of[result.id] = result
            part = self.path.with_suffix(".part")
            with part.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(Result._fields)
                writer.writerows(self.of[id_] for id_ in sorted(self.of))
            part.replace(self.path)


class Preloaded:
    """Runs of the tests of ``tree`` in forks of one process, whose imports they share (preloaded.py)."""

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("preloaded.py"))]
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, arguments: list[str], limit: float) -> tuple[int | None, str]:
        """pytest's exit status, None where it was ended at the limit, and its output."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"arguments": arguments, "limit": limit}), file=self.process.stdin, flush=True)
        status, output = json.loads(self.process.stdout.readline())
        return status, output

    def close(self) -> None:
        self.process.communicate()  # closes its input, which ends it


def needs_emulation(mutant: Mutant) -> bool:
    """Whether its tests may run CUDA kernels on the CPU."""
    return mutant.file.startswith("csrc/cuda/") or any(word.split("::")[0] in EMULATION for word in mutant.selection)


class Workshop:
    """A copy of the source tree with a build of its own."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.build_folder, self.passed = folder / "tree", folder / "build", folder / "passed.csv"
        self.configured = False
        self.failing: set[str] = set()  # the keys of tests that do not pass without a change
        beside = Path(sys.executable).parent  # where setup.py, too, looks first
        self.cmake = shutil.which("cmake", path=str(beside)) or "cmake"
        self.ninja = shutil.which("ninja", path=str(beside)) or "ninja"

    def refresh(self) -> None:
        """Copies what differs, so that what does not is not compiled again."""
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        names = {name for name in listed if name and (ROOT / name).is_file()}
        for name in names:
            source, copy = ROOT / name, self.tree / name
            if not copy.exists() or copy.read_bytes() != source.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)  # with the time of now
        for stale in set(self.tree.rglob("*.py")) - {self.tree / name for name in names}:
            stale.unlink()
        self.preloaded = Preloaded(self.tree)

    def build(self, mutant: Mutant, jobs: int) -> str:
        """Builds the libraries that the mutant's tests load, as far as they have changed: what the compiler says.

        Where no operator is concerned, they are the ones that the tree itself was built with.
        """
        built = [*ROOT.glob("fgvc_ext/_C*.so"), *ROOT.glob("fgvc_ext/lib/*.so")]
        if built and not mutant.file.startswith(BUILT):
            for path in built:
                copy = self.tree / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            return ""
        if not self.configured:
            options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={self.ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
            options += ["-DFGVC_EXT_EMULATION=ON", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON"]  # what is installed is tested
            options += ["-DFGVC_EXT_OPTIMIZE=-O1"]  # compiles in half the time, and computes the same
            command = [self.cmake, "-S", str(self.tree), "-B", str(self.build_folder), *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            self.configured = True
        targets = ["_C", *(["fgvc_ext_emulated"] if needs_emulation(mutant) else [])]
        command = [self.cmake, "--build", str(self.build_folder), "--parallel", str(jobs), "--target", *targets]
        done = subprocess.run(command, capture_output=True, text=True)
        library = self.tree / "fgvc_ext" / "lib"
        library.mkdir(exist_ok=True)
        for path in self.build_folder.rglob("*.so"):
            shutil.copyfile(path, (library.parent if path.name.startswith("_C") else library) / path.name)
        return done.stdout[-3000:] if done.returncode else ""

    def test(self, selection: Iterable[str], limit: float) -> tuple[str, str]:
        """caught or timed out, and by which test; or survived, and how many tests passed."""
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        status, output = self.preloaded.run([*selection, *options], limit)
        if status is None:
            return "timed out", f"after {limit:.0f} s"
        if status == 0:
            passed = re.search(r"(\d+) passed", output)
            return "survived", passed[1] if passed else "0"
        noticed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return "caught", noticed[1] if noticed else f"exit code {status}: {output[-200:].strip()}"

    def unchanged(self, mutant: Mutant, jobs: int) -> tuple[float, str] | None:
        """How long the mutant's tests take without it, and how many pass; None if not all do. Remembered."""
        sources = [path for folder in ("csrc", "fgvc_ext") for path in sorted((self.tree / folder).rglob("*"))]
        texts = [path.read_text() for path in sources if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")]
        key = digest([*mutant.selection, *texts, *(path.read_text() for path in files_of(mutant.selection, self.tree))])
        known = dict(line.split(",", 1) for line in self.passed.read_text().split()) if self.passed.exists() else {}
        if key in self.failing:
            return None
        if key not in known:
            errors, started = self.build(mutant, jobs), time.monotonic()
            result, by = ("caught", errors) if errors else self.test(mutant.selection, 1800)
            # Where all are skipped, because a library is missing, every mutant would survive.
            if result != "survived" or by == "0":
                why = "all are skipped" if by == "0" else by
                print(f"{mutant.file}: its tests do not pass as it is: {why}", flush=True)
                self.failing.add(key)
                return None
            known[key] = f"{time.monotonic() - started:.0f},{by}"
            self.passed.write_text("".join(f"{one},{rest}\n" for one, rest in known.items()))
        seconds, passed = known[key].split(",")
        return float(seconds), passed

    def run(self, mutant: Mutant, key: str, jobs: int) -> Result:
        usual, path = self.unchanged(mutant, jobs), self.tree / mutant.file
        if usual is None:
            return Result(mutant.id, BEFORE, "", 0, "")
        original, started = path.read_text(), time.monotonic()
        path.write_text(mutant.applied(original))
        try:
            errors = self.build(mutant, jobs)
            limit = 60 + 10 * usual[0]  # no machine is that busy: a hang
            result, by = ("did not compile", errors[-200:]) if errors else self.test(mutant.selection, limit)
        finally:
            path.write_text(original)
        if result == "survived":  # a library that does not load makes tests skip, which is not to notice
            by = "" if by == usual[1] else f"only {by} of {usual[1]} tests ran"
        return Result(mutant.id, result, by, round(time.monotonic() - started), key)


def run_all(pending: list[Mutant], keys: dict[str, str], results: Results, workers: int) -> list[Mutant]:
    """Runs them, the mutants of a file one after the other; returns those that could not be run."""
    workshops: Queue[Workshop] = Queue()
    for number in range(workers):
        workshops.put(Workshop(WORK / str(number)))
        workshops.queue[number].refresh()
    failed: list[Mutant] = []

    def run_file(group: list[Mutant]) -> None:
        workshop = workshops.get()
        for mutant in group:
            result = workshop.run(mutant, keys[mutant.id], max(1, (os.cpu_count() or 1) // workers))
            print(f"{result.result:16}{result.seconds:5} s  {mutant.id}  {result.by}", flush=True)
            failed.append(mutant) if result.result == BEFORE else results.add(result)
        workshops.put(workshop)

    groups = [list(group) for _, group in groupby(sorted(pending, key=lambda one: one.file), lambda one: one.file)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run_file, groups))
    for workshop in workshops.queue:
        workshop.preloaded.close()
    return failed


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else works in the copies meanwhile, or writes the results."""
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"expected no other run of the mutants in {WORK}, which one is working in") from None
        yield


def choose(everything: list[Mutant], only: str, area: str) -> list[Mutant]:
    """Those whose id or file matches ``only``, of the lists whose names begin with ``area``."""
    matches = re.compile(only, re.MULTILINE).search
    return [one for one in everything if matches(f"{one.id}\n{one.file}") and one.area.startswith(area)]


def report(chosen: list[Mutant], results: Results, failed: list[Mutant]) -> bool:
    """Prints the summary; whether enough were caught."""
    found = [(one, results.of[one.id]) for one in chosen if one.id in results.of and one not in failed]
    for area, group in groupby(sorted(found, key=lambda pair: pair[0].area), lambda pair: pair[0].area):
        outcomes = [result.result for _, result in group]
        print(f"{area}: {sum(one in CAUGHT for one in outcomes)} of {len(outcomes)} caught")
    caught = sum(result.result in CAUGHT for _, result in found)
    print(f"{caught} of {len(found)} caught ({100 * caught / max(1, len(found)):.1f} %)")
    for mutant, result in found:
        if result.result not in CAUGHT:
            print(f"{result.result}: {mutant.id} ({mutant.file}): {mutant.survives or 'NOBODY HAS SAID WHY'}")
    for mutant in failed:
        print(f"could not be run: {mutant.id} ({mutant.file})")
    return caught >= WANTED * len(found) and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the id or the file must match")
    parser.add_argument("--area", default="", help="how the names of the lists begin")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once, each in a copy and build of its own")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with alone():
        return 0 if run(arguments) else 1


def run(arguments: argparse.Namespace) -> bool:
    everything = mutants()
    chosen = choose(everything, arguments.only, arguments.area)
    results = Results(arguments.results, {mutant.id for mutant in everything})
    # Now, because who goes on working in the tree while this runs must not get results of other sources.
    keys = {mutant.id: mutant.key for mutant in chosen}
    known = {id_: result.key for id_, result in results.of.items()}
    pending = [mutant for mutant in chosen if arguments.again or known.get(mutant.id) != keys[mutant.id]]
    print(f"{len(chosen)} mutants, {len(pending)} without a result", flush=True)
    return report(chosen, results, run_all(pending, keys, results, arguments.jobs))


if __name__ == "__main__":
    sys.exit(main())
