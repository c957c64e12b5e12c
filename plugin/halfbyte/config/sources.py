"""Values before they have a type, each with the line or option where it was written; YAML and JSON read into them."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 20_000  # of which PyYAML reads a million in a minute
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Source:
    """Where a value was written: a line of a file, or an option of the command line.

    ``inner`` are the lines of what is within the value, by its path, such as ``[0].split``.
    """

    file: str | None = None
    line: int = 0
    option: str = ""
    inner: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.option if self.file is None else f"{self.file}:{self.line}"

    def at(self, key: str, path: str = "") -> str:
        """The head of an error message about `key`, or about what is at `path` within its value."""
        return f"{self}{path}" if self.file is None else f"{self}: {key}{path}"


class OptionError(Exception):
    """One invalid value; `read` collects them into one UserError.

    `path` is where it is within the option's value, such as ``[0].split``, and `source` its own line.
    """

    def __init__(self, what: str, source: Source | None = None, path: str = "") -> None:
        super().__init__(what)
        self.source, self.path = source, path


@dataclass(frozen=True)
class Node:
    """A value before it has a type: None, raw text, a list or a mapping of nodes.

    `plain` text was not quoted and may be a number, a boolean or null; quoted text and the strings of JSON
    may be converted to the field's type as well, but never to None.
    """

    value: "str | list[Node] | dict[str, Node] | None"
    source: Source
    plain: bool = True

    @property
    def detailed(self) -> Source:
        """The source with the lines of what is within the value."""
        return replace(self.source, inner=dict(self.lines_below("")))

    def lines_below(self, path: str) -> Iterator[tuple[str, int]]:
        if path:
            yield path, self.source.line
        if isinstance(self.value, list):
            for index, item in enumerate(self.value):
                yield from item.lines_below(f"{path}[{index}]")
        elif isinstance(self.value, dict):
            for key, item in self.value.items():
                yield from item.lines_below(f"{path}.{key}")


@dataclass
class Entries:
    """The keys of one file or command line in the order they were written; a repeated key is a mistake."""

    nodes: dict[str, Node] = field(default_factory=dict)
    mistakes: list[tuple[Source, str]] = field(default_factory=list)

    def add(self, key: str, node: Node) -> None:
        if key in self.nodes:
            first = self.nodes[key].source
            text = f"{node.source.at(shorten(key))}: given twice (first at {first}); keep one"
            self.mistakes.append((node.source, text))
        else:
            self.nodes[key] = node


def read_yaml(path: str) -> Entries:
    """Return the top-level keys of the flat YAML file at `path`; an empty file has none.

    Raises UserError for a file that cannot be read, is not UTF-8 or is not a YAML mapping.
    """
    root = _compose(path, _text(path))
    entries = Entries()
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == NULL):
        return entries
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"must be a list of `key: value` lines, is a {_kind(root)}", place=f"{path}:1")
    _mapping(path, root, entries)
    return entries


def _text(path: str) -> str:
    try:
        # A pipe that nobody writes to would block; one that somebody does (`<(...)`) is read to its end.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)
            data = file.read(MAX_BYTES + 1)
            if not data and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise ValueError("a pipe that nothing is written to")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read {path!r}: {reason}; give the path of a YAML file", option="--config"
        ) from error
    if len(data) > MAX_BYTES:
        raise UserError(f"more than {MAX_BYTES} bytes; a configuration is a short YAML file", place=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text; save the file as UTF-8", place=f"{path}:{line}") from error


def _compose(path: str, text: str) -> yaml.Node | None:
    try:
        depth = values = 0
        # The event stream is not recursive, so nesting and aliases are refused before yaml.compose recurses.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            assert event.start_mark is not None
            line = event.start_mark.line + 1
            values += isinstance(event, yaml.ScalarEvent)
            if values > MAX_VALUES:
                raise UserError(
                    f"more than {MAX_VALUES:,} keys and values; a configuration is a short YAML file",
                    place=f"{path}:{line}",
                )
            if isinstance(event, yaml.AliasEvent):
                raise UserError(
                    "aliases (*name) are not supported; write the value out", place=f"{path}:{line}"
                )
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise UserError(
                    f"nested more than {MAX_DEPTH} levels deep; a configuration is flat",
                    place=f"{path}:{line}",
                )
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
                raise UserError(
                    f"{shorten(event.tag)}: tags are not supported; write the bare value",
                    place=f"{path}:{line}",
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "cannot be parsed").split())
        if "'\\t'" in problem:
            problem = "a tab; indent with spaces"
        where = f"{path}:{mark.line + 1}" if mark is not None else path
        raise UserError(f"not valid YAML: {problem}; the form is `key: value`", place=where) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"not valid YAML: the character U+{ord(text[error.position]):04X}; save the file as plain UTF-8 text",
            place=f"{path}:{line}",
        ) from error
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # PyYAML lets chr() and int() fail on wild escapes
        raise UserError(f"not valid YAML: {error}", place=path) from error


def _mapping(path: str, node: yaml.MappingNode, entries: Entries) -> None:
    for key, value in node.value:
        source = Source(path, key.start_mark.line + 1)
        if isinstance(key, yaml.ScalarNode):
            entries.add(key.value, _node(path, value, source))
        else:
            entries.mistakes.append((source, f"{source}: a key must be a name, is a {_kind(key)}"))


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "single value"
    return "list" if isinstance(node, yaml.SequenceNode) else "mapping"


def _node(path: str, node: yaml.Node, source: Source) -> Node:
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        return Node(None if plain and node.tag == NULL else node.value, source, plain)
    if isinstance(node, yaml.SequenceNode):
        return Node(
            [_node(path, item, Source(path, item.start_mark.line + 1)) for item in node.value], source
        )
    assert isinstance(node, yaml.MappingNode)
    inner = Entries()
    _mapping(path, node, inner)
    if inner.mistakes:
        raise UserError(inner.mistakes[0][1])
    return Node(dict(inner.nodes), source)


def parse_json(text: str, source: Source) -> Node:
    """Parse `text` as JSON; raises OptionError, also for duplicate names and deep nesting."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found:
                raise ValueError(f"{name!r} is given twice")
            found[name] = value
        return found

    def node(value: Any, depth: int = 0) -> Node:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, dict):
            return Node({key: node(item, depth + 1) for key, item in value.items()}, source)
        if isinstance(value, list):
            return Node([node(item, depth + 1) for item in value], source)
        if isinstance(value, bool):
            return Node(str(value).lower(), source)
        if isinstance(value, _Number):
            return Node(str(value), source)
        return Node(value, source, plain=False)

    try:
        return node(json.loads(text, object_pairs_hook=pairs, parse_int=_Number, parse_float=_Number,
                               parse_constant=_Number))  # fmt: skip
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise OptionError(f"not valid JSON ({reason}), is {shown(text)}") from error


def parse_flow(text: str, source: Source) -> Node:
    """Parse `text`, a list or a mapping of the command line, as JSON or else as YAML reads it; raises OptionError."""
    try:
        return parse_json(text, source)
    except OptionError as error:
        refused = error
    try:
        root = _compose("", text)
        if not isinstance(root, yaml.CollectionNode):
            raise refused
        return _placed(_node("", root, source), source)
    except UserError:
        raise refused from None


def _placed(node: Node, source: Source) -> Node:
    """Return `node` with all that is in it as written at `source`."""
    value = node.value
    if isinstance(value, list):
        value = [_placed(item, source) for item in value]
    elif isinstance(value, dict):
        value = {key: _placed(item, source) for key, item in value.items()}
    return Node(value, source, node.plain)


class _Number(str):
    """The digits of a JSON number, converted to the field's type like any other text."""


def shown(value: Any) -> str:
    """Return `value` as one short line for an error message."""
    text = repr(str(value) if isinstance(value, str) else value)
    return shorten(text)
