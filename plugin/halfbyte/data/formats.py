"""The rows a trainer can learn from: which columns they have and what each column holds."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import UserError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

# A kind says what is wrong with one value, or None; it is told which roles the chat template knows.
Kind = Callable[[Any, Collection[str]], str | None]


def text(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A string."""
    return None if isinstance(value, str) else f"expected a string, found {describe(value)}"


def tokens(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A list of token ids that is not empty."""
    if not isinstance(value, list) or not value:
        return f"expected a list of token ids, found {describe(value)}"
    wrong = [item for item in value if type(item) is not int]
    return f"expected token ids, found {describe(wrong[0])}" if wrong else None


def messages(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A conversation: ``[{"role": ..., "content": ...}, ...]``."""
    return _conversation(value, roles, "role", "content")


def from_value(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A conversation in the older dress: ``[{"from": ..., "value": ...}, ...]``."""
    return _conversation(value, roles, "from", "value")


def text_or_messages(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A string or a conversation."""
    if isinstance(value, str):
        return None
    if isinstance(value, list):
        return messages(value, roles)
    return f"expected a string or a list of messages, found {describe(value)}"


def _conversation(value: Any, roles: Collection[str], who: str, what: str) -> str | None:
    if not isinstance(value, list):
        return f"expected a list of messages, found {describe(value)}"
    if not value:
        return "the conversation is empty"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return (
                f"message {number}: expected a mapping with {who!r} and {what!r}, found {describe(message)}"
            )
        role, content = message.get(who), message.get(what)
        if not isinstance(role, str):
            keys = ", ".join(sorted(key for key, held in message.items() if held is not None)) or "none"
            return f"message {number}: {who!r} is {describe(role)}, must be a string; its keys: {keys}"
        if role not in roles:
            known = FOREIGN_ROLES.get(role)
            return f"message {number}: the chat template knows no role {role!r}" + (
                f"; write {known!r}" if known else f", expected one of {', '.join(sorted(ROLES))}"
            )
        spoken = isinstance(content, str) or (isinstance(content, list) and content)
        if not spoken and not (content is None and message.get("tool_calls")):
            keys = ", ".join(sorted(key for key, held in message.items() if held is not None))
            return f"message {number}: {what!r} is {describe(content)}, must be a string; its keys: {keys}"
    return None


def describe(value: Any) -> str:
    """A few words about a value, for an error message; a string only by its length: data can be private."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    return type(value).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class Layout:
    """One arrangement of columns; every column it names must be there and hold what its kind says."""

    columns: Mapping[str, Kind]

    def __str__(self) -> str:
        return " + ".join(self.columns)

    def problem(self, row: Mapping[str, Any], roles: Collection[str] = ROLES) -> str | None:
        """What is wrong with one row, or None."""
        for column, kind in self.columns.items():
            if wrong := kind(row.get(column), roles):
                return f"column {column!r}: {wrong}"
        shapes = {column: isinstance(row[column], str) for column in self.columns}
        if text_or_messages in self.columns.values() and len(set(shapes.values())) > 1:
            found = ", ".join(f"{c!r} is {'a string' if s else 'messages'}" for c, s in shapes.items())
            return f"all must be strings or all lists of messages, but {found}"
        return None

    def conversational(self, row: Mapping[str, Any]) -> bool:
        """Whether a row that has passed :meth:`problem` goes through the chat template."""
        column, kind = next(iter(self.columns.items()))
        return kind in (messages, from_value) or (kind is text_or_messages and isinstance(row[column], list))


@dataclass(frozen=True)
class DataFormat:
    """What a recipe's trainer accepts: its layouts, in the order in which it decides between them."""

    name: str
    layouts: tuple[Layout, ...]

    def detect(self, columns: Collection[str], first: Mapping[str, Any], text_field: str = "text") -> Layout:
        """The layout of a data set, from its columns and its first row.

        ``text_field`` is TRL's ``dataset_text_field``, which takes the place of the column ``text``. Raises
        UserError where no layout fits.
        """
        layouts = [
            Layout({text_field if name == "text" else name: kind for name, kind in layout.columns.items()})
            for layout in self.layouts
        ]
        present = [layout for layout in layouts if set(layout.columns) <= set(columns)]
        for layout in present:
            # A plain prompt beside conversations is a copy of the prompt that they begin with.
            lists = any(isinstance(first[name], list) for name in layout.columns)
            if not (lists and isinstance(first.get("prompt"), str) and "prompt" in layout.columns):
                return layout
        if present:
            return present[0]
        wanted = {name for layout in layouts for name in layout.columns}
        near = next((hint for c in columns if (hint := suggestion(c, wanted - set(columns)))), "")
        raise UserError(
            f"no columns for {self.name}\n"
            f"  found: {', '.join(columns)}{near}\n"
            f"  expected one of: {'; '.join(map(str, layouts))}\n"
            "  rename the columns in the data"
            + (", or name the text column in `dataset_text_field`" if text_field in wanted else "")
        )


Text = DataFormat(
    "text",
    (
        Layout({"input_ids": tokens}),
        Layout({"prompt": text_or_messages, "completion": text_or_messages}),
        Layout({"conversations": from_value}),
        Layout({"messages": messages}),
        Layout({"text": text}),
    ),
)
"""Language modeling, prompt and completion, conversations, or token ids."""

PreferencePairs = DataFormat(
    "preference pairs",
    (
        Layout({"prompt": text_or_messages, "chosen": text_or_messages, "rejected": text_or_messages}),
        Layout({"chosen": text_or_messages, "rejected": text_or_messages}),
    ),
)
"""A chosen and a rejected side, with the prompt in a column of its own or at the head of both."""
