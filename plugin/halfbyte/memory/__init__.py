"""The one memory model: what a run keeps, what `plan` predicts, and what a rank really held."""

from halfbyte.memory.available import SHARE, check_budget, free_bytes
from halfbyte.memory.level import choose
from halfbyte.memory.measured import Peak, mapped_bytes
from halfbyte.memory.model import Memory, Place, Workload, is_planned, predict
from halfbyte.memory.resident import weights

__all__ = [
    "SHARE",
    "Memory",
    "Peak",
    "Place",
    "Workload",
    "check_budget",
    "choose",
    "free_bytes",
    "is_planned",
    "mapped_bytes",
    "predict",
    "weights",
]
