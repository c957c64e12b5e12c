"""Some rows of a split in the place of all: drawn at random, with the longest, which decide what a step needs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from halfbyte.errors import UserError

ROWS, LONGEST = 2000, 32


@dataclass(frozen=True)
class Sample:
    """Which rows to take: ``rows`` at random and the ``longest`` by bytes, or ``only`` those of these places.

    Raises :class:`UserError` for a place that does not exist.
    """

    rows: int = ROWS
    longest: int = LONGEST
    only: Sequence[int] | None = None

    def places(self, dataset: Dataset, seed: int = 0) -> np.ndarray | None:
        """Return the places in ``dataset`` of the rows that are taken, from 0 and in its order; None: all of them."""
        if self.only is not None:
            if beyond := [place for place in self.only if not 0 <= place < len(dataset)]:
                raise UserError(f"no row {beyond[0] + 1}: the split has {len(dataset):,}", option="--row")
            return np.array(self.only)
        if len(dataset) <= self.rows + self.longest:
            return None
        longest = np.empty(0, dtype=np.int64)
        if self.longest:
            longest = np.argsort(row_bytes(dataset), kind="stable")[-self.longest :]
        others = np.setdiff1d(np.arange(len(dataset)), longest)
        drawn = np.random.default_rng(seed).choice(others, self.rows, replace=False)
        return np.sort(np.concatenate([drawn, longest]))


@contextmanager
def placed(places: np.ndarray | None) -> Iterator[None]:
    """Name the row of the whole split in an error about one of its sample, which has the rows of these ``places``."""
    try:
        yield
    except UserError as error:
        error.row = None if error.row is None else number(places, error.row)
        raise


def number(places: np.ndarray | None, row: int) -> int:
    """The number of ``row`` of a sample in the whole split; both count from 1."""
    return row if places is None else int(places[row - 1]) + 1


def first_numbers(places: np.ndarray | None, rows: Sequence[int]) -> str:
    """The numbers of the first few ``rows`` of a sample in the whole split, for a message."""
    return ", ".join(str(number(places, row)) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")


def row_bytes(dataset: Dataset) -> np.ndarray:
    """Return about how many bytes of text, or of numbers, each row of ``dataset`` has, ``[rows]``."""
    found = np.zeros(len(dataset), dtype=np.int64)
    done = 0
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        part = sum(_bytes(batch[name].combine_chunks()) for name in batch.column_names)
        found[done : done + len(batch)] = part
        done += len(batch)
    return found


def _bytes(values: pa.Array) -> np.ndarray:
    """The bytes of each value, those of nested ones added up."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return np.asarray(pc.fill_null(pc.binary_length(values), 0), dtype=np.int64)
    if pa.types.is_struct(kind):
        return sum((_bytes(each) for each in values.flatten()), start=np.zeros(len(values), dtype=np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = np.asarray(pc.fill_null(pc.list_value_length(values), 0), dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(_bytes(values.flatten()))])
        after = np.cumsum(lengths)
        return np.asarray(ends[after] - ends[after - lengths])
    return np.full(len(values), 8, dtype=np.int64)
