"""How many tokens each prepared row brings to a forward: what a step must have memory for, and what a batch counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from halfbyte.data.preparation.counting import (
    COMPLETIONS,
    PAIRS,
    SCORED_PAIRS,
    list_batches,
    list_lengths,
    list_values,
)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row after truncation, int64 ``[rows]``: of each of its ``sides``, and of their ``common`` prefix.

    ``unread`` are those of the prefix that come before what predicts an answer: no loss reads what is computed of them.
    A row of SFT has one side, and one of KTO: what it estimates its KL term on is another forward. The width of a
    padded batch is a multiple of ``multiple``.
    """

    sides: tuple[np.ndarray, ...]
    common: np.ndarray
    unread: np.ndarray
    multiple: int = 1

    @classmethod
    def of(cls, dataset: Any, args: Any) -> "Lengths | None":
        """Measure ``dataset`` as a trainer with ``args`` cuts its rows; None where its columns do not say."""
        if not isinstance(dataset, Dataset) or not len(dataset):
            return None
        names = set(dataset.column_names)
        found: tuple[tuple[str, ...], Callable[..., Any]] | None = next(
            ((wanted, measure) for wanted, measure in _MEASURES if names >= set(wanted)), None
        )
        if found is None or "seq_lengths" in names:
            return None
        wanted, measure = found
        parts = [measure(*(batch[name] for name in wanted), args) for batch in list_batches(dataset, *wanted)]
        *sides, common, unread = (np.concatenate(each).astype(np.int64) for each in zip(*parts, strict=True))
        return cls(tuple(sides), common, unread, getattr(args, "pad_to_multiple_of", None) or 1)

    def sizes(self, *, padded: bool, shared: bool = False) -> np.ndarray:
        """Tokens that a row adds to a batch: as if it were the widest one of a ``padded`` batch.

        Of a pair on one row of tokens, what both sides begin with counts once where it is ``shared``.
        """
        if padded:
            widest = np.maximum.reduce(self.sides)
            return len(self.sides) * -(-widest // self.multiple) * self.multiple
        total: np.ndarray = np.sum(self.sides, axis=0)
        return total - self.common if shared else total


def most_tokens(sizes: np.ndarray, rows: int, *, padded: bool, budget: int | None = None) -> int:
    """Return the most tokens that ``rows`` of these ``sizes`` have in one batch, closed at ``budget`` tokens."""
    largest = np.partition(sizes, -rows)[-rows:] if len(sizes) > rows else sizes
    most = int(rows * largest.max() if padded else largest.sum())
    return most if budget is None else min(most, max(budget, int(largest.max())))


def common_prefixes(one: pa.ListArray, other: pa.ListArray) -> np.ndarray:
    """Return how many values each list of ``one`` begins with in common with that of ``other``, ``[rows]``."""
    own, others = list_lengths(one), list_lengths(other)
    shortest = np.minimum(own, others)
    row = np.repeat(np.arange(len(shortest)), shortest)
    place = np.arange(len(row)) - _starts(shortest)[row]
    differ = list_values(one)[_starts(own)[row] + place] != list_values(other)[_starts(others)[row] + place]
    found = shortest.copy()
    np.minimum.at(found, row[differ], place[differ])
    return found


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _of_sequences(ids: pa.ListArray, args: Any) -> tuple[np.ndarray, ...]:
    return _of_lengths(list_lengths(ids), args)


def _of_completions(prompt: pa.ListArray, completion: pa.ListArray, args: Any) -> Any:
    return _of_lengths(list_lengths(prompt) + list_lengths(completion), args)


def _of_lengths(whole: np.ndarray, args: Any) -> tuple[np.ndarray, ...]:
    return _cut(whole, args), np.zeros_like(whole), np.zeros_like(whole)


def _of_pairs(prompt: pa.ListArray, chosen: pa.ListArray, rejected: pa.ListArray, args: Any) -> Any:
    common = list_lengths(prompt) + common_prefixes(chosen, rejected)
    unread = np.maximum(list_lengths(prompt) - 1, 0)
    whole = [list_lengths(prompt) + list_lengths(side) for side in (chosen, rejected)]
    sides = [_cut(side, args) for side in whole]
    if args.max_length is not None and getattr(args, "truncation_mode", "keep_start") == "keep_end":
        # Sides that are cut at their start need not begin alike.
        cut = (whole[0] > args.max_length) | (whole[1] > args.max_length)
        return *sides, np.where(cut, 0, common), np.where(cut, 0, unread)
    return *sides, _cut(common, args), _cut(unread, args)


def _of_scored_pairs(chosen: pa.ListArray, rejected: pa.ListArray, args: Any) -> Any:
    none = np.zeros_like(list_lengths(chosen))
    return list_lengths(chosen), list_lengths(rejected), none, none


def _cut(whole: np.ndarray, args: Any) -> np.ndarray:
    most = getattr(args, "max_length", None)
    return whole if most is None else np.minimum(whole, most)


# By the columns of prepared rows, the first that are all there.
_MEASURES: tuple[tuple[tuple[str, ...], Callable[..., Any]], ...] = (
    (PAIRS.columns, _of_pairs),
    (SCORED_PAIRS.columns, _of_scored_pairs),
    (COMPLETIONS.columns, _of_completions),
    (("input_ids",), _of_sequences),
)
