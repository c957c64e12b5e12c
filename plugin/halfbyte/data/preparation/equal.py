"""Pairs whose sides train the same tokens: such a row trains nothing, and many of them are an error in the data."""

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np

from halfbyte.data.formats import DataFormat
from halfbyte.data.preparation.counting import Prepared
from halfbyte.data.rows import numbered
from halfbyte.data.sample import first_numbers
from halfbyte.errors import UserError

MOST = 0.01  # the share of rows with equal sides that is taken for an accident
SEEN = 1000  # rows of a stream before that share means anything
NUMBER = "row number"  # the column that numbers the rows of a split while they are prepared, from 1


def refuse_identical(dataset: Any, split: str, format: DataFormat, places: np.ndarray | None = None) -> None:
    """Raise UserError where more than 1% of the rows have identical sides, as it can be seen before tokenization.

    ``places`` are those of the rows of a sample.
    """
    if compared := format.compares(dataset.column_names):
        rows = numbered(dataset, list(compared), doing=f"comparing {split}")
        same = [number for number, row in rows if format.equal(row)]
        _refuse(split, same, len(dataset), None, places)


def with_numbers(dataset: Any, places: np.ndarray | None = None) -> Any:
    """The same rows of a Dataset or IterableDataset, numbered in a column of their own; of a sample by ``places``."""
    if not isinstance(dataset, datasets.IterableDataset):
        return dataset.add_column(NUMBER, np.arange(1, len(dataset) + 1) if places is None else places + 1)
    features = dataset.features
    if features is not None:
        features = datasets.Features({**features, NUMBER: datasets.Value("int64")})
    return dataset.map(_number, with_indices=True, features=features)


def dropped(dataset: Any, split: str, found: Prepared | None, args: Any, rows: int) -> tuple[Any, list[int]]:
    """Return a prepared Dataset without rows whose sides are equal, and the numbers of those.

    Raises UserError when they are more than 1% of ``rows``, the rows of the split before any was dropped.
    """
    numbered_here = NUMBER in dataset.column_names
    places = [] if found is None or found.equal is None else found.equal(dataset, args)
    if places:
        numbers = dataset.select(places)[NUMBER][:] if numbered_here else [place + 1 for place in places]
        _refuse(split, numbers, rows, args.max_length)
        dataset = dataset.select(np.delete(np.arange(len(dataset)), places))
    else:
        numbers = []
    return (dataset.remove_columns(NUMBER) if numbered_here else dataset), numbers


def dropped_arriving(stream: Any, split: str, found: Prepared | None, args: Any) -> Any:
    """Return a prepared IterableDataset that drops rows whose sides are equal until they are more than 1%."""
    if found is not None and found.differ is not None:
        stream = stream.filter(_keeper(split, found.differ, args), with_indices=True)
    return stream.remove_columns([NUMBER]) if NUMBER in next(iter(stream), {}) else stream


def _keeper(
    split: str, differ: Callable[[Mapping[str, Any], Any], bool], args: Any
) -> Callable[[Mapping[str, Any], int], bool]:
    equal: list[int] = []

    def keep(row: Mapping[str, Any], index: int) -> bool:
        if index == 0:  # the next epoch
            equal.clear()
        different = differ(row, args)
        if not different:
            equal.append(row.get(NUMBER, index + 1))
        if index + 1 == SEEN or (not different and index >= SEEN):
            _refuse(split, equal, index + 1, args.max_length)
        return different

    return keep


def _number(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, NUMBER: index + 1}


def _refuse(
    split: str, equal: list[int], rows: int, max_length: int | None, places: np.ndarray | None = None
) -> None:
    if len(equal) > MOST * rows:
        first = first_numbers(places, equal)
        cut = "" if max_length is None else f" as trained, with max_length {max_length},"
        raise UserError(
            f"chosen and rejected are equal{cut} in {len(equal):,} of {rows:,} rows (row {first})\n"
            f"  up to {MOST:.0%} are dropped; more is an error in the data",
            split=split,
        )
