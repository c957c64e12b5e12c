"""The option classes of a recipe as their source declares them, without importing TRL, which takes seconds.

A stand-in has the fields of its class, with their types, defaults and metadata, and none of its code. What the source
does not show plainly has no stand-in: the class itself, imported later, refuses what it must.
"""

import ast
import dataclasses
import functools
from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional, Union

from halfbyte.config.limits import RANGES

_RUN, _PLUGIN, _MIXTURE = (
    ("halfbyte.config.run", "RunArguments"),
    ("halfbyte.plugin", "QLoRAPlugin"),
    ("trl", "DatasetMixtureConfig"),
)
_TYPES = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list": list,
    "dict": dict,
    "Any": Any,
    "Path": Path,
}
_GENERIC: dict[str, Any] = {
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
    "list": list,
    "dict": dict,
}
_FACTORIES = {"list": list, "dict": dict}
_RANGED = {name for _, _, names in RANGES for name in names.split()}
_DEPTH = 20


class _UnclearError(Exception):
    """The source does not show what is looked for."""


@dataclasses.dataclass(frozen=True)
class _Import:
    """A name that another module binds; the whole module where ``name`` is empty."""

    module: str
    name: str = ""


Binding = ast.ClassDef | ast.expr | _Import


def option_classes(recipe: str) -> tuple[type, ...] | None:
    """Stand-ins for the option classes of the recipe ``module:attribute``, in the order of a run; None if unclear."""
    module, _, name = recipe.partition(":")
    try:
        made = _bindings(module)[name]
        if not (isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id == "Recipe"):
            return None
        config = next(word.value for word in made.keywords if word.arg == "config")
        classes = (_stand_in(*_RUN), _class(module, config), _stand_in(*_PLUGIN), _stand_in(*_MIXTURE))
    except (_UnclearError, KeyError, StopIteration, OSError, ValueError, TypeError, SyntaxError, ImportError):
        return None
    return None if any(issubclass(made, Enum) for made in classes) else classes


@functools.cache
def _bindings(module: str) -> dict[str, Binding]:
    """What the top-level names of ``module`` are, also those bound under a condition."""
    path = _path(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: dict[str, Binding] = {}
    for node in _statements(ast.parse(path.read_bytes()).body):
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import):
            found |= {name.asname or name.name: _Import(name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            found |= {name.asname or name.name: _Import(source, name.name) for name in node.names}
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _path(module: str) -> Path:
    top, *inner = module.split(".")
    spec = find_spec(top)  # of a top-level name: imports nothing
    roots = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    if spec is not None and not roots and not inner and spec.origin:
        return Path(spec.origin)
    for root in roots:
        package = root.joinpath(*inner)
        for path in (package.with_name(f"{package.name}.py"), package / "__init__.py"):
            if path.is_file() and (inner or path.name == "__init__.py"):
                return path
    raise _UnclearError(module)


def _resolved(module: str, name: str, depth: int = 0) -> tuple[str, str, Binding]:
    """The module that defines what ``name`` is in ``module``, its name there and its definition."""
    found = _bindings(module).get(name)
    if found is None or depth > _DEPTH:
        raise _UnclearError(f"{module}.{name}")
    if isinstance(found, _Import) and found.name and found.module not in ("enum", "typing"):
        return _resolved(found.module, found.name, depth + 1)
    return module, name, found


def _class(module: str, expression: ast.expr) -> type:
    """The stand-in of the class that ``expression`` names in ``module``."""
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
        owner = _bindings(module).get(expression.value.id)
        if isinstance(owner, _Import) and not owner.name:
            return _stand_in(owner.module, expression.attr)
    if not isinstance(expression, ast.Name):
        raise _UnclearError(ast.unparse(expression))
    if expression.id in ("object", "str"):
        return object
    return _stand_in(module, expression.id)


@functools.cache
def _stand_in(module: str, name: str) -> type:
    module, name, node = _resolved(module, name)
    if node == _Import("enum", "Enum"):
        return Enum
    if not isinstance(node, ast.ClassDef) or node.keywords:
        raise _UnclearError(f"{module}.{name}")
    bases = tuple(base for base in (_class(module, base) for base in node.bases) if base is not object)
    if any(issubclass(base, Enum) for base in bases):
        values = {t.id: ast.literal_eval(s.value) for s in node.body if isinstance(s, ast.Assign)
                  for t in s.targets if isinstance(t, ast.Name)}  # fmt: skip
        return Enum(name, values) if values else Enum  # type: ignore[return-value]
    decorators = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
    if decorators - {"dataclass", "dataclasses.dataclass"}:
        raise _UnclearError(f"{module}.{name}")
    declared = [s for s in node.body if isinstance(s, ast.AnnAssign)] if decorators else []
    fields = [_field(module, s) for s in declared if not ast.unparse(s.annotation).startswith("ClassVar")]
    made = dataclasses.make_dataclass(name, fields, bases=bases, kw_only=True)
    made.__module__ = module
    return made


def _field(module: str, statement: ast.AnnAssign) -> tuple[str, Any, Any]:
    name, value, options = ast.unparse(statement.target), statement.value, {}
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        options = {word.arg: word.value for word in value.keywords}
        value = options.get("default")
    hint = _type(module, statement.annotation)
    arguments: dict[str, Any] = {"metadata": _metadata(options.get("metadata"))}
    if "init" in options:
        arguments["init"] = ast.literal_eval(options["init"])
    if value is not None or "default_factory" in options:
        try:
            default = _literal(module, value) if value is not None else _made(options["default_factory"])
        except (_UnclearError, ValueError):
            if name in _RANGED:  # the range depends on the default
                raise _UnclearError(name) from None
            default = None
        arguments["default_factory"] = lambda: default
    return name, hint, dataclasses.field(**arguments)


def _literal(module: str, value: ast.expr) -> Any:
    if isinstance(value, ast.Name) and value.id not in ("True", "False", "None"):
        found = _resolved(module, value.id)[2]
        if not isinstance(found, ast.expr):
            raise _UnclearError(value.id)
        value = found
    return ast.literal_eval(value)


def _made(factory: ast.expr) -> Any:
    if isinstance(factory, ast.Lambda):
        return ast.literal_eval(factory.body)
    return _FACTORIES[factory.id]() if isinstance(factory, ast.Name) and factory.id in _FACTORIES else None


def _metadata(node: ast.expr | None) -> dict[str, Any]:
    if node is None:
        return {}
    if not isinstance(node, ast.Dict):
        raise _UnclearError(ast.unparse(node))
    found = {}
    for key, value in zip(node.keys, node.values, strict=True):
        try:
            found[ast.literal_eval(key)] = ast.literal_eval(value)  # type: ignore[arg-type]
        except ValueError:
            continue  # a help text that is put together, or choices: the class itself checks them
    return found


def _type(module: str, node: ast.expr) -> Any:
    """The type that an annotation means, Any where its source does not show it."""
    try:
        return _plain_type(module, node)
    except (_UnclearError, OSError, ValueError, TypeError, SyntaxError, ImportError):
        return Any


def _plain_type(module: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return (
            None if node.value is None else _plain_type(module, ast.parse(str(node.value), mode="eval").body)
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_plain_type(module, node.left), _plain_type(module, node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _GENERIC:
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        literal = node.value.id == "Literal"
        items = tuple(ast.literal_eval(item) if literal else _plain_type(module, item) for item in inner)
        return _GENERIC[node.value.id][items if len(items) > 1 else items[0]]
    if isinstance(node, ast.Name) and node.id in _TYPES:
        return _TYPES[node.id]
    return _class(module, node)
