"""The largest micro-batch that prepared rows can make: what a step must have memory for."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")


def most_tokens(dataset: Any, batch_size: int, args: Any, *, padded: bool, shared: bool) -> int | None:
    """Return the most tokens of ``batch_size`` rows of ``dataset``; None if its rows do not say.

    ``args`` are the trainer's: rows are cut to ``max_length``. ``padded`` batches are as wide as their longest row;
    the sides of a pair hold their prompt once where it is ``shared``.
    """
    if not isinstance(dataset, Dataset) or not len(dataset):
        return None
    columns = set(dataset.column_names)
    if columns >= set(_PAIR):
        prompt, chosen, rejected = (_lengths(dataset, name) for name in _PAIR)
        sides = _cut(prompt + chosen, args), _cut(prompt + rejected, args)
        if padded:
            return int(2 * batch_size * np.maximum(*sides).max())
        # Sides that are cut at their start need not begin alike.
        once = shared and (args.max_length is None or args.truncation_mode == "keep_start")
        sizes = sides[0] + sides[1] - (_cut(prompt, args) if once else 0)
    elif "input_ids" in columns and "seq_lengths" not in columns:
        sizes = _cut(_lengths(dataset, "input_ids"), args)
        if padded:
            return int(batch_size * sizes.max())
    else:
        return None
    largest = np.partition(sizes, -batch_size)[-batch_size:] if len(sizes) > batch_size else sizes
    return int(largest.sum())


def _lengths(dataset: Dataset, name: str) -> np.ndarray:
    """The lengths of a column's lists, in the order of the table and not of an index of it: for sums and maxima."""
    lengths = pc.list_value_length(dataset.data.column(name))
    found: np.ndarray = lengths.fill_null(0).to_numpy().astype(np.int64)
    return found


def _cut(lengths: np.ndarray, args: Any) -> np.ndarray:
    most = getattr(args, "max_length", None)
    return lengths if most is None else np.minimum(lengths, most)
