"""Every row looked at once: what it holds, whether the template takes it, whether a pair is one."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from halfbyte.data.formats import ROLES, Layout, describe, from_value
from halfbyte.data.rendering import refusal
from halfbyte.errors import UserError

BATCH = 1000  # rows decoded at a time
RENDERED = 2000  # rows rendered up front; a later one is found when its tokenization fails
MOST_EQUAL = 0.01  # the share of pairs with equal sides that is taken for an accident
TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")  # one value a token, where they are there
EQUAL_SEEN = 1000  # pairs of a stream before that share means anything


def numbered(dataset: Any, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Dataset with their numbers, counted from 1."""
    if columns is not None:
        dataset = dataset.select_columns(columns)
    number = 0
    for batch in dataset.iter(batch_size=BATCH):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(names, values, strict=True))


def digest(dataset: Any) -> str:
    """The sha256 of a Dataset's rows, all columns, whatever file and chunks they came in."""
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
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        plain = table.combine_chunks().replace_schema_metadata(None)
        writer = writer or pa.ipc.new_stream(Sink(), plain.schema)
        writer.write_table(plain)
    if writer is not None:
        writer.close()
    return sha.hexdigest()


@dataclass(frozen=True)
class RowCheck:
    """All that is asked of one row. ``template`` and ``tokenizer`` matter to conversations only."""

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
        if wrong is None and "rejected" in self.layout.columns and "prompt" not in self.layout.columns:
            wrong = _unshared_prompt(row)
        if wrong is None and "input_ids" in self.layout.columns:
            wrong = self._unlike_tokens(row)
        if wrong is None and self.assistant_only and not self._assistant_speaks(row):
            wrong = "assistant_only_loss: no message of the assistant's"
        if wrong is None and render and self.conversational:
            told = refusal(row, self.tokenizer, self.template)
            wrong = told and f"the chat template cannot render it: {told}"
        if wrong is not None:
            raise UserError(
                f"{self.split} row {number}: {wrong}\n  (rows count from 1; read as {self.layout})"
            )

    def _unlike_tokens(self, row: Mapping[str, Any]) -> str | None:
        ids = row["input_ids"]
        if not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
            return (
                f"column 'input_ids': ids from {min(ids)} to {max(ids)}, vocabulary of {len(self.tokenizer)}"
            )
        for column in TOKEN_COLUMNS:
            held = row.get(column, ids)
            if not isinstance(held, list) or len(held) != len(ids):
                return f"column {column!r}: expected a list of {len(ids)}, found {describe(held)}"
        return None

    def _assistant_speaks(self, row: Mapping[str, Any]) -> bool:
        who = "from" if from_value in self.layout.columns.values() else "role"
        return any(turn[who] == "assistant" for column in self.layout.columns for turn in row[column])

    def all(self, dataset: Any) -> None:
        """Check every row of a Dataset, rendering the first ``RENDERED``."""
        for number, row in numbered(dataset, _read_columns(dataset, self.layout)):
            self(number, row, render=number <= RENDERED)

    def arriving(self, stream: Any) -> Any:
        """The same IterableDataset, each row checked and rendered when it is read."""

        def check(row: dict[str, Any], index: int) -> dict[str, Any]:
            self(index + 1, row, render=True)
            return row

        return stream.map(check, with_indices=True, features=stream.features)


def first_refused(dataset: Any, check: RowCheck) -> tuple[int, str] | None:
    """The first row of a Dataset that the template cannot render, and why."""
    for number, row in numbered(dataset, _read_columns(dataset, check.layout)):
        if told := refusal(row, check.tokenizer, check.template):
            return number, told
    return None


def _read_columns(dataset: Any, layout: Layout) -> list[str]:
    beside = TOKEN_COLUMNS if "input_ids" in layout.columns else ("tools", "chat_template_kwargs")
    extra = set(beside) & set(dataset.column_names)
    return [*layout.columns, *sorted(extra)]


def equal_sides(row: Mapping[str, Any]) -> bool:
    """Whether the chosen and the rejected side say the same; such a pair has no gradient."""
    return _said(row["chosen"]) == _said(row["rejected"])


def _said(side: Any) -> Any:
    if isinstance(side, str):
        return side
    return [(turn.get("role"), turn.get("content"), turn.get("tool_calls")) for turn in side]


def _unshared_prompt(row: Mapping[str, Any]) -> str | None:
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen and rejected and chosen[0] != rejected[0]:
        return "no `prompt` column, and chosen and rejected do not begin alike; add `prompt`"
    return None


def equal_rows(dataset: Any, split: str) -> list[int]:
    """The numbers of the pairs with equal sides. Raises UserError when they are more than 1%."""
    equal = [number for number, row in numbered(dataset, ["chosen", "rejected"]) if equal_sides(row)]
    _refuse_equal(split, equal, len(dataset))
    return equal


def unequal_arriving(split: str) -> Callable[[dict[str, Any], int], bool]:
    """A filter for a stream that drops pairs with equal sides until they are more than 1%."""
    equal: list[int] = []

    def keep(row: dict[str, Any], index: int) -> bool:
        same = equal_sides(row)
        if same:
            equal.append(index + 1)
        if index + 1 == EQUAL_SEEN or (same and index >= EQUAL_SEEN):
            _refuse_equal(split, equal, index + 1)
        return not same

    return keep


def _refuse_equal(split: str, equal: list[int], rows: int) -> None:
    if len(equal) > MOST_EQUAL * rows:
        first = ", ".join(map(str, equal[:5])) + (", ..." if len(equal) > 5 else "")
        raise UserError(
            f"{split}: chosen and rejected are equal in {len(equal):,} of {rows:,} rows (row {first})\n"
            f"  up to {MOST_EQUAL:.0%} are dropped; more means that the pairs are wrong"
        )
