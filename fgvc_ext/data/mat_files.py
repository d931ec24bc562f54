"""Reading the MATLAB files in which some benchmarks keep their lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import DatasetError


def read_mat(file: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """The variables `names` of a MATLAB file, as lists: numbers and texts of cells, dictionaries of structures.

    Raises:
        DatasetError: no such file, not a MATLAB file, or a variable that it lacks.
        ValueError: scipy, which reads such files, is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{file}: MATLAB's files need scipy, which is not installed: pip install scipy") from None
    try:
        found = loadmat(file, squeeze_me=True, variable_names=list(names))
    except OSError as error:
        raise DatasetError.at(file, None, error.strerror or str(error)) from error
    except Exception as error:  # scipy raises many types for a file that is not what it should be
        raise DatasetError.at(file, None, f"cannot be read as a MATLAB file: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise DatasetError.at(file, None, f"expected the variables {', '.join(names)}, {missing[0]} is missing")
    return {name: _listed(found[name]) for name in names}


def _listed(values: Any) -> list[Any]:
    rows = np.atleast_1d(values)
    if rows.dtype.names is None:
        return list(rows.tolist())
    return [dict(zip(rows.dtype.names, row, strict=True)) for row in rows.tolist()]


def require_fields(file: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise DatasetError where structures lack one of these fields, which are told by name, never by place."""
    found = list(rows[0]) if rows else []
    if missing := [name for name in names if name not in found]:
        raise DatasetError.at(
            file, None, f"expected the fields {', '.join(names)}; {missing[0]} is missing, found {', '.join(found)}"
        )


def label_of(file: Path, entry: int, number: Any, classes: int) -> int:
    """The label of a class number, which counts from 1. Raises DatasetError for one that there is not."""
    if not isinstance(number, (int, float)) or number != int(number) or not 1 <= number <= classes:
        raise DatasetError.at(file, None, f"entry {entry}: expected a class from 1 to {classes}, got {number!r}")
    return int(number) - 1
