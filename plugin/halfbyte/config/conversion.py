"""The one conversion of written values to types."""

import dataclasses
import json
import math
import numbers
import re
import shlex
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from halfbyte.config.foreign import PARTS
from halfbyte.config.sources import Node, OptionError, parse_flow, parse_json, shown
from halfbyte.terminal.wording import shorten, suggestion

TRUE, FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")
INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9])*)")
NUMBER = re.compile(r"[+-]?((0|[1-9](_?[0-9])*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# 16 or text, 8 or 10: what libraries and versions of YAML disagree on.
DISPUTED = re.compile(r"[+-]?0([xX][0-9a-fA-F_]+|[oO]?[0-9_]+|[bB][01_]+)")
VARIABLE = re.compile(r"\$\{\w[^}]*\}|\$[A-Za-z_]\w*(?=/|$)")
NOT_FINITE = ("nan", "inf", "infinity")
LISTED = 12  # an error lists at most this many values


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the one type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def origins(hint: Any) -> list[Any]:
    return [typing.get_origin(member) or member for member in members(hint)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of Python's is of the type; one text is a list of texts, as upstream takes it."""
    kinds = dict(zip(origins(hint), members(hint), strict=True))
    if value is None or isinstance(value, bool):
        return type(value) in kinds or Any in kinds
    if isinstance(value, numbers.Real):
        allowed = (int, float, Any) if isinstance(value, numbers.Integral) else (float, Any)
        return any(kind in kinds for kind in allowed) and math.isfinite(value)
    if list in kinds and isinstance(value, str | list | tuple | set):
        item = (*typing.get_args(kinds[list]), Any)[0]
        return all(fits(entry, item) for entry in ([value] if isinstance(value, str) else value))
    if any(kind in (list, int, float, str, bool, type(None)) for kind in kinds) and len(kinds) == 1 + (
        type(None) in kinds
    ):
        return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    return True  # a class, an Enum or a mapping: the class that declares it checks it


def described(hint: Any) -> str:
    """Describe the type, for errors and help."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        list: "a list",
        type(None): "null",
    }
    words = []
    for member, origin in zip(members(hint), origins(hint), strict=True):
        if origin is Literal:
            words += [str(item).lower() for item in typing.get_args(member)]
        elif isinstance(origin, type) and issubclass(origin, Enum):
            words.append("a name")
        else:
            words.append(names.get(origin, "a mapping"))
    return " or ".join(dict.fromkeys(words))


def no_choice(text: str, choices: Sequence[Any], also: str = "") -> str:
    """Describe an unsupported value: all allowed values, or the nearest where there are many."""
    names = [str(choice) for choice in choices]
    near = suggestion(text.lower(), names, most=3)
    if len(names) <= LISTED:
        return f"{shown(text)} is not supported; write one of {', '.join(names)}{also}{near}"
    return f"{shown(text)} is not supported{near or f'; --help all lists the {len(names)} names'}{also}"


def convert(node: Node, hint: Any, choices: Sequence[Any] = ()) -> Any:
    kinds = dict(zip(origins(hint), members(hint), strict=True))
    value = node.value
    if Any in kinds:
        return _untyped(node)
    if value is None:
        if type(None) in kinds:
            return None
        raise OptionError(f"must be {described(hint)}, is null; write a value or leave the line out")
    if isinstance(value, list):
        if list not in kinds:
            raise OptionError(f"must be {described(hint)}, is a list of {len(value)}; write one value")
        item = (*typing.get_args(kinds[list]), Any)[0]
        return [_at(f"[{index}]", entry, item) for index, entry in enumerate(value)]
    if isinstance(value, dict):
        return _mapping(node, value, kinds, hint)
    return _text(node, value, kinds, hint, choices)


def _mapping(node: Node, value: dict[str, Node], kinds: dict[Any, Any], hint: Any) -> Any:
    if dict in kinds:
        inner = (*typing.get_args(kinds[dict]), Any, Any)[1]
        return {key: _at(f".{key}", entry, inner) for key, entry in value.items()}
    record: Any = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if record is None:
        raise OptionError(f"must be {described(hint)}, is a mapping; write one value")
    hints = typing.get_type_hints(record)
    known = {item.name: hints[item.name] for item in dataclasses.fields(record) if item.init}
    for key, entry in value.items():
        if key not in known:
            there = PARTS.get(key) if record.__name__ == "DatasetConfig" else None
            near = f"; {there}" if there else suggestion(key.lower(), known)
            raise OptionError(f"unknown key {shown(key)}{near}", entry.source)
    for item in dataclasses.fields(record):
        if (
            item.init
            and item.default is item.default_factory is dataclasses.MISSING
            and item.name not in value
        ):
            raise OptionError(f"{item.name} is missing; add it")
    try:
        return record(**{key: _at(f".{key}", entry, known[key]) for key, entry in value.items()})
    except (TypeError, ValueError) as error:
        raise OptionError(shorten(" ".join(str(error).split()), 200).replace(".__init__()", "")) from error


def _at(path: str, node: Node, hint: Any) -> Any:
    try:
        return convert(node, hint)
    except OptionError as error:
        raise OptionError(str(error), error.source or node.source, shorten(path) + error.path) from error


def _text(node: Node, text: str, kinds: dict[Any, Any], hint: Any, choices: Sequence[Any]) -> Any:
    lowered = text.lower()
    if str in kinds and text in choices:
        return text
    free_text = str in kinds and not choices and dict not in kinds
    if type(None) in kinds and node.plain and not free_text and lowered in ("none", "null", "~"):
        return None
    for choice in typing.get_args(kinds.get(Literal)):
        if text == choice or (not isinstance(choice, str) and lowered == str(choice).lower()):
            return choice
    if bool in kinds and lowered in (*TRUE, *FALSE):
        return lowered in TRUE
    if int in kinds and INTEGER.fullmatch(text):
        return _integer(text)
    if float in kinds and NUMBER.fullmatch(text):
        return _number(text)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            for item in kind:
                if text == str(item.value):
                    return text if str in kinds else item
    if list in kinds and text.startswith("["):
        # A regular expression such as [qv]_proj may begin with [ too: text that is no list stays text.
        try:
            listed = parse_json(text, node.source) if node.source.file else parse_flow(text, node.source)
        except OptionError:
            if str not in (*kinds, *typing.get_args(kinds[list])):
                raise
        else:
            if not choices and str in (*kinds, *typing.get_args(kinds[list])):
                _refuse_either(node, text, listed)
            return convert(listed, hint, choices)
    record = any(dataclasses.is_dataclass(kind) for kind in kinds)
    if (dict in kinds or record) and (text.startswith("{") or str not in kinds):
        if not text.lstrip().startswith("{"):
            raise OptionError(f"must be a mapping, on the command line '{{name: value}}', is {shown(text)}")
        read = parse_json if node.source.file else parse_flow
        return convert(read(text, node.source), hint, choices)
    if (str in kinds or Path in kinds) and node.source.file and VARIABLE.search(text):
        raise OptionError(
            f"{shown(text)}: variables are not expanded in a file; write the value, or give the option on the "
            f"command line, where the shell expands them"
        )
    if str in kinds:
        return text
    if Path in kinds:
        return Path(text)
    if list in kinds:
        return [convert(node, (*typing.get_args(kinds[list]), Any)[0], choices)]
    if lowered.lstrip("+-.") in NOT_FINITE:
        raise OptionError(f"must be a finite number, is {shorten(text)}")
    enums = [
        str(item.value)
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Enum)
        for item in kind
    ]
    if enums := enums or [str(item) for item in typing.get_args(kinds.get(Literal))]:
        raise OptionError(no_choice(text, enums))
    raise OptionError(f"must be {described(hint)}, is {shown(text)}")


def _refuse_either(node: Node, text: str, listed: Node) -> None:
    """Refuse ``[INST]`` on the command line: the text itself, or a list of one text."""
    items = listed.value
    if isinstance(items, list) and len(items) == 1 and items[0].plain and isinstance(items[0].value, str):
        itself, item = shlex.quote(json.dumps([text])), shlex.quote(items[0].value)
        raise OptionError(
            f"{shown(text)} is a text or a list of one; write {node.source} {shorten(itself, 200)} or "
            f"{node.source} {shorten(item, 200)}"
        )


def _integer(text: str) -> int:
    if len(text) > 25 or abs(int(text)) >= 2**63:
        raise OptionError(f"must be a whole number below 2^63, is {shorten(text)}")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise OptionError(f"must be a finite number, is {shorten(text)}")
    return value


def _untyped(node: Node) -> Any:
    """Convert a value inside a free mapping: plain text is a boolean, a number or text."""
    if isinstance(node.value, list):
        return [_at(f"[{index}]", item, Any) for index, item in enumerate(node.value)]
    if isinstance(node.value, dict):
        return {key: _at(f".{key}", item, Any) for key, item in node.value.items()}
    if node.value is None or not node.plain:
        return node.value
    text, lowered = node.value, node.value.lower()
    if lowered in ("true", "yes", "on", "false", "no", "off"):
        return lowered in TRUE
    if INTEGER.fullmatch(text):
        return _integer(text)
    if NUMBER.fullmatch(text):
        return _number(text)
    if lowered.lstrip("+-.") in NOT_FINITE:
        raise OptionError(f"must be a finite number, is {text}")
    if DISPUTED.fullmatch(text):
        raise OptionError(f"{shown(text)}: write a decimal number, or put text in quotes")
    return text
