"""The memory that this rank held: by phase of its run, and for training alone, beside what was predicted."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from halfbyte.memory import Peak, mapped_bytes
from halfbyte.tracking.record import RunRecord, peak_memory_bytes


class HeldMemory:
    """Which phase of a run held the most: ``phases`` has those that held more than all before them, in bytes.

    Loading is apart from the others: it holds more than a step, for a while.
    """

    def __init__(self, peak: Peak) -> None:
        self.phases: dict[str, int] = {}
        self._peak, self._highest, self._mapped = peak, 0, 0

    def loaded(self, model: nn.Module | None) -> None:
        """Take up the peak of loading ``model``, and begin again for its training."""
        self.over("load")
        self._highest = 0
        self._mapped = mapped_bytes(model) if model is not None else 0
        self._peak.restart()

    def over(self, phase: str) -> None:
        """Lay a rise of the process's peak since the last call to ``phase``."""
        if (peak := peak_memory_bytes()) > self._highest:
            self.phases[phase] = self._highest = peak

    def peak(self) -> int:
        """Return the most memory that the process held in any phase."""
        return max(peak_memory_bytes(), *self.phases.values(), 0)

    def of_training(self) -> int | None:
        """Return the peak since loading beyond what there was before it, in what the memory model counts."""
        found = self._peak.bytes()
        return None if found is None else found + self._mapped


def beside_predicted(record: RunRecord, measured: Sequence[int | None]) -> dict[str, Any]:
    """Return what each rank held for training, and by how much the largest differs from what ``record`` predicts."""
    predicted = record.get("memory", {}).get("predicted", {}).get("total")
    found = [each for each in measured if each is not None]
    if not predicted or len(found) < len(measured):
        return {}
    return {"measured": found, "difference": max(found) / predicted - 1}
