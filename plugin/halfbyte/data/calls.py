"""Arguments of tool calls as the chat template prints them: an object, or the JSON text that OpenAI writes."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from halfbyte.data.chat.rendering import Messages, rendered
from halfbyte.data.glance import is_list, is_text

OBJECT, TEXT = "object", "text"
_PROBE = {"k7fae": "v7fae"}


def form(tokenizer: Any, template: str | None = None) -> str | None:
    """The form of arguments that a chat template requires; None where it prints both alike, or none.

    A template that puts JSON around them prints text a second time quoted; one that prints them as they stand prints
    an object as Python does.
    """
    given, text = (_rendered(tokenizer, template, each) for each in (_PROBE, json.dumps(_PROBE)))
    if "k7fae" in given and "'k7fae'" not in given:
        return None if given == text else OBJECT
    return TEXT if '"k7fae"' in text else None


def rewritten(message: Mapping[str, Any], wanted: str) -> list[Any]:
    """The calls of a message with arguments in the ``wanted`` form; text that is no JSON object stays as it is."""
    return [_call(call, wanted) for call in message["tool_calls"]]


def has(dataset: Any, column: str, wanted: str) -> bool:
    """Whether a column of a Dataset may have calls whose arguments are not in the ``wanted`` form."""
    return any(differ(chunk, wanted) for chunk in dataset.data.column(column).chunks)


def differ(array: pa.Array, wanted: str) -> bool:
    """Whether an array of messages may have calls whose arguments are not in the ``wanted`` form."""
    if isinstance(array.type, pa.BaseExtensionType):
        sign = '"arguments":"' if wanted == OBJECT else '"arguments":{'
        return bool(pc.any(pc.match_substring(array.storage, sign)).as_py())
    if pa.types.is_struct(array.type):
        return any(
            (
                field.name == "arguments"
                and (wanted == OBJECT) == is_text(field.type)
                and part.null_count < len(part)
            )
            or differ(part, wanted)
            for field, part in zip(array.type, array.flatten(), strict=True)
        )
    if is_list(array.type):
        return differ(array.flatten(), wanted)
    return False


def _rendered(tokenizer: Any, template: str | None, arguments: Any) -> str:
    call = {"type": "function", "id": "a7fae0000", "function": {"name": "f", "arguments": arguments}}
    for content in ("", None):
        turns: Messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
        if (text := rendered(tokenizer, turns, template)) is not None:
            return text
    return ""


def _call(call: Any, wanted: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], wanted)}
    held = call.get("arguments")
    if wanted == TEXT and isinstance(held, Mapping):
        return {**call, "arguments": json.dumps(held, ensure_ascii=False)}
    if wanted == OBJECT and isinstance(held, str):
        try:
            read = json.loads(held) if held.strip() else {}
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": read} if isinstance(read, Mapping) else call
    return call
