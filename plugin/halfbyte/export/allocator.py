"""Memory that is freed goes back to the system at once: work that touches a model once, tensor by tensor."""

import ctypes
import sys

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LEAST = 1 << 20


def return_freed_memory() -> None:
    """Have glibc map allocations from 1 MiB on by themselves, for this process.

    By itself it raises that limit to 32 MiB, and keeps what lies below anything still in use: merging a base of 2 GB
    held 1.3 GB in the end, of which 0.5 were in use. Nothing happens where the C library has no such option.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LEAST)
