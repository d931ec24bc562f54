"""Operators, modules and training drivers for fine-grained visual classification."""

from . import nn, ops
from ._library import info, use_reference
from ._version import __version__

__all__ = ["__version__", "info", "nn", "ops", "use_reference"]
