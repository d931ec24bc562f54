"""Keep freed memory for the next step instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LIMIT = 2**30  # larger blocks still go straight to the system


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for giving memory back; False where there is no glibc or the user has set them.

    A training step frees and allocates the same hundreds of megabytes of activations again and again. glibc maps each
    large block anew, and the kernel fills every one of its pages with zeros: a share of the step's time. With raised
    thresholds the blocks are reused.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LIMIT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LIMIT))
