"""Turns of a conversation as other systems write them, read as messages."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from halfbyte.data.glance import is_list

# The keys under which a turn says who speaks, and what; the first of each is TRL's, the other ShareGPT's.
WHO, WHAT = ("role", "from"), ("content", "value")
# Speakers of the ShareGPT format and its relatives, by the role that chat templates know.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
# Those whose turns are calls of tools, as JSON.
_CALLERS = ("function_call", "tool_call")

# Keys by which other systems leave single turns out of the loss.
TURN_WEIGHTS = ("weight", "train", "training", "loss")

Message = dict[str, Any]


class UnreadableError(ValueError):
    """A row that is not what its conversion expects; the message says why."""


def shape(value: Any) -> str | None:
    """``text``, ``message`` (one turn), ``talk`` (a list of turns), or None for anything else."""
    if isinstance(value, str):
        return "text"
    if _is_turn(value):
        return "message"
    return "talk" if isinstance(value, list) and value and _is_turn(value[0]) else None


def plain(value: Any) -> bool:
    """Whether a list of turns has none of ShareGPT's keys."""
    return not any(isinstance(turn, Mapping) and {"from", "value"} & turn.keys() for turn in value)


def messages(value: Any, roles: Mapping[str, str]) -> list[Message]:
    """One turn or a list of them as messages, ``roles`` renaming speakers; a key that holds null is left out.

    Raises UnreadableError for a turn that says who speaks, or what, twice.
    """
    found: list[Message] = []
    for turn in value if isinstance(value, list) else [value]:
        message = _message(turn, roles)
        if found and message.keys() == found[-1].keys() == {"role", "content", "tool_calls"}:
            found[-1]["tool_calls"] += message["tool_calls"]  # calls in a row are one message
        else:
            found.append(message)
    return found


def speakers(dataset: Any, columns: list[str]) -> set[str]:
    """Everyone who speaks in ``columns`` of a Dataset; they may hold conversations, single turns, text or nulls."""
    found: set[str] = set()
    for name in columns:
        one = dataset.select_columns([name])
        for table in one.with_format("arrow").iter(batch_size=10_000):
            array = table[name].combine_chunks()
            while is_list(array.type):
                array = array.flatten()
            if pa.types.is_struct(array.type):
                said = [array.field(who).unique().to_pylist() for who in WHO if who in array.type.names]
                found |= {who for whos in said for who in whos if isinstance(who, str)}
            elif isinstance(
                array.type, pa.BaseExtensionType
            ):  # rows that differ in their keys are kept as JSON
                found |= {who for row in one for who in speaking(row[name])}
                break
    return found


def speaking(value: Any) -> Iterator[str]:
    """Everyone who speaks in one value."""
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, Mapping):
            yield from (turn[who] for who in WHO if isinstance(turn.get(who), str))


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(value.get(who), str) for who in WHO)


def _message(turn: Any, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping):
        raise UnreadableError(f"a turn must be a mapping, is {type(turn).__name__}")
    role, content = _either(turn, WHO), _either(turn, WHAT)
    if role in _CALLERS and role in roles:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    rest = {key: held for key, held in turn.items() if key not in (*WHO, *WHAT) and held is not None}
    return {"role": roles.get(role, role) if isinstance(role, str) else role, "content": content, **rest}


def _either(turn: Mapping[str, Any], keys: tuple[str, str]) -> Any:
    held = [turn[key] for key in keys if turn.get(key) is not None]
    if len(held) == 2 and held[0] != held[1]:
        raise UnreadableError(f"a turn has both {keys[0]!r} and {keys[1]!r}, and they differ; keep one")
    return held[0] if held else None


def _calls(content: Any) -> list[dict[str, Any]]:
    """The calls of a turn such as ``{"name": "f", "arguments": {}}``, or a list of them, as JSON text."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
        found = [
            {"type": "function", "function": {"name": call["name"], "arguments": _arguments(call)}}
            for call in (found if isinstance(found, list) else [found])
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableError(
            'a call of a tool must be JSON: {"name": ..., "arguments": {...}}, or a list of such calls'
        ) from error
    return found


def _arguments(call: Mapping[str, Any]) -> Any:
    held = call["arguments"]
    return json.loads(held) if isinstance(held, str) else held
