"""Every row checked once: what it holds, whether the template renders it, whether its sides differ."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from halfbyte.data import glance
from halfbyte.data.chat.rendering import refusal
from halfbyte.data.conversion.turns import TURN_WEIGHTS
from halfbyte.data.formats import TOKEN_COLUMNS, Layout
from halfbyte.data.kinds import ROLES, boolean, describe, messages, text, text_or_messages
from halfbyte.errors import UserError
from halfbyte.terminal.passes import Pass

BATCH = 1000  # rows decoded at a time
RENDERED = 2000  # rows rendered up front; a later one is found when its tokenization fails


def numbered(
    dataset: Any,
    columns: list[str] | None = None,
    *,
    doing: str = "reading rows",
    doubtful: glance.Doubtful | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a Dataset with their numbers, counted from 1; ``doing`` names the pass where it is shown.

    With ``doubtful`` only the rows that it does not clear are decoded and yielded.
    """
    if columns is not None:
        dataset = dataset.select_columns(columns)
    tables = dataset.with_format("arrow")
    with Pass(doing, len(dataset)) as progress:
        for begin in range(0, len(dataset), BATCH):
            end = min(begin + BATCH, len(dataset))
            places, held = np.arange(begin, end), None
            doubts = None if doubtful is None else doubtful(tables[begin:end], begin)
            if doubts is None or doubts.all():
                held = dataset[begin:end]
            elif doubts.any():
                held = dataset[places := places[doubts]]
            if held is not None:
                for number, *values in zip((places + 1).tolist(), *held.values(), strict=True):
                    yield number, dict(zip(held, values, strict=True))
            progress.advance(end - begin)


def digest(dataset: Any, split: str = "rows") -> str:
    """Return the sha256 of a Dataset's rows, all columns, whatever file and chunks they came in."""
    sha = hashlib.sha256()

    class Sink:
        closed = False

        def write(self, data: Any) -> int:
            sha.update(data)
            return len(data)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

        def writable(self) -> bool:
            return True

    writer = None
    with Pass(f"hashing {split}", len(dataset)) as progress:
        for table in dataset.with_format("arrow").iter(batch_size=BATCH):
            plain = table.combine_chunks().replace_schema_metadata(None)
            writer = writer or pa.ipc.new_stream(Sink(), plain.schema)
            writer.write_table(plain)
            progress.advance(len(plain))
    if writer is not None:
        writer.close()
    return sha.hexdigest()


@dataclass(frozen=True)
class RowCheck:
    """All checks of one row. ``template`` and ``tokenizer`` matter to conversations only."""

    split: str
    layout: Layout
    tokenizer: Any
    roles: frozenset[str] = ROLES
    template: str | None = None
    conversational: bool = False
    assistant_only: bool = False

    def __call__(self, number: int, row: Mapping[str, Any], *, render: bool) -> None:
        """Raise UserError for a row that cannot be trained on, with its number."""
        wrong = self.layout.problem(row, self.roles)
        if wrong is None and self.layout.conversational(row) is not self.conversational:
            here, first = (
                ("a conversation", "a string") if not self.conversational else ("a string", "a conversation")
            )
            wrong = f"{here}, but row 1 is {first}; all rows must be alike"
        option = None
        if wrong is None and self.layout.token_ids is not None:
            wrong = self._unlike_tokens(row, self.layout.token_ids)
        if wrong is None and self.assistant_only and not self.layout.answered(row):
            wrong, option = "no message of the assistant's", "assistant_only_loss"
        if wrong is None and render and self.conversational:
            reason = refusal(row, self.layout, self.tokenizer, self.template)
            wrong = reason and f"the chat template cannot render it: {reason}"
        if wrong is not None:
            raise UserError(
                f"{wrong}\n  (rows count from 1; read as {self.layout})",
                option=option,
                split=self.split,
                row=number,
            )

    def _unlike_tokens(self, row: Mapping[str, Any], name: str) -> str | None:
        ids = row[name]
        if not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
            return f"column {name!r}: ids from {min(ids)} to {max(ids)}, vocabulary of {len(self.tokenizer)}"
        for column in TOKEN_COLUMNS:
            held = row.get(column, ids)
            if not isinstance(held, list) or len(held) != len(ids):
                return f"column {column!r}: expected a list of {len(ids)}, found {describe(held)}"
        return None

    def all(self, dataset: Any) -> None:
        """Check every row of a Dataset, rendering the first ``RENDERED``."""
        doing = f"checking {self.split}"
        columns = _read_columns(dataset, self.layout)
        for number, row in numbered(dataset, columns, doing=doing, doubtful=self.doubtful):
            self(number, row, render=number <= RENDERED)

    def doubtful(self, table: pa.Table, begin: int) -> np.ndarray | None:
        """Which rows of a batch may be refused, as far as Arrow shows it; see :mod:`halfbyte.data.glance`."""
        layout = self.layout
        if layout.token_ids is not None or layout.begin_alike or (self.conversational and begin < RENDERED):
            return None
        if "prompt" in layout.columns and self.conversational:
            return None  # what stands in two columns is compared row by row
        found, answered = np.zeros(len(table), bool), np.zeros(len(table), bool)
        for name, kind in layout.columns.items():
            array = glance.column(table, name)
            if (kind is boolean and pa.types.is_boolean(array.type)) or (
                kind in (text, text_or_messages) and glance.is_text(array.type) and not self.conversational
            ):
                found |= glance.nulls(array)
                continue
            talks = kind in (messages, text_or_messages) and self.conversational
            if not talks or (turns := glance.turns(array)) is None:
                return None
            if (wrong := self._unlike_messages(turns.keys)) is None:
                return None
            found |= turns.rows(wrong) | (turns.lengths == 0)
            answered |= turns.rows(glance.mask(pc.equal(turns.keys["role"], "assistant")))
        return found | ~answered if self.assistant_only else found

    def _unlike_messages(self, keys: Mapping[str, pa.Array]) -> np.ndarray | None:
        """Which messages are more than a known role and a text; None where the columns do not show it."""
        role, content = keys.get("role"), keys.get("content")
        if role is None or content is None or not all(glance.is_text(held.type) for held in (role, content)):
            return None
        known = glance.mask(pc.is_in(role, pa.array(sorted(self.roles), role.type)))
        weighed = [~glance.nulls(keys[key]) for key in TURN_WEIGHTS if key in keys]
        return np.logical_or.reduce([~known, glance.nulls(content), *weighed])

    def arriving(self, stream: Any) -> Any:
        """Return the same IterableDataset, each row checked and rendered when it is read."""

        def check(row: dict[str, Any], index: int) -> dict[str, Any]:
            self(index + 1, row, render=True)
            return row

        return stream.map(check, with_indices=True, features=stream.features)


def first_refused(dataset: Any, check: RowCheck) -> tuple[int, str] | None:
    """Return the first row of a Dataset that the template cannot render, and why."""
    doing = f"looking for the row of {check.split}"
    for number, row in numbered(dataset, _read_columns(dataset, check.layout), doing=doing):
        if reason := refusal(row, check.layout, check.tokenizer, check.template):
            return number, reason
    return None


def _read_columns(dataset: Any, layout: Layout) -> list[str]:
    extra = set(layout.beside) & set(dataset.column_names)
    return [*layout.columns, *sorted(extra)]
