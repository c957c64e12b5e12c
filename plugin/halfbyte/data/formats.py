"""The rows a trainer can learn from: their columns, their checks, how they are counted, and what they train."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.data.conversion import shapes
from halfbyte.data.conversion.columns import Conversion
from halfbyte.data.conversion.shapes import Seen, begins_with
from halfbyte.data.conversion.turns import SPEAKERS, UnreadableError
from halfbyte.data.kinds import (
    ROLES,
    Kind,
    messages,
    text,
    text_or_messages,
    tokens,
)
from halfbyte.data.preparation.counting import (
    PAIRS,
    SCORED_PAIRS,
    SEQUENCES,
    Prepared,
    recognise,
)
from halfbyte.errors import UserError
from halfbyte.terminal.wording import suggestion

# Columns with one value a token, which may stand beside token ids.
TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")
# Columns that the chat template reads.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What else may stand beside token ids.
BESIDE_TOKENS = frozenset({*TOKEN_COLUMNS, "seq_lengths", "attention_mask"})
# Columns by which TRL decides how to read a row: left beside another layout they change what is trained.
DECIDING = BESIDE_TOKENS | {
    *("prompt", "completion", "chosen", "rejected", "messages", "conversations", "input_ids"),
}
# The kinds that are rendered with the chat template, or tokenized as text.
_SPOKEN = (text, messages, text_or_messages)


class OtherRowsError(UserError):
    """Rows of another kind than the format's: their ``columns``, and the ``first`` of them."""

    def __init__(
        self, what: str, *, columns: Collection[str], first: Mapping[str, Any], **place: Any
    ) -> None:
        super().__init__(what, **place)
        self.columns, self.first = tuple(columns), first


@dataclass(frozen=True)
class Layout:
    """One arrangement of columns; every column it names must be there and hold what its kind says.

    ``begin_alike``: conversations of the columns must begin with the same message, which is then their prompt.
    """

    columns: Mapping[str, Kind]
    begin_alike: bool = False

    def __str__(self) -> str:
        return " + ".join(self.columns)

    @property
    def spoken(self) -> tuple[str, ...]:
        """The columns that hold text or conversations."""
        return tuple(column for column, kind in self.columns.items() if kind in _SPOKEN)

    @property
    def token_ids(self) -> str | None:
        """The column that holds token ids, if one does."""
        return next((column for column, kind in self.columns.items() if kind is tokens), None)

    @property
    def beside(self) -> tuple[str, ...]:
        """Columns that are read with the layout's where the data has them."""
        return TEMPLATE_COLUMNS if self.token_ids is None else TOKEN_COLUMNS

    def problem(self, row: Mapping[str, Any], roles: Collection[str] = ROLES) -> str | None:
        """What is wrong with one row, or None."""
        for column, kind in self.columns.items():
            if wrong := kind(row.get(column), roles):
                return f"column {column!r}: {wrong}"
        either = [column for column, kind in self.columns.items() if kind is text_or_messages]
        shapes = {column: isinstance(row[column], str) for column in either}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{c!r} is {'a string' if s else 'messages'}" for c, s in shapes.items())
            return f"all must be strings or all lists of messages, but {found}"
        prompt: Any = row.get("prompt") if "prompt" in self.columns else None
        for column in either if isinstance(prompt, list) else ():
            if column != "prompt" and _repeats(prompt, row[column]):
                return f"column {column!r} begins with what `prompt` ends with, which would stand there twice"
        starts = [row[column][0] for column in self.columns if row[column]] if self.begin_alike else []
        if any(start != starts[0] for start in starts):
            return f"no `prompt` column, and {' and '.join(self.columns)} do not begin alike; add `prompt`"
        return None

    def conversational(self, row: Mapping[str, Any]) -> bool:
        """Whether a row that has passed :meth:`problem` is rendered with the chat template."""
        column, kind = next(iter(self.columns.items()))
        return kind is messages or (kind is text_or_messages and isinstance(row[column], list))

    def unread_wish(self, row: Mapping[str, Any]) -> str | None:
        """The column that says whether an answer is wanted, where the layout has answers and does not read it."""
        answers = {"completion", "messages"} & set(self.columns)
        held = [name for name in shapes.LABELS if answers and isinstance(row.get(name), bool)]
        return held[0] if held and held[0] not in self.columns else None

    def masks_prompt(self, row: Mapping[str, Any]) -> bool:
        """Whether the loss can leave out a prompt: the completion has a column or a mask of its own."""
        return "completion" in self.columns or "completion_mask" in row

    def answered(self, row: Mapping[str, Any]) -> bool:
        """Whether the assistant has a message in a conversation."""
        return any(turn["role"] == "assistant" for column in self.spoken for turn in row[column])


def _repeats(prompt: list[Any], side: list[Any]) -> bool:
    """Whether a side begins with the turns that end its prompt, from one of the user's on."""
    return any(
        turn["role"] == "user" and prompt[at:] == side[: len(prompt) - at] for at, turn in enumerate(prompt)
    )


@dataclass(frozen=True)
class DataFormat:
    """What a recipe's trainer accepts, and how its rows are counted.

    ``layouts`` are tried in their order. ``prepared`` are the forms in which trainers leave such rows; see
    :mod:`halfbyte.data.preparation.counting`. A row whose ``compared`` columns train the same tokens is dropped; where
    the rows do not have all of these columns, none is. ``sides`` is how many sequences one row adds to a forward pass.
    ``remark(dataset, training)`` returns what must be reported of all rows of a split under the trainer's config, or
    None. ``convert(seen)`` returns how rows of other systems become rows of a layout, or None for rows that are read as
    they are.
    """

    name: str
    layouts: tuple[Layout, ...]
    prepared: tuple[Prepared, ...] = ()
    compared: tuple[str, ...] = ()
    sides: int = 1
    remark: Callable[[Any, Any], str | None] | None = None
    convert: Callable[[Seen], Conversion | None] | None = None

    def detect(self, columns: Collection[str], first: Mapping[str, Any], text_field: str = "text") -> Layout:
        """Return the layout of a data set, from its columns and its first row.

        ``text_field`` is TRL's ``dataset_text_field``, which takes the place of the column ``text``. Raises
        OtherRowsError where no layout fits.
        """
        layouts = [
            Layout(
                {text_field if name == "text" else name: kind for name, kind in layout.columns.items()},
                layout.begin_alike,
            )
            for layout in self.layouts
        ]
        present = [layout for layout in layouts if set(layout.columns) <= set(columns)]
        for layout in present:
            # A prompt beside conversations that begin with it, or as text, is a copy.
            held = [first[name] for name in layout.columns if name != "prompt"]
            lists, prompt = any(isinstance(side, list) for side in held), first.get("prompt")
            copy = (lists and isinstance(prompt, str)) or all(begins_with(side, prompt) for side in held)
            if not (copy and "prompt" in layout.columns):
                return layout
        if present:
            return present[0]
        wanted = {name for layout in layouts for name in layout.columns}
        near = next((hint for c in columns if (hint := suggestion(c, wanted - set(columns)))), "")
        raise OtherRowsError(
            f"no columns for {self.name}\n"
            f"  found: {', '.join(columns)}{near}\n"
            f"  expected one of: {'; '.join(map(str, layouts))}\n"
            "  rename the columns in the data"
            + (", or name the text column in `dataset_text_field`" if text_field in wanted else ""),
            columns=columns,
            first=first,
        )

    def reads(self, columns: Collection[str], first: Mapping[str, Any]) -> bool:
        """Whether a first row with these columns could be trained on, as it is or converted."""
        seen = Seen(tuple(columns), first)
        try:
            found = None if self.convert is None else self.convert(seen)
            row = {**first, **found.row(first)} if found is not None else first
            layout = self.detect([*columns, *row], row)
        except (UserError, UnreadableError):
            return False
        return layout.problem(row, ROLES | SPEAKERS.keys()) is None and layout.unread_wish(row) is None

    @property
    def generates(self) -> bool:
        """Whether a model learns to write such rows, as it does where nothing else is known, and not to score them."""
        return not self.prepared or any(each.trained is not None for each in self.prepared)

    def compares(self, columns: Collection[str]) -> tuple[str, ...]:
        """The compared columns, where ``columns`` has all of them; else none."""
        return self.compared if set(self.compared) <= set(columns) else ()

    def equal(self, row: Mapping[str, Any]) -> bool | None:
        """Whether the compared columns of a row are identical; None for a row that has none."""
        held = [row[column] for column in self.compares(row.keys())]
        return all(each == held[0] for each in held) if held else None

    def recognise(self, columns: Collection[str]) -> Prepared | None:
        """How the rows with these columns were prepared, or None for rows that cannot be counted."""
        return recognise(columns, self.prepared)

    def trained(self, dataset: Any, args: Any) -> Iterator[np.ndarray] | None:
        """The token ids under the loss of prepared rows, arrays [T] of one row or several.

        None where no token is generated, or where the rows are in no known form.
        """
        found = self.recognise(dataset.column_names)
        return None if found is None or found.trained is None else found.trained(dataset, args)


Text = DataFormat(
    "text",
    (
        Layout({"input_ids": tokens}),
        Layout({"prompt": text_or_messages, "completion": text_or_messages}),
        Layout({"messages": messages}),
        Layout({"text": text}),
    ),
    prepared=(SEQUENCES,),
    convert=shapes.text,
)
"""Language modeling, prompt and completion, conversations, or token ids."""

PreferencePairs = DataFormat(
    "preference pairs",
    (
        Layout({"prompt": text_or_messages, "chosen": text_or_messages, "rejected": text_or_messages}),
        Layout({"chosen": text_or_messages, "rejected": text_or_messages}, begin_alike=True),
    ),
    prepared=(PAIRS, SCORED_PAIRS),
    compared=("chosen", "rejected"),
    sides=2,
    convert=shapes.pairs,
)
"""A chosen and a rejected side, with the prompt in a column of its own or at the head of both."""
