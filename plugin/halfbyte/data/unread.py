"""Columns that hold context or supervision and are not read: refused where training without them is another training.

What an unread column says may stand in the read ones as well, as the prompt beside a conversation does; then, and where
it is a score or a label, it is only named.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halfbyte.data.conversion.shapes import ANSWERS, QUESTIONS, SYSTEMS, TALKS, Seen
from halfbyte.data.conversion.turns import speaking
from halfbyte.data.formats import Layout, OtherRowsError
from halfbyte.data.rows import numbered
from halfbyte.errors import UserError

_REASONING = (
    *("reasoning", "reasoning_content", "thinking", "thought", "thoughts"),
    *("rationale", "explanation", "cot"),
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# What a model should see or say; each must be read, or stand within what is read.
CONTEXT = frozenset(
    {
        *(*SYSTEMS, *TALKS, *QUESTIONS, *ANSWERS),
        *(
            "prompt",
            "completion",
            "text",
            "input",
            "context",
            "history",
            "problem",
            "solution",
            "target",
            "targets",
        ),
        *(
            "document",
            "documents",
            "passage",
            "background",
            "dialog",
            "dialogue",
            "chat",
            "tools",
            "functions",
        ),
        *("instructions", "inputs", "outputs", "questions", "responses", "answers", "persona", "knowledge"),
        *("sys", "system_instruction", "system_instructions", "options", "choices", "hint", "hints"),
        *("tool_definitions", "tool_list", "tool_schemas", "available_tools", "available_functions"),
        *_REASONING,
    }
)
# Which tokens or rows count; where all of it is 1 it changes nothing.
WEIGHTS = frozenset(
    {
        *("weight", "weights", "sample_weight", "sample_weights", "loss_weight", "loss_weights", "loss_mask"),
        *("label_mask", "prompt_mask", "response_mask", "loss_scale", "train_on_turn"),
    }
)
_NAMED = ("label", "kto_tag", "desirable", "chosen", "rejected", "score", "rating", "reward", "preference")
# Beside pairs whose prompt is a common beginning any text could be the prompt, but for these.
_ASIDE = ("id", "idx", "index", "uuid", "source", "dataset", "subset", "split", "origin", "url", "lang", "language",
          "category", "model", "type", "task", "license", "date", "hash")  # fmt: skip

_LISTED = 12  # columns that a line names

# Further answers, which are only named where what is read ends with one.
_ANSWERS = frozenset(
    {
        *(*ANSWERS, "solution", "target", "targets", "outputs", "responses", "answers"),
        *_REASONING,
    }
)


def settle(seen: Seen, layout: Layout, *, deciding: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the data set without unread columns that would mislead, and the lines about those that are not read.

    ``deciding`` are columns by which the trainer would read rows in another way. Where the prompt is the text that
    both sides begin with, any other text could be the real one. Raises UserError for a column whose loss would change
    what is trained; of a stream, with the row, when it is read.
    """
    conversational = layout.conversational(seen.first)
    implicit = layout.begin_alike and not conversational
    read = {*layout.columns, *(layout.beside if conversational or layout.token_ids else ())}
    unread = [name for name in seen.columns if name not in read]
    for name in unread:
        if name in MEDIA and seen.holds(name):
            raise UserError(
                f"the data has {name!r}: training is on text; leave the column out with `columns:`",
                split=seen.split,
            )
    if (wish := layout.unread_wish(seen.first)) is not None:
        raise OtherRowsError(
            f"column {wish!r} says which answers are wanted, and is not read: unwanted ones would be trained too\n"
            "  keep the rows to train on, and leave the column out with `columns:`",
            columns=seen.columns,
            first=seen.first,
            split=seen.split,
        )
    tokens, chosen = (
        layout.token_ids is not None,
        seen.text_field != "text" and seen.text_field in layout.columns,
    )
    checked = [
        name
        for name in unread
        if _weighs(name, tokens, seen) or (not (tokens or chosen) and _tells(name, seen, implicit))
    ]
    if _ends_with_an_answer(layout, seen.first):
        checked = [name for name in checked if _plain(name) not in _ANSWERS]
    dataset = seen.dataset
    if checked:
        dataset = _checked(seen, layout, checked)
    gone = [name for name in unread if name in deciding or name in MEDIA]
    named = [
        name
        for name in unread
        if name in gone
        or (name in checked and seen.holds(name))
        or _shown(name, tokens or chosen)
        or (
            not tokens
            and not _aside(name)
            and isinstance(seen.first.get(name), str | list | dict)
            and seen.holds(name)
        )
    ]
    if gone:
        dataset = dataset.remove_columns(gone)
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    listed = ", ".join(named[:_LISTED]) + more
    lines = [f"{seen.split}: read as {layout}; columns not used: {listed}"] if named else []
    return dataset, lines


def _ends_with_an_answer(layout: Layout, first: Mapping[str, Any]) -> bool:
    talk = first.get("messages") if "messages" in layout.columns else None
    said = bool(talk) and isinstance(talk, list) and {"assistant"} == {*speaking(talk[-1])}
    return said or bool({"completion", "chosen"} & set(layout.columns) and not layout.begin_alike)


def _plain(name: str) -> str:
    """A column's name in the form of those above: `systemPrompt` and `System Prompt` are `system_prompt`."""
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).lower()


def _aside(name: str) -> bool:
    plain = _plain(name)
    return any(plain == word or plain.endswith(f"_{word}") for word in _ASIDE)


def _weighs(name: str, tokens: bool, seen: Seen) -> bool:
    return _plain(name) in WEIGHTS and not (tokens and "labels" in seen.columns)


def _tells(name: str, seen: Seen, implicit: bool) -> bool:
    if _plain(name) in CONTEXT or name in MEDIA:
        return seen.may_hold(name)
    aside = _aside(name) or _plain(name).startswith(_NAMED)
    return implicit and not aside and isinstance(seen.first.get(name), str | list | dict) and seen.holds(name)


def _shown(name: str, all: bool) -> bool:
    return _plain(name).startswith(_NAMED) or (all and _plain(name) in CONTEXT)


def _checked(seen: Seen, layout: Layout, checked: list[str]) -> Any:
    """The data set whose every row repeats in the layout's columns what it holds in ``checked``."""
    read = list(layout.columns)
    kept = [*seen.given(read), *(name for name in layout.beside if name in seen.columns)]

    def check(row: Mapping[str, Any], index: int) -> None:
        for name in checked:
            if not _harmless(name, row.get(name), [row.get(column) for column in read]):
                raise UserError(_refusal(name, read, kept), split=seen.split, row=index + 1)

    if not seen.whole:

        def arriving(row: dict[str, Any], index: int) -> dict[str, Any]:
            check(row, index)
            return row

        return seen.dataset.map(arriving, with_indices=True, features=seen.dataset.features)
    for number, row in numbered(seen.dataset, [*read, *checked]):
        check(row, number - 1)
    return seen.dataset


def _harmless(name: str, value: Any, read: list[Any]) -> bool:
    if _plain(name) in WEIGHTS:
        return all(weight is None or weight == 1 for weight in _leaves(value))
    if "tool" in _plain(name) or "function" in _plain(name):
        return not value
    said = [text.strip() for text in _strings(value) if text.strip()]
    held = [text.strip() for text in _strings(read)]
    within = all(any(_stands_in(text, each) for each in held) for text in said)
    # The conversation as somebody else rendered it.
    around = isinstance(value, str) and all(text in value for text in held)
    return (within and (bool(said) or not value)) or around


def _stands_in(text: str, whole: str) -> bool:
    """Whether a text is in another as words of it, and not as letters of a word."""
    at = whole.find(text)
    while at >= 0:
        before, after = whole[at - 1 : at] if at else "", whole[at + len(text) :][:1]
        if not (text[0].isalnum() and before.isalnum()) and not (text[-1].isalnum() and after.isalnum()):
            return True
        at = whole.find(text, at + 1)
    return False


def _refusal(name: str, read: list[str], kept: list[str]) -> str:
    without = ", ".join(column for column in kept if column != name)
    if _plain(name) in WEIGHTS:
        return (
            f"column {name!r} is not read, and not all of it is 1: everything would be trained alike\n"
            "  write what must not be trained as `labels` of -100 beside `input_ids`, or into `prompt` with a "
            "`completion`"
        )
    return (
        f"column {name!r} is not read, and {' + '.join(read)} do not repeat what it holds\n"
        f"  two readings: it belongs to the prompt, then write it there; or it does not, then leave it out:\n"
        f"  `datasets: [{{path: ..., columns: [{without}]}}]`"
    )


def _strings(value: Any) -> Iterator[str]:
    """Every text of a value, without the names of speakers and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            if key not in ("role", "from", "type"):
                yield from _strings(held)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
