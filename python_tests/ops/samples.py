"""The specs under the names that test_emulation.py knows them by; it goes when that file reads them itself."""

from . import spec
from .generators import DTYPES, random
from .spec import Sample
from .spec import Spec as Operator

OPERATORS = sorted(spec.SPECS, key=lambda one: one.name != "global_k_max_pool")  # which it takes for the first one

__all__ = ["DTYPES", "OPERATORS", "Operator", "Sample", "random"]
