"""The shapes in which people bring rows, recognised by their columns and their first row."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from halfbyte.data.conversion.columns import Conversion
from halfbyte.data.conversion.turns import SPEAKERS, plain, shape, speakers, speaking
from halfbyte.data.glance import is_list, is_text
from halfbyte.data.kinds import unknown_roles
from halfbyte.errors import UserError

SYSTEMS = ("system", "system_prompt", "system_message")
TALKS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "query")
ANSWERS = ("output", "response", "answer")
LABELS = ("label", "kto_tag")


@dataclass(frozen=True)
class Seen:
    """The columns of a split and its first row; ``dataset`` is None where nothing else of it is known.

    ``roles`` are those that the chat template knows.
    """

    columns: tuple[str, ...]
    first: Mapping[str, Any]
    dataset: Any = None
    split: str = "data"
    roles: Collection[str] = field(default=(), repr=False)
    text_field: str = "text"
    conversion: Conversion | None = None

    def given(self, columns: Collection[str]) -> list[str]:
        """The columns of the data as it was given that ``columns`` come from."""
        made = {} if self.conversion is None else self.conversion.written
        read = () if self.conversion is None else self.conversion.read
        return [*read, *(name for name in columns if name not in made and name not in read)]

    @property
    def whole(self) -> bool:
        """Whether all rows can be looked at: a stream is read once."""
        return isinstance(self.dataset, datasets.Dataset)

    def all(self, *names: str) -> bool:
        return set(names) <= set(self.columns)

    def shape(self, name: str) -> str | None:
        """What a column holds in the first row; see :func:`halfbyte.data.conversion.turns.shape`."""
        return shape(self.first.get(name))

    def texts(self, *names: str) -> list[str]:
        """Those of ``names`` that hold text in the first row."""
        return [name for name in names if self.shape(name) == "text"]

    def holds(self, column: str | None) -> bool:
        """Whether any row has something in a column; of a stream only the first is looked at."""
        if column is None or column not in self.columns:
            return False
        if not self.whole:
            return bool(self.first.get(column))
        one = self.dataset.select_columns([column]).with_format("arrow")
        return any(_something(table[column].combine_chunks()) for table in one.iter(batch_size=10_000))

    def may_hold(self, column: str | None) -> bool:
        """Whether any row may have something in a column: of a stream later rows are not known."""
        return column in self.columns and (self.holds(column) if self.whole else True)

    @property
    def beside(self) -> dict[str, Any]:
        """The columns that stand before a prompt: a system message, and turns before the last."""
        return {"system": self._optional(SYSTEMS), "history": self._optional(("history",))}

    @property
    def talks(self) -> tuple[str, ...]:
        """The columns of whole conversations: one, or several of which each row has one."""
        held = [name for name in TALKS if self.shape(name) == "talk"]
        empty = [name for name in TALKS if self.first.get(name) is None and self.may_hold(name)]
        return (held[0], *empty) if held else ()

    def settled(self, conversion: Conversion) -> Conversion | None:
        """The conversion with the roles that it renames; None where the rows are TRL's as they stand.

        Raises UserError that names every role that is neither the template's nor known from other systems.
        """
        found = {name for column in conversion.spoken for name in speaking(self.first.get(column))}
        if self.whole:
            found = speakers(self.dataset, conversion.spoken)
        if self.roles and (unknown := found - SPEAKERS.keys() - set(self.roles)):
            raise UserError(
                unknown_roles(unknown, self.roles),
                split=self.split,
                row=self._first_with(unknown, conversion.spoken),
            )
        renamed = [(old, new) for old, new in SPEAKERS.items() if old not in self.roles]
        met = [(old, new) for old, new in renamed if old in found]
        same = set(conversion.written) == set(conversion.read)
        if (
            same
            and not met
            and all(shape(turns := self.first[name]) == "talk" and plain(turns) for name in conversion.read)
        ):
            return None
        return replace(conversion, roles=tuple(met if self.whole else renamed))

    def _first_with(self, names: Collection[str], columns: list[str]) -> int:
        rows = self.dataset.select_columns(columns) if self.whole else [self.first]
        said = (
            number
            for number, row in enumerate(rows, 1)
            for name in columns
            if {*speaking(row[name])} & {*names}
        )
        return next(said)

    def _optional(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.may_hold(name)), None)


def text(seen: Seen) -> Conversion | None:
    """Rows for language modeling: conversations, or a question and its answer."""
    if "input_ids" in seen.columns:
        return None
    if seen.all("prompt", "completion"):
        return _completion(seen)
    if seen.talks:
        return seen.settled(Conversion(**{**seen.beside, "history": None}, talk=seen.talks))
    asked, answers = _asked(seen), seen.texts(*ANSWERS)
    if not asked and answers and seen.shape("prompt") == "text":
        raise UserError(
            f"two readings: prompt + {answers[0]} as text, or as a question to a chat model and its answer\n"
            f"  rename `{answers[0]}` to `completion` for the first, `prompt` to `question` for the second",
            split=seen.split,
        )
    if not asked or not answers:
        return None
    if len({seen.first[name] for name in answers}) > 1:
        raise UserError(
            f"two readings: the answer is in {' or in '.join(answers)}, and they differ\n"
            f"  keep one: `datasets: [{{path: ..., columns: [{', '.join([*asked.values(), answers[0]])}]}}]`",
            split=seen.split,
        )
    if seen.holds(seen.text_field):
        read = [*asked.values(), answers[0]]
        raise UserError(
            f"two readings: a conversation from {' + '.join(read)}, or the text of {seen.text_field!r} as it stands\n"
            f"  keep one: `datasets: [{{path: ..., columns: [{', '.join(read)}]}}]`, or `columns: [{seen.text_field}]`",
            split=seen.split,
        )
    return seen.settled(Conversion(**seen.beside, **asked, answers=(("completion", answers[0]),)))


def pairs(seen: Seen) -> Conversion | None:
    """Rows with two sides: text, single messages or conversations, their prompt in a column or at their head."""
    beside = seen.beside
    if seen.all("rejected_response") and seen.talks:
        return seen.settled(
            Conversion(**beside, talk=seen.talks, answers=(("rejected", "rejected_response"),), last="chosen")
        )
    answers = (("chosen", "preferred_output"), ("rejected", "non_preferred_output"))
    if seen.all("input", *dict(answers).values()):
        return seen.settled(Conversion(talk=("input",), answers=answers))
    sides, answers = ("chosen", "rejected"), (("chosen", "chosen"), ("rejected", "rejected"))
    if not seen.all(*sides) or None in map(seen.shape, sides):
        return None
    if all(seen.shape(side) == "talk" for side in sides) and not _answers_only(seen, "chosen"):
        return seen.settled(Conversion(system=beside["system"], answers=answers, whole=True))
    prompt = _prompt(seen)
    if not prompt:
        return None
    if (
        prompt == {"question": "prompt"}
        and not any(map(seen.holds, beside.values()))
        and len(seen.texts(*sides)) == 2
    ):
        return None  # TRL's own columns, as text
    if prompt.get("talk") == seen.talks and _speaker(seen.first[seen.talks[0]][-1]) == "assistant":
        raise UserError(
            f"two readings: {seen.talks[0]!r} ends with the assistant's turn; it may be the prompt, or the prompt with "
            "one answer\n  cut that turn off, or leave the column out",
            split=seen.split,
        )
    return seen.settled(Conversion(**beside, **prompt, answers=answers))


def unpaired(seen: Seen) -> Conversion | None:
    """Rows with one answer and whether it is wanted."""
    label = next((name for name in LABELS if name in seen.columns), None)
    if label is None:
        return None
    renamed = None if label == "label" else label
    if seen.all("prompt", "completion"):
        return _completion(seen, renamed)
    if seen.talks:
        return seen.settled(Conversion(**seen.beside, talk=seen.talks, last="completion", label=renamed))
    asked, answers = _prompt(seen), seen.texts(*ANSWERS, "completion")
    if not asked or not answers:
        return None
    found = Conversion(**seen.beside, **asked, answers=(("completion", answers[0]),), label=renamed)
    return seen.settled(found)


def _completion(seen: Seen, label: str | None = None) -> Conversion | None:
    """``prompt`` and ``completion`` that are not both text, or that have more beside them."""
    beside, shapes = seen.beside, [seen.shape("prompt"), seen.shape("completion")]
    if None in shapes or (
        shapes == ["text", "text"] and not any(map(seen.holds, beside.values())) and label is None
    ):
        return None
    if shapes == ["talk", "talk"] and begins_with(seen.first["completion"], seen.first["prompt"]):
        raise UserError(
            "the completion begins with the prompt, which would be trained twice\n"
            "  leave the prompt out of the completion, or leave `prompt` out and rename `completion` to `messages`",
            split=seen.split,
        )
    prompt = _prompt(seen)
    return seen.settled(Conversion(**beside, **prompt, answers=(("completion", "completion"),), label=label))


def _prompt(seen: Seen) -> dict[str, Any]:
    """Where the prompt is: ``prompt``, else a conversation, else a question."""
    if (held := seen.shape("prompt")) is not None:
        return {"question": "prompt"} if held == "text" else {"talk": ("prompt",)}
    return {"talk": seen.talks} if seen.talks else _asked(seen)


def _asked(seen: Seen) -> dict[str, Any]:
    """The user's message: one column, with Alpaca's ``input`` below its instruction, or ``input`` alone."""
    asked = seen.texts(*QUESTIONS) or seen.texts("input")
    if not asked:
        return {}
    below = "input" if asked[0] == "instruction" and seen.may_hold("input") else None
    return {"question": asked[0], **({"below": below} if below else {})}


def begins_with(talk: Any, prompt: Any) -> bool:
    """Whether a list of turns begins with all those of another."""
    lists = isinstance(talk, list) and isinstance(prompt, list)
    return lists and 0 < len(prompt) < len(talk) and talk[: len(prompt)] == prompt


def _speaker(turn: Any) -> str:
    said = next(iter(speaking(turn)), "")
    return SPEAKERS.get(said, said)


def _answers_only(seen: Seen, column: str) -> bool:
    return _speaker(seen.first[column][0]) in ("assistant", "tool")


def _something(array: pa.Array) -> bool:
    """Whether an array has a value that is neither null nor empty."""
    if is_text(array.type):
        return bool(pc.any(pc.not_equal(pc.utf8_trim_whitespace(array), "")).as_py())
    if is_list(array.type):
        return bool(pc.any(pc.greater(pc.list_value_length(array), 0)).as_py())
    return array.null_count < len(array)
