"""What a recipe is, and how the installed ones are found: entry points in the group ``halfbyte.recipes``.

Listing reads package metadata only; the one recipe that is named is imported.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from halfbyte import caches, commands
from halfbyte.errors import UserError
from halfbyte.task import CAUSAL_LM, Task
from halfbyte.terminal.wording import first_line, nearest, say, shorten, suggestion
from halfbyte.tracking.figures import DEFAULT, Figures

if TYPE_CHECKING:
    from halfbyte.config import Written
    from halfbyte.data import DataFormat

GROUP = "halfbyte.recipes"
_OWN_PACKAGE = "halfbyte"
_INSTALL = "a recipe of another package is installed with that package: pip install PACKAGE"

# Names that the command line keeps for itself.
COMMANDS = frozenset(commands.TABLE)
_WORDS = frozenset(("help", "version"))  # and these, which it answers itself

_METHODS = frozenset(("grpo", "rloo"))  # of TRL without a recipe here: not misspelt

FAST_PARTS = frozenset(("linears", "layers", "head", "padding_free"))
"""Parts of the fast step: fused linears and layers, the chunked LM head, padding-free batches."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train: a config class, a trainer class, and what data they need.

    ``config`` is a TRL config class or a subclass of one. ``data`` names the columns the trainer reads: every row is
    checked, and counted. ``build(config, plugin, data)`` makes the trainer where the default,
    ``plugin.trainer(trainer, args=config, ...)``, is not enough: reward functions, a value model; ``data`` has the rows
    and the tokenizer that rendered them. ``next`` is the command to suggest when the run is over; ``{output_dir}``,
    ``{model}`` and ``{start}``, the option that starts from what was trained, are filled in. ``task`` is what the base
    is loaded as. ``figures`` are what log lines, plots, card and closing summary show. ``fast`` names the parts of the
    fast step that may apply, of :data:`FAST_PARTS`.
    """

    config: type
    summary: str
    trainer: type | None = None
    data: DataFormat | None = None
    build: Callable[..., Any] | None = None
    next: str | None = None
    task: Task = CAUSAL_LM
    figures: Figures = DEFAULT
    fast: frozenset[str] = FAST_PARTS

    def __post_init__(self) -> None:
        if self.trainer is None and self.build is None:
            raise ValueError("a Recipe needs a `trainer` class or a `build` function")
        for part in sorted(self.fast - FAST_PARTS):
            raise ValueError(
                f"fast: no part of the fast step is named {part!r}{suggestion(part, FAST_PARTS)}\n"
                f"  parts: {', '.join(sorted(FAST_PARTS))}"
            )


@dataclass(frozen=True, order=True)
class Entry:
    """A recipe as package metadata registers it: nothing of it has been imported."""

    name: str
    package: str
    version: str
    object: str


def entries() -> list[Entry]:
    """Return every registered recipe, sorted by name; a distribution seen twice on the path counts once."""
    points = [(point, point.dist) for point in metadata.entry_points(group=GROUP) if point.dist is not None]
    # Parsed once for a package and not for each of its recipes: it takes milliseconds.
    of = {package: package.metadata for package in {package for _, package in points}}
    found = {Entry(point.name, of[by]["Name"], of[by]["Version"], point.value) for point, by in points}
    return sorted(found)


def check(listed: list[Entry]) -> None:
    """Raise :class:`UserError` if two packages claim one name, or one claims a command's."""
    for entry in listed:
        if entry.name in COMMANDS or entry.name in _WORDS:
            raise UserError(
                f"the recipe {entry.name!r} of package {entry.package} {entry.version} takes the name of a "
                f"halfbyte command; rename its entry point in {GROUP!r}, or uninstall {entry.package}"
            )
        claims = [other for other in listed if other.name == entry.name]
        if len(claims) > 1:
            packages = " and ".join(f"{c.package} {c.version} ({c.object})" for c in claims)
            raise UserError(
                f"the recipe name {entry.name!r} is claimed by {packages}; uninstall one, or rename its entry point"
            )


def load(name: str) -> Recipe:
    """Import and return the recipe ``name``.

    Raises :class:`UserError` for an unknown name, a name claimed twice, a module that does not import,
    or an object that is not a :class:`Recipe`.
    """
    listed = entries()
    claims = [entry for entry in listed if entry.name == name]
    if not claims:
        known = sorted({entry.name for entry in listed})
        near = None if name in _METHODS else nearest(name, [*known, *COMMANDS])
        advice = _INSTALL if near is None else f"did you mean {near!r}?"
        raise UserError(
            f"no recipe or command named {shorten(repr(name))}; {advice}\n"
            f"  recipes: {', '.join(known) or 'none installed'}; `halfbyte --help` lists the commands"
        )
    check(claims)
    entry = claims[0]
    point = metadata.EntryPoint(entry.name, entry.object, GROUP)
    try:
        recipe = point.load()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the recipe {name!r} of package {entry.package} {entry.version} cannot be imported from "
            f"{entry.object}: {type(error).__name__}: {shorten(first_line(error), 300)}"
        ) from error
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"{entry.object} of package {entry.package} {entry.version} is {type(recipe).__name__}, "
            f"not a halfbyte.Recipe"
        )
    return recipe


def named(name: str, arguments: list[str]) -> tuple[Recipe, Written]:
    """Return the recipe ``name`` and its ``arguments``, collected; says that it takes a while, where it does.

    Raises :class:`UserError` as :func:`load` does, and for every mistake in the arguments that shows before torch and
    the recipe are imported.
    """
    from halfbyte import config

    claims = [entry for entry in entries() if entry.name == name]
    if not claims:
        load(name)  # refuses the unknown name
    check(claims)
    written = config.collect(arguments)
    ours = claims[0].package == _OWN_PACKAGE
    config.refuse_early(written, f"halfbyte {name}", keys=ours, recipe=claims[0].object)
    caches.provide()
    if "trl" not in sys.modules:
        say("halfbyte: loading PyTorch, Transformers and TRL ...", error=True)
    return load(name), written


def recipes_for(columns: Collection[str], first: Mapping[str, Any]) -> str:
    """Return a line for an error: what rows such as ``first`` are, and which installed recipes train on them.

    Imports those; one that does not import is left out. Empty for rows of no known format.
    """
    from halfbyte.data import FORMATS

    kinds = [format.name for format in FORMATS if format.reads(columns, first)]
    found = []
    for name in sorted({entry.name for entry in entries()}):
        with contextlib.suppress(UserError):
            format = load(name).data
            if format is not None and format.reads(columns, first):
                found.append(f"halfbyte {name}")
                kinds.append(format.name)
    if not kinds:
        return ""
    return f"\n  these rows are {kinds[0]}, for: {', '.join(found) or 'a recipe that is not installed'}"
