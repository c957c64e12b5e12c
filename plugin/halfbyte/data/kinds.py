"""What one column of a row may hold: text, token ids, a truth value, a conversation."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from halfbyte.wording import shorten

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

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


def messages(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A conversation: ``[{"role": ..., "content": ...}, ...]``."""
    return _conversation(value, roles, "role", "content")


def from_value(value: Any, roles: Collection[str] = ROLES) -> str | None:
    """A conversation in ShareGPT format: ``[{"from": ..., "value": ...}, ...]``."""
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
        if isinstance(content, list) and (wrong := next(filter(None, map(unlike_text, content)), None)):
            return f"message {number}: {what!r} has {wrong}"
        spoken = isinstance(content, str) or (isinstance(content, list) and content)
        if not spoken and not (content is None and message.get("tool_calls")):
            keys = ", ".join(sorted(key for key, held in message.items() if held is not None))
            return f"message {number}: {what!r} is {describe(content)}, must be a string; its keys: {keys}"
    return None


def unlike_text(part: Any) -> str | None:
    """What one part of a message's content is, if it is not text."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return None
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        return f"a part of type {shorten(kind)!r}; text models only: leave such rows out"
    return f'{describe(part)} as a part; write {{"type": "text", "text": ...}}'


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
