"""The fields of the dataclasses, and the one conversion of written values to their types."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from halfbyte.config.limits import COUNTS, choices_for, range_for
from halfbyte.config.sources import Node, OptionError, parse_json, shown
from halfbyte.errors import UserError
from halfbyte.wording import shorten, suggestion

TRUE, FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")
INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9])*)")
NUMBER = re.compile(r"[+-]?([0-9](_?[0-9])*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = ("nan", "inf", "infinity")
LISTED = 12  # an error lists at most this many values


@dataclasses.dataclass(frozen=True)
class Field:
    """One option: the dataclass that declares it, its type, default, help and allowed values."""

    name: str
    owner: type
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...]

    def convert(self, node: Node) -> Any:
        """Return the value of `node` in this field's type; raises OptionError, which says what to write."""
        value = _convert(node, self.type, self.choices)
        if self.name in COUNTS and isinstance(value, float) and value >= 1 and value.is_integer():
            value = int(value)
        self._check_choices(value)
        if (limit := range_for(self.name, self.default)) and isinstance(value, int | float):
            words, check = limit
            if not isinstance(value, bool) and not check(value):
                raise OptionError(f"must be {words}, is {value}")
        return value

    def _check_choices(self, value: Any) -> None:
        if not self.choices or value is None:
            return
        items = value if isinstance(value, list) else [value]
        if list in _origins(self.type) and isinstance(value, str) and str in members(self.type):
            items = value.split()  # `debug` takes several names in one text
        for item in items:
            item = item.value if isinstance(item, Enum) else item
            if isinstance(item, str) and item not in self.choices:
                others = [member for member in members(self.type) if member in (bool, int, float)]
                also = f", or {described(Union[tuple(others)])}" if others else ""  # noqa: UP007
                raise OptionError(_no_choice(item, self.choices, also))

    @property
    def flag(self) -> bool:
        """Whether a bare `--name` means true."""
        return bool in members(self.type)


def fields_of(classes: Iterable[type]) -> dict[str, Field]:
    """Return every option of `classes` by name; a redeclared field keeps the help and choices it inherits.

    Raises UserError for a field whose name the command line reserves.
    """
    found: dict[str, Field] = {}
    for owner in classes:
        hints = typing.get_type_hints(owner)
        for declared in dataclasses.fields(owner):
            if not declared.init:
                continue
            name = declared.name
            if name in ("config", "help"):
                raise UserError(
                    f"--{name} is reserved; give the field another name", option=f"{owner.__name__}.{name}"
                )
            metadata: dict[str, Any] = {}
            for base in reversed(owner.__mro__):
                metadata |= dict(getattr(base, "__dataclass_fields__", {}).get(name, declared).metadata)
            hint = _widened(name, hints[name], metadata)
            choices = choices_for(
                owner, name, metadata, [m for t in members(hint) for m in (t, *typing.get_args(t))]
            )
            help = " ".join(str(metadata.get("help", "")).split())
            found.setdefault(name, Field(name, owner, hint, default_of(declared), help, choices))
    return found


def _widened(name: str, hint: Any, metadata: dict[str, Any]) -> Any:
    """Return the type as upstream uses it: `fsdp` takes a bare flag, `*_kwargs` are never paths."""
    if metadata.get("const") is True:
        return bool | hint
    if name.endswith("_kwargs") and dict in _origins(hint):
        return Union[tuple(member for member in members(hint) if member is not str)]  # noqa: UP007
    return hint


def default_of(declared: "dataclasses.Field[Any]") -> Any:
    """Return the class's default of a field, None where it has none."""
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return None if declared.default is dataclasses.MISSING else declared.default


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the one type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _origins(hint: Any) -> list[Any]:
    return [typing.get_origin(member) or member for member in members(hint)]


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
    for member, origin in zip(members(hint), _origins(hint), strict=True):
        if origin is Literal:
            words += [str(item).lower() for item in typing.get_args(member)]
        elif isinstance(origin, type) and issubclass(origin, Enum):
            words.append("a name")
        else:
            words.append(names.get(origin, "a mapping"))
    return " or ".join(dict.fromkeys(words))


def _no_choice(text: str, choices: Sequence[Any], also: str = "") -> str:
    """Describe an unsupported value: all allowed values, or the nearest where there are many."""
    names = [str(choice) for choice in choices]
    near = suggestion(text.lower(), names, most=3)
    if len(names) <= LISTED:
        return f"{shown(text)} is not supported; write one of {', '.join(names)}{also}{near}"
    return f"{shown(text)} is not supported{near or f'; --help all lists the {len(names)} names'}{also}"


def _convert(node: Node, hint: Any, choices: Sequence[Any] = ()) -> Any:
    kinds = dict(zip(_origins(hint), members(hint), strict=True))
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
    known = fields_of([record])
    for key, entry in value.items():
        if key not in known:
            raise OptionError(f"unknown key {shown(key)}{suggestion(key.lower(), known)}", entry.source)
    for item in dataclasses.fields(record):
        if (
            item.init
            and item.default is item.default_factory is dataclasses.MISSING
            and item.name not in value
        ):
            raise OptionError(f"{item.name} is missing; add it")
    try:
        return record(**{key: _at(f".{key}", entry, known[key].type) for key, entry in value.items()})
    except (TypeError, ValueError) as error:
        raise OptionError(shorten(" ".join(str(error).split()), 200).replace(".__init__()", "")) from error


def _at(path: str, node: Node, hint: Any) -> Any:
    try:
        return _convert(node, hint)
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
        # A regular expression such as [qv]_proj may begin with [ too: text that is not JSON stays text.
        try:
            return _convert(parse_json(text, node.source), hint, choices)
        except OptionError:
            if str not in (*kinds, *typing.get_args(kinds[list])):
                raise
    record = any(dataclasses.is_dataclass(kind) for kind in kinds)
    if (dict in kinds or record) and (text.startswith("{") or str not in kinds):
        if not text.lstrip().startswith("{"):
            raise OptionError(f"must be a mapping (JSON on the command line), is {shown(text)}")
        return _convert(parse_json(text, node.source), hint, choices)
    if str in kinds:
        return text
    if Path in kinds:
        return Path(text)
    if list in kinds:
        return [_convert(node, (*typing.get_args(kinds[list]), Any)[0], choices)]
    if lowered.lstrip("+-.") in NOT_FINITE:
        raise OptionError(f"must be a finite number, is {shorten(text)}")
    enums = [
        str(item.value)
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Enum)
        for item in kind
    ]
    if enums := enums or [str(item) for item in typing.get_args(kinds.get(Literal))]:
        raise OptionError(_no_choice(text, enums))
    raise OptionError(f"must be {described(hint)}, is {shown(text)}")


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
        return [_untyped(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: _untyped(item) for key, item in node.value.items()}
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
    return text
