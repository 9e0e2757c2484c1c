"""Keep freed memory for the next step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed blocks of up to 32 MiB to the system; true if it listens. Linux only, else a no-op.

    A training step on the CPU frees and takes the same megabytes again and again. By default glibc maps each block anew, and
    the kernel zeroes and faults in every page of it: a third of a small model's step. The price is that memory once used
    stays with the process.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
