"""Batches of rows as arrow tables: what tokenizing reads of them, and the columns that it adds."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from trl.data_utils import common_prefix_length

from halfbyte.data.chat.rendering import template_options
from halfbyte.data.preparation.counting import IGNORED
from halfbyte.data.preparation.encoding import Ids

EDITION = 1  # counted up when other rows come out of the same ones, so that what is cached is made anew
LEFT_OUT = "prompt_tokens_left_out"  # a column for the caller to read and remove


def row_options(batch: Any) -> list[dict[str, Any]]:
    """What each row passes to its chat template."""
    names = [name for name in ("tools", "chat_template_kwargs") if name in batch.pa_table.column_names]
    if not names:
        return [{"tools": None}] * len(batch.pa_table)
    rows: list[Mapping[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in zip(*(batch[name] for name in names), strict=True)
    ]
    return [template_options(row) for row in rows]


def joined(prompts: Sequence[Any], completions: Sequence[Any]) -> list[Any]:
    """Each prompt with its completion behind it: texts, or lists of messages."""
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


def alike(prompt: Ids, whole: Ids) -> int:
    """How many tokens of the prompt the whole begins with."""
    return len(prompt) if whole[: len(prompt)] == prompt else int(common_prefix_length(prompt, whole))


def ended(table: pa.Table, column: str, eos: str) -> pa.Table:
    """The table with the end token behind each text of a column that does not end with it."""
    texts = [text if text.endswith(eos) else text + eos for text in table[column].to_pylist()]
    at = table.column_names.index(column)
    return table.set_column(at, column, pa.array(texts, table.schema.field(at).type))


def labelled(ids: list[Ids], *masks: list[list[int]] | None) -> pa.Array:
    """The ids where every mask has a one, and the ignored label elsewhere."""
    labels = _flat(ids, "int64")
    for mask in masks:
        if mask is not None:
            labels[_flat(mask, "int64") == 0] = IGNORED
    return pa.ListArray.from_arrays(_offsets(ids), pa.array(labels))


def lists(rows: list[list[int]], dtype: str) -> pa.Array:
    """A list column."""
    return pa.ListArray.from_arrays(_offsets(rows), pa.array(_flat(rows, dtype)))


def _flat(rows: list[list[int]], dtype: str) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)


def _offsets(rows: list[list[int]]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, rows)]), pa.int32())


def appended(table: pa.Table, **columns: pa.Array) -> pa.Table:
    """The table with ``columns`` behind its own."""
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def list_of(dtype: str) -> Any:
    """The feature of a list column."""
    return datasets.List(datasets.Value(dtype))
