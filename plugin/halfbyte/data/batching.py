"""Micro-batches: how many rows make, and those of a budget of tokens, decided once for a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.errors import UserError


def micro_batches(rows: int, size: int, ranks: int, *, drop_last: bool) -> int:
    """Return the micro-batches of ``size`` rows that one of ``ranks`` has in an epoch of ``rows``.

    Raises :class:`UserError` where ``drop_last`` leaves none.
    """
    if not drop_last:
        return math.ceil(math.ceil(rows / size) / ranks)
    found = rows // size // ranks
    if not found:
        raise UserError(
            f"the {rows:,} rows do not fill a batch of {size} on each of {ranks} ranks, and all would be dropped; "
            "take it out, or write a smaller per_device_train_batch_size",
            option="dataloader_drop_last",
        )
    return found


@dataclass(frozen=True)
class Batching(Sequence[list[int]]):
    """The micro-batches of an epoch, each the rows of one, in an order that epochs change and compositions do not.

    Batch n is ``order[ends[n - 1] : ends[n]]``. ``tokens`` is the budget; ``longer`` rows exceed it and are alone. What
    meets once meets in every epoch, so that all epochs have as many steps.
    """

    tokens: int
    order: np.ndarray
    ends: np.ndarray
    longer: int = 0

    @classmethod
    def fill(
        cls,
        sizes: np.ndarray,
        *,
        rows: int,
        tokens: int,
        padded: bool,
        ranks: int = 1,
        seed: int | None = None,
    ) -> "Batching":
        """Close a micro-batch where another row would exceed ``rows`` or ``tokens``.

        ``sizes`` int64 ``[rows of the set]`` are what a row adds; a ``padded`` batch counts its widest row for each.
        With ``seed`` the rows are shuffled first. The widest are halved until the ``ranks`` have equally many, as far
        as there are any of two rows.
        """
        order = np.arange(len(sizes)) if seed is None else np.random.default_rng(seed).permutation(len(sizes))
        ends: list[int] = []
        count = total = widest = 0
        for place, size in enumerate(sizes[order].tolist()):
            widest_now = max(widest, size)
            total_now = (count + 1) * widest_now if padded else total + size
            if count and (count == rows or total_now > tokens):
                ends.append(place)
                count, widest_now, total_now = 0, size, size
            count, widest, total = count + 1, widest_now, total_now
        ends.append(len(sizes))
        while len(ends) % ranks:
            counts = np.diff(ends, prepend=0)
            most = int(counts.argmax())
            if counts[most] < 2:
                break
            ends.insert(most, ends[most] - int(counts[most]) // 2)
        return cls(tokens, order, np.array(ends), int((sizes > tokens).sum()))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        start = self.ends[number - 1] if number else 0
        return self.order[start : self.ends[number]].tolist()

    def lines(self) -> list[str]:
        """What the batches are, and a warning where rows exceed the budget."""
        mean = len(self.order) / len(self)
        found = [
            f"batches: {len(self):,} an epoch, of at most {self.tokens:,} tokens and {mean:.1f} rows on average"
        ]
        if self.longer:
            found.append(
                f"  rows longer than max_tokens_per_batch: {self.longer:,}, each alone in its batch, which is larger"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the batching in JSON's types."""
        return {
            "max_tokens_per_batch": self.tokens,
            "micro_batches": len(self),
            "rows": len(self.order),
            "longer_rows": self.longer,
        }
