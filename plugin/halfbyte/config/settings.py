"""The settings of a run, resolved: default < YAML < command line, and the dataclasses built from them."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from halfbyte.config.fields import Field, default_of
from halfbyte.config.sources import Source
from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten

# Upstream's deprecated spelling is the one with TRL's defaults; both spellings are set to the same value,
# because its __post_init__ lets `activation_checkpointing` win over a user's `gradient_checkpointing: false`.
ALIASES = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)


class Settings:
    """Every option with its value: what the user wrote, over the defaults of the dataclasses.

    Immutable: a later decision makes a new value (:meth:`with_values`, :meth:`with_defaults`). ``given`` maps
    each key that the user wrote to its Source; ``settings[key]`` is the value in the type of its field.
    """

    def __init__(self, classes: Sequence[type], fields: Mapping[str, Field], values: Mapping[str, Any],
                 given: Mapping[str, Source], prog: str) -> None:  # fmt: skip
        self.given: Mapping[str, Source] = MappingProxyType(dict(given))
        self._classes, self._fields, self._prog = tuple(classes), fields, prog
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def with_values(self, **values: Any) -> "Settings":
        """Return these settings with ``values``, whatever the user wrote: what a run has decided and printed."""
        unknown = values.keys() - self._values.keys()
        assert not unknown, f"no field is named {', '.join(sorted(unknown))}"
        return Settings(self._classes, self._fields, {**self._values, **values}, self.given, self._prog)

    def with_defaults(self, **values: Any) -> "Settings":
        """Return these settings with the ``values`` of those keys that the user did not write."""
        return self.with_values(**{key: value for key, value in values.items() if key not in self.given})

    def also_given(self, key: str, other: str) -> "Settings":
        """Return these settings with ``key`` set, and given, as the user gave it under the name ``other``."""
        values = {**self._values, key: self._values[other]}
        given = {**self.given, key: self.given.get(key, self.given[other])}
        return Settings(self._classes, self._fields, values, given, self._prog)

    def at(self, key: str) -> str:
        """Return the head of an error message about ``key``: where the user wrote it, or its name."""
        return self.given[key].at(key) if key in self.given else key

    def placed(self, error: UserError) -> UserError:
        """Put the place where the user wrote ``error.option`` into ``error``, and return it.

        The option may be a place within a value, such as ``datasets[0].path``. Where no adapter is given, the model is.
        """
        if error.option is None or error.place is not None:
            return error
        key, path = re.fullmatch(r"([^.\[]*)(.*)", error.option, re.DOTALL).groups()  # type: ignore[union-attr]
        if key == "adapter_name_or_path" and key not in self.given:
            key = "model_name_or_path"
        if key in self.given:
            source = self.given[key]
            error.place = dataclasses.replace(source, line=source.inner.get(path, source.line)).at(key, path)
        return error

    def refusal(self, error: Exception, otherwise: str) -> UserError:
        """Turn an upstream error into a UserError under the places of the options that it names.

        ``otherwise`` is its head where it names none that the user wrote.
        """
        text = " ".join(str(error).split())
        named = [key for key in self.given if names_option(text, key)]
        place = ", ".join(map(self.at, named)) or otherwise
        return UserError(shorten(text, 600), option=named[0] if len(named) == 1 else None, place=place)

    def build(self) -> tuple[Any, ...]:
        """Construct one instance of each dataclass, in the order they were given to ``read``.

        Raises UserError for what their ``__post_init__`` refuses, with the places of the keys it names.
        """
        return tuple(self._construct(owner) for owner in self._classes)

    def check(self, owner: type) -> None:
        """Raise UserError for what the rules of ``owner``, one of the dataclasses, refuse."""
        self._construct(owner)

    def resolved(self) -> dict[str, Any]:
        """Return every value by key, in the types of JSON."""
        return {key: _jsonable(value) for key, value in self._mirrored().items()}

    def _mirrored(self) -> dict[str, Any]:
        values = dict(self._values)
        values.update({new: values[old] for old, new in ALIASES if old in values})
        return values

    def _construct(self, owner: type) -> Any:
        values, arguments = self._mirrored(), {}
        for declared in dataclasses.fields(owner):
            if declared.init and declared.name in values:
                value = values[declared.name]
                required = declared.default is declared.default_factory is dataclasses.MISSING
                if required or declared.name in self.given or value != default_of(declared):
                    arguments[declared.name] = copy.deepcopy(value)
        try:
            return owner(**arguments)
        except UserError as error:
            raise self.placed(error) from error.__cause__
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            raise self.refusal(error, f"{self._prog}: {owner.__name__}") from error


def names_option(text: str, key: str) -> bool:
    """Whether an upstream message ``text`` names ``key`` as an option.

    A plain English word (fast, seed, dtype) does so only as ``--key``, ``key=`` or within quotes or backticks;
    a name with an underscore or a digit also where it stands as a word.
    """
    name = re.escape(key)
    marked = rf"([`'\"]){name}\1|(?<![\w-])--{name}(?![\w-])|(?<![\w-]){name}=(?!=)"
    if not key.isalpha():
        marked += rf"|(?<![\w-]){name}(?![\w-])"
    return re.search(marked, text) is not None


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _jsonable(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return _jsonable(value.value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    assert value is None or isinstance(value, str | int | float | bool), f"{value!r} is not JSON-able"
    return value
