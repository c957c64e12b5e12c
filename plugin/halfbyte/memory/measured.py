"""What a rank really held: anonymous memory of the host, or what torch allocated on its GPUs."""

import ctypes
import sys
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

_STATUS, _MAPS, _CLEAR = (Path("/proc/self") / name for name in ("status", "maps", "clear_refs"))


@dataclass
class Peak:
    """The most memory of this process in bytes, beyond what it held when this was made: before a base is loaded.

    On CUDA that is what torch allocated, elsewhere anonymous memory (RssAnon; None where the system does not tell).
    Weights that the host reads off a file through its page cache are not among it: :func:`mapped_bytes`.
    """

    before: int = field(default_factory=lambda: _anonymous() or 0)

    def restart(self) -> None:
        """Leave what was held so far out of what :meth:`bytes` returns: loading holds more than a step, for a while.

        On a host what loading has freed goes back to the system, which glibc does not do by itself.
        """
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
            return
        if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            library.malloc_trim(0)
        with suppress(OSError):
            _CLEAR.write_text("5", encoding="ascii")  # VmHWM begins again

    def bytes(self) -> int | None:
        """Return the peak since :meth:`restart`, less what was held before."""
        if torch.cuda.is_available():
            return sum(torch.cuda.max_memory_allocated(each) for each in range(torch.cuda.device_count()))
        found = _status()
        try:
            # The peak counts what is mapped from files and shared too, of which there is no peak of its own.
            anonymous = found["VmHWM"] - found["RssFile"] - found["RssShmem"]
        except KeyError:
            return None
        return anonymous - self.before


def mapped_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters of ``model`` that are a file's, mapped into memory as they are."""
    try:
        lines = _MAPS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    spans = sorted(
        tuple(int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        for line in lines
        if line.endswith(".safetensors")
    )
    starts = [start for start, _ in spans]

    def is_mapped(parameter: nn.Parameter) -> bool:
        at = bisect_right(starts, parameter.data_ptr()) - 1
        return at >= 0 and parameter.data_ptr() < spans[at][1]

    return sum(each.nbytes for each in model.parameters() if each.device.type == "cpu" and is_mapped(each))


def _anonymous() -> int | None:
    return _status().get("RssAnon")


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status in bytes; empty where there is none."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in words}
