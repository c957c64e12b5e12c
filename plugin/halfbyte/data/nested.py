"""Conversations and tools as one meaning, whatever the file format that they came in.

Arrow gives every row the keys of all rows, and a key that a row never had reads as null. What a file of structs cannot
tell apart is one thing in every format: a key that holds null is a key that is absent. Text is left alone, so a null
that matters can be kept in ``tools`` that are written as JSON text.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from halfbyte.data import calls
from halfbyte.data.chat.rendering import rendered
from halfbyte.data.glance import is_list
from halfbyte.data.kinds import unlike_text
from halfbyte.errors import UserError

# Columns that may be rendered with the chat template.
COLUMNS = frozenset(
    {
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "messages",
        "conversations",
        "tools",
        "chat_template_kwargs",
    }
)
_BATCH = 1000
# In JSON text: a key that holds null, and those that clients write into every message.
_NULL = r'[^\\]":null'
_OWN_NULL = (
    r'[^\\]"(?:content|tool_calls|function_call|refusal|audio|name|tool_call_id|reasoning_content)":null'
)
_PROBES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
)


def joins(tokenizer: Any, template: str | None = None) -> bool:
    """Whether a chat template prints ``content`` as it is, so that lists of text parts must become their text."""
    for roles in _PROBES:
        said = [{"role": role, "content": f"7fae{n}"} for n, role in enumerate(roles)]
        if (
            rendered(tokenizer, said, template) is None
        ):  # a template of lists alone, or without one of the roles
            continue
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in said]
        text = rendered(tokenizer, parts, template)
        if (
            text is None
            or "'type'" in text
            or '"type"' in text
            or any(t["content"] not in text for t in said)
        ):
            return True
    return False


def settle(
    dataset: Any, columns: Collection[str] = COLUMNS, join: bool = False, form: str | None = None
) -> Any:
    """Return a Dataset or IterableDataset without keys that hold null in the nested values of ``columns``.

    With ``join`` text parts of messages become their text; with a ``form`` (of :mod:`halfbyte.data.calls`) arguments of
    tool calls take it. Rows without ``chat_template_kwargs`` get empty ones where
    other rows have some. A Dataset that has nothing to change is returned as it is.
    """
    streaming = isinstance(dataset, datasets.IterableDataset)
    features = dataset.features
    if features is None and (first := next(iter(dataset.with_format("arrow")), None)) is not None:
        # A stream of a JSON array: mappings would be read as the JSON text that Arrow stores.
        features = datasets.Features.from_arrow_schema(first.schema)
        dataset = dataset.cast(features)
    nested = {name: kind for name in columns if (kind := _form(name, (features or {}).get(name))) is not None}
    if not streaming:
        nested = {n: kind for n, kind in nested.items() if _changes(dataset.data.column(n), n, join, form)}
    if not nested:
        return dataset
    options = {"features": datasets.Features({**features, **nested})}
    if streaming:
        return dataset.map(
            _settled, fn_kwargs={"columns": sorted(nested), "join": join, "form": form}, **options
        )
    return dataset.map(
        _settled_batch,
        batched=True,
        batch_size=_BATCH,
        fn_kwargs={"columns": sorted(nested), "join": join, "form": form},
        **options,
    )


def alike(parts: Iterable[Any]) -> list[Any]:
    """Return data sets with the nested columns in which they differ in one form, so that they can be concatenated.

    A part that lacks such a column, or has nothing in it, gets it with nulls or what it has. Raises UserError for a
    column that is nested in one part and text in another.
    """
    parts = list(parts)
    held = [part.features for part in parts]
    kinds = {n: kind for f in held for n in f or () if (kind := _form(n, f[n])) is not None}
    for name in kinds:
        if odd := [kind for f in held if f and (kind := f.get(name)) == datasets.Value("string")]:
            numbers = [f"datasets[{at}]" for at, f in enumerate(held) if f and f.get(name) == odd[0]]
            raise UserError(
                f"column {name!r} is text in {', '.join(numbers)} and nested in another part; write it in one form"
            )
    differ = {n: kind for n, kind in kinds.items() if len({repr((f or {}).get(n)) for f in held}) > 1}
    return [_converted(part, differ) for part in parts]


def written_nulls(dataset: Any, columns: Collection[str] = COLUMNS) -> list[str]:
    """The columns of a Dataset that hold JSON with a null that its author wrote, and not Arrow.

    Messages are not looked at themselves, only what they nest: templates read their keys with null as absent.
    """
    found = []
    for name in sorted(set(columns) & set(dataset.column_names)):
        texts = (text for chunk in dataset.data.column(name).chunks for text in _json_texts(chunk))
        for text in texts:
            nulls, own = (
                pc.sum(pc.count_substring_regex(text, pattern)).as_py() or 0 for pattern in (_NULL, _OWN_NULL)
            )
            if nulls > own:
                found.append(name)
                break
    return found


def loosened(features: Any, columns: Collection[str]) -> Any:
    """The features with the mappings of ``columns`` as JSON, whose keys may change; None of None."""
    if features is None:
        return None
    return datasets.Features({n: (_as_json(f) if n in columns else None) or f for n, f in features.items()})


def _converted(part: Any, kinds: Mapping[str, Any]) -> Any:
    features = part.features
    if features is None or not kinds:
        return part
    own = {name: _as_json(features.get(name)) or kind for name, kind in kinds.items()}
    return part.map(
        _settled_batch,
        batched=True,
        batch_size=_BATCH,
        fn_kwargs={"columns": sorted(own), "join": False},
        features=datasets.Features({**features, **own}),
    )


def _settled_batch(
    batch: dict[str, list[Any]], columns: list[str], join: bool, form: str | None = None
) -> dict[str, list[Any]]:
    absent = [None] * len(next(iter(batch.values())))
    return {name: [_column(name, value, join, form) for value in batch.get(name, absent)] for name in columns}


def _settled(row: dict[str, Any], columns: list[str], join: bool, form: str | None) -> dict[str, Any]:
    return {**row, **{name: _column(name, row[name], join, form) for name in columns if name in row}}


def _column(name: str, value: Any, join: bool, form: str | None) -> Any:
    if name == "chat_template_kwargs" and value is None:
        return {}
    return _without_nulls(value, join, form)


def _without_nulls(value: Any, join: bool, form: str | None) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item, join, form) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_nulls(held, join, form) for key, held in value.items() if held is not None}
    if form is not None and "role" in kept and isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = calls.rewritten(kept, form)
    for key in ("content", "value") if join and ("role" in kept or "from" in kept) else ():
        parts = kept.get(key)
        if isinstance(parts, list) and parts and not any(map(unlike_text, parts)):
            kept[key] = "".join(part["text"] for part in parts)
    return kept


def _form(name: str, feature: Any) -> Any:
    """The feature as :func:`_as_json` has it, also of a column that holds nothing but empty lists, or no options."""
    if feature == datasets.List(datasets.Value("null")):
        return datasets.List(datasets.Json())
    if name == "chat_template_kwargs" and feature == datasets.Value("null"):
        return datasets.Json()
    return _as_json(feature)


def _as_json(feature: Any) -> Any:
    """The feature with its outermost mappings as JSON, which keeps the keys of each row; None without mappings."""
    if isinstance(feature, dict | datasets.Json):
        return datasets.Json()
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _as_json(feature.feature)
        return None if inner is None else datasets.List(inner)
    return None


def _changes(column: pa.ChunkedArray, name: str, join: bool, form: str | None) -> bool:
    """Whether any value of a column could change."""
    if name == "chat_template_kwargs" and column.null_count:
        return True
    return any(
        _holds_null(chunk, join)
        or (join and _lists_content(chunk.type))
        or (form is not None and calls.differ(chunk, form))
        for chunk in column.chunks
    )


def _holds_null(array: pa.Array, join: bool) -> bool:
    """Whether a key of a mapping may hold null; of JSON, also whether a list may be content, with ``join``."""
    if isinstance(array.type, pa.BaseExtensionType):
        signs = ('":null', '"text"') if join else ('":null',)
        return any(pc.any(pc.match_substring(array.storage, sign)).as_py() for sign in signs)
    if pa.types.is_struct(array.type):
        return any(field.null_count or _holds_null(field, join) for field in array.flatten())
    if is_list(array.type):
        return _holds_null(array.flatten(), join)
    return False


def _lists_content(kind: pa.DataType) -> bool:
    """Whether mappings of a type have a ``content`` that is a list."""
    if is_list(kind):
        return _lists_content(kind.value_type)
    return pa.types.is_struct(kind) and any(
        (field.name in ("content", "value") and not pa.types.is_string(field.type))
        or _lists_content(field.type)
        for field in kind
    )


def _json_texts(array: pa.Array) -> Iterator[pa.Array]:
    if isinstance(array.type, pa.BaseExtensionType):
        yield array.storage
    elif pa.types.is_struct(array.type):
        for field in array.flatten():
            yield from _json_texts(field)
    elif is_list(array.type):
        yield from _json_texts(array.flatten())
