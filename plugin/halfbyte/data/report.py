"""The rows of a run, reported: how many, their tokens, what was dropped and what was truncated."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halfbyte.data.formats import DataFormat
from halfbyte.terminal.wording import plural


@dataclass
class SplitReport:
    """The counts of one split; None for what a stream, or a trainer that prepares its own rows, does not report.

    ``rows`` and ``sha`` describe the split as read, before anything is dropped; ``tokens`` are those of one
    epoch, after truncation; ``truncated`` counts rows that lost tokens to ``max_length`` and still train.
    ``lost_rows`` have no label left after truncation; ``long_rows`` exceed ``max_length`` where nothing is truncated.
    ``whole`` are the rows of a split of which only a sample was read, those of ``places``, from 0.
    """

    streaming: bool = False
    rows: int | None = None
    sha: str | None = None
    tokens: int | None = None
    truncated: int | None = None
    packed: int | None = None
    max_length: int | None = None
    equal_rows: list[int] = field(default_factory=list)
    lost_rows: int = 0
    long_rows: int = 0
    whole: int | None = None
    places: np.ndarray | None = field(default=None, repr=False)
    counted: bool = False
    # the rows.RowCheck that the rows passed, to find one that fails later
    check: Any = field(default=None, repr=False)

    @property
    def dropped(self) -> int | None:
        """Rows that are read and not trained on."""
        return None if self.streaming else len(self.equal_rows) + self.lost_rows + self.long_rows

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "sha": self.sha,
            "dropped": self.dropped,
            "dropped_equal_pairs": None if self.streaming else len(self.equal_rows),
            "dropped_no_label": None if self.streaming else self.lost_rows,
            "dropped_too_long": None if self.streaming else self.long_rows,
            "truncated": self.truncated,
            "packed": self.packed,
        }

    def line(self, name: str) -> str:
        if self.streaming:
            return f"{name}: rows, tokens, dropped and truncated unknown (streaming)"
        head = f"{name}: {plural(self.rows or 0, 'row')}"
        if self.tokens is not None:
            head += f", {_short(self.tokens)} tokens"
        parts = [head]
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated at max_length {self.max_length}")
        if self.lost_rows:
            parts.append(f"{self.lost_rows:,} dropped (no label left)")
        if self.long_rows:
            parts.append(f"{self.long_rows:,} dropped (longer than max_length {self.max_length})")
        if self.equal_rows:
            first = ", ".join(map(str, self.equal_rows[:5])) + (", ..." if len(self.equal_rows) > 5 else "")
            parts.append(f"{len(self.equal_rows):,} dropped (equal sides: row {first})")
        if self.packed is not None:
            parts.append(f"packed into {plural(self.packed, 'sequence')}")
        return "; ".join(parts)


@dataclass
class DataReport:
    """The reports of both splits, the format that their rows were read as, and notes on the data."""

    train: SplitReport = field(default_factory=SplitReport)
    eval: SplitReport | None = None
    notes: list[str] = field(default_factory=list)
    format: DataFormat | None = None

    def split(self, name: str) -> SplitReport | None:
        """The report of the split that TRL calls ``name``."""
        return {"train": self.train, "eval": self.eval}.get(name)

    def as_dict(self) -> dict[str, Any]:
        """The ``data`` entry of run.json: the train split's figures, and the other's under ``eval``."""
        return {**self.train.as_dict(), "eval": self.eval.as_dict() if self.eval else None}

    def lines(self) -> list[str]:
        """The lines to print: one for each split, one for each note."""
        eval_lines = [self.eval.line("eval")] if self.eval else []
        return [self.train.line("train"), *eval_lines, *self.notes]


def _short(count: int) -> str:
    for unit, suffix in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if count >= unit:
            return f"{count / (1000 if suffix == 'k' else unit):.1f}{suffix}"
    return f"{count:,}"
