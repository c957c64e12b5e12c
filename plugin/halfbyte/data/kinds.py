"""What one column of a row may hold: text, token ids, a truth value, a conversation."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from halfbyte.data.conversion.turns import SPEAKERS, TURN_WEIGHTS
from halfbyte.terminal.wording import shorten

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

# A kind returns what is wrong with one value, or None; the roles are those that the chat template knows.
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


def boolean(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """True or false; 1 and 0 are refused."""
    return None if isinstance(value, bool) else f"expected true or false, found {describe(value)}"


def number(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A finite number; true and false are refused."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return None
    return f"expected a finite number, found {describe(value)}"


def messages(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A conversation: ``[{"role": ..., "content": ...}, ...]``."""
    return _conversation(value, roles)


def text_or_messages(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A string or a conversation."""
    if isinstance(value, str):
        return None
    if isinstance(value, list):
        return messages(value, roles)
    return f"expected a string or a list of messages, found {describe(value)}"


def _conversation(value: Any, roles: Collection[str]) -> str | None:
    if not isinstance(value, list):
        return f"expected a list of messages, found {describe(value)}"
    if not value:
        return "the conversation is empty"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return (
                f"message {number}: expected a mapping with 'role' and 'content', found {describe(message)}"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            keys = ", ".join(sorted(key for key, held in message.items() if held is not None)) or "none"
            return f"message {number}: 'role' is {describe(role)}, must be a string; its keys: {keys}"
        if role not in roles:
            return f"message {number}: {unknown_roles(_roles(value) - set(roles), roles)}"
        if isinstance(content, list) and (wrong := next(filter(None, map(unlike_text, content)), None)):
            return f"message {number}: 'content' has {wrong}"
        spoken = isinstance(content, str) or (isinstance(content, list) and content)
        if not spoken and not (content is None and message.get("tool_calls")):
            keys = ", ".join(sorted(key for key, held in message.items() if held is not None))
            return f"message {number}: 'content' is {describe(content)}, must be a string; its keys: {keys}"
        weights = [key for key in TURN_WEIGHTS if message.get(key) not in (None, 1)]
        if (
            weights and role == "assistant"
        ):  # of other turns `assistant_only_loss` and `completion_only_loss` decide
            return (
                f"message {number}: {weights[0]!r} is {describe(message[weights[0]])}, but single turns are not left "
                "out of the loss; write the turns to train on as `completion` after a `prompt`, and remove the key"
            )
    return None


def unlike_text(part: Any) -> str | None:
    """What one part of a message's content is, if it is not text."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return None
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        return f"a part of type {shorten(kind)!r}; training is on text: leave such rows out"
    return f'{describe(part)} as a part; write {{"type": "text", "text": ...}}'


def _roles(value: list[Any]) -> set[str]:
    found = {turn.get("role") for turn in value if isinstance(turn, dict)}
    return {role for role in found if isinstance(role, str)}


def unknown_roles(names: Collection[str], roles: Collection[str] = ROLES) -> str:
    """What is wrong with roles that the chat template does not know."""
    known = SPEAKERS.keys() & names
    return (
        f"the chat template knows no role {', '.join(map(repr, sorted(names)))}, "
        f"expected one of {', '.join(sorted(roles))}"
        + (
            f"; write {', '.join(f'{SPEAKERS[name]!r} for {name!r}' for name in sorted(known))}"
            if known
            else ""
        )
    )


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
