"""Reference log-probabilities of scored tokens, in shards: how they are laid out, summed and stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save

# Pairs in a shard: what an interruption loses at most.
PAIRS = 256

Sides = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Side:
    """One side of n pairs: ``values``, float32 ``[tokens]``, of pair i from ``offsets[i]``, int64 ``[n + 1]``."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Side":
        """Lay out the log-probabilities of each pair, float32 ``[its tokens]``."""
        lengths = [len(row) for row in rows]
        return cls(np.concatenate(rows).astype(np.float32), np.cumsum([0, *lengths], dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def sums(self, shared: np.ndarray, ld_alpha: float | None) -> np.ndarray:
        """Sum each pair's tokens, float32 ``[n]``; those behind the first ``shared`` ``[n]`` weigh ``ld_alpha``."""
        pair = np.repeat(np.arange(len(self.lengths)), self.lengths)
        values = self.values.astype(np.float64)
        if ld_alpha is not None:
            place = np.arange(len(values)) - self.offsets[pair]
            values *= np.where(place < shared[pair], 1.0, ld_alpha)
        return np.bincount(pair, weights=values, minlength=len(self.lengths)).astype(np.float32)


@dataclass(frozen=True)
class Shard:
    """The pairs at ``rows`` of a dataset, int64 ``[n]``, with the log-probabilities of both sides."""

    rows: np.ndarray
    chosen: Side
    rejected: Side

    def sums(self, ld_alpha: float | None) -> Sides:
        """Sum what TRL's loss reads, float32 ``[n]`` a side; with ``ld_alpha`` as LD-DPO does (arXiv 2409.06411)."""
        shared = np.minimum(self.chosen.lengths, self.rejected.lengths)
        return self.chosen.sums(shared, ld_alpha), self.rejected.sums(shared, ld_alpha)

    def content(self) -> bytes:
        """Return the shard as a safetensors file."""
        return save(
            {
                "rows": self.rows,
                "chosen": self.chosen.values,
                "chosen_offsets": self.chosen.offsets,
                "rejected": self.rejected.values,
                "rejected_offsets": self.rejected.offsets,
            }
        )

    @classmethod
    def read(cls, content: bytes) -> "Shard":
        found = load(content)
        sides = (Side(found[name], found[f"{name}_offsets"]) for name in ("chosen", "rejected"))
        return cls(found["rows"], *sides)


def split(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each shard, the longest first: batches of one length, and the largest is the first."""
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + PAIRS] for start in range(0, len(order), PAIRS)]


def name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"{number:05d}.safetensors"
