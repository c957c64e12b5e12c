"""The options: one for each field of the dataclasses, with its type, default, help and allowed values."""

import dataclasses
import typing
from collections.abc import Iterable
from enum import Enum
from typing import Any, Union

from halfbyte.config.conversion import convert, described, fits, members, no_choice, origins
from halfbyte.config.limits import COUNTS, choices_for, largest_for, range_for
from halfbyte.config.sources import Node, OptionError, shown
from halfbyte.errors import UserError


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
        value = convert(node, self.type, self.choices)
        if self.name in COUNTS and isinstance(value, float) and value >= 1 and value.is_integer():
            value = int(value)
        self._check(value)
        return value

    def check(self, value: Any) -> None:
        """Raise OptionError for a value of Python's that is not of this field's type, or not allowed."""
        if not fits(value, self.type):
            raise OptionError(f"must be {described(self.type)}, is {shown(value)}")
        self._check(value)

    def _check(self, value: Any) -> None:
        self._check_choices(value)
        if (limit := range_for(self.name, self.default)) and isinstance(value, int | float):
            words, check = limit
            if not isinstance(value, bool) and not check(value):
                raise OptionError(f"must be {words}, is {value}")
            if value > largest_for(self.name):
                raise OptionError(f"must be {words}, and at most {largest_for(self.name):g}, is {value}")
        return value

    def _check_choices(self, value: Any) -> None:
        if not self.choices or value is None:
            return
        items = value if isinstance(value, list) else [value]
        if list in origins(self.type) and isinstance(value, str) and str in members(self.type):
            items = value.split()  # `debug` takes several names in one text
        for item in items:
            item = item.value if isinstance(item, Enum) else item
            if isinstance(item, str) and item not in self.choices:
                others = [member for member in members(self.type) if member in (bool, int, float)]
                also = f", or {described(Union[tuple(others)])}" if others else ""  # noqa: UP007
                raise OptionError(no_choice(item, self.choices, also))

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


def check_values(options: Any) -> None:
    """Raise UserError for the first field of the dataclass ``options`` that the command line would refuse as well."""
    for name, field in fields_of([type(options)]).items():
        try:
            field.check(getattr(options, name))
        except OptionError as error:
            raise UserError(str(error), option=name) from error


def _widened(name: str, hint: Any, metadata: dict[str, Any]) -> Any:
    """Return the type as upstream uses it: `fsdp` takes a bare flag, `*_kwargs` are never paths."""
    if metadata.get("const") is True:
        return bool | hint
    if name.endswith("_kwargs") and dict in origins(hint):
        return Union[tuple(member for member in members(hint) if member is not str)]  # noqa: UP007
    return hint


def default_of(declared: "dataclasses.Field[Any]") -> Any:
    """Return the class's default of a field, None where it has none."""
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return None if declared.default is dataclasses.MISSING else declared.default
