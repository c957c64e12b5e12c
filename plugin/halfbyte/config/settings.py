"""The resolved settings of a run: default < YAML < command line, and the dataclasses built from them."""

import copy
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

from halfbyte.config.fields import Field, default_of, fields_of
from halfbyte.config.limits import RENAMED, launcher_keys
from halfbyte.config.sources import CommandLine, Entries, Node, OptionError, Source, read_yaml, shorten, split
from halfbyte.errors import UserError

MAX_LINES = 10
# Upstream's deprecated spelling is the one with TRL's defaults; both spellings are set to the same value,
# because its __post_init__ lets `activation_checkpointing` win over a user's `gradient_checkpointing: false`.
ALIASES = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)


class Settings:
    """What the user wrote over what the dataclasses default to.

    `given` maps each key that the user wrote to its Source; `settings[key]` is the resolved value in the
    type of its field.
    """

    def __init__(self, classes: Sequence[type], fields: Mapping[str, Field], values: Mapping[str, Any],
                 given: Mapping[str, Source], prog: str) -> None:  # fmt: skip
        self.given = given
        self._classes, self._fields, self._prog = tuple(classes), fields, prog
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def with_values(self, **values: Any) -> "Settings":
        """These settings with ``values`` in place of theirs: decisions that were printed."""
        unknown = set(values) - set(self._values)
        assert not unknown, f"no field is named {unknown}"
        return Settings(self._classes, self._fields, {**self._values, **values}, self.given, self._prog)

    def placed(self, error: UserError) -> UserError:
        """``error`` with the place where its option was given."""
        if error.option is not None and error.option in self.given:
            error.place = self.at(error.option)
        return error

    def set_default(self, key: str, value: Any) -> None:
        """Change the default of `key`, which does nothing when the user gave it."""
        if key not in self.given:
            self.override(key, value)

    def override(self, key: str, value: Any) -> None:
        """Set `key` whatever the user wrote, after a decision that was printed."""
        assert key in self._values, f"no field is named {key}"
        self._values[key] = value

    def at(self, key: str) -> str:
        """The head of an error message about `key`: where the user wrote it, or its name."""
        return self.given[key].at(key) if key in self.given else key

    def refusal(self, error: Exception, otherwise: str) -> UserError:
        """What upstream refused, under the places of the keys that it names; under ``otherwise`` if it names none."""
        text = " ".join(str(error).split())
        named = [key for key in self.given if re.search(rf"(?<!\w){key}(?!\w)", text)]
        return UserError(f"{', '.join(map(self.at, named)) or otherwise}: {shorten(text, 600)}")

    def build(self) -> tuple[Any, ...]:
        """One instance of each dataclass, in the order they were given to `read`.

        Raises UserError for what their ``__post_init__`` refuses, with the places of the keys it names.
        """
        return tuple(self._construct(owner) for owner in self._classes)

    def resolved(self) -> dict[str, Any]:
        """Every value by key, in the types of JSON."""
        return {key: _jsonable(value) for key, value in self._mirrored().items()}

    def _mirrored(self) -> dict[str, Any]:
        values = dict(self._values)
        values.update({new: values[old] for old, new in ALIASES if old in values and new in values})
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
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            raise self.refusal(error, f"{self._prog}: {owner.__name__}") from error


def read(argv: Sequence[str], classes: Sequence[type], *, prog: str, summary: str = "",
         defaults: Mapping[str, Any] = {}) -> Settings:  # fmt: skip
    """The settings that `argv` (options and `--config FILE`) gives to the fields of `classes`.

    `defaults` takes the place of the classes' defaults. Raises UserError, which names each mistake with its
    line or option (at most ten), and SystemExit(0) after printing the help.
    """
    fields = fields_of(classes)
    command = split(argv)
    values = {name: copy.deepcopy(defaults.get(name, field.default)) for name, field in fields.items()}
    assert set(defaults) <= set(fields), f"defaults for unknown fields: {set(defaults) - set(fields)}"
    if command.help:
        from halfbyte.config.help import print_help

        print_help(prog, summary, classes, fields, values)
        raise SystemExit(0)
    written = read_yaml(command.config) if command.config is not None else Entries()
    options = _options(command, fields)
    mistakes: list[tuple[Source, str]] = written.mistakes + options.mistakes
    given: dict[str, Source] = {}
    for entries in (written, options):
        for key, node in entries.nodes.items():
            if key not in fields:
                text = f"{node.source.at(shorten(key))}: {_unknown(key, fields, prog)}"
                mistakes.append((node.source, text))
                continue
            try:
                values[key] = fields[key].convert(node)
                given[key] = node.source
            except OptionError as error:
                source = error.source or node.source
                mistakes.append((source, f"{source.at(key, error.path)}: {error}"))
    # The file's mistakes come first, in the order of its lines.
    mistakes.sort(key=lambda mistake: (mistake[0].file is None, mistake[0].line))
    settings = Settings(classes, fields, values, given, prog)
    lines = [text for _, text in mistakes] or _across(settings)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... and {len(lines) - MAX_LINES + 1} more"]
    if lines:
        raise UserError("\n".join(lines))
    return settings


def _options(command: CommandLine, fields: Mapping[str, Field]) -> Entries:
    entries = Entries()
    for name, words, source in command.options:
        negated = fields.get(name.removeprefix("no_")) if name not in fields else None
        if negated is not None and negated.flag and not words:
            name, words = negated.name, ["false"]  # HfArgumentParser's --no_FLAG
        field = fields.get(name)
        if not words and field is not None and field.flag:
            words = ["true"]
        if len(words) == 1:
            entries.add(name, Node(words[0], source))
        elif words or field is None:
            entries.add(name, Node([Node(word, source) for word in words], source))
        else:
            entries.mistakes.append((source, f"{source}: needs a value; write {source} VALUE"))
    return entries


def _unknown(key: str, fields: Mapping[str, Field], prog: str) -> str:
    name = key.replace("-", "_")
    if key == "config":
        return "a configuration file cannot name another; give one file with --config"
    if key == "env":
        return (
            "environment variables are set on the command line: NAME=value accelerate launch -m halfbyte ..."
        )
    if key in RENAMED:
        return f"unknown option; {RENAMED[key]}"
    if name in fields:
        return f"unknown option; write {name}"
    if name in launcher_keys():
        return (f"belongs to the launcher; write accelerate launch --num_processes N "
                f"[--config_file launch/X.yaml] -m {prog} ...")  # fmt: skip
    close = difflib.get_close_matches(name.lower(), fields, n=1)
    nearest = f"; did you mean {close[0]}?" if close else ""
    return f"unknown option{nearest} ({prog} --help lists all)"


def _across(settings: Settings) -> list[str]:
    """The rules between fields, and the spellings that mean one field."""
    mistakes: list[str] = []
    for old, new in ALIASES:
        if old not in settings or new not in settings or settings[new] is None or new not in settings.given:
            continue
        if old in settings.given and settings[old] != settings[new]:
            mistakes.append(
                f"{settings.at(new)}: differs from {old} ({settings.given[old]}); keep one of the two"
            )
        settings.override(old, settings[new])
        settings.given = {**settings.given, old: settings.given.get(old, settings.given[new])}
    if "load_in_4bit" in settings and "load_in_8bit" in settings and settings["load_in_8bit"]:
        settings.set_default("load_in_4bit", False)
        if settings["load_in_4bit"]:
            mistakes.append(
                f"{settings.at('load_in_8bit')}: load_in_4bit is true as well; keep one of the two"
            )
    if all(key in settings for key in ("load_in_4bit", "use_peft")):
        key = "use_peft" if "use_peft" in settings.given else "load_in_4bit"
        if settings["load_in_4bit"] and not settings["use_peft"]:
            text = "a 4-bit base trains only through adapters; write use_peft: true or load_in_4bit: false"
            mistakes.append(f"{settings.at(key)}: {text}")
    if "report_to" in settings.given and settings["report_to"] is None:
        mistakes.append(f"{settings.at('report_to')}: null names nothing; write none or wandb")
    return mistakes


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
