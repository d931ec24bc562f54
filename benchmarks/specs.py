"""The operators' benchmarks. They stand with their tests, as data: a file per operator in python_tests/ops/specs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # of the source folder, which is no package that gets installed

from python_tests.ops.comparison import leaves, results, with_leaves
from python_tests.ops.spec import SPECS, Benchmark, Case, Sample, Spec, Target

OPERATORS: dict[str, Spec] = {spec.name: spec for spec in SPECS if spec.benchmark is not None}

__all__ = ["OPERATORS", "Benchmark", "Case", "Sample", "Spec", "Target", "leaves", "results", "with_leaves"]
