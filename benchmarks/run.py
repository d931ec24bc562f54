"""Measures the operators against PyTorch and against their targets: ``python benchmarks/run.py --help``."""

import argparse
import datetime
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import OPERATORS, OURS, Measured, contenders, headline, sweep, use_instruction_set
from results import CsvFile, Result, document, replace_sections, sections, summary
from timing import keep_freed_memory, measure

from fgvc_ext import _library

MANY_FAULTS = 100  # a tenth of a millisecond, or less
LARGEST = {"cpu": 2**28, "cuda": 2**32}  # bytes of an input in the sweep


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times the operators; prints targets met and missed, writes a CSV file."
    )
    parser.add_argument("--op", choices=OPERATORS, action="append", help="only this operator (repeatable)")
    parser.add_argument("--quick", action="store_true", help="few rounds and no CSV file: a look, not a result")
    parser.add_argument("--sweep", action="store_true", help="also all shapes of the sweep (about half an hour)")
    parser.add_argument("--isa", help="e.g. avx512,avx2: the first is held to the targets (default: the two widest)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/<device>-<date>.csv)")
    parser.add_argument("--markdown", type=Path, help="also put the operators' tables into this page")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a target is missed")
    return parser.parse_args(words)


def chosen_instruction_sets(args: argparse.Namespace) -> list[str]:
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no GPU")
        return []
    if _library._module is None:
        raise SystemExit(f"the compiled libraries are missing: {_library.info()['cpu library']}")
    supported = _library._module.supported_instruction_sets()
    names = args.isa.split(",") if args.isa else supported[:2]
    unknown = sorted(set(names) - set(supported))
    if unknown:
        raise SystemExit(f"--isa: expected some of {', '.join(supported)}, got {', '.join(unknown)}")
    return names


def chosen_cases(args: argparse.Namespace) -> list[Measured]:
    cases = []
    for name in args.op or OPERATORS:
        cases += headline(OPERATORS[name], args.device)
        if args.sweep:
            cases += [one for one in sweep(OPERATORS[name]) if _bytes(one) <= LARGEST[args.device]]
    return cases


def _bytes(measured: Measured) -> int:
    return math.prod(measured.case.shape) * measured.case.dtype.itemsize


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 1 where ``--strict`` was asked for and a target is missed."""
    args = arguments(words)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # the sweep's shapes share a function; sizes of 1 get code of their own
    instruction_sets = chosen_instruction_sets(args)
    rounds, seconds = (10, 0.5) if args.quick else (20, 2.0)

    path = args.out or Path(__file__).parent / "results" / f"{args.device}-{datetime.date.today()}.csv"
    file = CsvFile(path, args.device) if args.out or not args.quick else None

    results = []
    for case in chosen_cases(args):
        torch.manual_seed(0)
        every = contenders(case, args.device, instruction_sets)
        result = Result(case, measure(every, args.device, rounds=rounds, seconds=seconds))
        results.append(result)
        if file:
            file.append(result)  # at once: a run that is cut short leaves what it has measured
        missed = ", ".join(f"{one.what} {one.measured} ({one.wanted})" for one in result.verdicts if not one.passed)
        print(f"{case.op} {case}: {missed or 'pass'}", file=sys.stderr, flush=True)
        for name, faults in result.times.faults.items():
            if faults > MANY_FAULTS:
                print(f"  {name} pays {faults:.0f} page faults per call: its time is that of memory", file=sys.stderr)
        if result.times.interruptions[OURS] >= 1:
            print("  other processes took the cores: repeat this on a quiet machine", file=sys.stderr)
    if instruction_sets:
        use_instruction_set(instruction_sets[0])

    found = sections(results, args.device)
    print(document(found))
    print(summary(results))
    if args.markdown:
        replace_sections(args.markdown, found)
    if file:
        print(f"written: {path}")
    return int(args.strict and not all(verdict.passed for result in results for verdict in result.verdicts))


if __name__ == "__main__":
    sys.exit(main())
