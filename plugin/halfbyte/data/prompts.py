"""The prompts that a run completes while it trains: from a file, or from the first rows of a split."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trl import extract_prompt, is_conversational

from halfbyte.data import contents
from halfbyte.data.chat.rendering import (
    TEMPLATE_ERRORS,
    Messages,
    known_roles,
    template_options,
    training_template,
)
from halfbyte.data.chat.template import stop_ids
from halfbyte.data.kinds import text_or_messages
from halfbyte.errors import UserError
from halfbyte.files import LONGEST_TEXT, read
from halfbyte.terminal.wording import first_line, plural, shorten, suggestion

MOST = 32  # prompts, which are completed at every round
_OPTION = "sample_prompts"
_ROWS = re.compile(r"(?P<split>[^/\\]+):(?P<rows>\d+)")
_FILES = (".txt", ".jsonl")
_FORMS = "a .txt file with a prompt a line, a .jsonl file, or rows of a split such as test:4"


@dataclass(frozen=True)
class Prompt:
    """One prompt as it was ``given``, a text or messages, and the token ids that the model completes."""

    given: str | Messages
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """All prompts of a run, in their order, and the tokens besides the model's own that end a completion."""

    prompts: tuple[Prompt, ...] = ()
    stops: frozenset[int] = frozenset()

    def line(self, steps: int | None, *, evaluates: bool) -> str:
        """When they are completed, to print before training."""
        when = "at each evaluation and " if evaluates else ""
        if steps is not None:
            when = f"every {plural(steps, 'step')} and " if steps > 1 else "every step and "
        return f"samples: {plural(len(self.prompts), 'prompt')}, completed {when}at the end"


def load(
    wanted: str,
    splits: Mapping[str, Any],
    ready: Callable[[str], Any],
    train: Any,
    tokenizer: Any,
    training: Any,
) -> Prompts:
    """Return the prompts that ``sample_prompts`` names: ``wanted`` is a file, or ``SPLIT:N``.

    ``ready(split)`` returns a split of ``splits`` as a trainer gets it. A text is a message of the user's where the
    rows of ``train`` are conversations, else what the model continues. Raises UserError, with the row at fault.
    """
    path, rows = Path(wanted).expanduser(), _ROWS.fullmatch(wanted)
    if path.exists() or rows is None:
        found, place = list(_of_file(path)), path.name
    else:
        place = rows["split"]
        found = _of_split(splits, place, int(rows["rows"]), ready)
    chats = is_conversational(next(iter(train)))
    encode = _Encode(tokenizer, training, chats)
    prompts = []
    for number, row in found:
        try:
            prompts.append(encode(row))
        except UserError as error:
            raise UserError(error.what, option=_OPTION, split=place, row=number) from error
    return Prompts(tuple(prompts), frozenset(stop_ids(tokenizer, encode.template) if encode.rendered else ()))


class _Encode:
    """Token ids of prompts as the trainer makes them: under its chat template, or as a text with special tokens."""

    def __init__(self, tokenizer: Any, training: Any, chats: bool) -> None:
        self._tokenizer, self._training, self._chats = tokenizer, training, chats
        self.template: str | None = None
        self.rendered = False  # whether a prompt was a conversation

    def __call__(self, row: Mapping[str, Any]) -> Prompt:
        given = _prompt_of(row)
        if wrong := text_or_messages(given, known_roles(self._tokenizer)):
            raise UserError(wrong)
        turns = [{"role": "user", "content": given}] if isinstance(given, str) and self._chats else given
        found = self._tokenizer(turns) if isinstance(turns, str) else self._rendered(turns, row)
        if not (ids := found["input_ids"]):
            raise UserError("the prompt is empty")
        return Prompt(given, tuple(ids))

    def _rendered(self, turns: Messages, row: Mapping[str, Any]) -> Any:
        self.template = training_template(self._tokenizer, self._training)
        self.rendered = True
        options = {"chat_template": self.template, "add_generation_prompt": True, **template_options(row)}
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"the chat template cannot render it: {shorten(first_line(error), 300)}"
            ) from error


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """What of a row comes before the answer."""
    if "prompt" in row:
        return row["prompt"]
    turns = row.get("messages")
    if isinstance(turns, list) and turns:
        answered = isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant"
        if answered and len(turns) == 1:
            raise UserError("no message comes before the assistant's")
        return turns[:-1] if answered else turns
    if {"chosen", "rejected"} <= row.keys():
        return extract_prompt(dict(row))["prompt"]
    columns = ", ".join(map(str, row)) or "none"
    raise UserError(f"no prompt: its columns are {columns}; expected `prompt` or `messages`")


def _of_file(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file of prompts, with the numbers of their lines."""
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = suggestion(path.name, siblings)
        raise UserError(f"{path}: no such file{near}\n  expected {_FORMS}", option=_OPTION)
    if path.suffix not in _FILES:
        raise UserError(f"{path} is not read; expected {_FORMS}", option=_OPTION)
    try:
        contents.refuse(path)
        text = read(path, LONGEST_TEXT).decode("utf-8-sig")
    except UserError as error:
        raise UserError(error.what, option=_OPTION) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", option=_OPTION) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty", option=_OPTION)
    if len(lines) > MOST:
        raise UserError(
            f"{path} has {plural(len(lines), 'prompt')}, and all are completed at every round; at most {MOST}",
            option=_OPTION,
        )
    for number, line in lines:
        row = {"prompt": line.strip()} if path.suffix == ".txt" else json.loads(line)
        if not isinstance(row, dict):
            raise UserError(
                "expected an object with `prompt` or `messages`", option=_OPTION, split=path.name, row=number
            )
        yield number, row


def _of_split(
    splits: Mapping[str, Any], name: str, rows: int, ready: Callable[[str], Any]
) -> list[tuple[int, Mapping[str, Any]]]:
    if not 1 <= rows <= MOST:
        raise UserError(f"{rows} rows; from 1 to {MOST}, as all are completed at every round", option=_OPTION)
    if name not in splits:
        raise UserError(
            f"no split {name!r}{suggestion(name, splits)}\n  found: {', '.join(splits)}", option=_OPTION
        )
    found = list(islice(ready(name), rows))
    if len(found) < rows:
        raise UserError(f"split {name!r} has {plural(len(found), 'row')}", option=_OPTION)
    return list(enumerate(found, 1))
