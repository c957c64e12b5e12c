"""What Arrow shows of a batch of rows without decoding it, so that only rows in doubt are looked at one by one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Which rows of a batch, the first of them at this place, may be at fault [rows]; None where any may be.
Doubtful = Callable[[pa.Table, int], np.ndarray | None]


@dataclass(frozen=True)
class Turns:
    """The messages of a column of conversations: how many each row has, and what they hold under each key."""

    lengths: np.ndarray
    keys: Mapping[str, pa.Array]

    def rows(self, turns: np.ndarray) -> np.ndarray:
        """Which rows have one of the ``turns`` [messages] that are true."""
        counts = np.concatenate(([0], np.cumsum(turns)))
        ends = np.cumsum(self.lengths)
        return np.asarray(counts[ends] > counts[ends - self.lengths])


def column(table: pa.Table, name: str) -> pa.Array:
    """A column of a batch as one array."""
    found: Any = table[name].combine_chunks()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def turns(array: pa.Array) -> Turns | None:
    """The messages of a column; None where it is no list of mappings of fixed keys, or holds a null in place of one.

    A row that is null has none.
    """
    if not is_list(array.type) or not pa.types.is_struct(array.type.value_type):
        return None
    held = array.flatten()
    if held.null_count:
        return None
    keys = dict(zip((field.name for field in held.type), held.flatten(), strict=True))
    return Turns(array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), keys)


def is_list(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def nulls(array: pa.Array) -> np.ndarray:
    """Which values are null."""
    return mask(array.is_null())


def matches(array: pa.Array, pattern: str) -> np.ndarray:
    """Which strings hold what ``pattern``, in RE2's syntax, finds."""
    return mask(pc.match_substring_regex(array, pattern))


def mask(array: pa.Array) -> np.ndarray:
    """Truth values, nulls among them false."""
    return np.asarray(array.fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)
