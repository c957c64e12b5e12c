"""Rows of other systems turned into TRL's columns: in one place, before they are checked, rendered or compared."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import datasets

from halfbyte.data.conversion.turns import Message, UnreadableError, messages, speaking
from halfbyte.data.kinds import describe
from halfbyte.errors import UserError

_MESSAGES = datasets.List(datasets.Json())  # each message keeps its own keys


@dataclass(frozen=True)
class Conversion:
    """Which columns of a row become a conversation, and how.

    The prompt is what ``system`` holds, then the pairs of ``history``, then the turns of ``talk`` (the one of these
    columns that is not null), then a user message from ``question`` with the text of ``below`` under it after a
    blank line. ``answers`` are pairs of a new column and the column it comes from; with ``whole`` these hold
    conversations that begin with their prompt. ``last`` is the new column for the last turn of ``talk``. ``label`` is
    the column that becomes ``label``. Without answers the prompt is the new column ``messages``. ``roles`` are pairs
    of a speaker and its new name.
    """

    system: str | None = None
    history: str | None = None
    talk: tuple[str, ...] = ()
    question: str | None = None
    below: str | None = None
    answers: tuple[tuple[str, str], ...] = ()
    whole: bool = False
    last: str | None = None
    label: str | None = None
    roles: tuple[tuple[str, str], ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that are converted; they are gone afterwards."""
        single = (self.system, self.history, self.question, self.below, self.label)
        named = [*self.talk, *(name for name in single if name), *(source for _, source in self.answers)]
        return tuple(dict.fromkeys(named))

    @property
    def spoken(self) -> list[str]:
        """The columns that may hold turns."""
        return list(dict.fromkeys([*self.talk, *(source for _, source in self.answers)]))

    @property
    def written(self) -> dict[str, Any]:
        """The new columns with their features."""
        targets = [target for target, _ in self.answers] + ([self.last] if self.last else [])
        first = [] if self.whole else ["prompt"] if targets else ["messages"]
        columns = dict.fromkeys([*first, *sorted(targets)], _MESSAGES)
        return {**columns, **({"label": datasets.Value("bool")} if self.label else {})}

    def line(self, first: Mapping[str, Any], whole: bool) -> str:
        """What is done, in one line; of a stream (not ``whole``) with the speakers of its ``first`` row."""
        met = {name for column in self.spoken for name in speaking(first.get(column))}
        parts = [f"{old} speaks as {new}" for old, new in self.roles if whole or old in met]
        if self.system:
            parts.append(f"{self.system} is the system message")
        if self.history:
            parts.append(f"{self.history} the turns before")
        if self.question:
            below = f", a blank line and {self.below}" if self.below else ""
            parts.append(f"{self.question}{below} the user's message")
        if "completion" in self.written:
            parts.append("the loss is on the completion (completion_only_loss: false puts it on all)")
        how = f" ({'; '.join(parts)})" if parts else ""
        if set(self.read) == set(self.written):
            return f"{' + '.join(self.read)} converted to messages of `role` and `content`{how}"
        return f"{' + '.join(self.read)} converted to {' + '.join(self.written)} as messages{how}"

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The new columns of one row. Raises UnreadableError."""
        roles = dict(self.roles)
        found: dict[str, Any] = {}
        prompt = self._prompt(row, roles)
        if self.last:
            if len(prompt) < 2 or prompt[-1]["role"] != "assistant":
                raise UnreadableError(
                    f"{self._at(row)}: its last turn must be the assistant's, after another"
                )
            found[self.last] = [prompt.pop()]
        for target, source in self.answers:
            side = _answer(source, row.get(source), roles)
            if self.whole:
                side = _one_system(prompt, side)
            elif side[0]["role"] not in ("assistant", "tool"):
                raise UnreadableError(
                    f"column {source!r} begins with a message of the {side[0]['role']}'s, but the prompt is in "
                    f"{' + '.join(self._prompts)}; a row has one prompt"
                )
            found[target] = side
        if self.label:
            found["label"] = row.get(self.label)
        if "prompt" in self.written:
            if not prompt:
                raise UnreadableError("the prompt is empty")
            found["prompt"] = prompt
        elif "messages" in self.written:
            found["messages"] = prompt
        return found

    @property
    def _prompts(self) -> list[str]:
        named = (self.system, self.history, *self.talk, self.question, self.below)
        return [name for name in named if name]

    def _prompt(self, row: Mapping[str, Any], roles: Mapping[str, str]) -> list[Message]:
        system = _text(self.system, row, optional=True)
        begin: list[Message] = [{"role": "system", "content": system}] if system else []
        turns = _history(self.history, row, roles)
        if self.talk:
            talk = row[self._at(row)]
            if isinstance(talk, Mapping) and "messages" in talk:  # OpenAI's form of preferences
                if talk.get("tools"):
                    raise UnreadableError(f"{self._at(row)}: put its tools into a column `tools`")
                talk = talk["messages"]
            turns += messages(talk, roles)
        if self.question:
            asked, below = _text(self.question, row), _text(self.below, row, optional=True)
            said = f"{asked}\n\n{below}" if asked.strip() and below else below or asked
            turns.append({"role": "user", "content": said})
        return _one_system(begin, turns)

    def _at(self, row: Mapping[str, Any]) -> str:
        held = [name for name in self.talk if row.get(name)]
        if len(held) != 1:
            has = f"{' and '.join(held)} both hold a conversation" if held else "no conversation"
            raise UnreadableError(f"{has} (columns {', '.join(self.talk)}); a row has one")
        return held[0]


def apply(split: str, dataset: Any, columns: Collection[str], conversion: Conversion) -> Any:
    """Return a Dataset or IterableDataset with the columns of ``conversion``, row by row.

    Raises UserError with the number of a row that does not have the shape of the first; of a stream when it is read.
    """
    features = dataset.features
    if features is not None:
        kept = {name: kind for name, kind in features.items() if name not in conversion.read}
        features = datasets.Features({**kept, **conversion.written})
    return dataset.map(
        _converted,
        with_indices=True,
        remove_columns=[name for name in conversion.read if name in columns],
        features=features,
        # `datasets` keeps the result under the names of our functions, whatever they did in an earlier version.
        fn_kwargs={"split": split, "conversion": conversion, "written_by": version("halfbyte")},
    )


def _converted(
    row: Mapping[str, Any], index: int, split: str, conversion: Conversion, written_by: str
) -> dict[str, Any]:
    try:
        return conversion.row(row)
    except UnreadableError as error:
        columns = " + ".join(conversion.read)
        raise UserError(
            f"{error}\n  (rows count from 1; read as {columns}, like row 1)", split=split, row=index + 1
        ) from error


def _text(column: str | None, row: Mapping[str, Any], *, optional: bool = False) -> str:
    value = row.get(column) if column else None
    if column and not isinstance(value, str) and not (optional and value is None):
        raise UnreadableError(f"column {column!r}: expected a string, found {describe(value)}")
    return value if isinstance(value, str) else ""


def _answer(column: str, value: Any, roles: Mapping[str, str]) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, Mapping | list) or not value:
        raise UnreadableError(f"column {column!r}: expected text or messages, found {describe(value)}")
    return messages(value, roles)


def _history(column: str | None, row: Mapping[str, Any], roles: Mapping[str, str]) -> list[Message]:
    """The turns of ``history``: pairs of what the user and the assistant said, or turns."""
    turns: list[Message] = []
    for pair in (row.get(column) or ()) if column else ():
        if isinstance(pair, Mapping):
            turns += messages(pair, roles)
        elif isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(said, str) for said in pair):
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            raise UnreadableError(f"column {column!r}: expected pairs of two strings, found {describe(pair)}")
    return turns


def _one_system(begin: list[Message], turns: list[Message]) -> list[Message]:
    """``turns`` after the system message of ``begin``. Raises UnreadableError where they have another of their own."""
    own = turns[0] if turns and turns[0]["role"] == "system" else None
    if begin and begin[0]["role"] == "system" and own is not None:
        if begin[0]["content"] != own["content"]:
            raise UnreadableError("two system messages, one in a column and one in the conversation, differ")
        return [*begin, *turns[1:]]
    return [*begin, *turns]
